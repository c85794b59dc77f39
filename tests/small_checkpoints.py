"""Small checkpoints with random weights, which tests load and damage."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
import tokenizers

HIDDEN, INTERMEDIATE, LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 64, 256, 2, 4, 2, 16
QUERIES, KEYS = Q_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
TOKENS = [*map(chr, range(33, 127)), "<s>", "<|im_end|>"]
VOCAB = len(TOKENS)
BOS, EOS = VOCAB - 2, VOCAB - 1

SHAPES = {
    "attn_q": (QUERIES, HIDDEN),
    "attn_k": (KEYS, HIDDEN),
    "attn_v": (KEYS, HIDDEN),
    "attn_output": (HIDDEN, QUERIES),
    "ffn_gate": (INTERMEDIATE, HIDDEN),
    "ffn_up": (INTERMEDIATE, HIDDEN),
    "ffn_down": (HIDDEN, INTERMEDIATE),
}
HUGGING_FACE = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
Type = gguf.GGMLQuantizationType
Tensors = dict[str, tuple[np.ndarray, Any]]


def random_weights(tied: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns float weights under GGUF's names, with rows in the model's own (half-split) order."""
    generator = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,)}
    if not tied:
        shapes["output"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in SHAPES.items()}
        shapes |= {f"blk.{layer}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders rows from half-split to GGUF's interleaved order, one by one, as the format defines it."""
    head_dim = len(rows) // heads
    result = np.empty_like(rows)
    for head in range(heads):
        for i in range(head_dim // 2):
            result[head * head_dim + 2 * i] = rows[head * head_dim + i]
            result[head * head_dim + 2 * i + 1] = rows[head * head_dim + i + head_dim // 2]
    return result


def stored(name: str, rows: np.ndarray) -> np.ndarray:
    heads = {"attn_q": Q_HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-1])
    return interleave(rows, heads) if heads else rows


def encode(weights: dict[str, np.ndarray], kinds: Callable[[str], Any]) -> Tensors:
    """Encodes weights in the types that `kinds` returns for their names; rows stay in the model's order."""
    return {
        name: (
            array if array.ndim == 1 else gguf.quants.quantize(array, kinds(name)),
            None if array.ndim == 1 else kinds(name),
        )
        for name, array in weights.items()
    }


def write_gguf(
    path: Path, tensors: Tensors, metadata: dict[str, Any] | None = None, architecture: str = "llama"
) -> Path:
    """Writes a GGUF file with the architecture's usual metadata, changed by `metadata`; None removes a key.

    Keys get the architecture's name as prefix, unless they start with "general.", "split." or "tokenizer.".
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("a small model")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (VOCAB - 2) + [3, 3])
    writer.add_token_merges([])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    values = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": INTERMEDIATE,
        "attention.head_count": Q_HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 500_000.0,
    } | (metadata or {})
    for name, value in values.items():
        key = name if name.startswith(("general.", "split.", "tokenizer.")) else f"{architecture}.{name}"
        writer.kv_data[0].pop(key, None)
        if value is not None:
            kind, element_kind = gguf_type(value), gguf_type(value[0]) if isinstance(value, list) and value else None
            writer.kv_data[0][key] = gguf.gguf_writer.GGUFValue(value, kind, element_kind)
    for name, (data, kind) in tensors.items():
        full_name = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        writer.add_tensor(full_name, stored(name.removesuffix(".bias"), data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_type(value: Any) -> gguf.GGUFValueType:
    """Returns the narrowest type that converters use and that can hold a value."""
    kinds = gguf.GGUFValueType
    if isinstance(value, bool | str | list):
        return {bool: kinds.BOOL, str: kinds.STRING, list: kinds.ARRAY}[type(value)]
    if isinstance(value, int):
        if value < 0:
            return kinds.INT32
        return kinds.UINT32 if value < 2**32 else kinds.UINT64
    return kinds.FLOAT32 if value == 0 or not np.isfinite(value) or 1e-30 < abs(value) < 1e30 else kinds.FLOAT64


def gguf_file(path: Path, kind: Any = Type.F32, tied: bool = False, **metadata: Any) -> Path:
    return write_gguf(path / "model.gguf", encode(random_weights(tied), lambda _: kind), metadata)


def hugging_face_folder(
    path: Path, tensors: dict[str, np.ndarray] | None = None, config: dict[str, Any] | None = None
) -> Path:
    """Writes a Hugging Face folder key by key, so that tests can write wrong ones."""
    path.mkdir(exist_ok=True)
    values = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": Q_HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "bos_token_id": BOS,
        "eos_token_id": [EOS],
    } | (config or {})
    (path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    safetensors.numpy.save_file(hugging_face_names() if tensors is None else tensors, path / "model.safetensors")
    write_tokenizer(path)
    return path


def hugging_face_names(weights: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    result = {}
    for name, array in (weights or random_weights()).items():
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            result[f"model.layers.{layer}.{HUGGING_FACE[part]}.weight"] = array
        else:
            result[f"{names[name]}.weight"] = array
    return result


def write_tokenizer(path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(TOKENS)}, []))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(TOKENS[-2:])
    backend.save(str(path / "tokenizer.json"))


def save_with_transformers(path: Path, architecture: str = "Llama", shard_size: str = "1GB", **config: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns about itself
        import torch
        import transformers

        torch.manual_seed(0)
        settings = getattr(transformers, f"{architecture}Config")(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=LAYERS,
            num_attention_heads=Q_HEADS,
            num_key_value_heads=KV_HEADS,
            bos_token_id=BOS,
            eos_token_id=EOS,
            **config,
        )
        model = getattr(transformers, f"{architecture}ForCausalLM")(settings)
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
                torch.nn.init.normal_(parameter)
        model.save_pretrained(path, max_shard_size=shard_size)
    write_tokenizer(path)
    return model
