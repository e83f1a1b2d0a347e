"""What is raised on purpose: a person's mistake, shown as a paragraph, exit status 2, no traceback; and what a reward lacks."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot be used. The message names it, says what is allowed, and where it stands."""


class BadRowError(UserError):
    """A row of a user's data can't be used. reason: a few words that other rows may share; the message says where it stands."""

    def __init__(self, origin: str, reason: str, details: str = "") -> None:
        super().__init__(f"{origin}: {details or reason}")
        self.reason = reason


class RewardError(Exception):
    """A reward could not say anything of a completion: its worker died, its service failed. That completion abstains."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A clause that helps after a misspelt name: the closest allowed one, then all of them."""
    choices = sorted(allowed)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}allowed: {', '.join(choices)}"
