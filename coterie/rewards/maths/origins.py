"""What the numbers of a worked solution were made of, and whether one was only counted up to.

True steps can lead from any number to any other: `5 + 1 = 6`, `6 + 1 = 7` and on to a guess. What a problem states is used about as often
as it is stated; to count, one number is used again and again, or numbers that are not stated at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from coterie.rewards.maths.expressions import Node, Number, Operation, Power, is_plain, numbers

Uses = Counter[Fraction]


@dataclass(frozen=True)
class Origin:
    """added, multiplied: how often each number was used so, one after another, on the way to a number. given: what the problem
    states of it."""

    added: Uses = field(default_factory=Counter)
    multiplied: Uses = field(default_factory=Counter)
    given: frozenset[Fraction] = frozenset()


@dataclass
class Origins:
    """stated: the numbers of the problem, and how often. constants: of anything, such as 60."""

    stated: Mapping[Fraction, int]
    constants: frozenset[Fraction]
    made: dict[Fraction, Origin] = field(default_factory=dict)

    def add(self, left: Node, results: Iterable[Fraction]) -> None:
        """A step made these of what stands on its left side."""
        origin = self._of(left)
        for number in results:
            self.made.setdefault(number, origin)

    def counted(self, number: Fraction) -> bool:
        """Whether one number was used more often than the problem says, or one that it does not state was added.

        A stated number may be used once more than it is stated, as often as another stated number says (5 + 5 + 5 for 3 times
        5), and twice more in products. Of what is not stated only 1 may be added, once, beside two stated numbers: as the one post more than there are gaps.
        """
        origin = self.made[number]
        free = [value for value, uses in origin.added.items() for _ in range(uses) if not self._times(value)]
        if free and (free != [1] or len(origin.given) < 2):
            return True
        stated = ((value, uses, 1) for value, uses in origin.added.items() if self._times(value))
        multiplied = ((value, uses, 2) for value, uses in origin.multiplied.items())
        return any(
            uses > self._times(value) + more and not self._says(value, uses)
            for value, uses, more in (*stated, *multiplied)
        )

    def _times(self, value: Fraction) -> int:
        """How often a number is stated; one that a step has made counts as stated once."""
        return self.stated.get(value, 0) or (1 if value in self.made else 0)

    def _says(self, value: Fraction, uses: int) -> bool:
        """Whether the problem states how often; to add 1 so often would be to add that number."""
        return value != 1 and any(Fraction(uses + more) in self.stated for more in (-1, 0, 1))

    def _of(self, node: Node) -> Origin:
        if isinstance(node, Power):
            return self._of(node.base)
        return self._of_operation(node) if isinstance(node, Operation) and not is_plain(node) else self._of_number(node)

    def _of_number(self, node: Node) -> Origin:
        value = abs(node.value)
        if value in self.made:
            return self.made[value]
        given = {value, *(abs(one.value) for one in numbers(node)), *(one.written for one in numbers(node))}
        return Origin(given=frozenset(number for number in given if number in self.stated))

    def _of_operation(self, node: Operation) -> Origin:
        parts = [(turned, part, self._of(part)) for turned, part in node.parts]
        own: Uses = Counter()
        for place, (turned, part, origin) in enumerate(parts):
            whole = place == 0 and not turned and not origin.given and any(t for t, _, _ in parts)  # 100 - 20, 1 - 1/4
            if isinstance(part, Number) and not whole:
                own[_stated_as(part, self.stated)] += 1
        added, multiplied = Counter[Fraction](), Counter[Fraction]()
        for _, _, origin in parts:  # the largest and no sum: what comes together was not used one after another
            added |= origin.added
            multiplied |= origin.multiplied
        if node.kind == "+":
            added += own
        else:
            multiplied += own
        given = frozenset().union(*(origin.given for _, _, origin in parts))
        return Origin(added, multiplied, given)


def _stated_as(node: Number, stated: Mapping[Fraction, int]) -> Fraction:
    """20 of `20%`, where that is what is stated; else the value."""
    return node.written if node.written in stated else abs(node.value)
