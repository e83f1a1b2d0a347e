"""What is raised on purpose: a person's mistake, shown as a paragraph, exit status 2, no traceback; what ends a run; what a reward
lacks."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user gave cannot be used. The message names it, says what is allowed, and where it stands."""


class BadRowError(UserError):
    """A row of a user's data can't be used. reason: a few words that other rows may share. details: the sentence about this one."""

    def __init__(self, reason: str, details: str) -> None:
        super().__init__(details)
        self.reason = reason


@contextmanager
def standing_at(origin: str) -> Iterator[None]:
    """Let a BadRowError of the block begin with where the row stands."""
    try:
        yield
    except BadRowError as error:
        raise BadRowError(error.reason, f"{origin}: {error}") from None


class RunFailedError(RuntimeError):
    """The run can't go on, through no mistake in what the user gave."""


class RewardError(Exception):
    """A reward could not say anything of a completion: its worker died, its service failed. That completion abstains."""


_LONGEST, _MOST = 100, 60  # of names that are compared and listed: more are nobody's help, and take their time


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A clause that helps after a misspelt name: the closest allowed one, then all of them."""
    choices = sorted(choice for choice in allowed if len(choice) <= _LONGEST)
    close = closest(name, choices) if len(name) <= _LONGEST else None
    guess = f"did you mean {close!r}? " if close else ""
    more = f" and {len(choices) - _MOST:,} more" if len(choices) > _MOST else ""
    return f"{guess}allowed: {', '.join(choices[:_MOST])}{more}"


def closest(name: str, choices: Iterable[str], cutoff: float = 0.5) -> str | None:
    """What a misspelt name was meant to be, or None where nothing shares enough with it.

    Of those that share at least `cutoff` of their letters, the one that the fewest slips of the hand lead to: `gpro` is `grpo`
    with two letters swapped, though `gspo` has as many in the same order.
    """
    written = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), written, n=10, cutoff=cutoff)  # the most alike first
    return written[min(close, key=lambda choice: _num_slips(name.lower(), choice))] if close else None


def _num_slips(given: str, meant: str) -> int:
    """Letters left out, added, mistaken or swapped with their neighbour. Source: Damerau, CACM 7 (1964)."""
    before: list[int] = []
    row = list(range(len(meant) + 1))
    for i, letter in enumerate(given, start=1):
        last, row, earlier = row, [i], before
        for j, other in enumerate(meant, start=1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == meant[j - 2] and given[i - 2] == other:
                cost = min(cost, earlier[j - 2] + 1)
            row.append(cost)
        before = last
    return row[-1]
