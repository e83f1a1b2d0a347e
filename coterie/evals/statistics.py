"""Estimates with their uncertainty."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean with a 95 % interval, of `count` observations."""

    value: float
    low: float
    high: float
    count: int


def wilson(successes: int, count: int) -> Estimate:
    """A proportion with Wilson's interval. Source: E. B. Wilson, JASA 22 (1927)."""
    if not 0 <= successes <= count or count == 0:
        raise ValueError(f"{successes} successes of {count}")
    share = successes / count
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    low, high = centre - half, centre + half
    return Estimate(share, low if successes else 0.0, high if successes < count else 1.0, count)


def mean_interval(values: Sequence[float]) -> Estimate:
    """A mean with its normal interval."""
    count = len(values)
    if not count:
        raise ValueError("the mean of nothing")
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1) if count > 1 else 0.0
    half = Z95 * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half, count)


def pass_at_k(num_right: int, num_samples: int, k: int) -> float:
    """The chance that at least one of k samples is right, drawn without replacement from the n that were made.

    Unbiased. Source: Chen et al., arXiv 2107.03374, equation 1.
    """
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(f"pass@{k} of {num_right} right among {num_samples}")
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)
