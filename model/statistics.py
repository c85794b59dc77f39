"""Times of a generation, compared with the bytes that its steps had to read."""

from __future__ import annotations

import dataclasses
import resource
import sys

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """Times and traffic of one run, all sequences together.

    Attributes:
      sequences: number of prompts in the batch.
      prompt_tokens: tokens in the prompts.
      generated_tokens: tokens generated.
      decode_steps: decode steps, which follow the first token of each sequence.
      compile_seconds: time spent compiling; 0 where everything was compiled before.
      prefill_seconds: time to the first token of every sequence, without compilation.
      decode_seconds: time from the first token to the last.
      weight_bytes: bytes of weights that a decode step must read.
      cache_bytes: bytes of the filled cache that a decode step must read, averaged over the steps.
      memory_bandwidth: bytes per second at which this device reads memory, measured.
      peak_memory: peak memory of the process (on a CPU) or the device so far, in bytes; None where it is not known.
    """

    sequences: int
    prompt_tokens: int
    generated_tokens: int
    decode_steps: int
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    weight_bytes: int
    cache_bytes: int
    memory_bandwidth: float
    peak_memory: int | None

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """Decoded tokens per second; 0 if there was no decode step."""
        decoded = self.generated_tokens - self.sequences
        return decoded / self.decode_seconds if self.decode_steps else 0.0

    @property
    def bytes_per_step(self) -> int:
        """Bytes that a decode step must read."""
        return self.weight_bytes + self.cache_bytes

    @property
    def achieved_bandwidth(self) -> float:
        """Bytes that had to be read per second of decoding; 0 if there was no decode step."""
        return self.bytes_per_step * self.decode_steps / self.decode_seconds if self.decode_steps else 0.0

    def __str__(self) -> str:
        batch = f" in {self.sequences} sequences" if self.sequences > 1 else ""
        share = self.achieved_bandwidth / self.memory_bandwidth
        decoding: tuple[str, ...] = (
            f"generated  {self.generated_tokens:6d} tokens, {self.decode_rate:,.1f} tokens/s",
            f"each step  {self.bytes_per_step / 1e6:6.1f} MB must be read: {self.weight_bytes / 1e6:.1f} of "
            f"weights, {self.cache_bytes / 1e6:.1f} of KV cache",
            f"bandwidth  {self.achieved_bandwidth / 1e9:6.1f} GB/s achieved, {share:.0%} of the "
            f"{self.memory_bandwidth / 1e9:.1f} GB/s at which this machine reads memory",
        )
        if not self.decode_steps:
            decoding = (f"generated  {self.generated_tokens:6d} tokens, with the prompt: no step to measure followed",)
        peak = "not known" if self.peak_memory is None else f"{self.peak_memory / 1e6:,.0f} MB"
        return "\n".join(
            (
                f"prompt     {self.prompt_tokens:6d} tokens{batch}, first token after {self.prefill_seconds:.3f} s "
                f"({self.prefill_rate:,.0f} tokens/s)",
                *decoding,
                f"memory     {peak} at the peak; compiled in {self.compile_seconds:.1f} s",
            )
        )


def peak_memory() -> int | None:
    """Returns the peak memory of the device, or on a CPU of this process, in bytes; None where it is not known."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return resident if sys.platform == "darwin" else resident * 1024
    stats = device.memory_stats() or {}
    return stats.get("peak_bytes_in_use")
