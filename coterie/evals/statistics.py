"""Estimates with their uncertainty, over prompts.

The samples of one prompt are alike, so what is independent here is the prompt: every variance is one of prompts about their mean,
and P prompts leave P - 1 degrees of freedom, however many samples each has. docs/evaluation.md has the coverage of each interval.

Legend: P prompts. An argument `by_prompt` holds P lists, one for each prompt, of the values of its samples.
"""

import functools
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

Values = Sequence[Sequence[float]]
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean with a 95 % interval, of `count` observations."""

    value: float
    low: float
    high: float
    count: int


def grouped(keys: Iterable[Hashable], values: Iterable[float]) -> list[list[float]]:
    """The values of each key, in the order in which keys come first."""
    found: dict[Hashable, list[float]] = {}
    for key, value in zip(keys, values, strict=True):
        found.setdefault(key, []).append(value)
    return list(found.values())


def share_interval(by_prompt: Values, *, low: float = 0.0, high: float = 1.0) -> Estimate:
    """The mean of values that lie between `low` and `high`, right and wrong for one; its interval does, too.

    Wilson's interval for as many independent observations as would give the variance that is seen among prompts. One sample of
    each, or samples that are all alike, are P observations, and it is Wilson's own; the less alike they are the more there are, and
    the more of the quantile is Student's, since their variance is then an estimate. Where the rarer outcome is all but absent
    that variance can't be seen: so few prompts decide it. Samples are then taken to be alike by a further share of exp(-2 m), with m
    prompts' worth of the rarer outcome there, and altogether where all prompts are equal.
    """
    mean, spread, num_prompts, count = _moments(by_prompt)
    share = (mean - low) / (high - low)
    alike = 1.0  # the variance among prompts, of the most there can be: where each is all right or all wrong
    if spread > 0:
        alike = min(spread * (num_prompts - 1) / num_prompts / (high - low) ** 2 / (share * (1 - share)), 1.0)
        alike += math.exp(-2 * num_prompts * min(share, 1 - share)) * (1 - alike)
    size = 1.0 if num_prompts == 1 else (num_prompts - 1) / alike / (1 - alike / num_prompts)
    quantile = alike * Z95 + (1 - alike) * student_quantile(num_prompts - 1) if num_prompts > 1 else Z95
    left, right = wilson(share, size, quantile)
    return Estimate(mean, low + left * (high - low), low + right * (high - low), count)


def wilson(share: float, count: float, quantile: float) -> tuple[float, float]:
    """The shares that a score test of a share seen in `count` independent observations does not reject.

    Source: E. B. Wilson, JASA 22 (1927).
    """
    square = quantile**2 / count
    centre = (share + square / 2) / (1 + square)
    half = math.sqrt(max(share * (1 - share) * square + square**2 / 4, 0.0)) / (1 + square)
    return (max(centre - half, 0.0) if share > 0 else 0.0), (min(centre + half, 1.0) if share < 1 else 1.0)


def mean_interval(by_prompt: Values, *, low: float = -math.inf, high: float = math.inf) -> Estimate:
    """The mean of any values, with Student's interval, cut to what is possible.

    Where all prompts have the same mean it is as wide as what a few unseen prompts could change: by the most that is
    possible, or where that has no bound by the mean itself, and at least 1.
    """
    mean, spread, num_prompts, count = _moments(by_prompt)
    if spread > 0:
        half = student_quantile(num_prompts - 1) * math.sqrt(spread / num_prompts)
        return Estimate(mean, max(mean - half, low), min(mean + half, high), count)
    reach, share = max(abs(mean), 1.0), _unseen_share(num_prompts)
    down = mean - low if math.isfinite(low) else reach
    up = high - mean if math.isfinite(high) else reach
    return Estimate(mean, mean - share * down, mean + share * up, count)


def difference_interval(by_prompt: Values) -> Estimate:
    """The mean of paired differences between -1 and 1, of two shares measured on the same prompts.

    Student's interval, widened where the two hardly ever differ, by what prompts of which none was seen could change.
    """
    mean, spread, num_prompts, count = _moments(by_prompt)
    differing = math.fsum(abs(math.fsum(values) / len(values)) for values in by_prompt)
    unseen = math.exp(-2 * differing) * _unseen_share(num_prompts)
    seen = student_quantile(num_prompts - 1) * math.sqrt(spread / num_prompts) if num_prompts > 1 else 2.0
    half = math.hypot(seen, unseen)
    return Estimate(mean, max(mean - half, -1.0), min(mean + half, 1.0), count)


def _moments(by_prompt: Values) -> tuple[float, float, int, int]:
    """The mean of all values, the sample variance of prompts about it, and the numbers of prompts and of values.

    Of prompts with different numbers of values each counts by its number: the variance is that of the ratio of two sums.
    """
    sums = [math.fsum(values) for values in by_prompt if len(values)]
    counts = [len(values) for values in by_prompt if len(values)]
    if not counts:
        raise ValueError("the mean of nothing")
    count, num_prompts = sum(counts), len(counts)
    mean = math.fsum(sums) / count
    means = [total / number for total, number in zip(sums, counts, strict=True)]
    if max(means) - min(means) <= 1e-12 * max(map(abs, means)):  # alike but for rounding
        return mean, 0.0, num_prompts, count
    squares = math.fsum((total - mean * number) ** 2 for total, number in zip(sums, counts, strict=True))
    return mean, squares * (num_prompts / count) ** 2 / (num_prompts - 1), num_prompts, count


def _unseen_share(num_prompts: int) -> float:
    """The largest share of prompts of a kind of which `num_prompts` show none, by Wilson's interval."""
    return wilson(0.0, num_prompts, Z95)[1]


@functools.lru_cache
def student_quantile(freedom: int) -> float:
    """Between this and its negative lie 95 % of Student's distribution with so many degrees of freedom, by bisection."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_share(middle, freedom) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _student_share(angle: float, freedom: int) -> float:
    """What lies within t = sqrt(freedom) tan(angle) of 0. Source: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    cosine = math.cos(angle)
    odd = freedom % 2
    term, total = cosine if odd else 1.0, 0.0
    for power in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


def pass_at_k(num_right: int, num_samples: int, k: int) -> float:
    """The chance that at least one of k samples is right, drawn without replacement from the n that were made.

    Unbiased. Source: Chen et al., arXiv 2107.03374, equation 1.
    """
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(f"pass@{k} of {num_right} right among {num_samples}")
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)
