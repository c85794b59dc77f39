"""Options of a generation: stop strings, penalties and biases, log probabilities, seeds, and a cache that is kept."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_checkpoints import VOCAB, Type, gguf_file
from test_commands import TEMPLATE

from palladion.model import engine as engine_module
from palladion.model.conversation import Conversation
from palladion.model.engine import Engine, common_prefix
from palladion.model.generation import RunOptions
from palladion.model.generator import Generator
from palladion.model.sampling import Sampling, TokenCounts, count_prompts, penalized, sample
from palladion.model.stop_strings import StopStrings

PROMPTS = [[1, 2, 3, 2], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return gguf_file(folder, Type.Q8_0, tied=True, **{"tokenizer.chat_template": TEMPLATE})


@pytest.fixture(scope="module")
def generator(path: Path) -> Generator:
    return Generator.load(path, max_len=256)


def generate(generator: Generator, prompts: Any = PROMPTS, **options: Any) -> Any:
    return generator.generate(prompts, **{"max_new_tokens": 20, "ignore_stop_tokens": True} | options)[0]


# -------------------------------------------------------------------------------------------------------- stop strings


def cut(text: str, strings: list[str]) -> str:
    """Returns the text before the stop string that is complete first, character by character."""
    for end in range(1, len(text) + 1):
        if found := [string for string in strings if text[:end].endswith(string)]:
            return text[: end - max(map(len, found))]
    return text


@pytest.mark.parametrize("strings", [["ab"], ["aab", "b"], ["abcab", "ca"], ["aaa"], ["bc", "abcd"], []])
def test_stop_strings_do_not_depend_on_the_pieces(strings: list[str]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice([*"abc"], size=rng.integers(1, 12)))
        stops, shown, places = StopStrings(strings), "", sorted(rng.integers(0, len(text) + 1, 4))
        for start, end in itertools.pairwise([0, *places, len(text)]):
            shown += stops.push(text[start:end])
            # What is shown is never taken back.
            assert cut(text, strings).startswith(shown)
        assert stops.found == (cut(text, strings) != text)
        assert shown + stops.flush() == cut(text, strings)


def test_a_generation_stops_at_a_string_across_tokens(generator: Generator) -> None:
    free = generate(generator)
    # A token of this vocabulary is a character.
    stop = free[0].text[6:9]
    pieces: list[list[str]] = [[], []]
    stopped, statistics = generator.generate(
        PROMPTS,
        max_new_tokens=20,
        ignore_stop_tokens=True,
        stop=["never said", stop],
        on_text=lambda index, text: pieces[index].append(text),
    )
    for one, all_of_it, shown in zip(stopped, free, pieces, strict=True):
        end = all_of_it.text.find(stop)
        assert one.text == "".join(shown) == (all_of_it.text if end < 0 else all_of_it.text[:end])
        assert one.stopped_by == ("max_new_tokens" if end < 0 else "stop string")
    end = free[0].text.find(stop)
    assert stopped[0].tokens == free[0].tokens[: end + 3]
    assert statistics.generated_tokens == sum(len(one.tokens) for one in stopped)
    assert "".join(generator.stream(PROMPTS[0], max_new_tokens=20, stop=stop)) == stopped[0].text


def test_a_run_ends_when_every_sequence_has_stopped(generator: Generator) -> None:
    (free,) = generate(generator, PROMPTS[:1])
    (stopped,), statistics = generator.generate(
        PROMPTS[:1], max_new_tokens=200, stop=free.text[2:4], ignore_stop_tokens=True
    )
    assert len(stopped.tokens) <= 4
    assert statistics.decode_steps < 40, "the dispatch with the string, and the one after it"


# ------------------------------------------------------------------------------------------------ penalties and biases


def test_penalties_are_those_of_their_definition() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 9)).astype(np.float32) * 4
    prompt, generated = rng.random((3, 9)) < 0.3, rng.integers(0, 3, (3, 9)).astype(np.int32)
    bias = {2: -3.5, 8: 1.25}
    sampling = Sampling(repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=-0.4, logit_bias=bias)
    seen = prompt | (generated > 0)
    expected = np.where(seen, np.where(logits > 0, logits / 1.3, logits * 1.3), logits).astype(np.float64)
    expected -= 0.7 * (generated > 0) + -0.4 * generated
    for token, value in bias.items():
        expected[:, token] += value
    counts = TokenCounts(jnp.asarray(prompt), jnp.asarray(generated))
    for form in (sampling, sampling.as_arrays()):
        np.testing.assert_allclose(penalized(jnp.asarray(logits), form, counts), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="sample: counts: got none; penalties need those of `count_prompts`"):
        sample(jnp.asarray(logits), jax.random.split(jax.random.key(0), 3), sampling)


def test_the_loop_counts_what_it_generates(generator: Generator) -> None:
    """Each greedy choice is the likeliest after the penalties of the tokens before it, in every sequence of a batch."""
    bias = {40: 2.0, 50: -1e6}
    sampling = Sampling(presence_penalty=3.0, frequency_penalty=1.5, logit_bias=bias)
    for generation in generate(generator, sampling=sampling, logprobs=VOCAB):
        counts = np.zeros(VOCAB)
        for entry in generation.logprobs:
            scores = np.empty(VOCAB)
            scores[[token for token, _ in entry.likeliest]] = [value for _, value in entry.likeliest]
            scores -= 3.0 * (counts > 0) + 1.5 * counts
            scores[40] += 2.0
            scores[50] -= 1e6
            assert scores[entry.token] >= scores.max() - 1e-4
            counts[entry.token] += 1
        assert 50 not in generation.tokens
        assert len(generation.tokens) == 20


def test_a_repetition_penalty_forbids_the_prompt_and_the_text(generator: Generator) -> None:
    sampling = Sampling(repetition_penalty=1e6, logit_bias=dict.fromkeys(range(VOCAB), 1e3))
    for prompt, generation in zip(PROMPTS, generate(generator, sampling=sampling), strict=True):
        assert len({*prompt, *generation.tokens}) == len({*prompt}) + 20


@pytest.mark.parametrize(
    "sampling",
    [Sampling(repetition_penalty=1.4), Sampling(temperature=0.8, presence_penalty=1.0, frequency_penalty=0.5)],
)
def test_a_batch_is_each_prompt_alone(generator: Generator, sampling: Sampling) -> None:
    together = generate(generator, sampling=sampling)
    assert together == [generate(generator, [prompt], sampling=sampling)[0] for prompt in PROMPTS]


def test_penalties_compile_once_and_cost_nothing_where_there_are_none(generator: Generator) -> None:
    plain = generator._engine(2, RunOptions())
    neutral = Sampling(repetition_penalty=1.0, presence_penalty=0, frequency_penalty=0.0, logit_bias={})
    assert generator._engine(2, RunOptions(sampling=neutral)) is plain
    penalties = Sampling(repetition_penalty=1.5, logit_bias={3: 1.0})
    penalized_engine = generator._engine(2, RunOptions(sampling=penalties))
    other = Sampling(repetition_penalty=1.1, logit_bias={3: 1.0, 5: 2.0})
    assert generator._engine(2, RunOptions(sampling=other)) is penalized_engine

    def program(engine: Engine) -> tuple[int, int]:
        """Returns how many arguments of the loop have a place for every token, and how often it scatters."""
        loop, arguments = engine.decode_loop()
        places = sum(leaf.shape == (2, VOCAB) for leaf in jax.tree.leaves(arguments[1:]))
        return places, loop.lower(*arguments).as_text().count('"stablehlo.scatter"')

    assert program(penalized_engine) == (2, program(plain)[1] + 2), "counting, and biases"
    assert program(plain)[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": 0}, r"Sampling\.repetition_penalty: got 0; accepted: above 0, at most 1e\+06, or None"),
        ({"presence_penalty": float("nan")}, r"Sampling\.presence_penalty: got nan; accepted: from -1e\+06 to 1e\+06"),
        ({"frequency_penalty": 1e7}, r"Sampling\.frequency_penalty: got 10000000\.0"),
        ({"logit_bias": [1]}, r"Sampling\.logit_bias: got list \[1\]; accepted: a dictionary of token ids and numbers"),
        ({"logit_bias": {"a": 1}}, r"Sampling\.logit_bias: got 'a' as a token id"),
        ({"logit_bias": {-1: 1}}, r"Sampling\.logit_bias: got -1 as a token id"),
        ({"logit_bias": {1: "x"}}, r"Sampling\.logit_bias: got 'x'; accepted: from"),
    ],
)
def test_wrong_penalties(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_no_counts_without_penalties() -> None:
    assert count_prompts([[1]], 5, Sampling(logit_bias={1: 2.0})) == TokenCounts()
    assert count_prompts([[1]], 5, Sampling(presence_penalty=1.0)).prompt is None


# ------------------------------------------------------------------------------------------ log probabilities and seeds


def test_log_probabilities(generator: Generator) -> None:
    plain = generate(generator)
    for expected, generation in zip(plain, generate(generator, logprobs=VOCAB), strict=True):
        assert generation.tokens == expected.tokens
        assert len(generation.logprobs) == len(generation.tokens)
        for token, entry in zip(generation.tokens, generation.logprobs, strict=True):
            values = dict(entry.likeliest)
            assert entry.token == token == entry.likeliest[0][0], "greedy"
            assert entry.logprob == values[token] == max(values.values())
            assert np.exp([*values.values()]).sum() == pytest.approx(1, abs=1e-4)
        assert generation.mean_logprob == pytest.approx(np.mean([entry.logprob for entry in generation.logprobs]))
    with pytest.raises(ValueError, match="log probabilities were not computed; pass logprobs=0 to generate"):
        _ = plain[0].mean_logprob


def test_log_probabilities_are_the_models_own(generator: Generator) -> None:
    """Penalties do not change them, and a decode step gives what a prefill of the text so far gives."""
    plain = generate(generator, logprobs=VOCAB)
    penalties = Sampling(repetition_penalty=2.0, logit_bias={7: 5.0})
    changed = generate(generator, sampling=penalties, logprobs=VOCAB, max_new_tokens=1)
    prompts = [[*prompt, *generation.tokens[:3]] for prompt, generation in zip(PROMPTS, plain, strict=True)]
    longer = generate(generator, prompts, logprobs=VOCAB, max_new_tokens=1)
    for one, other, number in [*zip(plain, changed, [0, 0], strict=True), *zip(plain, longer, [3, 3], strict=True)]:
        expected, found = dict(one.logprobs[number].likeliest), dict(other.logprobs[0].likeliest)
        np.testing.assert_allclose(
            [found[token] for token in range(VOCAB)], [expected[t] for t in range(VOCAB)], rtol=1e-4, atol=1e-3
        )
        assert other.logprobs[0].logprob == found[other.tokens[0]]


def test_a_seed_for_each_prompt(generator: Generator) -> None:
    prompts, sampling = [PROMPTS[0]] * 3, Sampling(temperature=1.5)
    together = generate(generator, prompts, sampling=sampling, seed=[7, 8, 7])
    assert together[0] == together[2] != together[1]
    for seed, generation in zip((7, 8), together, strict=False):
        assert generate(generator, PROMPTS[:1], sampling=sampling, seed=seed) == [generation]
    for seeds, message in (([1], "seed: got 1 of them for 3 prompts"), ([1, 2, 0.5], r"seed\[2\]: got float 0.5")):
        with pytest.raises(ValueError, match=message):
            generate(generator, prompts, seed=seeds)


# -------------------------------------------------------------------------------------------------------- conversations


def test_common_prefix() -> None:
    assert common_prefix([[1, 2, 3]], []) == 0
    assert common_prefix([[1, 2, 3]], [[1, 2, 4, 5]]) == 2
    assert common_prefix([[1, 2, 3]], [[1, 2, 3, 4]]) == 2, "the last token is read again: its logits are needed"
    assert common_prefix([[1, 2, 3], [1, 5]], [[1, 2], [1, 4]]) == 1
    assert common_prefix([[9, 2]], [[1, 2]]) == 0


def test_a_conversation_keeps_its_cache(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn reads only what is new, and answers as if it had read everything."""
    read: list[int] = []
    plan = engine_module.plan_chunks
    monkeypatch.setattr(engine_module, "plan_chunks", lambda tokens: read.append(tokens) or plan(tokens))
    conversation = Conversation(generator, max_new_tokens=6)
    for text in ("a" * 100, "bc", "d"):
        said = [*conversation.messages, {"role": "user", "content": text}]
        answer = "".join(conversation.send(text))
        prompt = generator.chat_prompt(said)
        (expected,), _ = generator.generate(prompt, max_new_tokens=6)
        assert answer == expected.text
        assert conversation.messages[-1] == {"role": "assistant", "content": answer}
    assert conversation.last is not None
    assert conversation.last[0].text == answer
    # Of each pair the first is the conversation's, the second that of a run that reads everything.
    assert read[0] == read[1] > 100
    for kept, everything in zip(read[2::2], read[3::2], strict=True):
        assert kept < 40 < everything


def test_other_runs_in_between_change_nothing(generator: Generator) -> None:
    conversation = Conversation(generator, max_new_tokens=6)
    undisturbed = Conversation(generator, max_new_tokens=6)
    expected = ["".join(undisturbed.send(text)) for text in ("one", "two")]
    answers = ["".join(conversation.send("one"))]
    generate(generator, [[9] * 60])
    answers.append("".join(conversation.send("two")))
    assert answers == expected


def test_an_answer_cut_short_stays_as_far_as_it_was_read(generator: Generator) -> None:
    conversation = Conversation(generator, "Be", max_new_tokens=60)
    answer = conversation.send("Hello")
    first = next(answer)
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": first}
    assert (
        "".join(conversation.send("Go"))
        == generator.generate(generator.chat_prompt(conversation.messages[:-1]), max_new_tokens=60)[0][0].text
    )
    with pytest.raises(ValueError, match=r"prompts\[0\]: has"):
        conversation.send("a" * 300)
    assert conversation.messages[-1]["role"] == "assistant"
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "Be"}]
