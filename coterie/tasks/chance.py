"""Choices of the bundled tasks, keyed as all noise is."""

from collections.abc import Mapping

import torch

from coterie.noise import key, mix, uniform


def chance(*parts: int | str) -> float:
    """A number in [0, 1) that depends on the key only."""
    return (key(*parts) >> 11 & (1 << 53) - 1) / (1 << 53)


def chances(count: int, width: int, *parts: int | str) -> list[list[float]]:
    """Numbers in [0, 1) that depend on the key and their place only: [count, width]."""
    return uniform(mix(torch.tensor(key(*parts)), torch.arange(count * width))).view(count, width).tolist()


def drawn(shares: Mapping[str, float], number: float) -> str:
    """The name whose share of [0, 1) a number falls into; the last one for what rounding leaves over."""
    for name, share in shares.items():
        if number < share:
            return name
        number -= share
    return name
