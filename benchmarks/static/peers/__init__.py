"""Ours beside others' kernels: the same shapes, the same compiler, the same static instrument. Estimates only."""
