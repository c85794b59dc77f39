"""The command `palladion`: what it prints, what it reads, and how it explains mistakes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from small_checkpoints import Type, gguf_file, hugging_face_folder

import palladion
from palladion.__main__ import PROGRAM
from palladion.model.checkpoint import CheckpointError, load_checkpoint
from palladion.model.commands.progress import Progress
from palladion.model.conversation import Conversation
from palladion.model.generator import Generator
from palladion.model.sampling import Sampling
from palladion.reference.quantization import QuantizedArray

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return gguf_file(folder, Type.Q8_0, tied=True, **{"tokenizer.chat_template": TEMPLATE})


@pytest.fixture(scope="module")
def generator(path: Path) -> Generator:
    return Generator.load(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Runs a command in this process; returns its exit status and what it printed."""
    capsys.readouterr()
    try:
        status = PROGRAM.main(arguments)
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_generate(path: Path, generator: Generator, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(
        capsys, "generate", f"--model={path}", "-p", "Hello", "--max-new-tokens=5", "--ignore-stop-tokens"
    )
    expected = generator.generate("Hello", max_new_tokens=5, ignore_stop_tokens=True)[0][0].text
    assert (status, out) == (0, f"Hello{expected}\n")
    assert "MB in the file" in err
    for word in ("loaded in", "compiling", "first token after", "MB must be read", "GB/s achieved", "at the peak"):
        assert word in err


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "palladion", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": "src", "JAX_PLATFORMS": "cpu", "PATH": ""},
        cwd=Path(__file__).parent.parent,
        check=False,
    )


def test_the_program_in_a_process() -> None:
    assert call("--version").stdout == f"palladion {palladion.__version__}, jax {jax.__version__}\n"
    wrong = call("generate", "--model=nowhere.gguf", "--prompt=a")
    assert wrong.returncode == 2
    # A plugin of JAX for a chip that is not here says so before.
    assert any(line.startswith("error: nowhere.gguf: no such file") for line in wrong.stderr.splitlines())
    assert "Traceback" not in wrong.stderr


def test_the_overview_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    status, page, _ = run(capsys)
    assert status == 0
    for name in ("generate", "chat", "quantize", "bench"):
        assert f"\n  {name} " in page
    for name in ("generate", "chat", "quantize"):
        status, page, _ = run(capsys, name, "--help")
        assert status == 0
        assert "_" not in "".join(word for word in page.split() if word.startswith("--")), "one spelling of options"


def test_every_page_says_how_the_program_was_called(capsys: pytest.CaptureFixture[str]) -> None:
    """Usage, examples and hints of `palladion bench` can be copied, and so can those of `python -m palladion`."""
    for pages in (run(capsys, "bench"), run(capsys, "bench", "static", "--help"), run(capsys, "bench", "tune", "-h")):
        assert "palladion bench " in pages[1]
        assert "python -m" not in pages[1]
    assert "(palladion bench --debug plan … shows where)" in run(capsys, "bench", "plan", "--model=x")[2]
    by_module = call("bench", "static", "--help").stdout
    assert "usage: python -m palladion bench static" in by_module
    assert "\n  python -m palladion bench static tpu\n" in by_module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt=a", "--model=nowhere.gguf"), "error: nowhere.gguf: no such file or folder; give a .gguf file"),
        (("--quantize=int3", "--prompt=a"), "error: scheme: got 'int3'"),
        (("--temperature=-1", "--prompt=a"), "error: Sampling.temperature: got -1.0"),
        (("--repetition-penalty=0", "--prompt=a"), "error: Sampling.repetition_penalty: got 0.0; accepted: above 0"),
        (("--prompt=a", "word"), "error: unrecognized arguments: word (a text belongs to its option"),
        (("--prompt=a", "--kv_dtype=int8"), "error: unrecognized arguments: --kv_dtype=int8"),
        (("--prompt=a", "--max-len=many"), "error: argument --max-len: invalid int value: 'many'"),
        (("--prompt=a\udcff",), "error: --prompt: is not valid text: character 1 is '\\udcff'"),
        (("--chat", "--system=\udcff", "--prompt=a"), "error: --system: is not valid text"),
        (("--prompt=a", f"--seed={2**70}"), f"error: seed: got {2**70}; accepted: an integer"),
        (("--prompt=a", "--stop="), "error: stop[0]: is empty"),
        (("--prompt=a", "--logprobs=101"), "error: logprobs: got 101; accepted: None, or from 0 to 100"),
        (("--prompt=a", "--logit-bias=a"), "error: --logit-bias: got 'a'; accepted: TOKEN=BIAS"),
        (("--prompt=a", "--logit-bias=ab=1"), "error: --logit-bias: 'ab' is 2 tokens"),
        (("--prompt=a", "--logit-bias=4096=1"), "error: Sampling.logit_bias: got 4096 as a token id; accepted: 0 to"),
        (("--prompt=a", "-n", "3"), "error: --samples: got 3, which would all be the same"),
        (("--prompt=a", "--temperature=1", "-n", "3", "--best=4"), "error: --best: got 4; accepted: at most --samples"),
        (("--prompt=a", "--batch=0"), "error: --batch: got 0; accepted: at least 1"),
        (("--prompt=" + "a" * 200,), "error: prompts[0]: has 200 tokens, the cache has room for 128"),
        (("--input=nowhere.jsonl",), "error: [Errno 2] No such file"),
        ((), 'error: no prompt: give --prompt="…" (or -p), --prompt=- for standard input'),
    ],
)
def test_mistakes(path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    """Every mistake is one line, found before weights are read."""
    given = [] if any(argument.startswith("--model") for argument in arguments) else [f"--model={path}"]
    status, out, err = run(capsys, "generate", *given, *arguments)
    assert (status, out) == (2, "")
    assert any(line.startswith(message) for line in err.splitlines()), err
    assert "loaded in" not in err or "--logit-bias=4096" in arguments[-1]


def test_commands_that_there_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "run")[2] == "error: command: got 'run'; accepted: generate, chat, quantize, bench\n"
    assert "error: command: got 'no'; accepted: suite, check" in run(capsys, "bench", "no")[2]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB\nand more"), 2),
        (MemoryError("9 GB"), 2),
        (KeyboardInterrupt(), 130),
        (jax.errors.JaxRuntimeError("INTERNAL: a bug"), None),
    ],
)
def test_errors_of_a_running_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int | None
) -> None:
    def fail(_: Any) -> int:
        raise error

    monkeypatch.setattr("palladion.model.commands.quantize.run", fail)
    arguments = ("quantize", "in", "out", "--scheme=int8")
    if status is None:
        with pytest.raises(jax.errors.JaxRuntimeError):
            run(capsys, *arguments)
        return
    found, _, said = run(capsys, *arguments)
    assert found == status
    assert len(said.splitlines()) == 1
    assert status != 2 or "9 GB" in said


def lines(*given: dict[str, Any]) -> io.StringIO:
    return io.StringIO("\n".join(map(json.dumps, given)) + "\n\n")


def test_lines_of_json(
    path: Path, generator: Generator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    given = lines({"prompt": "Hello", "seed": 3, "id": "first"}, {"messages": messages}, {"prompt": "you"})
    monkeypatch.setattr(sys, "stdin", given)
    options = ("--max-new-tokens=6", "--temperature=0.9", "--seed=5", "--batch=2", "--logprobs=2", "--stop=Q")
    status, out, err = run(capsys, "generate", f"--model={path}", "--input=-", "--json", *options)
    assert status == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert [(answer["id"], answer["seed"]) for answer in answers] == [("first", 3), (2, 5), (3, 5)]
    prompts = ["Hello", generator.chat_prompt(messages), "you"]
    for answer, prompt, seed in zip(answers, prompts, (3, 5, 5), strict=True):
        sampling = Sampling(temperature=0.9)
        (expected,), _ = generator.generate(
            prompt, max_new_tokens=6, sampling=sampling, seed=seed, stop="Q", logprobs=2
        )
        assert answer["prompt"] == prompt
        assert (answer["text"], tuple(answer["tokens"])) == (expected.text, expected.tokens)
        assert [entry["token"] for entry in answer["logprobs"]] == answer["tokens"]
        assert all(len(entry["likeliest"]) == 2 for entry in answer["logprobs"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: is not JSON"),
        ("[1]", "line 1: needs either a prompt or messages, got [1]"),
        ("{}", "line 1: needs either a prompt or messages"),
        ('{"prompt": "a", "messages": []}', "line 1: needs either a prompt or messages"),
        ('\n{"prompt": "a", "temperature": 1}', "line 2: got 'temperature'; accepted: id, messages, prompt, seed"),
        ('{"prompt": 1}', "line 1: prompt: got int 1; accepted: a string"),
        ('{"prompt": "a", "seed": 1.5}', "line 1: seed: got float 1.5; accepted: an integer"),
        ('{"messages": []}', "messages: got []; accepted: a list of at least one message"),
    ],
)
def test_wrong_lines_of_json(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(line)
    status, _, err = run(capsys, "generate", f"--model={path}", f"--input={file}")
    assert status == 2
    assert message in err


def test_samples(path: Path, generator: Generator, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", f"--model={path}", "-p", "Hello", "--temperature=0.9", "--max-new-tokens=4", "-n", "3")
    _, out, _ = run(capsys, *arguments)
    sampling = Sampling(temperature=0.9)
    samples = [
        generator.generate("Hello", max_new_tokens=4, sampling=sampling, seed=seed, logprobs=0)[0][0]
        for seed in range(3)
    ]
    headings = [f"--- 1, sample {number}\nHello{sample.text}\n" for number, sample in enumerate(samples, 1)]
    assert out == "".join(headings)
    best = max(range(3), key=lambda number: samples[number].mean_logprob)
    assert run(capsys, *arguments, "--best=1")[1] == headings[best]


def test_standard_input(path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hel\nlo\n"))
    _, out, err = run(capsys, "generate", f"--model={path}", "-p", "-", "--max-new-tokens=2", "--logprobs=1")
    assert out.startswith("Hel\nlo"), err
    assert len(out.splitlines()) == 4, "the text, and a line for each token"


def test_chat(
    path: Path, generator: Generator, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "seed": 2, "sampling": Sampling(temperature=0.9)}
    conversation = Conversation(generator, "Be", **options)
    expected = ["".join(conversation.send(text)) for text in ("One", "Two")]
    conversation.clear()
    expected.append("".join(conversation.send("One")))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Two\n\n/clear\nOne\n/exit\nThree\n"))
    for command in (("chat",), ("generate", "--interactive")):
        sys.stdin.seek(0)
        given = ("--system=Be", "--prompt=One", "--max-new-tokens=4", "--seed=2", "--temperature=0.9")
        status, out, err = run(capsys, *command, f"--model={path}", *given)
        assert (status, out) == (0, "".join(f"{text}\n\n" for text in expected)), err


def test_chat_without_a_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "chat", f"--model={gguf_file(tmp_path)}")
    assert status == 2
    assert "error: render_chat: this checkpoint has no chat template" in err
    assert "loaded" not in err


def test_chat_goes_on_after_a_message_too_long(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a" * 200 + "\nHi\n"))
    status, out, err = run(capsys, "chat", f"--model={path}", "--max-new-tokens=2")
    assert status == 0
    assert "error: prompts[0]: has" in err
    assert out.endswith("\n\n")
    assert len(out) > 2


def test_memory_is_checked_before_weights_are_read(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palladion.model.memory.available_memory", lambda: 10**6)
    status, _, err = run(capsys, "generate", f"--model={path}", "-p", "a", "-p", "b", "--max-len=4096")
    assert status == 2
    assert (
        "error: max_len 4096 in 2 sequences does not fit: it needs 0.0 GB for the weights at least, and 0.0 GB" in err
    )
    assert "loaded" not in err
    monkeypatch.setattr("palladion.model.memory.available_memory", lambda: 10**4)
    with pytest.raises(ValueError, match=r"the model does not fit: .* or a narrower scheme: quantize='int8'"):
        Generator.load(path)


def test_progress_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich draws in a terminal; without it, and elsewhere, there are plain lines."""
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    shown: list[str] = []
    for has_rich, terminal in ((True, True), (False, True), (True, False)):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        if not has_rich:
            monkeypatch.setitem(sys.modules, "rich.console", None)
        progress = Progress()
        for fraction in (0.5, 1.0):
            progress.loading("layer", fraction)
        progress.working("compiling")
        progress.done()
        shown.append(stream.getvalue())
        monkeypatch.undo()
        monkeypatch.setenv("TERM", "xterm")
    assert "\x1b" in shown[0]
    assert "layer" in shown[0]
    for plain in shown[1:]:
        assert [line.split()[0] for line in plain.splitlines()] == ["loaded", "compiling"]


# ------------------------------------------------------------------------------------------------------------ quantize


@pytest.mark.parametrize(
    ("scheme", "tied"),
    [
        ("int8", False),
        ("int8", True),
        ("int4-g32-zeros", False),
        ("int8-g64-minimums", True),
        ("mxfp4", True),
        ("float8_e4m3fn", False),
    ],
)
def test_quantize(tmp_path: Path, capsys: pytest.CaptureFixture[str], scheme: str, tied: bool) -> None:
    """A quantized folder loads to the same bits as quantizing at load."""
    source = hugging_face_folder(tmp_path / "in", config={"tie_word_embeddings": tied})
    if tied:
        remove_head(source)
    target = tmp_path / "out"
    status, _, err = run(capsys, "quantize", str(source), str(target), f"--scheme={scheme}")
    assert status == 0, err
    assert "15 weights" in err
    loaded, expected = load_checkpoint(target), load_checkpoint(source, quantize=scheme)
    assert isinstance(loaded.parameters.head, QuantizedArray)
    assert loaded.config == expected.config
    assert jax.tree.structure(loaded.parameters) == jax.tree.structure(expected.parameters)
    for one, other in zip(jax.tree.leaves(loaded.parameters), jax.tree.leaves(expected.parameters), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))
    assert loaded.tokenizer.encode("Hello") == expected.tokenizer.encode("Hello")


def remove_head(folder: Path) -> None:
    import safetensors.numpy

    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def test_quantize_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from palladion.model import quantized_folder

    monkeypatch.setattr(quantized_folder, "SHARD_BYTES", 50_000)
    source = hugging_face_folder(tmp_path / "in")
    report = quantized_folder.quantize_folder(source, tmp_path / "out", "int8")
    assert len([*(tmp_path / "out").glob("model-*.safetensors")]) > 2
    assert (report.weights, report.dense) == (15, 6)
    assert report.bytes_after < report.bytes_before / 2
    dense = load_checkpoint(tmp_path / "out", weights="dequantize").parameters
    original = load_checkpoint(source).parameters
    for one, other in zip(jax.tree.leaves(dense), jax.tree.leaves(original), strict=True):
        np.testing.assert_allclose(one, other, atol=0.05)


def test_what_quantize_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = hugging_face_folder(tmp_path / "in"), tmp_path / "out"
    for arguments, message in (
        ((str(source), str(source), "--scheme=int8"), "is there already; give a folder that does not exist"),
        ((str(source), str(target), "--scheme=int3"), "scheme: got 'int3'"),
        ((str(source), str(target)), "the following arguments are required: --scheme"),
        ((str(gguf_file(tmp_path)), str(target), "--scheme=int8"), "quantize takes Hugging Face folders"),
    ):
        status, _, err = run(capsys, "quantize", *arguments)
        assert status == 2
        assert message in err
        assert not target.exists()
    assert run(capsys, "quantize", str(source), str(target), "--scheme=int8")[0] == 0
    status, _, err = run(capsys, "quantize", str(target), str(tmp_path / "again"), "--scheme=int8")
    assert (status, "is quantized already" in err) == (2, True)
    config = json.loads((target / "config.json").read_text())
    for section, message in (
        ({"quant_method": "hqq"}, "weights already quantized by 'hqq' are not supported"),
        ({"quant_method": "palladion", "scheme": "int3"}, "quantization_config: scheme: got 'int3'"),
    ):
        (target / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(target)
