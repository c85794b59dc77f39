"""Benchmarks: how fast each step is, beside what it must read and beside the peers."""
