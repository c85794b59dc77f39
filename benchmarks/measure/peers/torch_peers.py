"""Peers that come with torch, on the CPU or on the GPU that JAX uses."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from palladion.benchmarks.measure.peers import Peer, first_reason, unsupported_dense, zero_dead_tokens
from palladion.benchmarks.measure.timing import CallRunner, copies_of
from palladion.kernels.decode_attention import Inputs as AttentionInputs
from palladion.kernels.decode_attention.cases import Case as AttentionCase
from palladion.kernels.devices import target_gpu
from palladion.kernels.quantized_matmul.cases import Case as MatmulCase
from palladion.reference import dequantize
from palladion.reference.bits import bits_dtype
from palladion.reference.platforms import target_platform
from palladion.reference.quantization import unpack_codes

INNER_K_TILES: Final = 8
"""Parameter of torch's 4-bit layout on a GPU."""

FLOAT8_ROWS: Final = 16
"""Rows of torch's float8 product must be a multiple of this."""


class TorchRunner:
    """A function of tensors. On a GPU its calls are a CUDA graph if it can be captured, timed by CUDA events.

    Args:
      name: the contender's name.
      function: the function.
      tensors: its arguments; copies are made, more than a cache holds.
      as_result: brings the function's result into the operation's form.

    Attributes:
      result: result of the first call, in the operation's form.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        tensors: tuple[Any, ...],
        as_result: Callable[[Any], np.ndarray],
    ) -> None:
        import torch

        self.name = name
        self._torch = torch
        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self._copies = [tuple(tensor.clone() for tensor in tensors) for _ in range(copies_of(nbytes))]
        self._function = function
        self._eager = CallRunner(name, lambda copy: function(*copy), self._copies)
        self._graph: Any = None
        with torch.inference_mode():
            self.result = as_result(function(*self._copies[0]))
            if target_platform() == "gpu":
                self._call_all()
                torch.cuda.synchronize()
                self._graph = self._captured()

    def _call_all(self) -> None:
        for copy in self._copies:
            self._function(*copy)

    def _captured(self) -> Any:
        """Returns a CUDA graph of a call on every copy; None where the function synchronizes."""
        graph = self._torch.cuda.CUDAGraph()
        try:
            with self._torch.cuda.graph(graph):
                self._call_all()
        except RuntimeError:
            self._torch.cuda.synchronize()
            return None
        return graph

    def run(self, calls: int) -> int:
        """Implements `Runner.run`."""
        with self._torch.inference_mode():
            calls = self._launch(calls)
            if target_platform() == "gpu":
                self._torch.cuda.synchronize()
        return calls

    def seconds(self, calls: int) -> float:
        """Implements `Runner.seconds`."""
        if target_platform() != "gpu":
            with self._torch.inference_mode():
                return self._eager.seconds(calls)
        events = [self._torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        with self._torch.inference_mode():
            calls = self._launch(calls)
        events[1].record()
        self._torch.cuda.synchronize()
        return float(events[0].elapsed_time(events[1])) / 1e3 / calls

    def _launch(self, calls: int) -> int:
        """Launches at least `calls` calls without waiting for them; returns how many."""
        if self._graph is None:
            self._eager.call(calls)
            return calls
        rounds = -(-calls // len(self._copies))
        for _ in range(rounds):
            self._graph.replay()
        return rounds * len(self._copies)


def needs_torch(*, gpu: bool = False) -> Callable[[], str | None]:
    """Returns a `Peer.unavailable` for peers that need torch, on a GPU or on any platform."""

    def unavailable() -> str | None:
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

    return unavailable


def as_tensor(array: Any) -> Any:
    """Copies a jax or NumPy array to a tensor on the same device, bit by bit; torch has the same narrow floats."""
    import torch

    array = jnp.asarray(array)
    bits = jax.lax.bitcast_convert_type(array, bits_dtype(array.dtype))
    host = torch.from_numpy(np.array(bits))
    tensor = host if bits.dtype == array.dtype else host.view(getattr(torch, array.dtype.name))
    return tensor.to("cuda") if target_platform() == "gpu" else tensor


def as_array(tensor: Any, dtype: str) -> np.ndarray:
    """Copies a tensor to a NumPy array of a dtype."""
    import torch

    return np.asarray(tensor.detach().to(torch.float32).cpu().numpy()).astype(jnp.dtype(dtype))


# --- Attention ---


def _sdpa(name: str, case: AttentionCase, inputs: AttentionInputs) -> TorchRunner:
    import torch

    scale = case.problem().scale
    tensors = [
        as_tensor(jnp.swapaxes(inputs.q, 1, 2)),
        *(as_tensor(zero_dead_tokens(x, inputs.lengths)) for x in (inputs.k, inputs.v)),
    ]
    if min(case.filled) < case.max_len:
        tensors.append(
            as_tensor(np.arange(case.max_len)[None, None, None] < np.asarray(case.filled)[:, None, None, None])
        )

    def attend(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=case.q_heads != case.kv_heads)

    return TorchRunner(name, attend, tuple(tensors), lambda out: as_array(out, case.dtype).swapaxes(1, 2))


def _flex(name: str, case: AttentionCase, inputs: AttentionInputs) -> TorchRunner:
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
        *(as_tensor(zero_dead_tokens(x, inputs.lengths)) for x in (inputs.k, inputs.v)),
    )
    return TorchRunner(name, attend, tensors, lambda out: as_array(out, case.dtype).swapaxes(1, 2))


# --- Products ---


def finish_of(case: MatmulCase) -> Callable[[Any], Any]:
    """Returns the activation and the gate as torch has them, which are functions of their own."""
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


def _unsupported_product(case: MatmulCase) -> str | None:
    """Returns why torch's products do not cover a case."""
    known = (None, jax.nn.silu, jax.nn.relu, jax.nn.gelu)
    return first_reason(
        "a stack of layers" if case.num_layers is not None else None,
        "a bias" if case.bias else None,
        "another activation" if case.activation not in known else None,
        "another dtype of the result" if (case.out_dtype or case.dtype) != case.dtype else None,
    )


def _unsupported_weight_only(case: MatmulCase) -> str | None:
    return first_reason("quantized activations" if case.quantize_x is not None else None, _unsupported_product(case))


def _linear(name: str, case: MatmulCase, inputs: Any) -> TorchRunner:
    import torch

    finish = finish_of(case)
    weight = as_tensor(dequantize(inputs.w, jnp.dtype(case.dtype)).T)  # [out, in]
    return TorchRunner(
        name,
        lambda x, w: finish(torch.nn.functional.linear(x, w)),
        (as_tensor(inputs.x), weight.contiguous()),
        lambda out: as_array(out, case.dtype),
    )


def only(scheme: Callable[[str], bool], what: str) -> Callable[[Any], str | None]:
    """Returns a `Peer.unsupported` for a product of bfloat16 activations with weights of some schemes."""

    def unsupported(case: MatmulCase) -> str | None:
        return first_reason(
            None if scheme(case.scheme) else f"{case.scheme}: {what} only",
            "activations that are not bfloat16" if case.dtype != "bfloat16" else None,
            _unsupported_weight_only(case),
        )

    return unsupported


def _int8(name: str, case: MatmulCase, inputs: Any) -> TorchRunner:
    import torch

    finish, w = finish_of(case), inputs.w.with_order("out_in")
    codes = as_tensor(w.values)  # [out, in]
    scales = as_tensor(w.scales[:, 0].astype(jnp.bfloat16))
    product = torch._weight_int8pack_mm
    return TorchRunner(
        name,
        lambda x, w, s: finish(product(x, w, s)),
        (as_tensor(inputs.x), codes, scales),
        lambda out: as_array(out, case.dtype),
    )


def _int4(name: str, case: MatmulCase, inputs: Any) -> TorchRunner:
    import torch

    finish, w = finish_of(case), inputs.w.with_order("in_out")
    group = w.scheme.group_size
    codes = as_tensor(np.asarray(unpack_codes(w)).T.astype(np.int32)).contiguous()  # [out, in], 0 to 15
    scales = as_tensor(w.scales.astype(jnp.bfloat16))  # [groups, out]
    factors = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()
    if target_platform() == "gpu":
        packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), INNER_K_TILES)
        product = torch._weight_int4pack_mm
    else:
        packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        product = torch._weight_int4pack_mm_for_cpu
    return TorchRunner(
        name,
        lambda x, w, s: finish(product(x, w, group, s)),
        (as_tensor(inputs.x), packed, factors),
        lambda out: as_array(out, case.dtype),
    )


def _float8_unavailable() -> str | None:
    gpu = target_gpu()
    return first_reason(needs_torch(gpu=True)(), None if gpu is None or gpu.float8 else f"{gpu.name} has no float8")


def _float8_unsupported(case: MatmulCase) -> str | None:
    both = case.scheme == "float8_e4m3fn" and case.quantize_x == "float8_e4m3fn"
    return first_reason(None if both else "float8 weights and activations only", _unsupported_product(case))


def _float8(name: str, case: MatmulCase, inputs: Any) -> TorchRunner:
    import torch

    finish, largest = finish_of(case), float(jnp.finfo(jnp.float8_e4m3fn).max)
    quantized = inputs.w.with_order("out_in")
    weight = as_tensor(quantized.values)  # [out, in], taken as its transpose, column-major
    scales = as_tensor(quantized.scales.T.astype(jnp.float32))  # [1, out]
    padding = -case.rows % FLOAT8_ROWS

    def multiply(x: Any, w: Any, w_scale: Any) -> Any:
        x_scale = x.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / largest
        codes = (x.float() / x_scale).to(torch.float8_e4m3fn)
        out = torch._scaled_mm(codes, w.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16)
        return finish(out)[: case.rows]

    x = torch.nn.functional.pad(as_tensor(inputs.x), (0, 0, 0, padding))
    return TorchRunner(name, multiply, (x, weight, scales), lambda out: as_array(out, case.dtype))


def in_groups(scheme: str) -> bool:
    """Returns whether a scheme has symmetric 4-bit codes in groups that other packages know."""
    return scheme in ("int4-g32", "int4-g64", "int4-g128")


PEERS: Final = (
    Peer("torch-sdpa", "decode_attention", needs_torch(), unsupported_dense, _sdpa),
    Peer("torch-flex", "decode_attention", needs_torch(gpu=True), unsupported_dense, _flex, slow=True),
    Peer("torch-linear", "quantized_matmul", needs_torch(), _unsupported_weight_only, _linear),
    Peer("torch-int8", "quantized_matmul", needs_torch(), only(lambda s: s == "int8", "int8 per channel"), _int8),
    Peer("torch-int4", "quantized_matmul", needs_torch(), only(in_groups, "int4 in groups, symmetric"), _int4),
    Peer("torch-float8", "quantized_matmul", _float8_unavailable, _float8_unsupported, _float8),
)
"""torch's implementations. "torch-linear" reads dense weights in the dtype of x; on a GPU it is cuBLAS."""
