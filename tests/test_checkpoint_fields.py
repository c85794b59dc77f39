"""Fields of config.json and names of tensors are applied as in transformers, or are errors that name them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from small_checkpoints import (
    BOS,
    EOS,
    HEAD_DIM,
    HIDDEN,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    Q_HEADS,
    VOCAB,
    hugging_face_folder,
    hugging_face_names,
    random_weights,
    save_with_transformers,
)
from test_checkpoint_damage import JSON_VALUES
from test_model import TOKENS, Judge, logits_of, new_cache, run

from palladion.model.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from palladion.model.checkpoint_fields import NEUTRAL_VALUES, NOTHING, check_fields, read_family
from palladion.model.checkpoint_files import JsonFile
from palladion.model.config import ModelConfig
from palladion.model.families import FAMILIES, Family
from palladion.model.huggingface_config import Rotary, read_config, read_rotary, rotary_settings
from palladion.reference.compare import assert_right

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": Q_HEADS,
    "num_key_value_heads": KV_HEADS,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
}


def transformers_loads(path: Path) -> Any:
    """The model that transformers makes of a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(path)


def assert_as_transformers(path: Path) -> Checkpoint:
    """Our logits of a folder are those of transformers, in its own loading of it."""
    model = transformers_loads(path)
    reference, oracle = logits_of(model, TOKENS, "float32").astype(np.float32), logits_of(model, TOKENS, "float64")
    checkpoint = load_checkpoint(path, stack=True)
    logits, _ = run(checkpoint, new_cache(checkpoint, 3), TOKENS, [24] * 3, every_position=True)
    assert_right(logits, reference, oracle)
    return checkpoint


def change(path: Path, **fields: Any) -> None:
    """Overwrites fields of a folder's config.json; ... removes one."""
    file = path / "config.json"
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


# ------------------------------------------------------------------------------------------------------------ families


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        pytest.param("Qwen2", {}, id="qwen2"),
        pytest.param("Qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}, id="qwen2-tied"),
        pytest.param("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, id="window"),
        pytest.param("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}, id="above"),
        pytest.param("Qwen2", {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0}, id="off"),
        pytest.param("SeedOss", {"head_dim": HEAD_DIM}, id="seed-oss"),
    ],
)
def test_logits_of_other_families(tmp_path: Path, architecture: str, config: dict[str, Any]) -> None:
    judge = Judge(tmp_path, architecture, True, **config)
    logits, _ = run(judge.checkpoint, new_cache(judge.checkpoint, 3), TOKENS, [24] * 3, every_position=True)
    judge.check(logits)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_families_by_any_of_their_names(family: Any) -> None:
    for architectures, model_type in (
        ([family.architecture], None),
        ([family.architecture], family.model_type),
        ([family.base_architecture], family.model_type),
        (None, family.model_type),
    ):
        content = {"architectures": architectures, "model_type": model_type}
        assert read_family(JsonFile(Path("config.json"), content=content)) is family
    content = {"architectures": [family.architecture], "model_type": "gpt2"}
    with pytest.raises(CheckpointError, match=rf"'gpt2' is not that of .*, which is '{family.model_type}'"):
        read_family(JsonFile(Path("config.json"), content=content))


@pytest.mark.parametrize(
    ("architecture", "model_type", "message"),
    [
        ("MixtralForCausalLM", "mixtral", "MixtralForCausalLM is not supported; it is a mixture of experts, which"),
        (
            "Qwen3MoeForCausalLM",
            None,
            "it is a mixture of experts, which this decoder does not have; supported: Llama, ",
        ),
        ("GptOssForCausalLM", "gpt_oss", "it is a mixture of experts"),
        (None, "deepseek_v3", "architecture deepseek_v3 is not .*it is a mixture of experts with latent attention"),
        ("Gemma3ForConditionalGeneration", "gemma3", "it is a model of text and images"),
        ("FooForCausalLM", "foo", "FooForCausalLM is not supported; supported: Llama, .*, Qwen3, .*, SeedOss$"),
    ],
)
def test_families_that_are_not_there(architecture: str | None, model_type: str | None, message: str) -> None:
    content = {"architectures": architecture and [architecture], "model_type": model_type}
    with pytest.raises(CheckpointError, match=message):
        read_family(JsonFile(Path("config.json"), content=content))


def opened(content: dict[str, Any]) -> tuple[JsonFile, Family]:
    """A config.json with its family's defaults."""
    given = JsonFile(Path("config.json"), content=content)
    family = read_family(given)
    return JsonFile(given.path, content={**family.defaults, **content}), family


def rotary_of(content: dict[str, Any]) -> Rotary:
    """The rotary frequencies that a config.json describes."""
    values, family = opened(content)
    return read_rotary(values, rotary_settings(values), family)


def described(content: dict[str, Any]) -> ModelConfig:
    """The configuration that a config.json describes."""
    values, family = opened(content)
    check_fields(values, rotary_settings(values), family)
    return read_config(values, family, rotary_of(content), tied=False, stop_tokens=())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_damaged_fields_of_a_family(family: Any) -> None:
    """Every value of every field of a family is an error that names the file, or gives a configuration."""
    fields = {*family.fields, *family.defaults, "layer_types", "sliding_window", "rope_parameters", "rope_scaling"}
    fields |= {field for field in family.biases.values() if field}
    base = {**SIZES, "model_type": family.model_type, "head_dim": HEAD_DIM, "hidden_act": family.activations[0]}
    described(base)
    for field in sorted(fields):
        for value in JSON_VALUES:
            try:
                described(base | {field: value})
            except CheckpointError as error:
                assert "config.json" in str(error)  # noqa: PT017  # either ending is right


@pytest.mark.parametrize(
    ("prefix", "fields"),
    [
        ("Gemma3Text", {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "sliding_window_pattern": 2}),
        ("Gemma3Text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("Olmo3", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}}),
        ("Cohere2", {"sliding_window_pattern": 2, "position_embedding_type": "rope_gptj", "rotary_pct": 1.0}),
        (
            "Phi3",
            {
                "original_max_position_embeddings": 1024,
                "rope_scaling": {"type": "longrope", "short_factor": [1.5] * 8, "long_factor": [3.0] * 8},
            },
        ),
        ("StableLm", {"partial_rotary_factor": 0.5, "rope_theta": 2e4}),
        ("SmolLM3", {"no_rope_layer_interval": 2, "rope_theta": 2e4}),
    ],
)
def test_older_files_mean_what_transformers_makes_of_them(prefix: str, fields: dict[str, Any]) -> None:
    """A config.json in the older form describes the same model as the one that transformers writes after reading it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        content = {**SIZES, "num_hidden_layers": 4, "max_position_embeddings": 4096, **fields}
        newer = json.loads(getattr(transformers, f"{prefix}Config")(**content).to_json_string(use_diff=False))
    content["model_type"] = newer["model_type"]
    for name in ("hidden_act", "hidden_activation", "head_dim"):
        if name in newer:
            content[name] = newer[name]
    first, second = (rotary_of(one) for one in (content, newer))
    np.testing.assert_allclose(first.frequencies, second.frequencies, rtol=1e-6)
    assert first[1:] == second[1:]
    assert described(content) == described(newer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "gemma2", "layer_types": ["full_attention"]}, "layer_types .* for each of 2 layers"),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 2}, "layer_types .* or 'sliding_attention'"),
        ({"model_type": "gemma2", "hidden_act": "silu"}, "hidden_act 'silu' is not supported"),
        ({"model_type": "gemma2", "attn_logit_softcapping": -1}, "'attn_logit_softcapping' must be a positive number"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 5.0}, "attn_logit_softcapping 5.0 is not supported"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, r"no_rope_layers \[1\] is not supported; .* of 2 layers"),
        ({"model_type": "smollm3", "no_rope_layers": [2, 1]}, r"no_rope_layers \[2, 1\] is not supported"),
        ({"model_type": "glm4", "partial_rotary_factor": 0.2}, "partial_rotary_factor 0.2 rotates 3 of each head's 16"),
        ({"model_type": "glm4", "partial_rotary_factor": 2}, "partial_rotary_factor 2.0 rotates 32 of each head's 16"),
        ({"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm True is not supported"),
        ({"model_type": "granite", "residual_multiplier": "1"}, "'residual_multiplier' must be a positive number"),
        ({"model_type": "cohere", "use_qk_norm": "no"}, "'use_qk_norm' must be true or false"),
        ({"model_type": "qwen3", "num_hidden_layers": 10**6}, "'num_hidden_layers' 1000000 is more than any model has"),
        (
            {"model_type": "phi3", "rope_scaling": {"type": "su"}},
            "'short_factor' must be a list of 8 numbers, got None",
        ),
        ({"model_type": "olmo2", "rope_parameters": {"full_attention": {}}}, "by kind of layer .'full_attention'. are"),
    ],
)
def test_fields_of_families_that_are_wrong(content: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        described({**SIZES, "head_dim": HEAD_DIM, **content})


RELABELLED = {
    "Cwm": ({"sliding_window": 8}, "layer_types .* is not supported; supported: 'full_attention'"),
    "Gemma": ({}, "hidden_act 'gelu_pytorch_tanh' is not supported"),
    "Granite": ({}, "attention_multiplier 1.0 is not supported"),
    "Granite ": ({"attention_multiplier": HEAD_DIM**-0.5, "logits_scaling": 8.0}, "logits_scaling 8.0 is not supp"),
    "Ernie4_5": ({}, None),
    "Ministral3": ({}, "llama_4_scaling_beta 0.1 is not supported"),
    "Ministral": ({}, "layer_types .* is not supported"),
    "SmolLM3": ({"no_rope_layers": [1, 0]}, r"no_rope_layers \[1, 0\] is not supported; supported: 1 for every"),
    "Helium": ({}, None),
    "Granite  ": ({"attention_multiplier": HEAD_DIM**-0.5}, None),
    "SmolLM3 ": ({"no_rope_layers": [1, 1]}, None),
}
"""Families whose tensors have Llama's names: settings, and the error; None where a folder is Llama but by its name."""


@pytest.mark.parametrize("name", RELABELLED)
def test_folders_relabelled_as_llama(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        settings, message = RELABELLED[name]
        config = getattr(transformers, f"{name.strip()}Config")(**SIZES, head_dim=HEAD_DIM, **settings)
    folder = hugging_face_folder(tmp_path)
    own = json.loads(config.to_json_string(use_diff=False))
    change(folder, **own | {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False})
    with pytest.raises(CheckpointError, match=f"'model_type' '{config.model_type}' is not that of architecture Llama"):
        load_checkpoint(folder)
    change(folder, model_type="llama")
    if message is None:
        load_checkpoint(folder)
    else:
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(folder)


def check(**fields: Any) -> None:
    content = {"hidden_size": HIDDEN, "num_attention_heads": Q_HEADS, "num_hidden_layers": LAYERS} | fields
    values = JsonFile(Path("config.json"), content=content)
    check_fields(values, values.section("rope_scaling"), FAMILIES[0])


@pytest.mark.parametrize("name", NEUTRAL_VALUES)
def test_fields_that_are_not_applied(name: str) -> None:
    neutral = NEUTRAL_VALUES[name]
    for value in (None, *neutral):
        check(**{name: value})
    for value in (2, 0.5, "false", [1], {"a": 1}, neutral != NOTHING and 0):
        if value not in neutral:
            with pytest.raises(CheckpointError, match=rf"config\.json: {name} .* is not supported: this decoder does"):
                check(**{name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar 256.0 is not supported.*: 16, for heads of 16"),
        ({"dim_model_base": 256}, "dim_model_base 256.0 is not supported"),
        ({"no_rope_layer_interval": 2}, "no_rope_layer_interval 2 is not supported"),
        ({"no_rope_layers": "1"}, "no_rope_layers '1' is not supported"),
        ({"some_new_multiplier": 3.0}, "some_new_multiplier 3.0 is not supported"),
        ({"rope_scaling": {"llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta 0.1 is not supported"),
        ({"rope_scaling": {"full_attention": {"rope_theta": 1e4}}}, "by kind of layer .'full_attention'. are not"),
        ({"attention_bias": "true"}, "'attention_bias' must be true or false, got 'true'"),
    ],
)
def test_other_fields_that_are_not_applied(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check(**fields)


def test_fields_that_change_nothing() -> None:
    check(query_pre_attn_scalar=HEAD_DIM, attention_multiplier=HEAD_DIM**-0.5, dim_model_base=HIDDEN)
    check(no_rope_layers=[1, 1], no_rope_layer_interval=1, pretraining_tp=2, some_new_multiplier=1.0, new_name="x")
    check(no_rope_layer_interval=4, attention_bias=True, mlp_bias=False, rope_interleaved=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_sliding_window": True, "layer_types": ["full_attention", "sliding"]}, "layer_types .* is not"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .* is not supported"),
        ({"use_sliding_window": "false"}, "'use_sliding_window' must be true or false, got 'false'"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types .* is not supported; supported: 'full_attention'"),
        ({"layer_types": "full_attention"}, "layer_types 'full_attention' is not supported"),
        ({"model_type": "llama", "use_sliding_window": True}, "use_sliding_window true is not supported by Llama"),
    ],
)
def test_windows_of_some_layers(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    given = {"architectures": ..., "model_type": "qwen2", "sliding_window": 7} | fields
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(hugging_face_folder(tmp_path, config=given))


@pytest.mark.parametrize("first", [0, 1, LAYERS, LAYERS + 1, ...])
def test_window_from_a_layer_on(tmp_path: Path, first: Any) -> None:
    """Where no layer_types say so, the layer from which on the window counts decides as it does in transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    fields = {"use_sliding_window": True, "sliding_window": 7} | ({} if first is ... else {"max_window_layers": first})
    kinds = transformers.Qwen2Config(**SIZES, **fields).layer_types
    config = load_checkpoint(
        hugging_face_folder(tmp_path, config={"architectures": ["Qwen2ForCausalLM"]} | fields)
    ).config
    windowed = [config.layer_kinds[layer % len(config.layer_kinds)].windowed for layer in range(LAYERS)]
    windows = [config.sliding_window if one else None for one in windowed]
    assert windows == [7 if kind == "sliding_attention" else None for kind in kinds]


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_window_beyond_any_cache_is_none(tmp_path: Path, model_type: str) -> None:
    fields = {"architectures": ..., "model_type": model_type, "use_sliding_window": ...}
    if model_type == "qwen2":
        fields |= {"use_sliding_window": True, "max_window_layers": 0}
    for window, expected in ((2**32 - 1, None), (10**400, None), (2**30 - 1, 2**30 - 1)):
        folder = hugging_face_folder(tmp_path, config=fields | {"sliding_window": window})
        assert load_checkpoint(folder).config.sliding_window == expected


def test_rotary_settings_of_both_names(tmp_path: Path) -> None:
    """transformers takes `rope_scaling` where both are there, and then the base beside it."""
    save_with_transformers(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    change(tmp_path, rope_scaling={"rope_type": "linear", "factor": 4.0}, rope_theta=2e4)
    expected = transformers_loads(tmp_path).model.rotary_emb.inv_freq.numpy()
    found = load_checkpoint(tmp_path).parameters.inverse_frequencies
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    change(tmp_path, rope_scaling={"factor": 4.0})
    with pytest.raises(CheckpointError, match="rotary scaling by a 'factor' has no 'rope_type'"):
        load_checkpoint(tmp_path)


# -------------------------------------------------------------------------------------------------- which tensors count


def test_single_file_counts_before_an_index(tmp_path: Path) -> None:
    save_with_transformers(tmp_path, shard_size="100KB")
    safetensors.numpy.save_file(
        hugging_face_names(random_weights(seed=1)), tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    assert_as_transformers(tmp_path)
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    head = load_checkpoint(tmp_path).parameters.head
    np.testing.assert_array_equal(head.T, random_weights(seed=1)["output"])  # type: ignore[union-attr]


@pytest.mark.parametrize("tied", [True, False])
def test_names_without_the_prefix(tmp_path: Path, tied: bool) -> None:
    model = save_with_transformers(tmp_path, tie_word_embeddings=tied)
    if tied:
        model.model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaModel"]
    else:
        state = {name.removeprefix("model."): tensor.numpy() for name, tensor in model.state_dict().items()}
        state["model.lm_head.weight"] = state.pop("lm_head.weight")
        safetensors.numpy.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_as_transformers(tmp_path)


def test_names_with_and_without_the_prefix(tmp_path: Path) -> None:
    tensors = hugging_face_names()
    tensors["norm.weight"] = tensors["model.norm.weight"] + 1
    with pytest.raises(CheckpointError, match=r"has tensor '.*norm\.weight' as '.*norm\.weight' too"):
        load_checkpoint(hugging_face_folder(tmp_path, tensors))


def test_decoder_without_its_head(tmp_path: Path) -> None:
    tensors = hugging_face_names()
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is missing; take the whole model's checkpoint, or"):
        load_checkpoint(hugging_face_folder(tmp_path, tensors, {"tie_word_embeddings": False}))


@pytest.mark.parametrize("stored", ["both", "different", "head"])
def test_tied_tables(tmp_path: Path, stored: str) -> None:
    """Equal tables are one; different ones are not tied, whatever config.json says; the head alone serves as both."""
    model = save_with_transformers(tmp_path, tie_word_embeddings=True)
    state = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    if stored == "different":
        state["lm_head.weight"][-1, -1] += 1
    elif stored == "head":
        del state["model.embed_tokens.weight"]
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = assert_as_transformers(tmp_path)
    assert checkpoint.config.tied_embedding == (stored != "different")


def test_biases_that_the_config_denies(tmp_path: Path) -> None:
    """transformers drops them; where config.json says nothing, they are what a relabelled Qwen2 has, and count."""
    save_with_transformers(tmp_path, attention_bias=True)
    change(tmp_path, attention_bias=False)
    with pytest.raises(CheckpointError, match=r"'attention_bias' is false, but .*\.0\.self_attn\.q_proj\.bias'"):
        load_checkpoint(tmp_path)
    change(tmp_path, attention_bias=...)
    assert load_checkpoint(tmp_path).parameters.layers[0].qkv_bias is not None  # type: ignore[index]
    heads = {"q": Q_HEADS, "k": KV_HEADS, "v": KV_HEADS}
    zeros = {
        f"model.layers.{layer}.self_attn.{part}_proj.bias": np.zeros(count * HEAD_DIM, np.float32)
        for part, count in heads.items()
        for layer in range(LAYERS)
    }
    tensors = hugging_face_names() | zeros
    load_checkpoint(hugging_face_folder(tmp_path, tensors, {"attention_bias": False}))


def test_biases_that_the_config_promises(tmp_path: Path) -> None:
    for field in ("attention_bias", "mlp_bias"):
        folder = hugging_face_folder(tmp_path, config={field: True})
        with pytest.raises(CheckpointError, match=f"'{field}' is true, but there is no tensor '.*proj.bias'"):
            load_checkpoint(folder)


def test_tensors_named_otherwise(tmp_path: Path) -> None:
    tensors = {f"language_model.{name}": array for name, array in hugging_face_names().items()}
    with pytest.raises(CheckpointError, match=r"is missing; tensors are named otherwise, 'language_model\."):
        load_checkpoint(hugging_face_folder(tmp_path, tensors))
    tensors = {name: array for name, array in hugging_face_names().items() if "embed" not in name}
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight' is missing; download the checkpoint again"):
        load_checkpoint(hugging_face_folder(tmp_path, tensors))


def test_added_token_beyond_the_embedding(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["id"] += 10
    content["model"]["vocab"] = {t: i + 10 * (i >= BOS) for t, i in content["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    load_checkpoint(folder)
    bos = content["added_tokens"][0]["content"]
    single = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [BOS + 10], "tokens": [bos]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"adds token {BOS + 10} to every text, but 'vocab_size' is {VOCAB}"):
        load_checkpoint(folder)
