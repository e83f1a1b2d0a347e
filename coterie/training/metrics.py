"""Metrics as sums and counts until they are written, so that they add exactly over micro-batches.

What comes as a tensor stays where it lies until the step's values are asked for: the host does not wait for a device in between.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Tally:
    """Named means and maxima under way."""

    sums: dict[str, float | Tensor] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, total: float | Tensor, count: float = 1.0) -> None:
        """Add to a mean: a sum and how many things it is of."""
        total = total.detach().double() if isinstance(total, Tensor) else total
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def add_values(self, name: str, values: Tensor) -> None:
        """Add every entry of a tensor to a mean."""
        self.add(name, values.sum(dtype=torch.float64), values.numel())

    def add_maximum(self, name: str, values: Tensor) -> None:
        if values.numel():
            largest = values.detach().max().double()
            self.maxima[name] = torch.maximum(self.maxima[name], largest) if name in self.maxima else largest

    def merge(self, *others: Tally) -> None:
        for other in others:
            for name, total in other.sums.items():
                self.add(name, total, other.counts[name])
            for name, value in other.maxima.items():
                self.add_maximum(name, value)

    def values(self) -> dict[str, float]:
        """The means and maxima. A mean of nothing is left out."""
        means = {name: float(self.sums[name]) / count for name, count in self.counts.items() if count}
        return {**means, **{name: float(value) for name, value in self.maxima.items()}}


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
