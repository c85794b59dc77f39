"""Families of models against transformers, on small checkpoints of random weights that it saves.

The oracle is transformers in float64; the reference whose error bounds ours is transformers in float32. Prompts of a
batch have different lengths, and windows are shorter than prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoints import BOS, EOS, VOCAB, interleave, write_tokenizer
from small_checkpoints import TOKENS as VOCABULARY
from test_model import logits_of, new_cache

from palladion.model.checkpoint import Checkpoint, load_checkpoint
from palladion.model.gguf_config import Metadata, read_config, read_rotary
from palladion.model.quantized_folder import quantize_folder
from palladion.model.transformer import forward
from palladion.reference.compare import assert_right

PROMPTS = np.array([20, 7, 13])
"""Tokens of each prompt."""

STEPS = 2
"""Tokens that are decoded after each prompt."""

TOKENS = np.random.default_rng(0).integers(0, VOCAB, (len(PROMPTS), PROMPTS.max() + STEPS))

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": None,
}


def saved(path: Path, architecture: str, **config: Any) -> Any:
    """Saves a model with random weights, those of norms and biases included, and returns it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns about itself
        import torch
        import transformers

        prefix = "Gemma3Text" if architecture == "Gemma3" else architecture
        settings = getattr(transformers, f"{prefix}Config")(**(SIZES | config))
        model = getattr(transformers, f"{architecture}ForCausalLM")(settings)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight") or "_norm.weight" in name:
                draw = draw * 0.3 + (0.0 if architecture.startswith("Gemma") else 1.0)
            elif parameter.ndim > 1:
                draw = draw * 2 / parameter.shape[-1] ** 0.5
            parameter.data = draw
        model.save_pretrained(path)
    write_tokenizer(path)
    return model.eval()


def check_logits(checkpoint: Checkpoint, reference: np.ndarray, oracle: np.ndarray) -> None:
    """Compares the logits of a prefill of ragged prompts, then those of decode steps."""
    longest = PROMPTS.max()
    aligned = np.ones((len(PROMPTS), longest), int)
    for row, length in enumerate(PROMPTS):
        aligned[row, longest - length :] = TOKENS[row, :length]

    # Programs run once: what their optimization would take is saved.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(tokens: jax.Array, lengths: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return forward(checkpoint.parameters, checkpoint.config, tokens, lengths, cache, every_position=True)

    logits, cache = run(jnp.asarray(aligned), jnp.asarray(PROMPTS), new_cache(checkpoint, len(PROMPTS)))
    for row, length in enumerate(PROMPTS):
        assert_right(logits[row, longest - length :], reference[row, :length], oracle[row, :length], f"prompt {row}")
    rows = np.arange(len(PROMPTS))
    for step in range(STEPS):
        at = PROMPTS + step
        logits, cache = run(jnp.asarray(TOKENS[rows, at][:, None]), jnp.asarray(at + 1), cache)
        assert_right(logits[:, 0], reference[rows, at], oracle[rows, at], f"step {step}")


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [1.0, 3.0, 7.0, 11.0],
}
LOCAL_AND_GLOBAL = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
YARN_OUTSIDE = {
    "full_attention": YARN | {"rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
}
FULL, SLIDING = "full_attention", "sliding_attention"
MULTIPLIERS = {
    "attention_multiplier": 0.4,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.3,
    "logits_scaling": 8.0,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-yarn": ("Llama", {"rope_parameters": YARN, "attention_bias": True, "mlp_bias": True}),
    "ministral": (
        "Ministral",
        {"sliding_window": 7, "num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING], "head_dim": 16},
    ),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3-biases": ("Qwen3", {"head_dim": 16, "attention_bias": True, "rope_parameters": YARN}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 32,
            "num_hidden_layers": 5,
            "sliding_window": 7,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 32,
            "num_hidden_layers": 5,
            "sliding_window": 7,
            "query_pre_attn_scalar": 24,
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING],
            "rope_parameters": LOCAL_AND_GLOBAL,
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 7}),
    "phi4-mini": (
        "Phi3",
        {
            "tie_word_embeddings": True,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.5},
            "original_max_position_embeddings": 64,
            "max_position_embeddings": 256,
        },
    ),
    "phi4-mini-long": (
        "Phi3",
        {
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.5},
            "original_max_position_embeddings": 8,
            "max_position_embeddings": 64,
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5}),
    "granite": ("Granite", MULTIPLIERS | {"attention_bias": True, "mlp_bias": True}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"num_hidden_layers": 5, "sliding_window": 7, "rope_parameters": YARN_OUTSIDE}),
    "glm": ("Glm", {"head_dim": 16}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "cohere": ("Cohere", {"use_qk_norm": True, "logit_scale": 0.3}),
    "cohere2": ("Cohere2", {"num_hidden_layers": 5, "sliding_window": 7}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
    "stablelm-parallel": (
        "StableLm",
        {"use_parallel_residual": True, "rope_parameters": {"partial_rotary_factor": 0.5}},
    ),
    "helium": ("Helium", {"head_dim": 16, "mlp_bias": True}),
    "arcee": ("Arcee", {"mlp_bias": True}),
    "seed-oss": ("SeedOss", {"head_dim": 16, "attention_out_bias": True, "mlp_bias": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path: Path, case: str):
    architecture, config = CASES[case]
    model = saved(tmp_path, architecture, **config)
    reference, oracle = logits_of(model, TOKENS, "float32").astype(np.float32), logits_of(model, TOKENS, "float64")
    # Every other family is tested with stacked layers, and all that have layers of several kinds.
    stack = config.get("num_hidden_layers", 2) > 2 or list(CASES).index(case) % 2 == 0
    check_logits(load_checkpoint(tmp_path, stack=stack), reference, oracle)


@pytest.mark.parametrize("case", ["gemma2", "glm4"])
def test_kernels_take_the_options(tmp_path: Path, case: str):
    """A decode step by kernels of a GPU: windows, soft-caps, scales, partial rotation, biases."""
    prefix, config = CASES[case]
    model = saved(tmp_path, prefix, **(config | {"num_hidden_layers": 2}))
    reference, oracle = logits_of(model, TOKENS, "float32").astype(np.float32), logits_of(model, TOKENS, "float64")
    checkpoint = load_checkpoint(tmp_path, stack=True, order="out_in")
    cache = new_cache(checkpoint, len(TOKENS), max_len=128)
    lengths = jnp.full(len(TOKENS), 16, jnp.int32)
    run = functools.partial(forward, checkpoint.parameters, checkpoint.config)
    _, cache = jax.jit(functools.partial(run, backend="xla"))(jnp.asarray(TOKENS[:, :16]), lengths, cache)
    step = jax.jit(functools.partial(run, backend="triton", interpret=True))
    logits, _ = step(jnp.asarray(TOKENS[:, 16:17]), lengths + 1, cache)
    assert_right(logits, reference[:, 16], oracle[:, 16])


@pytest.mark.parametrize("case", ["glm4", "cohere"])
def test_quantized_folders_load_as_the_folder_is_quantized(tmp_path: Path, case: str):
    """Rows that were reordered before they were quantized are not reordered again; biases and norms are."""
    prefix, config = CASES[case]
    saved(tmp_path / "dense", prefix, **config)
    quantize_folder(tmp_path / "dense", tmp_path / "quantized", "int8")
    expected = load_checkpoint(tmp_path / "dense", quantize="int8").parameters
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(tmp_path / "quantized").parameters, expected)


# ---------------------------------------------------------------------------------------------------------------- GGUF

LLAMA_LIKE = ("llama", "granite", "arcee", "smollm3")
"""Architectures whose converter interleaves the rows of queries and keys; others keep the order of safetensors."""

EXTRA = {
    "granite": lambda w, c: (
        w.add_attention_scale(c.attention_multiplier),
        w.add_embedding_scale(c.embedding_multiplier),
        w.add_residual_scale(c.residual_multiplier),
        w.add_logit_scale(c.logits_scaling),
    ),
    "gemma2": lambda w, c: (
        w.add_attn_logit_softcapping(c.attn_logit_softcapping),
        w.add_final_logit_softcapping(c.final_logit_softcapping),
    ),
    "gemma3": lambda w, c: (
        w.add_rope_freq_base(c.rope_parameters[FULL]["rope_theta"]),
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
        w.add_rope_scaling_factor(c.rope_parameters[FULL]["factor"]),
        w.add_sliding_window_pattern([kind == SLIDING for kind in c.layer_types]),
    ),
    "phi3": lambda w, c: (
        w.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(256 / 64) / math.log(64))),
        w.add_rope_scaling_orig_ctx_len(c.original_max_position_embeddings),
        w.add_tensor("rope_factors_short.weight", np.array(LONGROPE["short_factor"], np.float32)),
        w.add_tensor("rope_factors_long.weight", np.array(LONGROPE["long_factor"], np.float32)),
    ),
    "command-r": lambda w, c: w.add_logit_scale(c.logit_scale),
    "cohere2": lambda w, c: w.add_logit_scale(c.logit_scale),
    "stablelm": lambda w, c: w.add_parallel_residual(c.use_parallel_residual),
    "olmo2": lambda w, c: w.add_rope_freq_base(c.rope_parameters.get(FULL, c.rope_parameters)["rope_theta"]),
    "llama": lambda w, _c: (
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
        w.add_rope_scaling_factor(YARN["factor"]),
        w.add_rope_scaling_orig_ctx_len(YARN["original_max_position_embeddings"]),
    ),
}
"""Metadata and tensors that converters add for an architecture."""


def converted(path: Path, model: Any, architecture: str) -> Path:
    """Writes a model of transformers as a GGUF file, in the way of llama.cpp's converter."""
    config, file = model.config, path / "model.gguf"
    writer = gguf.GGUFWriter(file, architecture)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([1] * (VOCAB - 2) + [3, 3])
    writer.add_token_merges([])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if hasattr(config, "layer_norm_eps"):
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if "rope_theta" in config.rope_parameters:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * (config.rope_parameters.get("partial_rotary_factor") or 1)))
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    EXTRA.get(architecture, lambda _writer, _config: None)(writer, config)
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), 99)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.detach().float().numpy()
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        if architecture in LLAMA_LIKE and any(f".{part}_proj." in name for part in "qk"):
            array = interleave(array, len(array) // head_dim)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


GGUF_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "gemma2-scale": ("Gemma2", CASES["gemma2"][1] | {"query_pre_attn_scalar": 32}),
    "gemma3-scale": ("Gemma3", CASES["gemma3"][1] | {"query_pre_attn_scalar": 32}),
    "olmo3-plain": ("Olmo3", {"num_hidden_layers": 5, "sliding_window": 7, "rope_parameters": None}),
}
"""Models that GGUF can describe: attention of Gemma is scaled by the width of a head."""


@pytest.mark.parametrize(
    ("case", "architecture"),
    [
        ("llama-yarn", "llama"),
        ("qwen3", "qwen3"),
        ("qwen2", "qwen2"),
        ("gemma", "gemma"),
        ("gemma2-scale", "gemma2"),
        ("gemma3-scale", "gemma3"),
        ("phi4-mini", "phi3"),
        ("smollm3", "smollm3"),
        ("granite", "granite"),
        ("olmo2", "olmo2"),
        ("olmo3-plain", "olmo2"),
        ("glm4", "glm4"),
        ("cohere", "command-r"),
        ("cohere2", "cohere2"),
        ("stablelm", "stablelm"),
        ("stablelm-parallel", "stablelm"),
        ("arcee", "arcee"),
        ("seed-oss", "seed_oss"),
    ],
)
def test_gguf_files_load_as_folders_do(tmp_path: Path, case: str, architecture: str):
    """Configuration and weights are those of the folder, whose logits are compared above."""
    prefix, config = (CASES | GGUF_CASES)[case]
    model = saved(tmp_path, prefix, **config)
    folder, file = load_checkpoint(tmp_path), load_checkpoint(converted(tmp_path, model, architecture))
    for field in dataclasses.fields(folder.config):
        ours, theirs = (getattr(checkpoint.config, field.name) for checkpoint in (file, folder))
        if field.name == "attention_scale":
            ours, theirs = (scale or folder.config.head_dim**-0.5 for scale in (ours, theirs))
        is_real = isinstance(theirs, float) or field.name == "rotary_scales"
        assert ours == (pytest.approx(theirs, rel=1e-6) if is_real else theirs), field.name
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, file.parameters, folder.parameters)


@pytest.mark.parametrize("layers", [42, 46])
def test_gguf_tells_the_scale_of_gemmas_attention_by_its_layers(layers: int):
    """The largest models divide by the root of hidden_size / heads, which is not the width of a head."""
    sizes = {
        "embedding_length": 4608,
        "attention.head_count": 32,
        "attention.key_length": 128,
        "block_count": layers,
        "feed_forward_length": 64,
        "context_length": 64,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    values = {"general.architecture": "gemma2"} | {f"gemma2.{key}": value for key, value in sizes.items()}
    metadata = Metadata(Path("model.gguf"), values)
    config = read_config(metadata, read_rotary(metadata, {}), vocab_size=8, tensors=(), stop_tokens=())
    assert config.attention_scale == (pytest.approx(144**-0.5) if layers == 46 else None)
    assert (config.sliding_window, config.attention_soft_cap, config.logit_soft_cap) == (4096, 50.0, 30.0)
