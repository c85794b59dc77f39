"""Measurement of operations and models on this machine: accuracy and time."""
