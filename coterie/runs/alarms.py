"""Figures that say a run is going wrong, step by step: an event when one begins, and where asked for, the end of the run.

Limits that are passed, steps whose loss is not finite, and rewards that say nothing.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.errors import RunFailedError
from coterie.recipe import GRPO, Recipe
from coterie.recipe.settings import Limits
from coterie.redact import hidden_in
from coterie.runs.notice import Notice, Recorded
from coterie.runs.reader import SKIPPED, Reader

_MEAN = "reward/mean"  # which a step has that has a reward at all
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


class Alarms:
    """Listens to the steps of a run: each method says what begins with one, and raises RunFailedError where the run has to end.

    They look back in the record, of the sessions before too, so that a resumed run says what an uninterrupted one does.
    is_solved: of a step's metrics, as `solved` in `alarms`.
    """

    def __init__(
        self, folder: Path, record: Reader, recipe: Recipe, is_solved: Callable[[Mapping[str, float]], bool]
    ) -> None:
        self._folder, self._record, self._recipe, self._is_solved = folder, record, recipe, is_solved

    def limits(self, step: Recorded) -> Iterator[Notice]:
        """The limits that begin to be passed, those of `limits.stop_on` ending the run."""
        stop_on = set(self._recipe.limits.stop_on)
        corrects = isinstance(self._recipe, GRPO) and self._recipe.correction.acts
        if corrects and self._recipe.limits.sampler_gap is None:
            stop_on.discard("sampler_gap")  # what was sampled is weighed by how far apart the two are
        found = self._passed(step.stage, step.step, step.metrics)
        if not found:
            return
        earlier = self._record.metrics_of(step.stage, step.step - 1)
        before = {alarm.limit for alarm in self._passed(step.stage, step.step - 1, earlier)}
        for alarm in found:
            if alarm.limit not in before:
                yield Notice("limit", f"limits.{alarm.limit}: {alarm.message}", alarm.message)
            if alarm.limit in stop_on:
                raise RunFailedError(
                    f"step {step.step}: {alarm.message}, and limits.stop_on names {alarm.limit}; the newest checkpoint stands"
                )

    def _passed(self, stage: str, step: int, metrics: Mapping[str, float]) -> list[Alarm]:
        spans = ((1, min(_HISTORY, step - 1)), (step - _HISTORY, step - 1))
        usual = usual_norm(*(self._record.gradient_norms(stage, *span) for span in spans))
        return alarms(metrics, usual, self._recipe.limits, solved=self._is_solved(metrics))

    def skipped(self, step: Recorded) -> Iterator[Notice]:
        """The rows of a step whose loss was not finite are kept; too many of them in a row end the run."""
        if not any(step.metrics.get(name) for name in SKIPPED):
            return
        what = "the loss or its gradient was not finite"
        file = write_rows(self._folder / "skipped" / f"{step.stage}_{step.step:06d}.jsonl", step)
        shown = f"{what}, so the weights stay as they were; its rows: {file}"
        yield Notice("step_skipped", f"{what}; its rows: {file}", shown)
        limit = self._recipe.limits.skipped_steps
        if self._record.num_skipped(step.stage, step.step - limit + 1, step.step) == limit:
            raise RunFailedError(
                f"{what} in {limit} steps in a row; the weights are as they were before. A lower optimiser.learning_rate may help"
            )

    def silence(self, step: Recorded) -> Iterator[Notice]:
        """The first step without any reward, or a reward that has said nothing for some; where none has for as long, the run ends.

        Failures are no silence.
        """
        if "reward/num_abstained" not in step.metrics:
            return  # a stage that has no rewards
        count = min(self._recipe.limits.skipped_steps, self._recipe.steps)  # as many as with a loss that is not finite
        if not self._abstains(step.metrics):
            for spec in self._recipe.rewards:
                silent = step.step >= count and not self._spoken(step, f"reward/{spec.name}", 0, count)
                if silent and self._spoken(step, f"reward/{spec.name}", count, 1):
                    words = f"reward {spec.name} has said nothing of any completion for {count} steps"
                    yield Notice("reward_silent", words, words)
            return
        if self._spoken(step, _MEAN, 1, 1):  # else it was said before
            words = (
                "no completion of this step has a reward, since the rewards abstained from all of them: nothing is learned from "
                f"it. After {count} such steps in a row the run ends"
            )
            yield Notice("reward_silent", words, words)
        if step.step >= count and not self._spoken(step, _MEAN, 0, count):
            raise RunFailedError(
                f"step {step.step}: the rewards abstained from every completion of {count} steps in a row, so nothing is learned. "
                "Look at what they return: coterie check, or coterie score with completions of your own; None abstains"
            )

    @staticmethod
    def _abstains(metrics: Mapping[str, float]) -> bool:
        silent = metrics.get("reward/num_abstained", 0.0) > metrics.get("reward/num_failed", 0.0)
        return _MEAN not in metrics and silent

    def _spoken(self, step: Recorded, name: str, back: int, count: int) -> bool:
        """Whether one of the `count` steps up to `back` before this one has the metric; also steps before the first."""
        last = step.step - back
        return last < 1 or bool(self._record.num_with_metric(step.stage, name, last - count + 1, last))


def write_rows(file: Path, step: Recorded) -> Path:
    """Write what a step learned from as JSON lines: completions with everything that went into the loss, or rows."""
    texts = ([("".join(step.pieces(tokens)), tokens) for tokens in row] for row in step.rows)
    written: list[dict[str, Any]] = [
        {"prompt": prompt, "prompt_tokens": tokens, "answers": [{"text": text, "tokens": own} for text, own in answers]}
        for (prompt, tokens), *answers in texts
    ]
    scored = step.scored
    for p, group in enumerate(scored.groups if scored is not None else ()):
        for c, completion in enumerate(group.completions):
            assert scored is not None
            written.append(
                {
                    "prompt": group.prompt.content,
                    "completion": completion.text,
                    "reward": scored.rewards[p, c].item(),
                    "parts": {name: part[p, c].item() for name, part in scored.parts.items()},
                    "tokens": completion.tokens,
                    "sampler_logprobs": completion.logprobs.tolist(),
                }
            )
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(hidden_in(row), ensure_ascii=False) + "\n" for row in written), encoding="utf-8")
    return file
