"""Signs that a reward is being hacked, or has nothing left to teach, read from the figures of a run.

A rule looks at series, which hold one number for each step from step 1 on, NaN where a step has none, and says what holds at
their end, with the figures. A sign is a reason to read completions, not a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from coterie.evals.statistics import Estimate
from coterie.runs.notice import Notice
from coterie.runs.reader import Reader


@dataclass(frozen=True)
class Limits:
    """From where on something is a sign.

    window: steps whose mean is compared with that of as many others. lasting: steps for which a state has to last, and for
    which a sign has to be gone before it is given anew. errors: a mean has risen or fallen where it moved by more than this
    many standard errors of the difference of two windows; 4, since a long run makes thousands of comparisons.
    dominant: share of the variance within groups that one part brings. jump: rise of a part within three windows, as a
    share of the range of its values so far. jump_stds: the same, in the largest std that it has had within groups.
    standing: a part whose rise is at most this share of its range has not risen.
    longer, shorter: mean length against that of the first window. flat: std of the rewards, as a share of the largest so far.
    best: how far from the best mean reward so far, as a share of its range. silent: share of the groups without signal.
    solved: how far the mean reward is from the best that a completion has had, as a share of what their rewards differ by.
    """

    window: int = 10
    lasting: int = 20
    errors: float = 4.0
    dominant: float = 0.9
    jump: float = 0.5
    jump_stds: float = 1.0
    standing: float = 0.1
    longer: float = 1.5
    shorter: float = 0.5
    flat: float = 0.05
    best: float = 0.05
    silent: float = 0.8
    solved: float = 0.05


LIMITS = Limits()
SIGN = "sign/"  # what the kind of an event begins with that tells a sign; its name follows


@dataclass(frozen=True)
class Sign:
    """What a rule saw. about: the part, or the direction, where a rule can see several things at once."""

    name: str
    step: int
    text: str
    about: str = ""

    @property
    def notice(self) -> Notice:
        return Notice(f"{SIGN}{self.name}", self.text, f"{self.name}: {self.text}")


@dataclass(frozen=True)
class Change:
    """The means of two windows, and the standard error of their difference."""

    before: float
    now: float
    error: float

    def rises(self, limits: Limits, direction: float = 1.0) -> bool:
        """Whether it rises, or with the direction -1 falls, by more than chance."""
        return direction * (self.now - self.before) > limits.errors * self.error

    def __str__(self) -> str:
        return f"from {self.before:.3g} to {self.now:.3g}"


@dataclass
class History:
    """What the rules look at: everything up to the step `step`.

    weights: of each part of the reward; a part with the weight 0 is only watched. series, smallest, largest: by the name of
    the metric. accuracies: by the step after which they were measured.
    """

    weights: Mapping[str, float]
    step: int = 0
    series: dict[str, list[float]] = field(default_factory=dict)
    smallest: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    accuracies: dict[int, Estimate] = field(default_factory=dict)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """The figures of the next step; a name has NaN for the steps in which it was missing."""
        self.step = step
        for name, value in metrics.items():
            series = self.series.setdefault(name, [])
            series += [math.nan] * (step - 1 - len(series))
            series.append(value)
            if math.isfinite(value):
                self.smallest[name] = min(value, self.smallest.get(name, math.inf))
                self.largest[name] = max(value, self.largest.get(name, -math.inf))

    def window(self, name: str, last: int, size: int) -> list[float]:
        """What there is of a series in the `size` steps up to the step `last`."""
        return [value for value in self.series.get(name, ())[max(0, last - size) : last] if math.isfinite(value)]

    def range(self, name: str) -> float:
        """Between the smallest and the largest value so far."""
        return self.largest.get(name, 0.0) - self.smallest.get(name, 0.0)

    def change(self, name: str, before: int, size: int) -> Change | None:
        """From the `size` steps up to `before` to the last ones; None where they overlap, or too little of them is there."""
        windows = [self.window(name, last, size) for last in (before, self.step)]
        if not size <= before <= self.step - size or min(map(len, windows)) < max(2, size / 2):
            return None
        error = math.sqrt(sum(_square_of_error(window) for window in windows))
        return Change(fmean(windows[0]), fmean(windows[1]), error)

    def is_solved(self, mean: float, limits: Limits) -> bool:
        """Whether a mean reward is about the best that a completion has had: then equal rewards are no loss, but the aim."""
        best, worst = self.largest.get("reward/highest", math.nan), self.smallest.get("reward/lowest", math.nan)
        return best > worst and mean >= best - limits.solved * (best - worst)

    def direction(self, part: str) -> float:
        """-1 for a part that counts against a completion."""
        return -1.0 if self.weights[part] < 0 else 1.0


def _square_of_error(values: Sequence[float]) -> float:
    """The squared standard error of the mean of two or more values."""
    mean = fmean(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values)


def one_part_dominates(history: History, limits: Limits = LIMITS) -> Iterator[Sign]:
    """One part brings nearly all of the variance that tells the completions of a group apart, while another part falls."""
    size = limits.lasting
    variances = {}
    for part, weight in history.weights.items():
        stds = history.window(f"reward/{part}_group_std", history.step, size)
        variances[part] = fmean([(weight * std) ** 2 for std in stds] or [0.0])
    total = sum(variances.values())
    if history.step < 2 * size or not 0 < total < math.inf:
        return
    part = max(variances, key=lambda name: variances[name])
    share = variances[part] / total
    changes = {o: history.change(f"reward/{o}", history.step - size, size) for o in variances if o != part}
    fallen = {o: change for o, change in changes.items() if change and _falls(history, o, change, limits)}
    if share >= limits.dominant and fallen:
        losses = ", ".join(f"{other} goes {change}" for other, change in fallen.items())
        text = f"{part} brings {share:.0%} of the rewards' variance within groups over {size} steps, while {losses}"
        yield Sign("one_part_dominates", history.step, text, part)


def one_part_jumps(history: History, limits: Limits = LIMITS) -> Iterator[Sign]:
    """One part rises fast while no other does, as a format does that is learned without content."""
    size = limits.window
    found = {part: history.change(f"reward/{part}", history.step - 2 * size, size) for part in history.weights}
    changes = {part: change for part, change in found.items() if change is not None}
    for part, change in changes.items():
        others = {other: c for other, c in changes.items() if other != part}
        spread = history.largest.get(f"reward/{part}_group_std", 0.0)
        far = abs(change.now - change.before) > max(
            limits.jump * history.range(f"reward/{part}"), limits.jump_stds * spread
        )
        if not others or not far or not change.rises(limits, history.direction(part)):
            continue
        if all(_stands(history, other, c, limits) for other, c in others.items()):
            rest = ", ".join(f"{other} {c}" for other, c in others.items())
            text = f"{part} goes {change} within {3 * size} steps, and no other part rises: {rest}"
            yield Sign("one_part_jumps", history.step, text, part)


def _falls(history: History, part: str, change: Change, limits: Limits) -> bool:
    """Whether a part has fallen, by more than chance and by more than a little."""
    direction = -history.direction(part)
    far = direction * (change.now - change.before) > limits.standing * history.range(f"reward/{part}")
    return far and change.rises(limits, direction)


def _stands(history: History, part: str, change: Change, limits: Limits) -> bool:
    """Whether a part has not risen."""
    rise = history.direction(part) * (change.now - change.before)
    return rise <= limits.standing * history.range(f"reward/{part}")


def length_drift(history: History, limits: Limits = LIMITS) -> Iterator[Sign]:
    """Completions are much longer or shorter than at the start."""
    name, size = "completion/tokens_mean", limits.window
    whole = history.change(name, size, size)
    if whole is None or whole.before <= 0:
        return
    ratio = whole.now / whole.before
    longer = ratio > limits.longer and whole.rises(limits)
    shorter = ratio < limits.shorter and whole.rises(limits, -1)
    if longer or shorter:
        way = "longer" if longer else "shorter"
        reward = history.change("reward/mean", size, size)
        text = (
            f"completions get {way}: {whole.now:.1f} tokens on average in the last {size} steps, {ratio:.2g} times the "
            f"{whole.before:.1f} of the first {size}" + (f"; the reward goes {reward}" if reward else "")
        )
        yield Sign("length_drift", history.step, text, way)


def saturation(history: History, limits: Limits = LIMITS) -> Iterator[Sign]:
    """All completions get about the best reward so far: nothing is left to learn."""
    size = limits.lasting
    stds, means = (history.window(name, history.step, size) for name in ("reward/std", "reward/mean"))
    spread, between = history.largest.get("reward/std", 0.0), history.range("reward/mean")
    if history.step < size + limits.window or min(len(stds), len(means)) < size or spread == 0 or between == 0:
        return
    best = history.largest["reward/mean"]
    if max(stds) <= limits.flat * spread and min(means) >= best - limits.best * between:
        text = (
            f"for {size} steps the rewards have had a std of at most {max(stds):.2g} (once it was {spread:.2g}) and a mean of "
            f"{fmean(means):.3g}, the best so far being {best:.3g}: little is left to learn from them"
        )
        yield Sign("saturation", history.step, text)


def no_signal(history: History, limits: Limits = LIMITS) -> Iterator[Sign]:
    """Most groups have equal rewards, from which nothing can be learned, and they are not the best ones."""
    size = limits.lasting
    shares = history.window("group/no_signal_share", history.step, size)
    means = history.window("reward/mean", history.step, size)
    if means and history.is_solved(median(means), limits):
        return
    if len(shares) == size and fmean(shares) > limits.silent:
        text = f"in {fmean(shares):.0%} of the groups of {size} steps all completions got the same reward"
        yield Sign("no_signal", history.step, text)


def reward_against_accuracy(history: History, limits: Limits = LIMITS) -> Iterator[Sign]:
    """The reward has risen since the best held-out accuracy, which has fallen by more than its interval allows."""
    earlier = [step for step in history.accuracies if step < history.step]
    if history.step not in history.accuracies or not earlier:
        return
    then = max(earlier, key=lambda step: history.accuracies[step].value)
    best, now = history.accuracies[then], history.accuracies[history.step]
    margin = math.hypot(best.high - best.low, now.high - now.low) / 2
    change = history.change("reward/mean", max(then, limits.window), limits.window)
    if best.value - now.value > margin and change is not None and change.rises(limits):
        text = (
            f"held-out accuracy falls from {best.value:.3f} after step {then} to {now.value:.3f}, while the reward in training "
            f"goes {change}"
        )
        yield Sign("reward_against_accuracy", history.step, text)


_WATCHED = (
    "reward/mean", "reward/std", "reward/highest", "reward/lowest", "completion/tokens_mean", "group/no_signal_share",
)  # fmt: skip
EVERY_STEP = (one_part_dominates, one_part_jumps, length_drift, saturation, no_signal)


class Watch:
    """Takes the figures of a run as they come, and tells which signs begin."""

    def __init__(self, weights: Mapping[str, float], limits: Limits = LIMITS) -> None:
        self._history, self._limits = History(weights), limits
        parts = [f"reward/{part}{of}" for part in weights for of in ("", "_group_std")]
        self._names = {*_WATCHED, *parts}
        self._held: dict[tuple[str, str], int] = {}  # the last step at which each sign held

    @classmethod
    def of(cls, record: Reader, weights: Mapping[str, float]) -> Watch:
        """One that has seen what is recorded, so that a resumed run is told what an uninterrupted one is."""
        watch = cls(weights)
        steps, accuracies = record.metrics_by_step(), record.accuracies()
        for step in sorted({*steps, *accuracies}):
            if step in steps:
                watch.add(step, {name: math.nan if value is None else value for name, value in steps[step].items()})
            if step in accuracies:
                watch.add_accuracy(step, accuracies[step])
        return watch

    def add(self, step: int, metrics: Mapping[str, float]) -> list[Sign]:
        """The figures of a step -> the signs that begin with it."""
        self._history.add(step, {name: value for name, value in metrics.items() if name in self._names})
        found = [sign for rule in EVERY_STEP for sign in rule(self._history, self._limits)]
        return self._beginning(found, step - self._limits.lasting)

    def is_solved(self, metrics: Mapping[str, float]) -> bool:
        """Whether the figures of a step are those of a policy that gets about the best reward each time."""
        return self._history.is_solved(metrics.get("reward/mean", math.nan), self._limits)

    def add_accuracy(self, step: int, accuracy: Estimate) -> list[Sign]:
        """A held-out accuracy after a step -> the signs that begin with it."""
        before = max((measured for measured in self._history.accuracies if measured < step), default=0)
        self._history.accuracies[step] = accuracy
        return self._beginning(list(reward_against_accuracy(self._history, self._limits)), before)

    def _beginning(self, found: Sequence[Sign], since: int) -> list[Sign]:
        """Those of the signs that have not held at any step from `since` on."""
        new = [sign for sign in found if self._held.get((sign.name, sign.about), -math.inf) < since]
        self._held |= {(sign.name, sign.about): sign.step for sign in found}
        return new
