"""The GPU kernel of append_qkv, in Triton. Its block sizes are those of append_kv."""
