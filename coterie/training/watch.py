"""Figures that say a run is going wrong, step by step (R36): an event when one begins, and where asked for, the end of the run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coterie.settings import Limits

HISTORY = 50  # steps whose gradient norms a spike is compared with
_ENOUGH = 10


@dataclass(frozen=True)
class Alarm:
    """A limit that a step passed: which setting, and the figures in words."""

    limit: str
    message: str


def alarms(metrics: Mapping[str, float], grad_norms: Sequence[float], limits: Limits) -> list[Alarm]:
    """The limits that a step passed. grad_norms: of the steps before it, at most HISTORY."""
    found = []
    norm = metrics.get("optimiser/grad_norm", 0.0)
    usual = statistics.median(grad_norms) if len(grad_norms) >= _ENOUGH else None
    if usual and norm > limits.grad_norm_times * usual:
        found.append(
            Alarm(
                "grad_norm_times", f"the gradient's norm is {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}"
            )
        )
    for limit, name, what in _HIGHEST:
        bound, value = getattr(limits, limit), metrics.get(name)
        if bound is not None and value is not None and value > bound:
            found.append(Alarm(limit, f"{what} is {value:.3g}, above {bound:g}"))
    entropy = metrics.get("policy/entropy")
    if entropy is not None and entropy < limits.entropy:
        found.append(
            Alarm(
                "entropy",
                f"the policy's entropy is {entropy:.3g} nats a token, below {limits.entropy:g}: it has collapsed",
            )
        )
    return found


_HIGHEST = (
    ("ratio", "policy/ratio_max", "the largest ratio of the policy to the one that sampled"),
    (
        "sampler_gap",
        "policy/sampler_gap_max",
        "the largest gap in nats between the sampler's log-probability and the trainer's",
    ),
    ("kl", "policy/kl", "the KL to the reference in nats a token"),
)
