"""Palladion: Pallas kernels for LLM decoding, their pure-XLA references, and a minimal LLM that runs on either."""
