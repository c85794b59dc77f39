"""The study of sums, dot products and attention, on synthetic numbers and on those of a model."""

from __future__ import annotations

from typing import Any

import numpy as np

from palladion.benchmarks.numerics import language_model, sums
from palladion.benchmarks.numerics.rounding import Array


def study_sums(model: str | None) -> dict[str, Any]:
    """Studies sums, dot products and attention: of sines and normal numbers, and of a model's if one is given."""
    vectors = {
        "sin, in order": sums.sines(),
        "sin, shuffled": sums.shuffled_sines(),
        "normal": np.random.default_rng(3).standard_normal(sums.LENGTH, np.float32),
    }
    pairs = {"normal": sums.normal_pairs()}
    if model is not None:
        subject = language_model.LanguageModel(model)
        x, w = real_pairs(subject)
        pairs["SmolLM2, MLP"] = (x, w)
        vectors["SmolLM2 weights"] = w.ravel()[: sums.LENGTH]
        vectors["SmolLM2 activations"] = x.ravel()[: sums.LENGTH]
        vectors["SmolLM2 products"] = (x * w).ravel()[: sums.LENGTH]
    return {"sums": sums.study_sums(vectors), "dots": sums.study_dots(pairs), "attention": sums.study_attention()}


def real_pairs(model: language_model.LanguageModel) -> tuple[Array, Array]:
    """Returns what the down projections multiply: activations of a token and the weights of an output channel.

    A layer has fewer of them than the longest dot product that is studied, so layers are concatenated.

    Returns:
      Two arrays `[PAIRS, longest]` float32.
    """
    layers = model.parameters.layers
    assert not isinstance(layers, tuple)
    inputs = np.stack([np.asarray(x) for name, x in model.activations() if name == "down"])  # [layers, tokens, in]
    weights = np.asarray(layers.down)  # [layers, in, out]
    generator = np.random.default_rng(4)
    tokens = generator.integers(0, inputs.shape[1], sums.PAIRS)
    channels = generator.integers(0, weights.shape[2], sums.PAIRS)
    longest = sums.DOT_LENGTHS[-1]
    x = inputs[:, tokens].transpose(1, 0, 2).reshape(sums.PAIRS, -1)[:, :longest]
    w = weights[:, :, channels].transpose(2, 0, 1).reshape(sums.PAIRS, -1)[:, :longest]
    return np.ascontiguousarray(x), np.ascontiguousarray(w)
