"""Tokenizers: text survives the way through tokens, streams give whole characters, chats say what was said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from palladion.model.checkpoint import find_model
from palladion.model.checkpoint_files import CheckpointError
from palladion.model.tokenizer import END_OF_TURN, PRE_TOKENIZERS, SPACE, Tokenizer

TRICKY = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces\tand a tab \n\n and lines\r\n\r\n  end  ",
    "1234567890 3.14159 1,000,000 ٣٤ ½ Ⅷ x²",
    "I'm you're HE'LL they'd it's 'S",
    "naïve café e\u0301 ÅÅ straße ﬁ",
    "日本語と한국어 и русский العربية हिन्दी",
    "🙂 👩‍👩‍👧‍👦 🤦🏽‍♀️ 🇩🇪",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "a<|im_end|>b <|im_end|> c",
    "def f(x):\n    return x**2  # comment\n",
    "\u00a0\u2003\u3000\u200b\ufeff\u2028\u0085",
    "$^~|<>=+ ... --- ___ \x07\x7f",
]

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
UNKNOWN, BOS, EOS, START, END = range(5)

CHAT = (
    "{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a default.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    """The metadata of a byte-level tokenizer: a token for each byte, a few merges."""
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w"]
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    metadata = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [2] + [3] * 4 + [1] * (len(tokens) - 5),
        "merges": merges,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items() if value is not None}


def sentencepiece_metadata(**changes: Any) -> dict[str, Any]:
    """The metadata of a SentencePiece tokenizer: bytes, letters, and pieces with scores."""
    pieces = ["he", "ll", "hell", "hello", f"{SPACE}w", f"{SPACE}wor", "or", "ld", f"{SPACE}world", SPACE * 2, "é"]
    letters = [SPACE, *"abcdefghijklmnopqrstuvwxyz"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    metadata = {
        "model": "llama",
        "tokens": SPECIAL + byte_tokens + pieces + letters,
        "token_type": [2] + [3] * 4 + [6] * 256 + [1] * (len(pieces) + len(letters)),
        "scores": [0.0] * (5 + 256) + [-float(i) for i in range(len(pieces) + len(letters))],
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items() if value is not None}


def chat_tokenizer(template: str | None, **changes: Any) -> Tokenizer:
    return Tokenizer.from_gguf(byte_level_metadata(**changes) | {"tokenizer.chat_template": template})


BYTE_LEVEL = Tokenizer.from_gguf(byte_level_metadata())
SENTENCEPIECE = Tokenizer.from_gguf(sentencepiece_metadata())

# ------------------------------------------------------------------------------------------------- encoding, decoding


def test_byte_level_tokens() -> None:
    tokens = byte_level_metadata()["tokenizer.ggml.tokens"]
    assert [tokens[i] for i in BYTE_LEVEL.encode("hello world 12")] == ["hello", "Ġw", *"orld", "Ġ", "1", "2"]
    assert BYTE_LEVEL.encode("<|im_start|>h<|im_end|>") == [START, tokens.index("h"), END]


def test_sentencepiece_tokens() -> None:
    tokens = sentencepiece_metadata()["tokenizer.ggml.tokens"]
    ids = SENTENCEPIECE.encode("hello world<|im_end|>Z")
    expected = ["<s>", SPACE, "hello", f"{SPACE}world", "<|im_end|>", SPACE, "<0x5A>"]
    assert [tokens[i] for i in ids] == expected
    without_prefix = Tokenizer.from_gguf(sentencepiece_metadata(add_space_prefix=False))
    assert [tokens[i] for i in without_prefix.encode("hello")] == ["<s>", "hello"]
    assert without_prefix.decode(without_prefix.encode(" hello")) == " hello"


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_text_survives(text: str) -> None:
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text), special=True) == text


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_survives(text: str) -> None:
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text, add_bos=False)) == text
    spaces = text.replace(SPACE, " ")  # that character and a space are the same to SentencePiece
    assert SENTENCEPIECE.decode(SENTENCEPIECE.encode(text)) == spaces


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_loses_nothing(pre: str) -> None:
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(pre=pre))
    for text in TRICKY:
        assert tokenizer.decode(tokenizer.encode(text, add_bos=False), special=True) == text


def test_control_tokens_are_shown_on_request() -> None:
    ids = BYTE_LEVEL.encode("<|im_start|>hello<|im_end|>")
    assert BYTE_LEVEL.decode(ids) == "hello"
    assert BYTE_LEVEL.decode(ids, special=True) == "<|im_start|>hello<|im_end|>"


def test_user_defined_tokens_are_text() -> None:
    metadata = byte_level_metadata()
    tokens = [*metadata["tokenizer.ggml.tokens"], "two words"]
    types = [*metadata["tokenizer.ggml.token_type"], 4]
    tokenizer = Tokenizer.from_gguf(byte_level_metadata(tokens=tokens, token_type=types))
    assert tokenizer.encode("two words") == [len(tokens) - 1]
    assert tokenizer.decode([len(tokens) - 1]) == "two words"


def test_bos() -> None:
    h = BYTE_LEVEL.encode("h")
    assert len(h) == 1
    assert BYTE_LEVEL.encode("h", add_bos=True) == [BOS, *h]
    adding = Tokenizer.from_gguf(byte_level_metadata(pre="llama-bpe"))
    assert adding.encode("h") == [BOS, *h]
    assert adding.encode("<s>h") == [BOS, *h], "a chat template may have written it already"
    assert adding.encode("h", add_bos=False) == h
    stated = Tokenizer.from_gguf(byte_level_metadata(pre="llama-bpe", add_bos_token=False))
    assert stated.encode("h") == h
    with pytest.raises(ValueError, match="add_bos=True, but this vocabulary has no BOS token"):
        Tokenizer.from_gguf(byte_level_metadata(bos_token_id=None)).encode("h", add_bos=True)


def test_special_tokens_that_are_no_token_do_not_exist() -> None:
    tokenizer = chat_tokenizer("[{{ bos_token }}{{ eos_token }}]", bos_token_id=2**32 - 1)
    assert tokenizer.bos is None
    assert tokenizer.render_chat([USER]) == "[</s>]"


def test_stop_tokens() -> None:
    assert "<|im_end|>" in END_OF_TURN
    assert BYTE_LEVEL.stop_tokens == (EOS, END)
    assert Tokenizer.from_gguf(byte_level_metadata(eot_token_id=START)).stop_tokens == (EOS, START, END)


def test_ids_outside_the_vocabulary() -> None:
    assert BYTE_LEVEL.decode([10**6, *BYTE_LEVEL.encode("h")]) == "h"
    with pytest.raises(ValueError, match="not negative, got -1"):
        BYTE_LEVEL.decode([-1])


# ------------------------------------------------------------------------------------------------------------- streams


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([BYTE_LEVEL, SENTENCEPIECE]), st.data())
def test_pieces_joined_are_the_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([BYTE_LEVEL, SENTENCEPIECE]), st.text(alphabet="aé€🙂 \u0301", max_size=12))
def test_valid_text_streams_without_replacement(tokenizer: Tokenizer, text: str) -> None:
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text
    assert stream.flush() == ""


def test_characters_wait_until_they_are_whole() -> None:
    stream = BYTE_LEVEL.stream()
    pieces = [stream.push(token) for token in BYTE_LEVEL.encode("é🙂!")]
    assert pieces == ["", "é", "", "", "", "🙂", "!"]
    assert stream.push(BYTE_LEVEL.encode("é")[0]) == ""
    assert stream.flush() == "\ufffd"


def test_leading_space_goes_once() -> None:
    ids = SENTENCEPIECE.encode(" world", add_bos=False)
    assert SENTENCEPIECE.decode([BOS, *ids]) == " world"
    world = [sentencepiece_metadata()["tokenizer.ggml.tokens"].index(f"{SPACE}world")]
    assert SENTENCEPIECE.decode([BOS, *world, *world]) == "world world"
    stream = SENTENCEPIECE.stream(continuing=True)
    assert stream.push(world[0]) == " world"


# --------------------------------------------------------------------------------------------------------------- chats

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}


def test_chat_without_a_system_message_has_none() -> None:
    turn = "<|im_start|>user\nHi<|im_end|>\n"
    tokenizer = chat_tokenizer(CHAT)
    assert tokenizer.render_chat([USER]) == f"{turn}<|im_start|>assistant\n"
    assert tokenizer.render_chat([USER], add_generation_prompt=False) == turn
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert tokenizer.render_chat([SYSTEM, USER]) == f"{system}{turn}<|im_start|>assistant\n"
    answered = [USER, {"role": "assistant", "content": "Hello"}, USER]
    assert tokenizer.render_chat(answered, False) == f"{turn}<|im_start|>assistant\nHello<|im_end|>\n{turn}"


def test_chat_keeps_the_bos_token() -> None:
    template = "{{ bos_token }}" + CHAT
    text = chat_tokenizer(template).render_chat([USER])
    assert text == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chat_tokenizer(template, pre="llama-bpe").encode(text).count(BOS) == 1


def test_chat_whose_system_message_is_no_turn_is_left_alone() -> None:
    folded = (
        "{% if messages[0].role == 'system' %}{% set system, rest = '<<' + messages[0].content + '>>', messages[1:] %}"
        "{% else %}{% set system, rest = '', messages %}{% endif %}"
        "{% for message in rest %}[INST] {% if loop.first %}{{ system }}{% endif %}{{ message.content }} [/INST]"
        "{% endfor %}"
    )
    assert chat_tokenizer(folded).render_chat([USER]) == "[INST] Hi [/INST]"
    ignoring = "{{ messages[0].role }}: {{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    assert chat_tokenizer(ignoring).render_chat([USER]) == "user: Hi>"
    refusing = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    refusing += "[{{ m.content }}]{% endfor %}"
    assert chat_tokenizer(refusing).render_chat([USER]) == "[Hi]"
    with pytest.raises(ValueError, match=r"refuses this conversation: no system; roles given: \['system', 'user'\]"):
        chat_tokenizer(refusing).render_chat([SYSTEM, USER])


def test_templates_have_the_functions_they_expect() -> None:
    template = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    message = {"role": "user", "content": "<é>'"}
    assert chat_tokenizer(template).render_chat([message]) == json.dumps(message, ensure_ascii=False)
    assert len(chat_tokenizer("{{ strftime_now('%Y') }}").render_chat([USER])) == 4
    assert chat_tokenizer("{% if tools %}tools{% endif %}{{ eos_token }}").render_chat([USER]) == "</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "^render_chat: this checkpoint has no chat template, as base models have none; encode plain text"),
        ("{% for %}", "chat template is not valid"),
        ("{{ messages.__class__.__mro__ }}", "refuses this conversation: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses this conversation"),
        ("{{ 'a' + 1 }}", "refuses this conversation"),
        ("{{ range(10 ** 9) }}", "refuses this conversation: Range too big"),
    ],
)
def test_chat_errors(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_tokenizer(template).render_chat([USER])


# --------------------------------------------------------------------------------------------------------- GGUF errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer model 'bert' .* supported: 'gpt2' .* and 'llama'"),
        ({"tokens": None}, "tokenizer model 'gpt2' with 0 tokens"),
        ({"pre": "gpt-7"}, "pre-tokenizer 'gpt-7' is not supported; supported: default, gpt-2, smollm"),
        ({"token_type": [1]}, "1 token types for 266 tokens"),
        ({"merges": ["h q q"]}, "damaged vocabulary or merges"),
    ],
)
def test_gguf_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"model\.gguf: .*{message}"):
        Tokenizer.from_gguf(byte_level_metadata(**changes), source="model.gguf")


def test_sentencepiece_needs_scores() -> None:
    with pytest.raises(CheckpointError, match="0 scores for"):
        Tokenizer.from_gguf(sentencepiece_metadata(scores=None))


# -------------------------------------------------------------------------------------------------------------- folders


def byte_level_folder(path: Path, **config: Any) -> tokenizers.Tokenizer:
    metadata = byte_level_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split()) for merge in metadata["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.enable_truncation(3)  # a setting for training that must not cut prompts
    save(backend, path, config)
    return backend


def sentencepiece_folder(path: Path, **config: Any) -> tokenizers.Tokenizer:
    metadata = sentencepiece_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), (SPACE, "w"), ("o", "r"), (f"{SPACE}w", "or")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    save(backend, path, config)
    return backend


def save(backend: tokenizers.Tokenizer, path: Path, config: dict[str, Any]) -> None:
    backend.save(str(path / "tokenizer.json"))
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))


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


def test_folder_bos_rules(tmp_path: Path) -> None:
    sentencepiece_folder(tmp_path, bos_token="<s>", add_bos_token=False)
    assert BOS not in Tokenizer.from_folder(tmp_path).encode("hello")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": BOS, "eos_token_id": EOS}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("hello")[0] == tokenizer.bos == BOS


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
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: 'bos_token' must be a string, got 3"):
        Tokenizer.from_folder(tmp_path)


# --------------------------------------------------------------------------------------------------------------- peers


def write_vocabulary(path: Path, metadata: dict[str, Any]) -> Path:
    """A GGUF file with a tokenizer and no weights, which llama.cpp opens with `vocab_only`."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def assert_agrees_with_llama_cpp(path: Path, tokenizer: Tokenizer) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    peer = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    try:
        for text in TRICKY:
            assert tokenizer.encode(text) == peer.tokenize(text.encode(), special=True), text
    finally:
        peer.close()


def smollm2_vocabulary() -> tuple[Path, dict[str, Any]]:
    try:
        path = find_model("smollm2")
    except CheckpointError as error:
        pytest.skip(str(error))
    fields = gguf.GGUFReader(path).fields
    return path, {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


@pytest.mark.peer
def test_smollm2_agrees_with_llama_cpp(tmp_path: Path) -> None:
    path, metadata = smollm2_vocabulary()
    tokenizer = Tokenizer.from_gguf(metadata)
    assert_agrees_with_llama_cpp(path, tokenizer)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.render_chat([USER]) == prompt
    assert tokenizer.stop_tokens == (0, 2)
    # The same vocabulary, cut short so that it is written quickly, under every way of cutting text.
    size = 1200
    tokens = metadata["tokenizer.ggml.tokens"][:size]
    merges = [m for m in metadata["tokenizer.ggml.merges"] if {*m.split(" "), m.replace(" ", "")} <= {*tokens}]
    for pre in PRE_TOKENIZERS:
        cut = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": metadata["tokenizer.ggml.token_type"][:size],
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 2,
        }
        assert_agrees_with_llama_cpp(write_vocabulary(tmp_path / f"{pre}.gguf", cut), Tokenizer.from_gguf(cut))


@pytest.mark.peer
def test_sentencepiece_agrees_with_llama_cpp(tmp_path: Path) -> None:
    for changes in ({}, {"add_space_prefix": False}, {"add_bos_token": False}):
        metadata = sentencepiece_metadata(**changes)
        path = write_vocabulary(tmp_path / "vocabulary.gguf", metadata)
        assert_agrees_with_llama_cpp(path, Tokenizer.from_gguf(metadata))
