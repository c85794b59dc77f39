"""Edges of the engine: random numbers of successive steps, and the last position of its cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from small_checkpoints import Type, gguf_file

from palladion.model import engine as engine_module
from palladion.model.generation import RunOptions
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


@pytest.fixture(params=["cpu", "gpu"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles the decode loop of a CPU, which ends early, or of a GPU, which does not."""
    monkeypatch.setattr(engine_module, "target_platform", lambda: request.param)


@pytest.mark.usefixtures("loop")
def test_the_cache_is_full_with_its_last_place_and_not_before(path: Path):
    generator = Generator.load(path, max_len=16)
    # The last token of an answer is not cached: 3 tokens of the prompt and 13 more fill the cache.
    for max_new_tokens, stopped_by in ((13, "max_new_tokens"), (14, "cache full"), (15, "cache full")):
        (generation,), _ = generator.generate([[1, 2, 3]], max_new_tokens=max_new_tokens, ignore_stop_tokens=True)
        assert len(generation.tokens) == min(max_new_tokens, 14)
        assert generation.stopped_by == stopped_by


@pytest.mark.usefixtures("loop")
def test_steps_that_do_not_count_leave_no_trace(path: Path):
    generator = Generator.load(path, max_len=64)
    sampling, prompts = Sampling(), [[1, 2, 3], [4, 5, 6, 7, 8]]
    engine = generator._engine(2, RunOptions())
    keys = engine.keys(0)
    output, state = engine.decode(engine.prefill(prompts, keys, sampling), 7, keys, sampling)
    expected, lengths = np.asarray(output.tokens)[:7], np.asarray(state.lengths)
    assert expected.min() >= 0
    state = engine.prefill(prompts, keys, sampling)
    parts = []
    for steps in (2, 1, 4):
        output, state = engine.decode(state, steps, keys, sampling)
        assert (np.asarray(output.tokens)[steps:] == -1).all()
        parts.append(np.asarray(output.tokens)[:steps])
    np.testing.assert_array_equal(np.concatenate(parts), expected)
    np.testing.assert_array_equal(state.lengths, lengths)


@pytest.mark.usefixtures("loop")
def test_a_sequence_that_stops_stays_stopped(path: Path):
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    generator = Generator.load(path, max_len=64)
    free, _ = generator.generate(prompts, max_new_tokens=30, ignore_stop_tokens=True)
    stop = next(token for token in free[0].tokens[2:] if token not in free[1].tokens)
    config = dataclasses.replace(generator.config, stop_tokens=(stop,))
    stopping = Generator(dataclasses.replace(generator.checkpoint, config=config), max_len=64)
    (first, second), statistics = stopping.generate(prompts, max_new_tokens=30)
    assert first.tokens == free[0].tokens[: free[0].tokens.index(stop) + 1]
    assert second.tokens == free[1].tokens
    assert statistics.decode_steps == 29
