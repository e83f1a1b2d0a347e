"""Metrics as sums and counts until they are written, so that they add exactly over micro-batches."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Tally:
    """Named means and maxima under way."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: float | Tensor, count: float = 1.0) -> None:
        """Add to a mean: a sum and how many things it is of."""
        self.sums[name] = self.sums.get(name, 0.0) + float(total)
        self.counts[name] = self.counts.get(name, 0.0) + count

    def add_values(self, name: str, values: Tensor) -> None:
        """Add every entry of a tensor to a mean."""
        self.add(name, values.sum(dtype=torch.float64), values.numel())

    def add_maximum(self, name: str, values: Tensor) -> None:
        if values.numel():
            self.maxima[name] = max(self.maxima.get(name, -torch.inf), float(values.max()))

    def merge(self, other: Tally) -> None:
        for name, total in other.sums.items():
            self.add(name, total, other.counts[name])
        for name, value in other.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, -torch.inf), value)

    def values(self) -> dict[str, float]:
        """The means and maxima. A mean of nothing is left out."""
        means = {name: self.sums[name] / count for name, count in self.counts.items() if count}
        return {**means, **self.maxima}


class Clock:
    """Seconds spent on the parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to a name, and keep the whole."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
        self.seconds["time/step_seconds"] = now - self._start
