"""The sandbox that chat templates run in: they are programs that come with a download.

Jinja's own sandbox lets a template make text and nothing else. What it does not bound is work: here every template is
rewritten so that its loops, its calls and the sizes of its values are counted, and one that takes too much is stopped.
Bounded are the passes of all loops and the calls of functions and macros together, the sizes of values that are
assigned, returned, multiplied or written, and the numbers that filters and methods of strings are given, which are
widths and counts. What is left is linear in these, and in the length of the template.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.runtime
import jinja2.sandbox

MAX_STEPS: Final = 1_000_000
"""Passes of loops and calls of functions and macros, in one rendering together."""

MAX_SIZE: Final = 10_000_000
"""Characters of the text, characters or entries of a value, and the largest width or count."""

WORK: Final = "work of this rendering"
"""The variable that holds the counter: no name that a template could write."""


class Work:
    """Counts what one rendering does.

    Raises:
      ValueError: by each method, once it is too much.
    """

    def __init__(self) -> None:
        self._steps = 0

    def step(self) -> None:
        """Counts a pass of a loop, or a call."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise ValueError(f"it takes more than {MAX_STEPS:,} passes of loops and calls")

    def passes(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items of a loop, counted as they are taken."""
        for item in items:
            self.step()
            yield item


def check_size(size: int) -> None:
    """Raises ValueError for a value that is too large."""
    if size > MAX_SIZE:
        raise ValueError(f"it makes a value of {size:,} characters or entries, more than {MAX_SIZE:,}")


def sized(value: Any) -> Any:
    """`value`, unless it is too large."""
    if isinstance(value, str | Sequence | dict):
        check_size(len(value))
    return value


def counted(value: Any) -> Any:
    """`value`, which may be a width or a count, unless it is too large."""
    if isinstance(value, int):
        check_size(value)
    return value


@jinja2.pass_context
def _passes(context: jinja2.runtime.Context, items: Iterable[Any]) -> Iterator[Any]:
    work: Work = context[WORK]
    return work.passes(items)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the functions that chat templates expect, and with bounds on their work."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", GenerationTag]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.filters |= {
            "tojson": _to_json,
            "palladion_passes": _passes,
            "palladion_sized": sized,
            "palladion_counted": counted,
        }
        del self.globals["lipsum"]  # any amount of text in one call
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }

    def bounded(self, source: str) -> jinja2.Template:
        """Compiles a template, its loops and assignments counted."""
        tree = self.parse(source)
        for applied in [*tree.find_all(jinja2.nodes.Filter)]:
            applied.args = [_filtered(argument, "palladion_counted") for argument in applied.args]
            for pair in applied.kwargs:
                pair.value = _filtered(pair.value, "palladion_counted")
        for node in [*tree.find_all((jinja2.nodes.For, jinja2.nodes.Assign, jinja2.nodes.AssignBlock))]:
            if isinstance(node, jinja2.nodes.For):
                node.iter = _filtered(node.iter, "palladion_passes")
            elif isinstance(node, jinja2.nodes.Assign):
                node.node = _filtered(node.node, "palladion_sized")
            elif isinstance(node, jinja2.nodes.AssignBlock):
                node.filter = _filtered(node.filter, "palladion_sized")
        tree.set_environment(self)
        return self.from_string(tree)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Calls a function for a template; the names leave all others to its keyword arguments."""
        work: Work = __context[WORK]
        work.step()
        if isinstance(__obj, jinja2.runtime.LoopContext) and args:
            args = (work.passes(args[0]), *args[1:])  # a recursive loop's next level
        if isinstance(getattr(__obj, "__self__", None), str):
            args = tuple(map(counted, args))
        return sized(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiplies, or raises to a power, where the result is not too large."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_size(left.bit_length() * max(right, 0))
        for value, count in ((left, right), (right, left)):
            if operator == "*" and isinstance(value, str | Sequence) and isinstance(count, int):
                check_size(len(value) * max(count, 0))
        return super().call_binop(context, operator, left, right)


class GenerationTag(jinja2.ext.Extension):
    """The tag `{% generation %}`, which marks what a model is trained to write; here its content is just content."""

    tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """Parses the tag up to `{% endgeneration %}`, a scope of its own."""
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """The text that a template of `Environment.bounded` makes.

    Raises:
      ValueError: it takes too much work.
      Exception: whatever the template raises.
    """
    pieces, size = [], 0
    for piece in template.generate(variables | {WORK: Work()}):
        pieces.append(piece)
        size += len(piece)
        check_size(size)
    return "".join(pieces)


def _filtered(node: Any, name: str) -> jinja2.nodes.Filter:
    line = None if node is None else node.lineno
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=line)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """The filter of that name without Jinja's escaping for HTML: templates write JSON for a model to read."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)
