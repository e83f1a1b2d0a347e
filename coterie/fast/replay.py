"""A step of decoding that a GPU records once and replays.

A step is some hundred small kernels, which the host takes longer to launch than a GPU to run. A CUDA graph launches all of them at once. It
needs shapes and addresses that stay: they do until rows are admitted or let go, or the grid gets more columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from coterie.errors import first_line
from coterie.fast.grid import Grid, StaticLayout
from coterie.models.policy import Policy

# Steps of a grid before one is recorded: grids may be short-lived, and libraries set themselves up in the first
_BY_HAND = 2
ROOM = 256  # columns that are added at a time, since each time is a recording


class Replayer:
    """Runs steps of decoding for one job, in static shapes, replayed where it can be done.

    Recording fails for a model that waits for the device in its forward pass; then `usable` is false from there on, after a warning.
    """

    def __init__(self, policy: Policy, pool: Pool) -> None:
        self.usable = True
        self._policy, self._pool = policy, pool
        self._step: _Step | None = None
        self._checked = False

    def feed(self, grid: Grid, tokens: Tensor, positions: Tensor) -> Tensor:
        """The logits after these tokens, [R] at positions [R], of rows that are in the grid: [R, V]."""
        if self._step is None or not self._step.is_of(grid):
            self._step = _Step(self._policy, grid)
        step = self._step
        if step.graph is None and step.num_run >= _BY_HAND and self.usable and _records_on(grid.rows.device):
            self._record(step, tokens, positions)
        return step.run(tokens, positions)

    def _record(self, step: _Step, tokens: Tensor, positions: Tensor) -> None:
        try:
            expected = None if self._checked else step.run(tokens, positions)
            step.record(self._pool)
            if expected is not None:
                difference = (step.run(tokens, positions) - expected).abs().max()
                if not difference <= 0.02 * expected.abs().max().clamp(min=1):  # not a number is no equal either
                    raise RuntimeError(f"logits differ by {difference.item():.2g}")
                self._checked = True
        except RuntimeError as error:
            step.graph, self.usable = None, False
            warnings.warn(f"sampling without CUDA graphs, which is slower ({first_line(error)})", stacklevel=2)


class _Step:
    """A step on one grid, whose tensors it reads and writes where they lie."""

    def __init__(self, policy: Policy, grid: Grid) -> None:
        self.graph: Any = None
        self.num_run = 0
        self._policy, self._grid, self._own_kv = policy, grid, grid.own_kv
        self._tokens, self._positions = torch.zeros_like(grid.rows), torch.zeros_like(grid.rows)
        self._now = grid.rows.new_zeros(1)
        self._logits = grid.logits

    def is_of(self, grid: Grid) -> bool:
        return self._grid is grid and self._own_kv is grid.own_kv

    def run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        self.num_run += 1
        self._tokens.copy_(tokens)
        self._positions.copy_(positions)
        self._now.fill_(self._grid.now)
        if self.graph is None:
            return self._compute()
        self.graph.replay()
        return self._logits

    def record(self, pool: Pool) -> None:
        self.graph, self._logits = pool.capture(self._compute)

    def _compute(self) -> Tensor:
        layout = StaticLayout(self._grid, self._now)
        return self._policy.logits(self._policy.run(self._tokens, self._positions, layout))


class Pool:
    """Memory that one recording leaves to the next. torch gives it up for good with the last recording in it, so the newest is kept."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._stream: Any = None  # for all recordings: each stream gets a room of its own for products, which stays
        self._newest: Any = None

    def capture(self, compute: Callable[[], Tensor]) -> tuple[Any, Tensor]:
        """A recording of what `compute` launches, and the tensor that a replay fills.

        This is torch.cuda.graph without what it does first, which takes longer than the steps that are saved: to collect garbage, and to
        give memory back. What other threads do on the device meanwhile does not end it.
        """
        graph = torch.cuda.CUDAGraph()
        self._handle = self._handle or torch.cuda.graph_pool_handle()
        self._stream = self._stream or torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            try:
                out = compute()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        self._newest = graph
        return graph, out


def _records_on(device: torch.device) -> bool:
    return device.type == "cuda"
