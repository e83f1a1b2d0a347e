"""The built-in reward `answer`: does a completion's answer have the value of the right one? Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from typing import Any, Literal

from coterie.errors import RewardError, UserError, nearest
from coterie.rewards.maths.extract import boxed_answer, final_answer, known_answer
from coterie.rewards.maths.values import UndecidedError, equal, parts
from coterie.rewards.text_of import completion_text
from coterie.rewards.workers.pool import WorkerPool

_TARGET = "coterie.rewards.maths.algebra:compare"
_LATE = "took longer"
_MAX_KNOWN = 1 << 16  # verdicts that are kept

Scores = dict[tuple[str, str], float | Exception | None]
Extract = Literal["auto", "boxed", "whole"]


@dataclass(frozen=True)
class Answer:
    r"""1 for a completion whose answer has the mathematical value of the column `answer`, however it is spelt, else 0.

    column: another name of that column. extract: where the answer stands: "boxed" only in the last \boxed{}, "whole" is the
    whole completion, and "auto" looks at the last box, then after "####", "answer is", 答案 or 所以, then at the last line.
    Spelling, plain numbers, lists and points are compared here, in exact fractions; what needs algebra by math-verify's
    reading and by evaluation, in `workers` processes, which a comparison may hold for `seconds`.

    Values are exact: 0.33 is not 1/3. A completion without an answer, an answer longer than `max_characters`, one that is no
    mathematics and one over its time score 0: a model wrote them, and to abstain would let it escape a low reward. A right
    answer that is missing or can't be read, and a worker that dies, are failures, and the completion abstains.
    """

    column: str = "answer"
    extract: Extract = "auto"
    seconds: float = 1.5
    max_characters: int = 400
    workers: int = 2
    unevaluated: bool = False
    _pool: list[WorkerPool] = field(default_factory=list, init=False, repr=False, compare=False)
    _verdicts: dict[tuple[str, str | None], str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.column.isidentifier() or self.column == "completions":
            raise UserError(f"rewards: answer: {self.column!r} can't be the name of a column")
        if self.extract not in _EXTRACT:
            raise UserError(f"rewards: answer: extract is {self.extract!r}; {nearest(str(self.extract), _EXTRACT)}")
        if not (self.seconds > 0 and self.max_characters > 0 and self.workers > 0):
            raise UserError("rewards: answer: seconds, max_characters and workers must be above 0")

    @property
    def __signature__(self) -> Signature:
        """With the column by its name, so that data without it are refused before training."""
        names = ("completions", self.column)
        return Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | Exception | None]:
        golds = [None if gold is None else known_answer(str(gold)) for gold in columns[self.column]]
        answers = [self._extracted(completion_text(completion)) for completion in completions]
        pairs = [(gold or "", answer) for gold, answer in zip(golds, answers, strict=True)]
        scores = {pair: self._at_once(*pair) for pair in dict.fromkeys(pairs)}
        self._refuse_unreadable(scores)
        self._decide([pair for pair, score in scores.items() if score is None], scores)
        return [scores[pair] for pair in pairs]

    def close(self) -> None:
        """End the workers."""
        while self._pool:
            self._pool.pop().close()

    def _extracted(self, text: str) -> str:
        answer = _EXTRACT[self.extract](text)
        return answer if len(answer) <= self.max_characters else ""

    def _at_once(self, gold: str, answer: str) -> float | Exception | None:
        """What can be said without algebra. None if nothing can."""
        if not gold:
            return RewardError(f"the right answer is missing: the column {self.column} is empty")
        if not answer:
            return 0.0
        try:
            return float(equal(gold, answer, _undecided, unevaluated=self.unevaluated))
        except UndecidedError:
            return None

    def _refuse_unreadable(self, scores: Scores) -> None:
        """Where a right answer can't be read, nobody is wrong by it: not even a completion that gives no mathematics."""
        golds = dict.fromkeys(gold for (gold, _), score in scores.items() if score in (None, 0.0) and parts(gold))
        readable = self._ask([(gold, None) for gold in golds])
        for pair, score in scores.items():
            verdict = readable.get((pair[0], None), "equal") if score in (None, 0.0) else "equal"
            if verdict != "equal":
                why = f": {verdict}" if isinstance(verdict, Exception) else " as mathematics"
                scores[pair] = RewardError(f"the right answer {pair[0]!r:.80} can't be read{why}")

    def _decide(self, pairs: Sequence[tuple[str, str]], scores: Scores) -> None:
        """Ask the workers whether the answers are equal."""
        verdicts = self._ask(pairs)
        for pair in pairs:
            verdict = verdicts[pair]
            if isinstance(verdict, Exception) and not str(verdict).startswith(_LATE):
                scores[pair] = verdict
            else:
                scores[pair] = float(verdict == "equal")

    def _ask(self, pairs: Sequence[tuple[str, str | None]]) -> dict[tuple[str, str | None], str | Exception]:
        """The workers' verdicts, which are kept: the answers of a group are often equal, and those of an epoch the same."""
        if len(self._verdicts) > _MAX_KNOWN:
            self._verdicts.clear()
        fresh: dict[tuple[str, str | None], str | Exception] = {}
        if new := [pair for pair in pairs if pair not in self._verdicts]:
            if not self._pool:
                self._pool.append(WorkerPool(_TARGET, num_workers=self.workers, seconds=self.seconds))
            asked = [{"gold": gold, "answer": answer, "unevaluated": self.unevaluated} for gold, answer in new]
            fresh = dict(zip(new, self._pool[0].map(asked), strict=True))
        self._verdicts.update({pair: verdict for pair, verdict in fresh.items() if isinstance(verdict, str)})
        return {pair: fresh[pair] if pair in fresh else self._verdicts[pair] for pair in pairs}


def _undecided(gold: str, answer: str) -> bool:
    raise UndecidedError


_EXTRACT: dict[str, Callable[[str], str]] = {"auto": final_answer, "boxed": boxed_answer, "whole": str.strip}
