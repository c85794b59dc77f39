"""The line that says what became of a checkpoint's weights while they were loaded."""

from __future__ import annotations

from palladion.model.checkpoint_reader import StoredTensor
from palladion.model.parameters import Weight
from palladion.reference.quantization import QuantizedArray


class WeightSummary:
    """Collects the formats that weights have in a file, and the ones that they are executed in."""

    def __init__(self) -> None:
        self._changes: dict[str, None] = {}  # in the order in which they were seen

    def add(self, tensor: StoredTensor, weight: Weight, kept: bool) -> None:
        """Notes a weight.

        Args:
          tensor: the weight in the file.
          weight: what it was read as.
          kept: whether its own quantization was kept, without loss.
        """
        if not tensor.format:
            return
        if kept and isinstance(weight, QuantizedArray):
            change = f"as {weight.scheme} without loss"
        elif isinstance(weight, QuantizedArray):
            change = f"quantized again to {weight.scheme}"
        else:
            rounded = "" if weight.dtype == "float32" else ", rounded"
            change = f"dequantized to {weight.dtype.name}{rounded}"
        self._changes[f"{tensor.format} {change}"] = None

    def text(self, stored_bytes: int, step_bytes: int) -> str:
        """Returns the line.

        Args:
          stored_bytes: size of the weights in the file.
          step_bytes: bytes of weights that a decode step of one sequence reads.
        """
        changes = f": {'; '.join(self._changes)}" if self._changes else ""
        return f"weights of {stored_bytes / 1e6:.2f} MB in the file, {step_bytes / 1e6:.2f} MB read by a step{changes}"
