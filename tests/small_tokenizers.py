"""Small tokenizers, as metadata of GGUF files and as Hugging Face folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from palladion.model.tokenizer import Tokenizer
from palladion.model.vocabulary import SPACE

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
    """Returns the metadata of a byte-level tokenizer with a token for each byte and a few merges."""
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
    """Returns the metadata of a SentencePiece tokenizer with bytes, letters, and pieces with scores."""
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


USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "Be brief."}


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
