"""One exact step of an optimiser over micro-batches, with its learning rate: what every method takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from coterie.distributed.reduce import all_agree, sum_gradients
from coterie.recipe.settings import ColdStart, Optimiser
from coterie.runs.checkpoint import Trained
from coterie.sections import section
from coterie.stopping import may_stop, weights_move
from coterie.training.metrics import Tally
from coterie.types import Stream


def learning_rate_at(step: int, num_steps: int, settings: Optimiser | ColdStart) -> float:
    """The learning rate of a step, numbered from 1: linear warm-up, then the schedule down to `final_share`."""
    if step <= settings.warmup_steps:
        return settings.learning_rate * step / settings.warmup_steps
    done = (step - 1 - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    final = getattr(settings, "final_share", 0.0)
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    share = shapes[settings.schedule]
    return settings.learning_rate * (share if settings.schedule == "constant" else final + (1 - final) * share)


def make_optimiser(
    model: Trained, settings: Optimiser | None = None, learning_rate: float | None = None
) -> torch.optim.Optimizer:
    """AdamW over all parameters that are trained, in the model's order."""
    settings = settings or Optimiser()
    parameters = [parameter for _, parameter in model.named_parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr=learning_rate or settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
        fused=True,
    )


def set_learning_rate(
    optimiser: torch.optim.Optimizer, step: int, num_steps: int, settings: Optimiser | ColdStart
) -> float:
    """Give the optimiser the learning rate of a step, and return it."""
    learning_rate = learning_rate_at(step, num_steps, settings)
    for group in optimiser.param_groups:
        group["lr"] = learning_rate
    return learning_rate


def take_step(
    optimiser: torch.optim.Optimizer,
    streams: Sequence[Stream],
    loss_of: Callable[[int, Stream], Tensor],
    device: torch.device,
    max_grad_norm: float,
) -> Tally:
    """Backward over every micro-batch, clip the gradient's norm, step. `loss_of(number, stream on the device)` -> scalar.

    The gradient is the sum over micro-batches. A loss or gradient that is not finite never reaches the weights: the step
    is skipped and counted.
    """
    tally = Tally()
    given = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    parameters = [parameter for parameter in given if parameter.requires_grad]
    with section("train/optimiser"):
        for parameter in given:
            if not parameter.requires_grad:
                parameter.grad = None  # a frozen weight with a gradient of zeros would decay
        for parameter in parameters:  # zeros and not None, so that a batch without signal is a step with no gradient
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
    finite = torch.ones((), dtype=torch.bool, device=device)
    for number, stream in enumerate(streams):
        may_stop()
        with _named(f"micro-batch {number + 1} of {len(streams)}", stream):
            with section("train/forward"):
                loss = loss_of(number, stream.to(device))
                finite &= loss.isfinite()
            with section("train/backward"):
                loss.backward()
    may_stop()
    weights_move()
    with section("train/optimiser"):
        sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        takes = all_agree(
            bool(finite & norm.isfinite())
        )  # the one place of the update where the host waits for the device
        if takes:
            optimiser.step()
            # The fused optimiser does not count its changes, by which copies of weights are known to be old.
            torch.autograd.graph.increment_version(parameters)
            tally.add("optimiser/grad_norm", norm)
    tally.add("optimiser/skipped_share", 0.0 if takes else 1.0)
    return tally


@contextmanager
def _named(name: str, stream: Stream) -> Iterator[None]:
    """Put the micro-batch into an error, for where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        error.add_note(f"{name}, {len(stream.tokens):,} tokens of {stream.num_rows} rows")
        raise
