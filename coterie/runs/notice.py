"""What is recorded of a step, and what those say that look at it: an event, and a line for the person who watches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coterie.tasks.base import Encoded
from coterie.types import Scored


@dataclass(frozen=True)
class Recorded:
    """A step of a stage. scored: its completions; rows: what it learned from, where that is no completions.

    pieces: gives the text of each token: token ids -> list of str.
    """

    stage: str
    step: int
    metrics: Mapping[str, float]
    scored: Scored | None = None
    rows: Sequence[Encoded] = ()
    pieces: Any = None


@dataclass(frozen=True)
class Notice:
    """An event of a kind, in words. shown: the words for the console; empty where nothing is said there."""

    kind: str
    text: str
    shown: str = ""


Listener = Callable[[Recorded], Iterable[Notice]]  # hears every step once it is recorded; may raise RunFailedError
