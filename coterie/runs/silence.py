"""Rewards that say nothing of any completion: a warning and an event, and where none says anything, the end of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from coterie.recipe import Recipe
from coterie.runs.console import Console
from coterie.runs.folder import RunFailedError
from coterie.runs.store import Store

_MEAN = "reward/mean"  # which a step has that has a reward at all


def watch_silence(
    store: Store, console: Console, recipe: Recipe, stage: str, step: int, metrics: Mapping[str, float]
) -> None:
    """Say and record what begins with a recorded step. Raises RunFailedError where nothing has been said for too long."""
    if "reward/num_abstained" not in metrics:
        return  # a stage that has no rewards
    for words in _silences(store, recipe, stage, step, metrics):
        store.event(stage, step, "reward_silent", words)
        console.warn(f"step {step}: {words}")
    why = _why_it_ends(store, recipe, stage, step, metrics)
    if why:
        raise RunFailedError(f"step {step}: {why}")


def _steps_until_the_end(recipe: Recipe) -> int:
    """In how many steps in a row nothing has to be said for a run to end: as many as with a loss that is not finite."""
    return min(recipe.limits.skipped_steps, recipe.steps)


def _silences(store: Store, recipe: Recipe, stage: str, step: int, metrics: Mapping[str, float]) -> Iterator[str]:
    """What begins with a recorded step: it is the first without any reward, or a reward has been silent for some."""
    count = _steps_until_the_end(recipe)
    if _abstains(metrics) and not _spoken(store, stage, _MEAN, step - 1, 1):
        return  # said before
    if _abstains(metrics):
        yield (
            "no completion of this step has a reward, since the rewards abstained from all of them: nothing is learned from it. "
            f"After {count} such steps in a row the run ends"
        )
        return
    for spec in recipe.rewards:
        name = f"reward/{spec.name}"
        silent = step >= count and not _spoken(store, stage, name, step, count)
        if silent and _spoken(store, stage, name, step - count, 1):
            yield f"reward {spec.name} has said nothing of any completion for {count} steps"


def _why_it_ends(store: Store, recipe: Recipe, stage: str, step: int, metrics: Mapping[str, float]) -> str:
    """Why the run has to end, where the rewards abstained from everything for too long; else empty. Failures are no abstentions."""
    count = _steps_until_the_end(recipe)
    if not _abstains(metrics) or step < count or _spoken(store, stage, _MEAN, step, count):
        return ""
    return (
        f"the rewards abstained from every completion of {count} steps in a row, so nothing is learned. Look at what they return: "
        "coterie check, or coterie score with completions of your own; None abstains"
    )


def _abstains(metrics: Mapping[str, float]) -> bool:
    silent = metrics.get("reward/num_abstained", 0.0) > metrics.get("reward/num_failed", 0.0)
    return _MEAN not in metrics and silent


def _spoken(store: Store, stage: str, name: str, step: int, count: int) -> bool:
    """Whether one of the `count` steps up to this one has the metric; also steps before the first, which have nothing to say."""
    return step < 1 or bool(store.num_with_metric(stage, name, step - count + 1, step))
