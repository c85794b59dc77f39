"""Generation: what comes out, how it stops, that nothing compiles twice, and every error on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import unoptimized
from small_checkpoints import VOCAB, Type, gguf_file

from palladion.model.checkpoint import CheckpointError
from palladion.model.engine import PREFILL_CHUNKS, STEPS_PER_DISPATCH, plan_chunks
from palladion.model.generator import Generator
from palladion.model.locate import find_model
from palladion.model.sampling import Sampling, filtered, greedy, sample
from palladion.model.transformer import empty_cache, forward

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21], [30]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_file(tmp_path_factory.mktemp("model"), Type.Q8_0, tied=True)


@pytest.fixture(scope="module")
def generator(path: Path) -> Generator:
    return Generator.load(path, max_len=64)


@pytest.fixture(autouse=True)
def small_models_compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles the programs of the small model without optimizations; those of a real one run for seconds."""
    with contextlib.nullcontext() if "smollm2" in request.fixturenames else unoptimized():
        yield


def tokens_of(generator: Generator, prompts: Any, **options: Any) -> list[tuple[int, ...]]:
    return [generation.tokens for generation in generator.generate(prompts, **options)[0]]


def test_greedy_tokens_are_the_likeliest(generator: Generator):
    """Greedy decoding chooses the tokens that complete forward passes choose."""
    expected: list[int] = []
    step = jax.jit(functools.partial(forward, config=generator.config))
    for _ in range(20):
        cache = empty_cache(generator.parameters, generator.config, 1, 32, jnp.float32)
        sequence = [*PROMPTS[0], *expected]
        tokens = jnp.array([[0] * (32 - len(sequence)) + sequence])
        logits, _ = step(generator.parameters, tokens=tokens, lengths=jnp.array([len(sequence)]), cache=cache)
        expected.append(int(logits[0].argmax()))
    assert tokens_of(generator, [PROMPTS[0]], max_new_tokens=20, ignore_stop_tokens=True) == [tuple(expected)]


def test_gpu_kernels_choose_the_same_tokens(path: Path, generator: Generator):
    """Interpreted GPU kernels choose the same tokens; `test_smollm2_by_kernels` tests the TPU's."""
    by_kernels = Generator.load(path, max_len=64, backend="triton", interpret=True)
    options: dict[str, Any] = {"max_new_tokens": 6, "ignore_stop_tokens": True}
    assert tokens_of(by_kernels, PROMPTS[::2], **options) == tokens_of(generator, PROMPTS[::2], **options)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01)])
def test_a_batch_is_each_prompt_alone(generator: Generator, sampling: Sampling):
    options: dict[str, Any] = {"max_new_tokens": 20, "sampling": sampling, "seed": 3, "ignore_stop_tokens": True}
    together = tokens_of(generator, PROMPTS, **options)
    assert together == [tokens_of(generator, [prompt], **options)[0] for prompt in PROMPTS]


def test_seeds(generator: Generator):
    def drawn(seed: int) -> Any:
        return tokens_of(generator, PROMPTS[:1], sampling=Sampling(temperature=2.0), seed=seed)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_long_prompts_in_chunks(path: Path):
    assert plan_chunks(300) == [128, 128, 16, 16, 16]
    assert plan_chunks(1) == [16]
    generator = Generator.load(path, max_len=512)
    prompt = np.random.default_rng(0).integers(0, VOCAB, 300).tolist()
    cache = empty_cache(generator.parameters, generator.config, 1, 300, jnp.float32)
    logits, _ = forward(generator.parameters, generator.config, jnp.array([prompt]), jnp.array([300]), cache)
    assert tokens_of(generator, [prompt], max_new_tokens=1) == [(int(logits[0].argmax()),)]


def test_streams_are_the_text(generator: Generator):
    generations, _ = generator.generate("Hello", max_new_tokens=30)
    assert "".join(generator.stream("Hello", max_new_tokens=30)) == generations[0].text
    pieces: list[tuple[int, str]] = []
    several, _ = generator.generate(["Hello", "you"], max_new_tokens=30, on_text=lambda *piece: pieces.append(piece))
    for index, generation in enumerate(several):
        assert "".join(text for place, text in pieces if place == index) == generation.text


def test_streams_of_several_prompts_once_one_has_stopped(generator: Generator):
    """Each piece of text goes to its own prompt, also where those before it have nothing more to say."""
    free = tokens_of(generator, PROMPTS, max_new_tokens=40, ignore_stop_tokens=True)
    # The first prompt stops early, at a token that the others do not come to until later.
    stop = next(token for token in free[0][2:20] if all(token not in other[:33] for other in free[1:]))
    config = dataclasses.replace(generator.config, stop_tokens=(stop,))
    stopping = Generator(dataclasses.replace(generator.checkpoint, config=config), max_len=64)
    for order in ([0, 1, 2], [2, 0, 1]):
        pieces: list[list[str]] = [[], [], []]
        generations, _ = stopping.generate(
            [PROMPTS[index] for index in order],
            max_new_tokens=33,
            on_text=lambda at, text, to=pieces: to[at].append(text),
        )
        for index, generation, texts in zip(order, generations, pieces, strict=True):
            expected = free[index][: free[index].index(stop) + 1] if index == 0 else free[index][:33]
            stream = generator.tokenizer.stream(continuing=True)
            text = "".join(map(stream.push, expected)) + stream.flush()
            assert generation.tokens == expected
            assert generation.stopped_by == ("stop token" if index == 0 else "max_new_tokens")
            assert "".join(texts) == generation.text == text


def test_how_it_stops(path: Path):
    generator = Generator.load(path, max_len=16)
    (full,), statistics = generator.generate([[1, 2, 3]], max_new_tokens=100, ignore_stop_tokens=True)
    # 3 tokens of prompt, 13 more in the cache, and one that needs no room.
    assert (full.stopped_by, len(full.tokens)) == ("cache full", 14)
    assert statistics.generated_tokens == 14
    (short,), _ = generator.generate([[1, 2, 3]], max_new_tokens=2, ignore_stop_tokens=True)
    assert (short.stopped_by, len(short.tokens)) == ("max_new_tokens", 2)
    assert short.tokens == full.tokens[:2]


def test_stop_tokens(generator: Generator):
    (free,), _ = generator.generate([[1, 2, 3]], max_new_tokens=40, ignore_stop_tokens=True)
    stop = next(token for token in free.tokens[5:] if token not in free.tokens[:5])
    config = dataclasses.replace(generator.config, stop_tokens=(stop,))
    stopping = Generator(dataclasses.replace(generator.checkpoint, config=config), max_len=64)
    (stopped,), statistics = stopping.generate([[1, 2, 3]], max_new_tokens=40)
    assert stopped.tokens == free.tokens[: free.tokens.index(stop) + 1]
    assert stopped.stopped_by == "stop token"
    assert statistics.decode_steps == len(stopped.tokens) - 1
    # Beside a sequence that goes on, a finished one keeps still.
    together = tokens_of(stopping, [[1, 2, 3], PROMPTS[1]], max_new_tokens=40)
    assert together == [stopped.tokens, *tokens_of(stopping, [PROMPTS[1]], max_new_tokens=40)]


def test_nothing_compiles_twice(generator: Generator):
    sampling = Sampling(temperature=0.5, top_p=0.9)
    generator.generate(PROMPTS[:1], max_new_tokens=3, sampling=sampling)
    compiled: list[str] = []

    def listen(event: str, seconds: float, **_: Any) -> None:
        del seconds
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for prompt, seed, temperature in ((PROMPTS[2], 1, 0.7), ([5] * 16, 2, 1.5)):
            _, statistics = generator.generate(
                [prompt], max_new_tokens=25, sampling=Sampling(temperature=temperature, top_p=0.5), seed=seed
            )
            assert statistics.compile_seconds == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_programs_hold_nothing_twice(path: Path, dtype: str):
    """Caches are aliased, and neither they nor the weights are copied or widened."""
    generator = Generator.load(path, weights="dequantize", dtype=dtype, max_len=8192)
    generator.generate([[1, 2, 3]], max_new_tokens=2)
    (engine,) = generator._engines.values()
    cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(engine.cache_like))
    for program in engine.programs.values():
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= cache
        assert memory.temp_size_in_bytes < cache / 4


def test_a_failed_run_leaves_no_trace(generator: Generator):
    expected = tokens_of(generator, PROMPTS[:1], max_new_tokens=40)

    def fail(_index: int, _text: str) -> None:
        raise RuntimeError("the reader went away")

    with pytest.raises(RuntimeError, match="went away"):
        generator.generate(PROMPTS[:1], max_new_tokens=40, on_text=fail)
    assert tokens_of(generator, PROMPTS[:1], max_new_tokens=40) == expected


def test_statistics(generator: Generator):
    _, statistics = generator.generate(PROMPTS, max_new_tokens=20, ignore_stop_tokens=True)
    assert (statistics.sequences, statistics.prompt_tokens, statistics.generated_tokens) == (3, 22, 60)
    assert statistics.decode_steps == 19
    assert statistics.weight_bytes == generator.parameters.nbytes
    per_token = 2 * 2 * 2 * 16 * 4  # keys and values, layers, KV heads, head_dim, float32
    # A step reads all tokens up to its own.
    held = sum(len(prompt) + step for prompt in PROMPTS for step in range(1, 20))
    assert statistics.cache_bytes == per_token * held // 19
    assert statistics.memory_bandwidth > 1e9
    assert "of the" in str(statistics)
    assert "tokens/s\neach step" in str(statistics)


def test_one_token_has_no_rate(generator: Generator):
    """The first token comes with the prompt: nothing is said of steps that there were not."""
    _, statistics = generator.generate(PROMPTS[:1], max_new_tokens=1)
    assert (statistics.generated_tokens, statistics.decode_steps) == (1, 0)
    shown = str(statistics).splitlines()
    assert [line.split()[0] for line in shown] == ["prompt", "generated", "memory"]
    assert "tokens/s" not in shown[1]
    assert "GB/s" not in str(statistics)


# ------------------------------------------------------------------------------------------------------------ sampling


def test_greedy_takes_the_first_of_equals():
    logits = jnp.array([[0.0, 3.0, 3.0, -1.0], [5.0, 1.0, 2.0, 5.0]])
    np.testing.assert_array_equal(greedy(logits), [1, 0])


def kept(logits: np.ndarray, **options: Any) -> np.ndarray:
    return np.isfinite(
        np.asarray(filtered(jnp.asarray(logits, jnp.float32)[None], Sampling(temperature=1.0, **options)))
    )[0]


def test_filters():
    probabilities = np.array([0.02, 0.5, 0.08, 0.25, 0.15])
    logits = np.log(probabilities)
    np.testing.assert_array_equal(kept(logits, top_k=2), probabilities >= 0.25)
    np.testing.assert_array_equal(kept(logits, top_k=99), np.ones(5, bool))
    np.testing.assert_array_equal(kept(logits, top_p=0.6), probabilities >= 0.25)
    np.testing.assert_array_equal(kept(logits, top_p=0.8), probabilities >= 0.15)
    np.testing.assert_array_equal(kept(logits, top_p=1.0), np.ones(5, bool))
    np.testing.assert_array_equal(kept(logits, top_p=0.001), probabilities == 0.5)
    np.testing.assert_array_equal(kept(logits, min_p=0.2), probabilities >= 0.1)
    np.testing.assert_array_equal(kept(logits, top_k=3, top_p=0.8), probabilities >= 0.25)


def test_edges_of_filters():
    logits = np.array([1.0, 3.0, 2.0, 3.0, 2.0, -1.0], np.float32)
    np.testing.assert_array_equal(kept(logits, top_k=1), logits == 3)
    np.testing.assert_array_equal(kept(logits, top_k=2), logits == 3)
    np.testing.assert_array_equal(kept(logits, top_k=3), logits >= 2)
    np.testing.assert_array_equal(kept(logits, top_k=6), logits >= -1)
    np.testing.assert_array_equal(kept(logits, min_p=1), logits == 3)
    np.testing.assert_array_equal(kept(logits, min_p=1.0, top_p=0.01), logits == 3)
    np.testing.assert_array_equal(kept(logits, min_p=0), np.ones(6, bool))
    np.testing.assert_array_equal(kept(logits, min_p=np.exp(np.float32(-1)) * 1.0001), logits == 3)
    np.testing.assert_array_equal(kept(logits, min_p=np.exp(np.float32(-1)) * 0.9999), logits >= 2)
    # A top_p that the tokens meet exactly needs no more of them: here the sum is what the filter itself adds up.
    distinct = np.array([2.0, 0.5, 1.0, -1.0], np.float32)
    probabilities = np.asarray(jax.nn.softmax(distinct))
    for count in (1, 2, 3):
        likeliest = distinct >= np.sort(distinct)[-count]
        met = float(jnp.sum(jnp.where(likeliest, probabilities, 0.0)))
        np.testing.assert_array_equal(kept(distinct, top_p=met), likeliest)
        np.testing.assert_array_equal(
            kept(distinct, top_p=np.nextafter(np.float32(met), np.float32(1))),
            distinct >= np.sort(distinct)[-count - 1],
        )


def test_draws_follow_the_distribution():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.broadcast_to(jnp.log(probabilities), (20_000, 4))
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = np.asarray(sample(logits, keys, Sampling(temperature=1.0)))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 20_000, probabilities, atol=0.015)
    hot = np.asarray(sample(logits, keys, Sampling(temperature=0.5)))
    np.testing.assert_allclose(
        np.bincount(hot, minlength=4) / 20_000, probabilities**2 / (probabilities**2).sum(), atol=0.015
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, r"Sampling\.temperature: got -1\.0; accepted: 0 \(greedy\) or above, finite, or None"),
        ({"temperature": float("nan")}, r"Sampling\.temperature: got nan"),
        ({"temperature": float("inf")}, r"Sampling\.temperature: got inf"),
        ({"temperature": "hot"}, r"Sampling\.temperature: got 'hot'"),
        ({"temperature": {"temperature": "hot"}}, r"Sampling\.temperature: got {'temperature': 'hot'}"),
        ({"temperature": True}, r"Sampling\.temperature: got True"),
        ({"temperature": 1j}, r"Sampling\.temperature: got 1j"),
        ({"temperature": [0.5]}, r"Sampling\.temperature: got \[0\.5\]"),
        ({"temperature": np.ones(2)}, r"Sampling\.temperature: got array"),
        ({"temperature": jnp.ones(2)}, r"Sampling\.temperature: got Array"),
        ({"top_k": 0}, r"Sampling\.top_k: got 0; accepted: a whole number, at least 1, or None"),
        ({"temperature": 1.0, "top_k": 0}, r"Sampling\.top_k: got 0"),
        ({"top_k": 2.5}, r"Sampling\.top_k: got 2\.5"),
        ({"top_k": float("inf")}, r"Sampling\.top_k: got inf"),
        ({"top_p": 0}, r"Sampling\.top_p: got 0; accepted: above 0, at most 1, or None"),
        ({"top_p": 1.5}, r"Sampling\.top_p: got 1\.5; accepted: above 0, at most 1"),
        ({"min_p": -0.1}, r"Sampling\.min_p: got -0\.1; accepted: 0 to 1"),
        ({"temperature": 0, "min_p": 2}, r"Sampling\.min_p: got 2"),
    ],
)
def test_sampling_errors(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Sampling(**arguments)


def test_sampling_of_temperature_zero_is_greedy():
    assert Sampling(temperature=0.0) == Sampling(temperature=0, top_k=3, top_p=0.5) == Sampling()
    assert Sampling(temperature=np.float32(0.0)).temperature is None
    assert Sampling(top_k=3).temperature == 1.0
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    np.testing.assert_array_equal(sample(logits, keys, Sampling(temperature=0.0)), np.argmax(logits, axis=-1))


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 1e-38, 1e-45, 1e-60, 5e-324, jnp.float32(0.0)])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}])
def test_small_temperatures_take_the_likeliest(temperature: Any, filters: dict[str, Any]):
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(5, 9)) * 10 - 20, jnp.float32)
    keys = jax.random.split(jax.random.key(0), 5)
    sampling = Sampling(temperature=temperature, **filters).as_arrays()
    np.testing.assert_array_equal(jax.jit(sample)(logits, keys, sampling), np.argmax(logits, axis=-1))


def test_large_values_change_nothing():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(200, 9)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 200)
    assert Sampling(temperature=10**400) == Sampling(temperature=Fraction(10**400)) == Sampling(temperature=1e300)
    hot = sample(logits, keys, Sampling(temperature=1e300, top_k=10**400).as_arrays())
    assert {*np.asarray(hot).tolist()} == {*range(9)}
    coldest = sample(logits, keys, Sampling(top_p=1e-60).as_arrays())
    np.testing.assert_array_equal(coldest, np.argmax(logits, axis=-1))


def test_sampling_is_a_pytree():
    sampling = Sampling(temperature=0.5, top_k=np.int64(3))
    assert (sampling.temperature, sampling.top_k, type(sampling.top_k)) == (0.5, 3, int)
    leaves, structure = jax.tree.flatten(sampling)
    assert leaves == [0.5, 3]
    assert jax.tree.unflatten(structure, leaves) == sampling
    assert jax.tree.map(lambda _: 0, sampling).top_k == 0, "as axes of vmap are given, unchecked"
    assert jax.tree.structure(Sampling(temperature=1, top_k=7)) == structure
    assert jax.tree.structure(Sampling(temperature=1, top_p=0.7)) != structure
    traced = jax.jit(lambda t: Sampling(temperature=t, top_k=2).as_arrays())(0.5)
    assert (float(traced.temperature), traced.top_k.dtype) == (0.5, jnp.int32)
    shapes = jax.eval_shape(sampling.as_arrays)
    assert [leaf.dtype for leaf in jax.tree.leaves(shapes)] == [jnp.float32, jnp.int32]


def test_the_types_of_numbers_compile_nothing(generator: Generator):
    """One program for each set of filters, whatever the values' types."""
    everything = [
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 1, "top_k": np.int64(5), "top_p": 1, "min_p": 0},
        {"temperature": np.float16(0.5), "top_k": np.uint8(7), "top_p": np.float64(0.5), "min_p": np.float32(0.25)},
        {"temperature": np.int32(2), "top_k": 5.0, "top_p": jnp.float32(0.5), "min_p": np.array(1)},
        {"temperature": jnp.int32(2), "top_k": jnp.int8(5), "top_p": 1.0, "min_p": jnp.bfloat16(0.5)},
    ]
    for number, values in enumerate(everything):
        _, statistics = generator.generate(
            [[1, 2]], max_new_tokens=2, sampling=Sampling(**values), ignore_stop_tokens=True
        )
        assert number == 0 or statistics.compile_seconds == 0


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "prompts: got none; give at least one"),
        ("", {}, r"prompts\[0\]: is empty"),
        ([[1], []], {}, r"prompts\[1\]: is empty"),
        (
            [[1] * 64],
            {},
            r"prompts\[0\]: has 64 tokens, the cache has room for 64 with the answer; shorten it or raise",
        ),
        ([[1, VOCAB]], {}, rf"prompts\[0\]: token {VOCAB} is not in 0 to {VOCAB - 1}"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens: got 0; accepted: at least 1"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens: got float 2.5; accepted: an integer"),
        ([[1]], {"max_new_tokens": True}, "max_new_tokens: got bool True; accepted: an integer"),
        ([[1]], {"max_new_tokens": "3"}, "max_new_tokens: got str '3'; accepted: an integer"),
        ([[1]], {"seed": 2**70}, r"seed: got \d+; accepted: an integer from -2\*\*63 to 2\*\*63 - 1"),
        ([[1]], {"seed": 2**63}, "seed: got 9223372036854775808"),
        ([[1]], {"seed": -(2**63) - 1}, "seed: got -9223372036854775809"),
        ([[1]], {"seed": 1.0}, "seed: got float 1.0; accepted: an integer"),
        ([[1]], {"sampling": {"temperature": 1.0}}, r"sampling: got dict .*; accepted: None, or a Sampling"),
        ([[1]], {"sampling": 0.8}, "sampling: got float 0.8; accepted: None, or a Sampling"),
        ([[1, 2.0]], {}, r"prompts\[0\]: not text, so token ids\[1\]: got float 2.0; accepted: an integer"),
        ([["Hello"]], {}, r"prompts\[0\]: not text, so token ids\[0\]: got str 'Hello'"),
        ([None], {}, r"prompts\[0\]: not text, so token ids: got NoneType"),
        ([b"Hello"], {}, r"prompts\[0\]: not text, so token ids: got bytes b'Hello'"),
        (["a\ud800"], {}, r"prompts\[0\]: is not valid text: character 1 is '\\ud800', a lone surrogate"),
    ],
)
def test_wrong_prompts(generator: Generator, prompts: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        generator.generate(prompts, **options)
    if isinstance(prompts, list) and len(prompts) == 1:
        with pytest.raises(ValueError, match=message):
            generator.stream(prompts[0], **options)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([1, 2], r"prompts: got \[1, 2\], a list of token ids, which is one prompt; .* here \[\[1, 2\]\]"),
        (np.array([1, 2]), r"got \[1, 2\], a list of token ids"),
        (jnp.array([1, 2]), r"got \[1, 2\], a list of token ids"),
        ([np.int64(1), 2], "a list of token ids"),
        ([*jnp.array([1, 2])], "a list of token ids"),
        (5, "prompts: got int 5; accepted: a text, or a list of texts and lists of token ids"),
        (None, "prompts: got NoneType None; accepted: a text"),
        (b"Hello", "prompts: got bytes b'Hello'; accepted: a text"),
        ({"role": "user"}, "prompts: got dict .*; accepted: a text"),
    ],
)
def test_what_is_no_batch(generator: Generator, prompts: Any, message: str):
    with pytest.raises(ValueError, match=message):
        generator.generate(prompts)


@pytest.mark.parametrize("form", [np.array, jnp.array, tuple, lambda rows: [np.array(row) for row in rows]])
def test_prompts_in_any_form(generator: Generator, form: Any):
    rows = [[1, 2, 3], [4, 5, 6]]
    options: dict[str, Any] = {"max_new_tokens": np.int64(3), "seed": np.uint8(1)}
    assert tokens_of(generator, form(rows), **options) == tokens_of(generator, rows, max_new_tokens=3, seed=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cuda"}, "backend: got 'cuda'; accepted: None, auto, xla, pallas"),
        ({"dtype": "int8"}, "dtype.* accepted: float32, bfloat16, float16|dtype must be one of float32"),
        ({"kv_dtype": "int4"}, "dtype int4 is not one of float32"),
        ({"max_len": 1}, "max_len: got 1; accepted: at least 2"),
        ({"max_len": 2**31}, "max_len: got 2147483648; accepted: .* at most 1073741824"),
        ({"max_len": 2**70}, r"max_len: got \d+; accepted"),
        ({"max_len": 64.0}, "max_len: got float 64.0; accepted: an integer"),
    ],
)
def test_wrong_options(path: Path, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Generator.load(path, **options)


# ------------------------------------------------------------------------------------------------------ the real model


@pytest.fixture(scope="module")
def smollm2() -> Generator:
    try:
        find_model("smollm2")
    except CheckpointError as error:
        pytest.skip(str(error))
    return Generator.load("smollm2", max_len=128)


@pytest.mark.peer
def test_smollm2_knows_the_capital_of_france(smollm2: Generator):
    raw, _ = smollm2.generate("The capital of France is", max_new_tokens=2)
    assert raw[0].text == " Paris."
    chat = smollm2.chat_prompt([{"role": "user", "content": "What is the capital of France?"}])
    answer, _ = smollm2.generate(chat, max_new_tokens=20)
    assert (answer[0].text, answer[0].stopped_by) == ("The capital of France is Paris.", "stop token")


@pytest.mark.peer
def test_smollm2_by_kernels(smollm2: Generator):
    by_kernels = Generator(smollm2.checkpoint, max_len=128, backend="pallas")
    prompt = "The capital of France is"
    assert tokens_of(by_kernels, prompt, max_new_tokens=5) == tokens_of(smollm2, prompt, max_new_tokens=5)


@pytest.mark.peer
def test_smollm2_says_what_llama_cpp_says(smollm2: Generator):
    llama_cpp = pytest.importorskip("llama_cpp")
    peer = llama_cpp.Llama(str(find_model("smollm2")), n_ctx=256, verbose=False)
    chat = smollm2.chat_prompt([{"role": "user", "content": "What is the capital of France?"}])
    # llama.cpp rounds activations to 8 bits, so that only clear choices are the same: of these texts all tokens are.
    for prompt, count in (("The capital of France is", 2), (chat, 8)):
        tokens = smollm2.tokenizer.encode(prompt)
        peer.reset()
        steps = peer.generate(tokens, temp=0.0, top_k=1)
        assert tokens_of(smollm2, [tokens], max_new_tokens=count) == [tuple(next(steps) for _ in range(count))]


def test_constants_fit_together():
    assert PREFILL_CHUNKS[0] % PREFILL_CHUNKS[1] == 0
    assert min(STEPS_PER_DISPATCH.values()) >= 1
