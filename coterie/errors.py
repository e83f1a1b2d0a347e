"""The one exception that a person's mistake becomes: shown as a paragraph, exit status 2, no traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave cannot be used. The message names it, says what is allowed, and where it stands."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A clause that helps after a misspelt name: the closest allowed one, then all of them."""
    choices = sorted(allowed)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    guess = f"did you mean {close[0]!r}? " if close else ""
    return f"{guess}allowed: {', '.join(choices)}"
