"""Sums over processes. With one process they change nothing.

A gradient is a sum over micro-batches with denominators counted over the whole optimiser step, so that a process is to
another what a micro-batch is to another: the sum over processes is the gradient that one process would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, distributed

from coterie.types import BatchTotals


def num_processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sum_numbers(*numbers: float) -> list[float]:
    """Each number, summed over all processes."""
    if num_processes() == 1:
        return list(numbers)
    sums = torch.tensor(numbers, dtype=torch.float64, device=_device())
    distributed.all_reduce(sums)
    return sums.tolist()


def sum_totals(totals: BatchTotals) -> BatchTotals:
    """The denominators of the step, counted over all processes."""
    num_rows, num_tokens = sum_numbers(totals.num_rows, totals.num_tokens)
    return replace(totals, num_rows=int(num_rows), num_tokens=int(num_tokens))


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Add up the parameters' gradients over all processes, in place and in one message."""
    if num_processes() == 1:
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    distributed.all_reduce(flat)
    at = 0
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.copy_(flat[at : at + parameter.grad.numel()].view_as(parameter.grad))
            at += parameter.grad.numel()


def all_agree(answer: bool) -> bool:
    """Whether every process says yes, so that all of them take a step or none does."""
    return sum_numbers(0.0 if answer else 1.0) == [0.0]


def _device() -> torch.device:
    """Where the processes' messages have to lie."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
