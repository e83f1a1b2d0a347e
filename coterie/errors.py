"""What is raised on purpose: a person's mistake, shown as a paragraph, exit status 2, no traceback; what ends a run; what a reward
lacks."""

import difflib
from collections import Counter
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


def first_line(error: BaseException) -> str:
    """What an error says, up to its first line break; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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

    Of those that share at least `cutoff` of their letters, the one with the fewest letters too many or too few: `gpro` has those of
    `grpo`, though it has as many in the order of `gspo`.
    """
    written = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), written, n=10, cutoff=cutoff)  # the most alike first
    return written[min(close, key=lambda choice: _num_others(name.lower(), choice))] if close else None


def _num_others(one: str, other: str) -> int:
    """How many letters only one of two names has."""
    first, second = Counter(one), Counter(other)
    return ((first - second) + (second - first)).total()
