"""Figures that say a run is going wrong, step by step: an event when one begins, and where asked for, the end of the run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from coterie.recipe import Recipe
from coterie.recipe.settings import Limits
from coterie.runs.console import Console
from coterie.runs.folder import RunFailedError
from coterie.runs.store import Store

_HISTORY = 50  # steps that a gradient's norm is compared with
_ENOUGH = 10


@dataclass(frozen=True)
class Alarm:
    """A limit that a step passed: which setting, and the figures in words."""

    limit: str
    message: str


def usual_norm(first: Sequence[float], last: Sequence[float]) -> float | None:
    """What is usual for the gradient's norm, from those of the first and of the last steps that had a signal; None while unknown.

    It is the larger of the two medians. Where nearly all is learned only a few completions have a gradient, and norms differ by
    orders of magnitude from step to step; what was usual at the start is no alarm there.
    """
    return max((statistics.median(norms) for norms in (first, last) if len(norms) >= _ENOUGH), default=None)


def alarms(metrics: Mapping[str, float], usual: float | None, limits: Limits, *, solved: bool = False) -> list[Alarm]:
    """The limits that a step passed. usual: norm of the gradient. solved: whether completions get about the best reward, so that
    a policy that always says the same has learned it, and not collapsed."""
    found = []
    norm = metrics.get("optimiser/grad_norm", 0.0)
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
    gap, explained = metrics.get("policy/sampler_gap_max"), metrics.get("policy/sampler_rounding")
    if limits.sampler_gap is None and gap is not None and explained is not None and gap > explained:
        found.append(
            Alarm(
                "sampler_gap",
                f"the sampler's log-probability of a token is {gap:.3g} nats from the trainer's, of which rounding explains "
                f"{explained:.2g}: the two do not compute the same model. Where the compiled loops are the cause, "
                "COTERIE_KERNELS=off in the environment mends it; correction.kind=truncate weighs what was sampled by how much "
                "likelier the trainer makes it, and goes on; limits.stop_on=[] goes on without",
            )
        )
    entropy = metrics.get("policy/entropy")
    if entropy is not None and entropy < limits.entropy and not solved:
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


def watch_limits(
    store: Store,
    console: Console,
    recipe: Recipe,
    stage: str,
    step: int,
    metrics: Mapping[str, float],
    is_solved: Callable[[Mapping[str, float]], bool] | None = None,
) -> None:
    """Say and record where a limit begins to be passed with a recorded step; RunFailedError where it is one that ends the run.
    is_solved: of a step's figures, as `solved` in `alarms`; never without."""
    stop_on = set(recipe.limits.stop_on)
    if recipe.correction.kind != "none" and recipe.limits.sampler_gap is None:
        stop_on.discard("sampler_gap")  # what was sampled is weighed by how far apart the two are

    def passed(step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        solved = is_solved is not None and is_solved(metrics)
        return alarms(metrics, _usual_norm_at(store, stage, step), recipe.limits, solved=solved)

    found = passed(step, metrics)
    before = {alarm.limit for alarm in passed(step - 1, store.metrics_of(stage, step - 1))} if found else set()
    for alarm in found:
        if alarm.limit not in before:
            store.event(stage, step, "limit", f"limits.{alarm.limit}: {alarm.message}")
            console.warn(f"step {step}: {alarm.message}")
        if alarm.limit in stop_on:
            raise RunFailedError(
                f"step {step}: {alarm.message}, and limits.stop_on names {alarm.limit}; the newest checkpoint stands"
            )


def _usual_norm_at(store: Store, stage: str, step: int) -> float | None:
    first, last = ((1, min(_HISTORY, step - 1)), (step - _HISTORY, step - 1))
    return usual_norm(store.gradient_norms(stage, *first), store.gradient_norms(stage, *last))
