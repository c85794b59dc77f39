"""Commands that run a model: generate, chat and quantize."""
