"""What torch offers, on the CPU or on the GPU that JAX works on."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from palladion.benchmarks.measure.peers import Contender, Peer, first, plain_attention, seen
from palladion.benchmarks.measure.timing import copies_of
from palladion.kernels.devices import target_gpu
from palladion.reference import dequantize
from palladion.reference.bits import bits_dtype
from palladion.reference.platforms import target_platform
from palladion.reference.quantization import codes_of

INNER_K_TILES: Final = 8
"""Of torch's 4-bit layout."""

FLOAT8_ROWS: Final = 16
"""Of what torch's float8 product takes, a multiple."""


class TorchRunner:
    """A function of tensors; on a GPU its calls are a CUDA graph where it can be one, timed by the device's events.

    Args:
      name: of the contender.
      function: of tensors.
      tensors: its arguments; copies are made, as many as no cache holds.
    """

    def __init__(self, name: str, function: Callable[..., Any], tensors: tuple[Any, ...]) -> None:
        import torch

        self.name = name
        self._torch = torch
        self._function = function
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self._copies = [tuple(tensor.clone() for tensor in tensors) for _ in range(copies_of(nbytes))]
        self._next = 0
        self._graph: Any = None
        with torch.inference_mode():
            self.result = function(*self._copies[0])
            if target_platform() == "gpu":
                for copy in self._copies:
                    function(*copy)
                torch.cuda.synchronize()
                self._graph = self._captured()

    def _captured(self) -> Any:
        graph = self._torch.cuda.CUDAGraph()
        try:
            with self._torch.cuda.graph(graph):
                for copy in self._copies:
                    self._function(*copy)
        except RuntimeError:  # what synchronizes cannot be captured: its calls are made one by one
            self._torch.cuda.synchronize()
            return None
        return graph

    def seconds(self, calls: int) -> float:
        """As `timing.Runner` has it."""
        with self._torch.inference_mode():
            return self._on_gpu(calls) if target_platform() == "gpu" else self._on_cpu(calls)

    def _call(self) -> None:
        self._function(*self._copies[self._next])
        self._next = (self._next + 1) % len(self._copies)

    def _on_cpu(self, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            self._call()
        return (time.perf_counter() - start) / calls

    def _on_gpu(self, calls: int) -> float:
        events = [self._torch.cuda.Event(enable_timing=True) for _ in range(2)]
        rounds = -(-calls // len(self._copies))
        events[0].record()
        if self._graph is not None:
            for _ in range(rounds):
                self._graph.replay()
            calls = rounds * len(self._copies)
        else:
            for _ in range(calls):
                self._call()
        events[1].record()
        self._torch.cuda.synchronize()
        return float(events[0].elapsed_time(events[1])) / 1e3 / calls


def needs_torch(*, gpu: bool = False) -> Callable[[], str | None]:
    """What a peer that needs torch, on a GPU or anywhere, lacks on this machine."""

    def missing() -> str | None:
        if importlib.util.find_spec("torch") is None:
            return "torch is not installed"
        import torch

        torch.set_num_threads(os.cpu_count() or 1)
        platform = target_platform()
        if platform == "gpu" and not torch.cuda.is_available():
            return "this torch has no CUDA"
        if platform == "tpu" or (gpu and platform != "gpu"):
            return "runs on a GPU only" if gpu else "torch does not run on a TPU here"
        return None

    return missing


def as_tensor(array: Any) -> Any:
    """A jax or NumPy array as a tensor on the same device, by its bits: torch knows the same narrow floats."""
    import torch

    array = jnp.asarray(array)
    bits = jax.lax.bitcast_convert_type(array, bits_dtype(array.dtype))
    host = torch.from_numpy(np.array(bits))
    tensor = host if bits.dtype == array.dtype else host.view(getattr(torch, array.dtype.name))
    return tensor.to("cuda") if target_platform() == "gpu" else tensor


def as_array(tensor: Any, dtype: str) -> np.ndarray:
    """A result of torch as the array that it stands for."""
    import torch

    return np.asarray(tensor.detach().to(torch.float32).cpu().numpy()).astype(jnp.dtype(dtype))


def _contender(name: str, function: Callable[..., Any], tensors: tuple[Any, ...], dtype: str) -> Contender:
    runner = TorchRunner(name, function, tensors)
    return Contender(runner, as_array(runner.result, dtype))


# --- Attention ---


def dense_only(case: Any) -> str | None:
    """What attention over a plain dense cache does not cover of a case."""
    return first("pages" if case.page_size is not None else None, plain_attention(case))


def _sdpa(name: str, case: Any, inputs: Any) -> Contender:
    import torch

    scale = case.problem().scale
    tensors = [
        as_tensor(jnp.swapaxes(inputs.q, 1, 2)),
        *(as_tensor(seen(x, inputs.lengths)) for x in (inputs.k, inputs.v)),
    ]
    if min(case.filled) < case.max_len:
        tensors.append(
            as_tensor(np.arange(case.max_len)[None, None, None] < np.asarray(case.filled)[:, None, None, None])
        )

    def attend(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=case.q_heads != case.kv_heads)

    runner = TorchRunner(name, attend, tuple(tensors))
    return Contender(runner, as_array(runner.result, case.dtype).swapaxes(1, 2))


def _flex(name: str, case: Any, inputs: Any) -> Contender:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    scale, compiled = case.problem().scale, torch.compile(flex_attention)
    lengths = as_tensor(np.asarray(case.filled, np.int32))
    ragged = min(case.filled) < case.max_len

    def visible(b: Any, h: Any, q_index: Any, kv_index: Any) -> Any:
        del h, q_index
        return kv_index < lengths[b]

    mask = create_block_mask(visible, case.batch, None, 1, case.max_len, device="cuda") if ragged else None

    def attend(q: Any, k: Any, v: Any) -> Any:
        return compiled(q, k, v, scale=scale, block_mask=mask, enable_gqa=case.q_heads != case.kv_heads)

    tensors = (
        as_tensor(jnp.swapaxes(inputs.q, 1, 2)),
        *(as_tensor(seen(x, inputs.lengths)) for x in (inputs.k, inputs.v)),
    )
    runner = TorchRunner(name, attend, tensors)
    return Contender(runner, as_array(runner.result, case.dtype).swapaxes(1, 2))


# --- Products ---


def _finish(case: Any) -> Callable[[Any], Any]:
    """Activation and gate, as torch has them: functions of their own."""
    import torch

    functional = torch.nn.functional
    activations: dict[Any, Callable[[Any], Any]] = {
        None: lambda y: y,
        jax.nn.silu: functional.silu,
        jax.nn.relu: functional.relu,
        jax.nn.gelu: lambda y: functional.gelu(y, approximate="tanh"),
    }
    activation = activations[case.activation]

    def finish(y: Any) -> Any:
        if not case.gated:
            return activation(y)
        gate, up = y.chunk(2, dim=-1)
        return activation(gate) * up

    return finish


def _product(case: Any) -> str | None:
    """What of a case torch's products do not cover."""
    known = (None, jax.nn.silu, jax.nn.relu, jax.nn.gelu)
    return first(
        "a stack of layers" if case.num_layers is not None else None,
        "a bias" if case.bias else None,
        "another activation" if case.activation not in known else None,
        "another dtype of the result" if (case.out_dtype or case.dtype) != case.dtype else None,
    )


def _weight_only(case: Any) -> str | None:
    return first("quantized activations" if case.quantize_x is not None else None, _product(case))


def _linear(name: str, case: Any, inputs: Any) -> Contender:
    import torch

    finish = _finish(case)
    weight = as_tensor(dequantize(inputs.w, jnp.dtype(case.dtype)).T)  # [out, in]
    return _contender(
        name,
        lambda x, w: finish(torch.nn.functional.linear(x, w)),
        (as_tensor(inputs.x), weight.contiguous()),
        case.dtype,
    )


def _only(scheme: Callable[[str], bool], what: str) -> Callable[[Any], str | None]:
    def refuses(case: Any) -> str | None:
        return first(
            None if scheme(case.scheme) else f"{case.scheme}: {what} only",
            "activations that are not bfloat16" if case.dtype != "bfloat16" else None,
            _weight_only(case),
        )

    return refuses


def _int8(name: str, case: Any, inputs: Any) -> Contender:
    import torch

    finish = _finish(case)
    codes = as_tensor(inputs.w.values.T).contiguous()  # [out, in]
    scales = as_tensor(inputs.w.scales[0].astype(jnp.bfloat16))
    product = torch._weight_int8pack_mm
    return _contender(name, lambda x, w, s: finish(product(x, w, s)), (as_tensor(inputs.x), codes, scales), case.dtype)


def _int4(name: str, case: Any, inputs: Any) -> Contender:
    import torch

    finish, group = _finish(case), inputs.w.scheme.group_size
    codes = as_tensor(np.asarray(codes_of(inputs.w)).T.astype(np.int32)).contiguous()  # [out, in], 0 to 15
    scales = as_tensor(inputs.w.scales.astype(jnp.bfloat16))  # [groups, out]
    factors = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()
    if target_platform() == "gpu":
        packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), INNER_K_TILES)
        product = torch._weight_int4pack_mm
    else:
        packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        product = torch._weight_int4pack_mm_for_cpu
    return _contender(
        name, lambda x, w, s: finish(product(x, w, group, s)), (as_tensor(inputs.x), packed, factors), case.dtype
    )


def _float8_missing() -> str | None:
    gpu = target_gpu()
    return first(needs_torch(gpu=True)(), None if gpu is None or gpu.float8 else f"{gpu.name} has no float8")


def _float8_refuses(case: Any) -> str | None:
    both = case.scheme == "float8_e4m3fn" and case.quantize_x == "float8_e4m3fn"
    return first(None if both else "float8 weights and activations only", _product(case))


def _float8(name: str, case: Any, inputs: Any) -> Contender:
    import torch

    finish, largest = _finish(case), float(jnp.finfo(jnp.float8_e4m3fn).max)
    weight = as_tensor(inputs.w.values.T).contiguous()  # [out, in], taken as its transpose, column-major
    scales = as_tensor(inputs.w.scales.astype(jnp.float32))  # [1, out]
    padding = -case.rows % FLOAT8_ROWS

    def multiply(x: Any, w: Any, w_scale: Any) -> Any:
        x_scale = x.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / largest
        codes = (x.float() / x_scale).to(torch.float8_e4m3fn)
        out = torch._scaled_mm(codes, w.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16)
        return finish(out)[: case.rows]

    x = torch.nn.functional.pad(as_tensor(inputs.x), (0, 0, 0, padding))
    return _contender(name, multiply, (x, weight, scales), case.dtype)


def _groups(scheme: str) -> bool:
    return scheme in ("int4-g32", "int4-g64", "int4-g128")


PEERS: Final = (
    Peer("torch-sdpa", "decode_attention", needs_torch(), dense_only, _sdpa),
    Peer("torch-flex", "decode_attention", needs_torch(gpu=True), dense_only, _flex),
    Peer("torch-linear", "quantized_matmul", needs_torch(), _weight_only, _linear),
    Peer("torch-int8", "quantized_matmul", needs_torch(), _only(lambda s: s == "int8", "int8 per channel"), _int8),
    Peer("torch-int4", "quantized_matmul", needs_torch(), _only(_groups, "int4 in groups, symmetric"), _int4),
    Peer("torch-float8", "quantized_matmul", _float8_missing, _float8_refuses, _float8),
)
"""`torch-linear` has dense weights in the dtype of x; on a GPU it is cuBLAS."""
