"""What a run learns from, made once at set-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coterie.models.codec import Codec
from coterie.rewards.base import Reward
from coterie.tasks.base import Task


@dataclass(frozen=True)
class Problem:
    """The task, what judges its completions, and what stands between text and tokens."""

    task: Task
    rewards: Sequence[Reward]
    codec: Codec
