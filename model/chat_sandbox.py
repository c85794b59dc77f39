"""The sandbox for chat templates, which are programs that come with a download.

Jinja's own sandbox keeps a template from doing anything but producing text, but does not bound its work. Therefore each
template is rewritten so that its work is counted, and is stopped when it exceeds a limit. Limited are loop iterations
and calls of functions and macros, together; the sizes of values that are assigned, returned, multiplied or written; and
the integer arguments of filters and string methods, which are widths and counts. All other work is linear in these and
in the length of the template.
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
"""Maximum loop iterations and calls of functions and macros in one rendering, together."""

MAX_SIZE: Final = 10_000_000
"""Maximum characters of the text, characters or entries of a value, and width or count."""

WORK: Final = "work of this rendering"
"""Variable that holds the counter; a template cannot write a name with spaces."""


class Work:
    """Counts the work of one rendering.

    Raises:
      ValueError: raised by each method once the work exceeds `MAX_STEPS`.
    """

    def __init__(self) -> None:
        self._steps = 0

    def step(self) -> None:
        """Counts a loop iteration or a call."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise ValueError(f"it takes more than {MAX_STEPS:,} passes of loops and calls")

    def iterate(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yields the items of a loop and counts them."""
        for item in items:
            self.step()
            yield item


def check_size(size: int) -> None:
    """Raises ValueError for a size above `MAX_SIZE`."""
    if size > MAX_SIZE:
        raise ValueError(f"it makes a value of {size:,} characters or entries, more than {MAX_SIZE:,}")


def sized(value: Any) -> Any:
    """Returns `value`; raises ValueError if it is too large."""
    if isinstance(value, str | Sequence | dict):
        check_size(len(value))
    return value


def counted(value: Any) -> Any:
    """Returns `value`; raises ValueError if it is an integer too large for a width or a count."""
    if isinstance(value, int):
        check_size(value)
    return value


@jinja2.pass_context
def _iterate(context: jinja2.runtime.Context, items: Iterable[Any]) -> Iterator[Any]:
    """Counts the iterations of a loop, as a filter."""
    work: Work = context[WORK]
    return work.iterate(items)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with the functions that chat templates expect, and with limits on their work."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", GenerationTag]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.filters |= {
            "tojson": _to_json,
            "palladion_iterate": _iterate,
            "palladion_sized": sized,
            "palladion_counted": counted,
        }
        del self.globals["lipsum"]  # any amount of text in one call
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        }

    def bounded(self, source: str) -> jinja2.Template:
        """Compiles a template so that its loops and assignments are counted."""
        tree = self.parse(source)
        for applied in [*tree.find_all(jinja2.nodes.Filter)]:
            applied.args = [_filtered(argument, "palladion_counted") for argument in applied.args]
            for pair in applied.kwargs:
                pair.value = _filtered(pair.value, "palladion_counted")
        for node in [*tree.find_all((jinja2.nodes.For, jinja2.nodes.Assign, jinja2.nodes.AssignBlock))]:
            if isinstance(node, jinja2.nodes.For):
                node.iter = _filtered(node.iter, "palladion_iterate")
            elif isinstance(node, jinja2.nodes.Assign):
                node.node = _filtered(node.node, "palladion_sized")
            elif isinstance(node, jinja2.nodes.AssignBlock):
                node.filter = _filtered(node.filter, "palladion_sized")
        tree.set_environment(self)
        return self.from_string(tree)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Calls a function for a template; parameter names are mangled so as not to collide with keyword arguments."""
        work: Work = __context[WORK]
        work.step()
        if isinstance(__obj, jinja2.runtime.LoopContext) and args:
            args = (work.iterate(args[0]), *args[1:])  # the next level of a recursive loop
        if isinstance(getattr(__obj, "__self__", None), str):
            args = tuple(map(counted, args))
        return sized(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiplies, or raises to a power; raises ValueError if the result is too large."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_size(left.bit_length() * max(right, 0))
        for value, count in ((left, right), (right, left)):
            if operator == "*" and isinstance(value, str | Sequence) and isinstance(count, int):
                check_size(len(value) * max(count, 0))
        return super().call_binop(context, operator, left, right)


class GenerationTag(jinja2.ext.Extension):
    """The tag `{% generation %}`, which marks the assistant's text for training; here it only renders its content."""

    tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        """Parses the content up to `{% endgeneration %}` as a scope."""
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    """Renders a template that `Environment.bounded` compiled.

    Raises:
      ValueError: the template exceeds a limit.
      Exception: any error of the template.
    """
    pieces, size = [], 0
    for piece in template.generate(variables | {WORK: Work()}):
        pieces.append(piece)
        size += len(piece)
        check_size(size)
    return "".join(pieces)


def _filtered(node: Any, name: str) -> jinja2.nodes.Filter:
    """Applies a filter to an expression."""
    line = None if node is None else node.lineno
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=line)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """Implements the filter `tojson` without Jinja's escaping for HTML: a model reads the JSON."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> NoReturn:
    """Raises ValueError, for templates that refuse a conversation."""
    raise ValueError(message)
