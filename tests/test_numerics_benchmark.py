"""The studies of rounding: emulated arithmetic, and results that are kept, tabulated and drawn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from palladion import Scheme
from palladion.benchmarks.commands import numerics as command
from palladion.benchmarks.numerics import figures, language_model, rounding, sums, tables
from palladion.benchmarks.numerics.rounding import SumMethod
from palladion.model.config import ModelConfig
from palladion.model.parameters import Layer, Parameters
from palladion.model.transformer import empty_cache, forward


@pytest.mark.parametrize(
    ("inputs", "accumulator", "in_order", "shuffled"),
    [
        ("float32", "float32", 1.9395, 1.9395),
        ("bfloat16", "float32", 1.9409, 1.9409),
        ("bfloat16", "bfloat16", 1.984, 3.594),
        ("float32", "bfloat16", 1.703, -0.875),
    ],
)
def test_sums_of_sines_are_those_of_the_course(inputs: str, accumulator: str, in_order: float, shuffled: float):
    """The course is High Performance LLMs from First Principles, session 9; Python shuffles, with seed 0."""
    found = SumMethod(inputs, accumulator, "one after the other").sum(np.stack([sums.sines(), sums.shuffled_sines()]))
    np.testing.assert_allclose(found, [in_order, shuffled], atol=1e-3 if accumulator == "bfloat16" else 1e-4)


@pytest.mark.parametrize("order", rounding.ORDERS)
def test_every_order_adds_up_all(order: str):
    x = np.random.default_rng(0).standard_normal((3, 300), np.float32)
    dtype = "bfloat16" if order == "stochastic rounding" else "float32"
    found = SumMethod("float32", dtype, order).sum(x)
    np.testing.assert_allclose(found, x.astype(np.float64).sum(axis=1), atol=1.5 if dtype == "bfloat16" else 1e-4)


def test_compensation_and_trees_help():
    x = np.random.default_rng(0).standard_normal((8, 2000), np.float32)
    exact = x.astype(np.float64).sum(axis=1)

    def error(order: str) -> float:
        return float(np.abs(SumMethod("float32", "float32", order).sum(x) - exact).mean())

    assert error("Kahan") < error("pairwise") < 0.3 * error("one after the other")


def test_sums_of_codes_with_one_scale_do_not_depend_on_the_order():
    x = np.random.default_rng(0).standard_normal((1, 1000), np.float32)
    shuffled = x[:, random.Random(0).sample(range(1000), 1000)]
    method = SumMethod("int8", "exact", "one scale")
    np.testing.assert_array_equal(method.sum(x), method.sum(shuffled))
    assert method.sum(x) != SumMethod("int8", "exact", "scale per 128").sum(x)


def test_stochastic_rounding_is_right_on_average():
    x = np.full(20_000, 1 + 2.0**-10, np.float32)  # an eighth of the way to the next bfloat16
    found = rounding.stochastically_rounded(x, np.random.default_rng(0))
    assert set(found.tolist()) == {1.0, 1 + 2.0**-7}
    assert abs(found.mean() - x[0]) < 4 * 2.0**-7 * np.sqrt(1 / 8 * 7 / 8 / len(x))


@pytest.fixture(scope="module")
def study() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "DOT_LENGTHS", (128, 256))
        patch.setattr(sums, "CONTEXT", 1024)
        vector = np.random.default_rng(0).standard_normal(300, np.float32)
        of_sums = sums.study_sums({"sin, in order": sums.sines()[:300], "normal": vector})
        dots = sums.study_dots({"normal": tuple(part[:4, :256] for part in sums.normal_pairs())})  # type: ignore[dict-item]
        return json.loads(json.dumps({"sums": of_sums, "dots": dots, "attention": sums.study_attention()}))


def test_attention_errs_as_its_accumulators_do(study: dict[str, Any]):
    def error(accumulator: str, weights: str, block: int) -> float:
        (record,) = (
            r
            for r in study["attention"]
            if (r["accumulator"], r["weights"], r["block"], r["splits"]) == (accumulator, weights, block, 1)
        )
        return record["rms_error"]

    assert error("float32", "float32", 16) < 2e-6
    assert 2e-4 < error("float32", "bfloat16", 16) < 4e-3
    assert error("bfloat16", "bfloat16", 16) > 2 * error("bfloat16", "bfloat16", 512)


RUN = {
    "name": "int8",
    "kind": "weights",
    "tokens": 512,
    "weight_bytes": 1e8,
    "perplexity": 20.0,
    "kl": 0.01,
    "kl_standard_error": 0.001,
    "agreement": 0.9,
    "kl_by_position": [0.01, 0.02],
    "seconds": 1.0,
}


def test_results_are_tabulated_and_drawn(study: dict[str, Any], tmp_path: Path):
    pytest.importorskip("matplotlib")
    text = tables.sums_tables(study)
    assert "bfloat16 + bfloat16, one after the other" in text
    assert "accumulators float32, weights bfloat16, 1 splits" in text
    cache = RUN | {"name": "cache int8", "kind": "cache"}
    runs = {"int8": RUN, "int4": RUN | {"name": "int4", "weight_bytes": 5e7, "kl": 0.5}, "cache int8": cache}
    assert "cache int8  0.01000  0.02000" in tables.model_tables(runs)
    figures.draw_sums(study, tmp_path)
    figures.draw_model(runs, tmp_path)
    pictures = sorted(tmp_path.glob("*.png"))
    assert [path.stem for path in pictures] == [f"numerics-{name}" for name in ("cache", "dots", "model", "sums")]
    assert max(path.stat().st_size for path in pictures) < 100_000


def test_the_pareto_front():
    worse = RUN | {"name": "worse", "weight_bytes": 2e8, "kl": 0.02}
    smaller = RUN | {"name": "smaller", "weight_bytes": 5e7, "kl": 0.5}
    assert figures.pareto([RUN, worse, smaller]) == {"int8", "smaller"}


def test_runs_are_valid_and_have_unique_names():
    runs = language_model.runs()
    assert len({run.name for run in runs}) == len(runs)
    assert [run.kind for run in runs].count("baseline") == 1
    assert runs[0].kind == "baseline"
    for run in runs:
        assert run.tokens % language_model.CHUNK == 0
        assert run.tokens <= runs[0].tokens
        if run.weights not in ("float32", "bfloat16"):
            Scheme.parse(run.weights)
    texts = [language_model.text(name) for name in ("evaluation", "calibration")]
    assert min(map(len, texts)) > 2000
    assert not set(texts[0].split("\n\n")) & set(texts[1].split("\n\n"))


def test_an_interrupted_study_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[str] = []

    class Subject:
        def __init__(self, model: str) -> None:
            del model

        def evaluate(self, run: language_model.Run) -> dict[str, Any]:
            if len(made) == 3:
                raise KeyboardInterrupt
            made.append(run.name)
            return {**language_model.dataclasses.asdict(run), "kl": 0.0}

    checkpoint = tmp_path / "model.gguf"
    checkpoint.touch()
    monkeypatch.setattr(language_model, "LanguageModel", Subject)
    path = tmp_path / "runs.json"
    with pytest.raises(KeyboardInterrupt):
        language_model.study(path, str(checkpoint))
    first = list(made)
    made.clear()
    with pytest.raises(KeyboardInterrupt):
        language_model.study(path, str(checkpoint))
    # The baseline runs again, because all others are compared with it; then the missing runs follow.
    assert made == [first[0], *(run.name for run in language_model.runs()[3:5])]
    assert len(json.loads(path.read_text())["runs"]) == 5


def test_the_command_says_what_is_missing(tmp_path: Path):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = parser.parse_args(["figures", "--results", str(tmp_path), "--figures", str(tmp_path / "drawn")])
    with pytest.raises(ValueError, match="has no results; run 'numerics sums'"):
        command.run(given)


def test_adapt_sees_and_replaces_what_every_weight_is_multiplied_by():
    config = ModelConfig(64, 32, 64, num_layers=2, q_heads=2, kv_heads=1, head_dim=16, max_positions=32)
    generator = np.random.default_rng(0)

    def weight(*shape: int) -> jax.Array:
        return jnp.asarray(generator.standard_normal(shape), jnp.float32)

    layers = tuple(
        Layer(
            attention_norm=jnp.ones(32),
            qkv=weight(32, 64),
            qkv_bias=None,
            output=weight(32, 32),
            mlp_norm=jnp.ones(32),
            gate_up=weight(32, 128),
            down=weight(64, 32),
        )
        for _ in range(2)
    )
    parameters = Parameters(
        embedding=None, layers=layers, final_norm=jnp.ones(32), head=weight(32, 64), inverse_frequencies=jnp.ones(8)
    )
    seen: list[tuple[int, int]] = []

    def run(factor: float) -> jax.Array:
        def adapt(x: jax.Array, w: Any) -> jax.Array:
            seen.append((id(w), x.shape[-1]))
            return x * factor if w is parameters.head else x

        cache = empty_cache(parameters, config, 1, 8, jnp.float32)
        tokens, lengths = jnp.array([[3, 1, 2]], jnp.int32), jnp.array([3], jnp.int32)
        return forward(parameters, config, tokens, lengths, cache, adapt=adapt)[0]

    once = run(1.0)
    expected = [id(part) for layer in layers for part in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    assert [number for number, _ in seen] == [*expected, id(parameters.head)]
    assert [width for _, width in seen] == [32, 32, 32, 64] * 2 + [32]
    np.testing.assert_array_equal(run(2.0), 2 * once)
