"""The distance by which rounding alone moves what a model computes: the measure of two ways to compute the same.

In float32 two right ways are 1e-6 apart, in bfloat16 a hundredth, or a nat where a router's choice hangs on the last bit. So the
distance that is allowed is not a number by type: the model is run again with every result rounded a little otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from coterie.models.policy import Policy
from coterie.noise import key

TIMES = 2  # how much further two right ways may be apart than a few trials, each of whose roundings is larger than real ones, found


def epsilon_of(policy: Policy) -> float:
    """The distance between 1 and the next of the numbers that a policy's products give."""
    return torch.finfo(torch.bfloat16 if policy.mixed else policy.model.dtype).eps


@torch.no_grad()
def rounding_of(model: nn.Module, compute: Callable[[], Tensor], *, trials: int = 4) -> tuple[Tensor, Tensor]:
    """The numbers that `compute` makes of the model, and how far each moves at most in some trials. Same shapes.

    Between two right ways to compute it lies TIMES as much, or less.
    """
    plain = compute()
    moved = torch.zeros_like(plain)
    for trial in range(trials):
        with _rounded_otherwise(model, trial):
            moved = torch.maximum(moved, (compute() - plain).abs())
    return plain, moved


@contextmanager
def _rounded_otherwise(model: nn.Module, seed: int) -> Iterator[None]:
    """Let what each module with weights gives be one unit in the last place larger or smaller, by chance."""
    generators: dict[torch.device, torch.Generator] = {}

    def hook(module: nn.Module, inputs: object, output: object) -> object:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        if output.device not in generators:
            generators[output.device] = torch.Generator(output.device).manual_seed(key("rounding", seed) % 2**63)
        ups = torch.randint(2, output.shape, generator=generators[output.device], device=output.device)
        return output * (1 + (2 * ups - 1) * torch.finfo(output.dtype).eps).to(output.dtype)

    hooked = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    handles = [module.register_forward_hook(hook) for module in hooked]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
