"""Weights that adapt while a run trains, so that something measured holds a target."""


def adapted_kl_weight(weight: float, measured: float, *, target: float, rate: float) -> float:
    """A KL weight for the next step: up where the KL lies above its target, down where below, by at most `rate`.

    measured, target: nats per token. Source: arXiv 1909.08593, equations 3 and 4, where the error is held within 0.2.
    """
    error = max(-1.0, min(1.0, (measured / target - 1) / 0.2))
    return weight * (1 + rate * error)


def adapted_entropy_weight(weight: float, measured: float, *, target: float, rate: float) -> float:
    """An entropy weight for the next step: it grows with the nats that the entropy lacks, and never falls below 0."""
    return max(0.0, weight + rate * (target - measured))
