"""Random numbers that are keyed, never positional: the same keys give the same number whatever else is going on."""

import hashlib

import torch
from torch import Tensor

_SHIFTS = (30, 27, 31)
_FACTORS = (-4658895280553007687, -7723592293110705685)  # 0xBF58476D1CE4E5B9 and 0x94D049BB133111EB as signed 64-bit
_MASK = (1 << 64) - 1
_STEP = -7046029254386353131  # 0x9E3779B97F4A7C15


def key(*parts: int | str) -> int:
    """One signed 64-bit key from numbers and words, in order."""
    state = 0
    for part in parts:
        number = part if isinstance(part, int) else int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "big")
        state = _mix_one(state, number)
    return state - (1 << 64) if state >> 63 else state


def _mix_one(state: int, number: int) -> int:
    """`mix` for two Python integers, as unsigned: a thousand times faster than on tensors of one."""
    z = ((state ^ number * _STEP) + _STEP) & _MASK
    for shift, factor in zip(_SHIFTS, (*_FACTORS, 1), strict=True):
        z = (z ^ z >> shift) * factor & _MASK
    return z


def mix(state: Tensor, number: Tensor) -> Tensor:
    """Fold a number into a key, elementwise on int64. Source: the finaliser of SplitMix64 (Steele et al., 2014)."""
    z = (state ^ number * _STEP) + _STEP  # int64 arithmetic wraps around on every device
    for shift, factor in zip(_SHIFTS, (*_FACTORS, 1), strict=True):
        z = (z ^ (z >> shift & (1 << 64 - shift) - 1)) * factor
    return z


def uniform(keys: Tensor) -> Tensor:
    """Keys, int64 of any shape -> float64 numbers in [0, 1), of 53 random bits each."""
    return (keys >> 11 & (1 << 53) - 1).double() / (1 << 53)


def permutation(size: int, *parts: int | str) -> list[int]:
    """A shuffle of range(size) that depends on the key only."""
    keys = mix(torch.tensor(key(*parts)), torch.arange(size))
    return torch.argsort(keys, stable=True).tolist()
