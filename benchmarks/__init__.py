"""Benchmarks: commands, measurements, static examinations of compiled kernels, and studies of numerics."""
