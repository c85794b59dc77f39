"""Edges of the engine: random numbers of successive steps, and the last position of its cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_checkpoints import Type, gguf_file

from palladion.model.generator import Generator
from palladion.model.sampling import Sampling


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_file(tmp_path_factory.mktemp("model"), Type.Q8_0, tied=True)


def test_every_step_draws_anew(path: Path):
    generator = Generator.load(path, max_len=64)
    # The temperature makes all tokens equally likely: repeated random numbers would give the same token again.
    (generation,), _ = generator.generate(
        [[1, 2, 3]], max_new_tokens=40, sampling=Sampling(temperature=1e6), ignore_stop_tokens=True
    )
    assert len(set(generation.tokens)) > 20


def test_the_cache_is_full_with_its_last_place_and_not_before(path: Path):
    generator = Generator.load(path, max_len=16)
    # The last token of an answer is not cached: 3 tokens of the prompt and 13 more fill the cache.
    for max_new_tokens, stopped_by in ((13, "max_new_tokens"), (14, "cache full"), (15, "cache full")):
        (generation,), _ = generator.generate([[1, 2, 3]], max_new_tokens=max_new_tokens, ignore_stop_tokens=True)
        assert len(generation.tokens) == min(max_new_tokens, 14)
        assert generation.stopped_by == stopped_by
