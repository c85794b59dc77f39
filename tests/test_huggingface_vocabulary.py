"""Vocabularies of Hugging Face folders: the tokens that transformers gives, and files that are not as they must be."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import BOS, END, EOS, SPACE, START, USER, byte_level_folder, sentencepiece_folder
from tokenizers import decoders

from palladion.model.checkpoint_files import CheckpointError
from palladion.model.tokenizer import Tokenizer


@pytest.mark.parametrize("make", [byte_level_folder, sentencepiece_folder])
def test_folder_agrees_with_its_own_package(tmp_path: Path, make: Any) -> None:
    backend = make(tmp_path, bos_token="<s>", eos_token={"content": "</s>"})
    tokenizer = Tokenizer.from_folder(tmp_path)
    backend.no_truncation()
    for text in ("hello world", "  hello  ", "é🙂 hello", "hello<|im_end|>world", ""):
        ids = tokenizer.encode(text)
        assert ids == backend.encode(text).ids
        assert tokenizer.decode(ids) == backend.decode(ids)
    assert tokenizer.bos == BOS
    assert tokenizer.stop_tokens == (EOS,)


def test_folder_bos_token_may_stand_in_the_config(tmp_path: Path) -> None:
    backend = sentencepiece_folder(tmp_path)
    backend.no_truncation()
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": BOS, "eos_token_id": EOS}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("hello", add_bos=True)[0] == tokenizer.bos == BOS
    assert tokenizer.encode("hello", add_bos=False) == backend.encode("hello", add_special_tokens=False).ids
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 100_000}))
    assert Tokenizer.from_folder(tmp_path).bos is None


def test_folder_stop_tokens_are_those_of_all_files(tmp_path: Path) -> None:
    byte_level_folder(tmp_path, eos_token="<|im_end|>")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": EOS}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [START, EOS]}))
    assert Tokenizer.from_folder(tmp_path).stop_tokens == (EOS, START, END)


def test_folder_chat_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    for template, expected in (("inline", "inline"), (named, "named"), (None, None)):
        byte_level_folder(tmp_path, chat_template=template)
        assert Tokenizer.from_folder(tmp_path).chat_template == expected
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert Tokenizer.from_folder(tmp_path).chat_template == "from a file"


def test_folder_errors(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match=r"has tokenizer\.model but no tokenizer\.json; make one with"):
        Tokenizer.from_folder(tmp_path)
    backend = byte_level_folder(tmp_path)
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="decoder WordPiece is not supported; supported: ByteLevel"):
        Tokenizer.from_folder(tmp_path)
    byte_level_folder(tmp_path, bos_token=3)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: 'bos_token' must be a token: a string.* got 3"):
        Tokenizer.from_folder(tmp_path)


def change(path: Path, name: str = "tokenizer.json", **changes: Any) -> None:
    """Writes keys of a JSON file anew."""
    content = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(content | changes))


def change_model(path: Path, **changes: Any) -> None:
    change(path, model=json.loads((path / "tokenizer.json").read_text())["model"] | changes)


SPECIAL_TOKEN = {"SpecialToken": {"id": "</s>", "type_id": 0}}
SEQUENCE = {"Sequence": {"id": "A", "type_id": 0}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "ABCD"}}, "not a tokenizer .*charsmap"),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}}, "not a tokenizer"),
        ({"decoder": 3}, "not a tokenizer"),
        ({"added_tokens": [{"id": 1}]}, "not a tokenizer"),
        (
            {
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [SPECIAL_TOKEN, SEQUENCE],
                    "pair": [SEQUENCE],
                    "special_tokens": {},
                }
            },
            "the tokenizer cannot encode",
        ),
    ],
)
def test_a_tokenizer_that_panics_is_an_error_at_load(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    byte_level_folder(tmp_path)
    change(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: {message}"):
        Tokenizer.from_folder(tmp_path)


def test_a_post_processor_of_another_vocabulary(tmp_path: Path) -> None:
    byte_level_folder(tmp_path)
    ends = {"sep": ["</s>", 999], "cls": ["<s>", 998], "trim_offsets": True, "add_prefix_space": False}
    change(tmp_path, truncation=None, post_processor={"type": "RobertaProcessing"} | ends)
    with pytest.raises(CheckpointError, match=r"puts token 999 around a text, but its last token is 265"):
        Tokenizer.from_folder(tmp_path)


def test_a_panic_leaves_no_trace_on_standard_error(tmp_path: Path) -> None:
    byte_level_folder(tmp_path)
    change(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": "ABCD"})
    program = (
        "import sys\n"
        "from palladion.model.tokenizer import Tokenizer\n"
        "try:\n    Tokenizer.from_folder(sys.argv[1])\n"
        "except ValueError as error:\n    print(error, file=sys.stderr)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": "src", "JAX_PLATFORMS": "cpu", "PATH": ""},
        cwd=Path(__file__).parent.parent,
        check=True,
    )
    assert "panicked" not in run.stderr
    assert "not a tokenizer" in run.stderr, "what comes afterwards is not lost"


@pytest.mark.parametrize("token", [2**31, 10**8, 2**24])
def test_ids_that_no_vocabulary_has(tmp_path: Path, token: int) -> None:
    byte_level_folder(tmp_path)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    change_model(tmp_path, vocab=vocabulary | {"far": token})
    with pytest.raises(
        CheckpointError, match=f"token 'far' has the id {token}, which no vocabulary has: ids are below"
    ):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("token", [2**31, [EOS, 2**40], -1, "2", True, 2.0])
def test_stop_tokens_that_no_vocabulary_has(tmp_path: Path, name: str, token: Any) -> None:
    byte_level_folder(tmp_path)
    (tmp_path / name).write_text(json.dumps({"eos_token_id": token}))
    with pytest.raises(CheckpointError, match=f"{name}: 'eos_token_id' "):
        Tokenizer.from_folder(tmp_path)


FILES = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json", "chat_template.jinja")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file(tmp_path: Path, name: str, make: Any) -> None:
    byte_level_folder(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name}: is not a regular file"):
        Tokenizer.from_folder(tmp_path)


def test_a_template_that_is_not_utf8(tmp_path: Path) -> None:
    byte_level_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ messages }}\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: not readable as UTF-8 text"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"added_tokens_decoder": [1]}, "'added_tokens_decoder' must be an object"),
        ({"added_tokens_decoder": {"x": "a"}}, "'added_tokens_decoder' has the key 'x'"),
        ({"added_tokens_decoder": {"9": {"content": 3}}}, "must be a token"),
        ({"added_tokens_decoder": {"9": {"content": "a", "lstrip": "no"}}}, "must be a token"),
        ({"extra_special_tokens": 3}, "'extra_special_tokens' must be a list of tokens, got 3"),
        ({"extra_special_tokens": [3]}, "'extra_special_tokens' must be a token"),
        ({"tokenizer_class": 3}, "'tokenizer_class' must be a string"),
        ({"chat_template": 3}, "'chat_template' must be a string"),
        ({"chat_template": "\ud800"}, "'chat_template': is not valid text"),
        ({"chat_template": [{"name": "default", "template": "\ud800"}]}, "'chat_template': is not valid text"),
        ({"eos_token": "\ud800"}, "its tokens cannot be added"),
    ],
)
def test_settings_of_the_wrong_type(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    byte_level_folder(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: .*{message}"):
        Tokenizer.from_folder(tmp_path)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
PLACES = {
    "tokenizer.json": ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "version"),
    "tokenizer_config.json": (
        *("bos_token", "eos_token", "pad_token", "mask_token", "image_token", "extra_special_tokens"),
        *("additional_special_tokens", "added_tokens_decoder", "tokenizer_class", "legacy", "chat_template"),
    ),
    "special_tokens_map.json": ("bos_token", "eos_token", "additional_special_tokens"),
    "added_tokens.json": ("<extra>",),
    "config.json": ("bos_token_id", "eos_token_id", "model_type"),
    "generation_config.json": ("eos_token_id",),
}


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([byte_level_folder, sentencepiece_folder]), st.data())
def test_any_folder_is_a_tokenizer_or_an_error(make: Any, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        make(path, bos_token="<s>")
        name = data.draw(st.sampled_from([*PLACES]))
        key = data.draw(st.sampled_from(PLACES[name]))
        content = json.loads((path / name).read_text()) if (path / name).exists() else {}
        value = data.draw(ANYTHING)
        if isinstance(content.get(key), dict) and data.draw(st.booleans()):
            value = content[key] | {data.draw(st.sampled_from(sorted(content[key]))): value}
        (path / name).write_text(json.dumps(content | {key: value}))
        try:
            tokenizer = Tokenizer.from_folder(path)
        except CheckpointError:
            return
        with contextlib.suppress(ValueError):  # some fail on some texts
            tokenizer.decode(tokenizer.encode("<s>hello <|im_end|>\n"), special=True)


# --------------------------------------------------------------------------------------------------------------- peers

EXTRA = {"content": "<extra>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
BOTH_ENDS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, SEQUENCE, SPECIAL_TOKEN],
    "pair": [SEQUENCE, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        text: {"id": text, "ids": [token], "tokens": [text]} for text, token in (("<s>", BOS), ("</s>", EOS))
    },
}
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "names": (NAMES, {}),
    "bos": (NAMES | {"add_bos_token": True}, {}),
    "no-bos": (NAMES | {"add_bos_token": False}, {}),
    "eos": (NAMES | {"add_eos_token": True}, {}),
    "bos-without-processor": (NAMES | {"add_bos_token": True, "add_eos_token": True}, {"post_processor": None}),
    "no-bos-with-processor": (NAMES | {"add_bos_token": False}, {"post_processor": BOTH_ENDS}),
    "nothing-said-with-processor": ({}, {"post_processor": BOTH_ENDS}),
    "Fast": (NAMES | {"tokenizer_class": "PreTrainedTokenizerFast"}, {}),
    "Llama": (NAMES | {"tokenizer_class": "LlamaTokenizer"}, {}),
    "LlamaFast": (NAMES | {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}, {}),
    "Llama-legacy": (NAMES | {"tokenizer_class": "LlamaTokenizer", "legacy": True}, {}),
    "Llama-no-prefix": (NAMES | {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}, {}),
    "listed": (NAMES | {"added_tokens_decoder": {"900": EXTRA | {"special": True}}}, {}),
    "listed-as-text": (NAMES | {"added_tokens_decoder": {"900": EXTRA | {"special": False, "lstrip": True}}}, {}),
    "several": (NAMES | {"pad_token": "<extra>", "extra_special_tokens": ["<more>", "hello"]}, {}),
    "older-key": (NAMES | {"additional_special_tokens": ["<more>", "<extra>"]}, {}),
    "own-key": (NAMES | {"image_token": "<extra>"}, {}),
    "named-only": ({"bos_token": "hello", "eos_token": "<extra>"}, {}),
}
TEXTS = [
    "",
    "hello world",
    " hello  world ",
    "<s>hello",
    "<s> hello</s>",
    "hello</s> world<|im_end|>hello",
    "a <extra> b<more>hello",
]
MODEL_TYPES = (None, "llama", "mistral")


@pytest.mark.peer
@pytest.mark.parametrize("make", [byte_level_folder, sentencepiece_folder])
@pytest.mark.parametrize("folder", FOLDERS)
def test_tokens_are_those_of_transformers(tmp_path: Path, make: Any, folder: str) -> None:
    transformers = pytest.importorskip("transformers")
    settings, changes = FOLDERS[folder]
    template = "{{ bos_token }}{% for message in messages %}[{{ message.content }}]{{ eos_token }}{% endfor %}"
    make(tmp_path, **settings, chat_template=template)
    change(tmp_path, **changes, truncation=None)
    for model_type in MODEL_TYPES:
        if model_type:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        tokenizer = Tokenizer.from_folder(tmp_path)
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert ids == peer(text).input_ids, (model_type, text)
            assert tokenizer.encode(text, add_bos=False) == peer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids, special=True) == peer.decode(ids)
        if "bos_token" in settings:
            chat = tokenizer.encode(tokenizer.render_chat([USER]))
            assert chat == peer.apply_chat_template([USER], tokenize=True, return_dict=False)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast"])
def test_byte_level_classes_give_the_tokens_of_transformers(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    byte_level_folder(tmp_path, **NAMES, unk_token="<unk>", pad_token="</s>", tokenizer_class=name)
    change(tmp_path, truncation=None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == peer(text).input_ids, text


@pytest.mark.peer
@pytest.mark.parametrize("make", [byte_level_folder, sentencepiece_folder])
def test_older_files_are_those_of_transformers(tmp_path: Path, make: Any) -> None:
    transformers = pytest.importorskip("transformers")
    make(tmp_path)
    change(tmp_path, truncation=None)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(NAMES | {"pad_token": EXTRA}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<more>": 901, "<extra>": 900}))
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == peer(text).input_ids, text
    assert tokenizer.bos == BOS


def test_the_class_llama_tokenizer_puts_a_space_before_the_text_only(tmp_path: Path) -> None:
    sentencepiece_folder(tmp_path, **NAMES, tokenizer_class="LlamaTokenizer")
    tokenizer = Tokenizer.from_folder(tmp_path)
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    space, hello = vocabulary[SPACE], vocabulary["hello"]
    assert tokenizer.encode("hello</s>hello") == [BOS, space, hello, EOS, hello]
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
