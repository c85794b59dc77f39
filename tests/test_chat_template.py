"""Chats: a template writes what was said, takes what it is given, and cannot run for ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import BOS, CHAT, SYSTEM, USER, byte_level_folder, chat_tokenizer

from palladion.model import chat_sandbox
from palladion.model.tokenizer import Tokenizer


def test_chat_without_a_system_message_has_none() -> None:
    turn = "<|im_start|>user\nHi<|im_end|>\n"
    tokenizer = chat_tokenizer(CHAT)
    assert tokenizer.render_chat([USER]) == f"{turn}<|im_start|>assistant\n"
    assert tokenizer.render_chat([USER], add_generation_prompt=False) == turn
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert tokenizer.render_chat([SYSTEM, USER]) == f"{system}{turn}<|im_start|>assistant\n"
    answered = [USER, {"role": "assistant", "content": "Hello"}, USER]
    assert tokenizer.render_chat(answered, False) == f"{turn}<|im_start|>assistant\nHello<|im_end|>\n{turn}"


def test_chat_keeps_the_bos_token() -> None:
    template = "{{ bos_token }}" + CHAT
    text = chat_tokenizer(template).render_chat([USER])
    assert text == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for written in (template, CHAT):
        tokenizer = chat_tokenizer(written, pre="llama-bpe")
        chat = tokenizer.render_chat([USER])
        assert tokenizer.encode(chat).count(BOS) == 1, "written by the template or not, as by llama.cpp"
        assert tokenizer.encode(chat + "Hello").count(BOS) == 1
        assert tokenizer.encode(chat, add_bos=False).count(BOS) == (written is template)


def test_chat_whose_system_message_is_no_turn_is_left_alone() -> None:
    folded = (
        "{% if messages[0].role == 'system' %}{% set system, rest = '<<' + messages[0].content + '>>', messages[1:] %}"
        "{% else %}{% set system, rest = '', messages %}{% endif %}"
        "{% for message in rest %}[INST] {% if loop.first %}{{ system }}{% endif %}{{ message.content }} [/INST]"
        "{% endfor %}"
    )
    assert chat_tokenizer(folded).render_chat([USER]) == "[INST] Hi [/INST]"
    ignoring = "{{ messages[0].role }}: {{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    assert chat_tokenizer(ignoring).render_chat([USER]) == "user: Hi>"
    refusing = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    refusing += "[{{ m.content }}]{% endfor %}"
    assert chat_tokenizer(refusing).render_chat([USER]) == "[Hi]"
    with pytest.raises(ValueError, match=r"refuses this conversation: no system; roles given: \['system', 'user'\]"):
        chat_tokenizer(refusing).render_chat([SYSTEM, USER])


def test_templates_have_the_functions_they_expect() -> None:
    template = "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}"
    message = {"role": "user", "content": "<é>'"}
    assert chat_tokenizer(template).render_chat([message]) == json.dumps(message, ensure_ascii=False)
    assert len(chat_tokenizer("{{ strftime_now('%Y') }}").render_chat([USER])) == 4
    assert chat_tokenizer("{% if tools %}tools{% endif %}{{ eos_token }}").render_chat([USER]) == "</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "^render_chat: this checkpoint has no chat template, as base models have none; encode plain text"),
        ("{% for %}", "chat template is not valid"),
        ("{{ messages.__class__.__mro__ }}", "refuses this conversation: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses this conversation"),
        ("{{ 'a' + 1 }}", "refuses this conversation"),
        ("{{ range(10 ** 6) }}", "refuses this conversation: Range too big"),
        ("{{ lipsum(10 ** 9) }}", "refuses this conversation: 'lipsum' is undefined"),
    ],
)
def test_chat_errors(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_tokenizer(template).render_chat([USER])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("x", "messages: got 'x'; accepted: a list of at least one message"),
        (USER, "messages: got {'role': 'user'.*; accepted: a list"),
        ([], r"messages: got \[\]; accepted: a list of at least one message"),
        (None, "messages: got None"),
        (["x"], r"messages\[0\]: got 'x'; accepted: dictionaries of \"role\" and \"content\""),
        ([USER, ["user", "x"]], r"messages\[1\]: got \['user', 'x'\]"),
        ([{"content": "x"}], r"messages\[0\]: 'role': got NoneType None; accepted: a string"),
        ([{"role": 3, "content": "x"}], r"messages\[0\]: 'role': got int 3; accepted: a string"),
        ([{"role": "user"}], r"messages\[0\]: its content is None; accepted: .* a string or a list of parts"),
        ([{"role": "user", "content": 3}], r"messages\[0\]: its content is 3"),
        ([{"role": "user", "content": []}], r"messages\[0\]: its content is \[\]"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]: its content is \['x'\]"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], r"messages\[0\]: its content is"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], r"messages\[0\]: its content is"),
        ([{"role": "user", "content": "\ud800"}], r"messages\[0\]: 'content': is not valid text.* lone surrogate"),
        ([{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}], "lone surrogate"),
    ],
)
def test_what_is_no_conversation(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_tokenizer(CHAT).render_chat(messages)


def test_content_in_parts() -> None:
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]
    by_parts = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    assert chat_tokenizer(by_parts).render_chat([{"role": "user", "content": parts}]) == "Hi you"
    assert chat_tokenizer(by_parts).render_chat([USER]) == "Hi"
    with pytest.raises(ValueError, match=r"takes no list of parts, .* give the content as one string"):
        chat_tokenizer(CHAT).render_chat([{"role": "user", "content": parts}])


def test_a_message_that_calls_a_tool_may_say_nothing() -> None:
    template = "{% for m in messages %}[{{ m.content or m.tool_calls[0].name }}]{% endfor %}"
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    assert chat_tokenizer(template).render_chat([USER, call]) == "[Hi][clock]"


# ----------------------------------------------------------------------------------------------------- bounds of work

ENDLESS = {
    "nested loops": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "loops over a list": "{% set l = range(9000) | list %}{% for a in l %}{% for b in l %}x{% endfor %}{% endfor %}",
    "loops with a filter": "{% for a in range(90000) %}{% for b in range(90000) if b > a %}{% endfor %}{% endfor %}",
    "loops in a macro": (
        "{% macro m() %}{% for a in range(90000) %}x{% endfor %}{% endmacro %}{% for a in range(90000) %}{{ m() }}"
        "{% endfor %}"
    ),
    "macros that call themselves": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "a recursive loop": (
        "{% for a in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}"
    ),
    "a recursive loop over long lists": (
        "{% set l = range(9000) | list %}{% for a in [1] recursive %}{% if loop.depth < 3 %}{{ loop(l) }}{% endif %}"
        "{% endfor %}"
    ),
    "a text that doubles": "{% set s = 'ab' %}" + "{% set s = s ~ s %}" * 60,
    "a block that doubles": "{% set s = 'ab' %}" + "{% set s %}{{ s }}{{ s }}{% endset %}" * 60,
    "a filtered block that doubles": "{% set s = 'ab' %}" + "{% set s | trim %}{{ s }}{{ s }}{% endset %}" * 60,
    "a list that doubles": (
        "{% set n = namespace(s=[1]) %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}"
    ),
    "a long text": "{{ 'ab' * 10 ** 10 }}",
    "a long list": "{{ (10 ** 10) * [1] }}",
    "a large number": "{{ 10 ** (10 ** 9) }}",
    "a wide filter": "{{ messages[0].content | center(10 ** 10) }}",
    "a wide filter by name": "{{ messages[0].content | indent(width=10 ** 10) }}",
    "a filter that counts": "{{ messages | slice(10 ** 10) | list | length }}",
    "a wide method": "{{ messages[0].content.rjust(10 ** 10) }}",
    "much text": "{% set s = 'a' * 10 ** 6 %}{% for a in range(60000) %}{{ s }}{% endfor %}",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS.keys())
def test_templates_that_would_not_end(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_sandbox, "MAX_STEPS", 100_000)  # a tenth, to be sooner there
    with pytest.raises(ValueError, match=r"refuses this conversation: it (takes|makes a value of) .*more than"):
        chat_tokenizer(template).render_chat([USER])


def test_long_conversations_are_within_the_bounds() -> None:
    messages = [USER, {"role": "assistant", "content": "Hello"}] * 5000
    text = chat_tokenizer(CHAT).render_chat(messages)
    assert text.count("<|im_start|>") == 10_001
    assert len(messages) * 50 < chat_sandbox.MAX_STEPS
    # Each rendering has its own count.
    template = "{% for a in range(50000) %}{% for b in range(10) %}{% endfor %}{% endfor %}done"
    tokenizer = chat_tokenizer(template)
    assert [tokenizer.render_chat([SYSTEM]) for _ in range(2)] == ["done"] * 2


def test_counted_loops_are_loops() -> None:
    template = (
        "{% for a in [1, 2, 3] %}{{ loop.index }}/{{ loop.length }}{{ '.' if loop.last else ',' }}{% endfor %}"
        "{% for key, value in {'a': 1}.items() %}{{ key }}{{ value }}{% else %}none{% endfor %}"
        "{% for a in missing %}{{ a }}{% else %}none{% endfor %}"
        "{% for a in [[1, [2]], 3] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}"
        "{% for a in 'abc' if a != 'b' %}{{ a }}{% endfor %}"
        "{% set x = 3 * 'ab' %}{{ x }}{{ 2 ** 3 * 1.5 }}"
    )
    assert chat_tokenizer(template).render_chat([SYSTEM]) == "1/3,2/3,3/3.a1none123acababab12.0"


def test_the_generation_tag_is_transparent() -> None:
    template = (
        "{% for m in messages %}{% generation %}\n{{ m.content }}{% set x = 1 %}{% endgeneration %}{{ x }}{% endfor %}"
    )
    assert chat_tokenizer(template).render_chat([USER]) == "Hi"


@pytest.mark.peer
def test_generation_tags_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    template = (
        "{%- for m in messages -%}\n  [{{ m.role }}]\n  {%- generation -%}\n {{ m.content }}\n{% set x = m.role %}"
        "{{ x }}\n{%- endgeneration -%}\n|{{ x }}\n{% generation %}\n  {% if true %}\na\n  {% endif %}\n"
        "  {% endgeneration %}\n{%- endfor %}"
    )
    byte_level_folder(tmp_path, chat_template=template, bos_token="<s>")
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [SYSTEM, USER]
    expected = peer.apply_chat_template(messages, tokenize=False)
    assert Tokenizer.from_folder(tmp_path).render_chat(messages, False) == expected
