"""Reads `quantization_config` of config.json: the layouts that the quantized weights of a published checkpoint have."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from palladion.model.checkpoint_files import CheckpointError, JsonFile, check_integer, shorten
from palladion.model.quantized_layouts import AWQ, FLOAT8, GPTQ, Layout, Packed, PackedMXFP4, Parts, Scaled, StoredPart
from palladion.model.stored_quantized import METHOD

SECTIONS: Final = ("quantization_config", "compression_config")
"""Sections of config.json that say how weights are quantized; older files have the second."""

FILES: Final[Mapping[str, str]] = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files that hold the section in older checkpoints, and the method that they are of."""

SUPPORTED: Final = ("gptq", "awq", "compressed-tensors", "fp8", "fbgemm_fp8")

WAY_OUT: Final = (
    "take the unquantized checkpoint and quantize it here, with quantize='int4-g32' or 'int8' for example, or take a "
    "GGUF file"
)

FLOAT_TYPES: Final = ("F64", "F32", "F16", "BF16")
"""Types of tensors that are not quantized, as safetensors names them."""

UNUSED: Final = ("input_scale", "input_zero_point", "output_scale", "activation_scale", "input_scale_ub")
"""Parts of a weight that are about activations, which stay floats here."""


@dataclasses.dataclass(frozen=True)
class Method:
    """The layouts of a checkpoint's quantized weights.

    Attributes:
      layouts: by the name of the part that tells that a linear layer has the layout.
      parts: names of all other parts.
    """

    layouts: Mapping[str, Layout]
    parts: tuple[str, ...]


def read_method(values: JsonFile) -> Method | None:
    """Returns the layouts of a checkpoint's weights, None where they are not quantized, or in Palladion's own format.

    Args:
      values: config.json.

    Raises:
      CheckpointError: the method is not supported, or its settings are missing or wrong.
    """
    section = _section(values)
    name = section.text("quant_method") or ""
    if not section.content or name == METHOD:
        return None
    if name not in READERS:
        kind = f"{name} {_bitsandbytes(section)}" if name == "bitsandbytes" else name
        raise CheckpointError(
            f"{values.path}: weights already quantized by {shorten(kind)} are not supported; supported: "
            f"{', '.join(SUPPORTED)}; {WAY_OUT}"
        )
    return READERS[name](section)


def _section(values: JsonFile) -> JsonFile:
    """Returns the settings, of config.json or of a file beside it; empty where there are none."""
    for name in SECTIONS:
        if (section := values.section(name)).content:
            return section
    for name, method in FILES.items():
        section = JsonFile(values.path.parent / name, optional=True)
        if section.content:
            return JsonFile(section.path, content={"quant_method": method} | section.content)
    return JsonFile(values.path, content={})


def parts_of_modules(
    stored: Mapping[str, StoredPart], method: Method, read: Callable[[str], np.ndarray]
) -> Iterator[tuple[Parts, Layout]]:
    """Yields the parts of each quantized linear layer, and their layout.

    Args:
      stored: all tensors by name.
      method: the layouts that there may be.
      read: reads a tensor.

    Raises:
      CheckpointError: the part that tells the layout is missing.
    """
    modules: dict[str, dict[str, StoredPart]] = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if part in method.layouts or part in method.parts:
            modules.setdefault(module, {})[part] = tensor
    for module, found in modules.items():
        markers = [part for part in method.layouts if part in found]
        if len(markers) == len(found) and all(found[part].kind in FLOAT_TYPES for part in markers):
            continue  # a layer that is not quantized, or a norm
        parts = Parts(module, found, functools.partial(_read_part, read, module))
        if not markers:
            raise parts.fail(next(iter(method.layouts)), "is missing")
        yield parts, method.layouts[markers[0]]


def _read_part(read: Callable[[str], np.ndarray], module: str, part: str) -> np.ndarray:
    return read(f"{module}.{part}")


def _bitsandbytes(section: JsonFile) -> str:
    """Returns the name of a format of bitsandbytes."""
    if section.content.get("load_in_8bit") or section.content.get("_load_in_8bit"):
        return "int8"
    return section.text("bnb_4bit_quant_type") or "fp4"


def _choice(section: JsonFile, key: str, given: Any, accepted: tuple[Any, ...]) -> None:
    """Raises CheckpointError where a setting is not among those accepted."""
    if given not in accepted:
        raise CheckpointError(
            f"{section.path}: quantization: {key!r} {shorten(given)} is not supported; supported: "
            f"{', '.join(map(repr, accepted))}; {WAY_OUT}"
        )


def _group_size(section: JsonFile, given: Any) -> int:
    """Returns a group size; -1 means that one group has all weights of a channel."""
    return -1 if given == -1 else check_integer(given, f"{section.path}: quantization: 'group_size'")


def _read_gptq(section: JsonFile) -> Method:
    bits = section.integer("bits")
    _choice(section, "bits", bits, (4, 8))
    version = section.text("checkpoint_format") or "gptq"
    _choice(section, "checkpoint_format", version, ("gptq", "gptq_v2"))
    layout = GPTQ(bits, _group_size(section, section.content.get("group_size", 128)), version == "gptq")
    return Method({"qweight": layout}, ("qzeros", "scales", "g_idx"))


def _read_awq(section: JsonFile) -> Method:
    bits = section.content.get("bits", section.content.get("w_bit", 4))
    _choice(section, "bits", bits, (4,))
    _choice(section, "version", (section.text("version") or "gemm").lower(), ("gemm",))
    _choice(section, "zero_point", section.boolean("zero_point", True), (True,))
    size = section.content.get("group_size", section.content.get("q_group_size", 128))
    return Method({"qweight": AWQ(_group_size(section, size))}, ("qzeros", "scales"))


def _read_fp8(section: JsonFile) -> Method:
    given = section.content.get("weight_block_size")
    if given is None:
        return _scaled(Scaled(tuple(FLOAT8)))
    if not isinstance(given, list) or len(given) != 2:
        raise CheckpointError(
            f"{section.path}: quantization: 'weight_block_size' must be two integers, got {shorten(given)}; take the "
            "original file"
        )
    rows, columns = (check_integer(size, f"{section.path}: quantization: 'weight_block_size'") for size in given)
    return _scaled(Scaled(tuple(FLOAT8), (rows, columns)))


def _scaled(layout: Layout) -> Method:
    return Method({"weight": layout}, ("weight_scale", "weight_scale_inv", "weight_zero_point", *UNUSED))


def _read_compressed(section: JsonFile) -> Method:
    """Reads the settings of compressed-tensors; groups of layers must agree in what decides the layout."""
    sparsity = section.section("sparsity_config").text("format")
    _choice(section, "sparsity_config.format", sparsity, (None, "dense"))
    groups = section.section("config_groups")
    if not groups.content:
        raise CheckpointError(f"{section.path}: quantization: 'config_groups' is missing; take the original file")
    methods = {}
    for name in groups.content:
        group = groups.section(name)
        method = _read_group(section, group, group.text("format") or section.text("format") or "")
        methods[str(method)] = method
    if len(methods) > 1:
        raise CheckpointError(
            f"{section.path}: quantization: 'config_groups' with different formats of weights are not supported; "
            f"supported: one for all; {WAY_OUT}"
        )
    return next(iter(methods.values()))


def _read_group(section: JsonFile, group: JsonFile, name: str) -> Method:
    """Reads the settings of the layers of one group."""
    accepted = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized")
    _choice(section, "format", name, accepted)
    parts = ("weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", *UNUSED)
    if name == "mxfp4-pack-quantized":
        return Method({"weight_packed": PackedMXFP4()}, parts)
    weights = group.section("weights")
    strategy = weights.text("strategy") or "tensor"
    _choice(section, "weights.strategy", strategy, ("tensor", "channel", "group", "block"))
    bits = weights.integer("num_bits", 8)
    _choice(section, "weights.num_bits", bits, (4, 8) if name == "pack-quantized" else (8,))
    if name == "pack-quantized":
        _choice(section, "weights.type", weights.text("type") or "int", ("int",))
        _choice(section, "weights.strategy", strategy, ("channel", "group"))
        size = _group_size(section, weights.content.get("group_size")) if strategy == "group" else -1
        return Method({"weight_packed": Packed(bits, None if size == -1 else size)}, parts)
    block = weights.content.get("block_structure") if strategy == "block" else None
    if strategy == "block":
        return _read_fp8(JsonFile(section.path, content={"weight_block_size": block}))
    return _scaled(Scaled((*FLOAT8, "I8")))


READERS: Final[Mapping[str, Callable[[JsonFile], Method]]] = {
    "gptq": _read_gptq,
    "awq": _read_awq,
    "compressed-tensors": _read_compressed,
    "fp8": _read_fp8,
    "fbgemm_fp8": lambda _: _scaled(Scaled(tuple(FLOAT8))),
}
"""Functions that read the settings of each method."""
