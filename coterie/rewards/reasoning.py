"""The built-in reward `reasoning_gym`: what a generator's own verifier says of an answer.

Source of generators and verifiers: the package reasoning-gym, https://github.com/open-thought/reasoning-gym (Apache-2.0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coterie.errors import RewardError, UserError
from coterie.rewards.maths.extract import boxed_answer, final_answer
from coterie.rewards.text_of import completion_text
from coterie.rewards.workers.pool import WorkerPool

_TARGET = "coterie.rewards.verifiers:verify"
_LATE = "took longer"
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class ReasoningGym:
    r"""From 0 to 1: the score that the verifier of the prompt's generator gives a completion's answer.

    The answer is what stands in the last <answer>...</answer>, else in the last \boxed{}; without either the best of three
    readings counts: the whole completion, what follows "answer is" or its like, and the last line. Verifiers run in `workers`
    processes, which a completion may hold for `seconds`. One over its time, an answer longer than `max_characters`, and one that
    a verifier raises on score 0: a model wrote them. Some verifiers evaluate the answer as Python or SymPy code; those are given
    only numbers, lists and arithmetic. A worker that dies is a failure, and the completion abstains.
    """

    seconds: float = 5.0
    max_characters: int = 4_000
    workers: int = 2
    _pool: list[WorkerPool] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.max_characters > 0 and self.workers > 0):
            raise UserError("rewards: reasoning_gym: seconds, max_characters and workers must be above 0")

    def __call__(self, completions: Sequence[Any], entry: Sequence[Mapping[str, Any]]) -> list[float | Exception]:
        if not self._pool:
            self._pool.append(WorkerPool(_TARGET, num_workers=self.workers, seconds=self.seconds))
        readings = [self._readings(completion_text(completion)) for completion in completions]
        calls = [{"entry": dict(one), "answers": found} for one, found in zip(entry, readings, strict=True)]
        return [_score_of(verdict) for verdict in self._pool[0].map(calls)]

    def close(self) -> None:
        """End the workers."""
        while self._pool:
            self._pool.pop().close()

    def _readings(self, text: str) -> list[str]:
        """What may be meant as the answer."""
        tagged = _TAG.findall(text)
        if tagged:
            found = [tagged[-1]]
        elif "\\boxed" in text:
            found = [boxed_answer(text)]
        else:
            last = text.strip().rpartition("\n")[2]
            found = [text, final_answer(text), last, last.rstrip(".")]
        stripped = dict.fromkeys(reading.strip() for reading in found)
        return [reading for reading in stripped if reading and len(reading) <= self.max_characters]


def _score_of(verdict: Any) -> float | Exception:
    if isinstance(verdict, RewardError) and str(verdict).startswith(_LATE):
        return 0.0
    return verdict if isinstance(verdict, Exception) else float(verdict)
