"""Finds natural loops in a list of instructions with branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Loop:
    """A natural loop, which is entered at one instruction only.

    Attributes:
      first: number of the instruction that it is entered at.
      body: numbers of its instructions, including inner loops; they need not be consecutive.
      depth: nesting depth, 1 for an outermost loop.
    """

    first: int
    body: frozenset[int] = dataclasses.field(repr=False)
    depth: int = 1

    def contains(self, other: Loop) -> bool:
        """Whether another loop lies inside this one."""
        return other.body < self.body


def natural_loops(successors: Sequence[Sequence[int]]) -> tuple[Loop, ...]:
    """Returns the loops of a program in the order of their first instructions, outer loops before inner ones.

    Args:
      successors: for each instruction, those that may follow it; the program begins at the first instruction.
    """
    order = _reverse_postorder(successors)
    before: dict[int, list[int]] = {number: [] for number in order}
    for number in order:
        for following in successors[number]:
            before[following].append(number)
    dominator = _dominators(order, before)
    bodies: dict[int, set[int]] = {}
    for number in order:
        for following in successors[number]:
            if _dominates(following, number, dominator):
                _extend(bodies.setdefault(following, {following}), number, before)
    loops = [Loop(first, frozenset(body)) for first, body in bodies.items()]
    loops.sort(key=lambda loop: (loop.first, -len(loop.body)))
    return with_depths(loops)


def _extend(body: set[int], last: int, before: dict[int, list[int]]) -> None:
    """Adds to a loop's body an instruction that branches back, and all that leads to it within the loop."""
    pending = [last]
    while pending:
        number = pending.pop()
        if number not in body:
            body.add(number)
            pending += before[number]


def with_depths(loops: Sequence[Loop]) -> tuple[Loop, ...]:
    """Returns loops with the nesting depths that they have among themselves."""
    return tuple(dataclasses.replace(loop, depth=1 + sum(other.contains(loop) for other in loops)) for loop in loops)


def _reverse_postorder(successors: Sequence[Sequence[int]]) -> list[int]:
    """Returns the reachable instructions in reverse postorder: predecessors first, except for backward branches."""
    seen, order = {0}, []
    stack = [(0, iter(successors[0]))]
    while stack:
        number, following = stack[-1]
        for one in following:
            if one not in seen:
                seen.add(one)
                stack.append((one, iter(successors[one])))
                break
        else:
            order.append(number)
            stack.pop()
    return order[::-1]


def _dominators(order: Sequence[int], before: dict[int, list[int]]) -> dict[int, int]:
    """Returns the immediate dominator of each instruction (Cooper, Harvey and Kennedy, 2001)."""
    place = {number: at for at, number in enumerate(order)}
    dominator = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for number in order[1:]:
            known = [one for one in before[number] if one in dominator]
            common = known[0]
            for other in known[1:]:
                common = _common_dominator(common, other, place, dominator)
            if dominator.get(number) != common:
                dominator[number] = common
                changed = True
    return dominator


def _common_dominator(one: int, other: int, place: dict[int, int], dominator: dict[int, int]) -> int:
    """Returns the nearest instruction that dominates both; `place` is the position in reverse postorder."""
    while one != other:
        if place[one] > place[other]:
            one = dominator[one]
        else:
            other = dominator[other]
    return one


def _dominates(one: int, other: int, dominator: dict[int, int]) -> bool:
    while other != one and dominator[other] != other:
        other = dominator[other]
    return other == one
