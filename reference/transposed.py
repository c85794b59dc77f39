"""Quantized weights whose matrices are `[out, in]` for the caller, whatever the order in which they are stored."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import register_pytree_node_serialization

from palladion.reference.leading import MatrixStack

if TYPE_CHECKING:
    from palladion.reference.quantization import QuantizedArray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TransposedWeight(MatrixStack):
    """A QuantizedArray seen as `[..., out, in]`, for code that computes `w @ x`, as Equinox does. A pytree.

    Attributes:
      matrix: the weights, logically `[..., in, out]`; `T` and `mT` give it back.
    """

    matrix: QuantizedArray

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, `(..., out, in)`."""
        *leading, in_features, out_features = self.matrix.shape
        return (*leading, out_features, in_features)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype that the weights count as: that of the scales, float32 for mxfp4."""
        return self.matrix.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales, zero points and minimums."""
        return self.matrix.nbytes

    @property
    def mT(self) -> QuantizedArray:  # noqa: N802
        """The matrices as `[..., in, out]`."""
        return self.matrix

    @property
    def T(self) -> QuantizedArray:  # noqa: N802
        """The matrix as `[in, out]`. A stack has `mT` only."""
        self.check_is_matrix()
        return self.matrix

    def select(self, key: tuple[Any, ...]) -> TransposedWeight:
        """Returns the matrices that an index of leading dimensions selects; `w[key]` checks the index first."""
        return TransposedWeight(self.matrix.select(key))

    def __matmul__(self, x: Any) -> jax.Array:
        """Computes w @ x for x `[in]` or `[..., in, columns]`, by `palladion.quantized_matmul`."""
        if np.ndim(x) < 2:
            return x @ self.matrix
        return jnp.swapaxes(jnp.swapaxes(x, -1, -2) @ self.matrix, -1, -2)

    def __rmatmul__(self, x: Any) -> NoReturn:
        raise TypeError(
            f"x @ w: a TransposedWeight is [out, in], here {self.shape}, and stands on the left: w @ x; x @ w.T "
            "multiplies by the matrix [in, out]"
        )

    def __repr__(self) -> str:
        return f"{self.matrix!r}.mT"


register_pytree_node_serialization(
    TransposedWeight,
    serialized_name="palladion.TransposedWeight",
    serialize_auxdata=lambda _: b"",
    deserialize_auxdata=lambda _: (),
    from_children=lambda _, parts: TransposedWeight(*parts),
)
