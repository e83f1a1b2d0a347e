"""A language model behind an OpenAI-compatible endpoint as a judge: by a scale, in pairs, or ranking a group.

Legend: a group is the completions of one prompt; equal completions of a group are judged once.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from inspect import Parameter, Signature
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from coterie.errors import RewardError, UserError, nearest
from coterie.noise import permutation
from coterie.rewards.arguments import GIVEN
from coterie.rewards.base import Part
from coterie.rewards.judge.cache import Cache, default_folder
from coterie.rewards.judge.client import Client, DeclinedError
from coterie.rewards.judge.request import (
    Form,
    Question,
    Ranking,
    ReplyError,
    Scale,
    Winner,
    conversation,
    make_question,
)
from coterie.rewards.judge.service import Service, is_number, wrong_counts
from coterie.rewards.text_of import Chat, completion_text
from coterie.trust import check_writing

Verdicts = Mapping[Question, Any]  # a RewardError where the judge said nothing of use


@dataclass(frozen=True)
class Judge(Service):
    """What a language model makes of each completion by a rubric: a number from 0 to 1, or a failure where it says nothing.

    One that is too long for it, or that it declines, has 0, the lowest: to abstain would let it escape. An outage is a failure.

    model, url, key_variable, temperature, extra, concurrency, attempts, request_seconds, step_seconds, failures_in_a_row,
    pause_seconds: whom it asks, and how much, as `Service` says. rubric: what is good. mode: absolute, each on the scale from
    `lowest` to `highest`; pairwise, each against the reference, or against others of its group in at most `max_pairs` pairs,
    always in both orders; ranking, a group in one request, asked in `orders` orders. reference: the column with a reference
    answer. reason: the judge writes its reason before its verdict. max_characters: of a text; a longer completion has 0.
    cache: the folder of the verdicts; none for no cache, empty for one in the user's cache folder.
    """

    model: str
    rubric: str
    mode: str = "absolute"
    reference: str = ""
    lowest: float = 1
    highest: float = 10
    max_pairs: int = 16
    orders: int = 1
    reason: bool = True
    max_characters: int = 20_000
    cache: str = ""
    # The questions of a step: of each the verdicts of its batch, to come, and its place among them
    _asked: dict[Question, tuple[Future[list[Any]], int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    # Of completions since the start
    _num_declined: Counter[str] = field(default_factory=Counter, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache not in ("", "none"):
            check_writing(Path(self.cache).expanduser(), "rewards: judge: cache")

    def _wrong(self) -> Iterator[str]:
        if not isinstance(self.rubric, str) or not self.rubric.strip():
            yield f"rubric: {self.rubric!r} is no text"
        for name in ("reference", "cache"):
            if not isinstance(getattr(self, name), str):
                yield f"{name}: {getattr(self, name)!r} is no text"
        if self.mode not in _MODES:
            yield f"mode: there is no {self.mode!r}; {nearest(str(self.mode), _MODES)}"
        if self.reference in GIVEN:
            yield f"reference: {self.reference!r} can't be the name of a column"
        yield from wrong_counts(self, "max_pairs", "orders", "max_characters")
        if not all(map(is_number, (self.lowest, self.highest))) or self.lowest >= self.highest:
            yield f"lowest, highest: {self.lowest!r} and {self.highest!r} are no scale"
        if not isinstance(self.reason, bool):
            yield f"reason: {self.reason!r} is neither true nor false"
        yield from super()._wrong()

    def __call__(
        self, prompts: Sequence[str | Chat], completions: Sequence[str | Chat], **columns: Sequence[Any]
    ) -> list[Part]:
        """One entry for each completion. Completions that follow one another with the same prompt are a group."""
        plans = self._plans(prompts, completions, columns)
        try:
            self._ask(plans)
            verdicts = {question: batch.result()[number] for question, (batch, number) in self._asked.items()}
        finally:
            for batch, _ in self._asked.values():
                batch.cancel()
            self._asked.clear()
        parts = [part for plan in plans for part in plan.parts(verdicts)]
        self._say_declined([part for part in parts if isinstance(part, DeclinedError)])
        return [0.0 if isinstance(part, DeclinedError) else part for part in parts]

    def _say_declined(self, declined: Sequence[DeclinedError]) -> None:
        """Warn when there are 1, 2, 4, 8 ... of them since the start."""
        before = self._num_declined["judge"]
        self._num_declined["judge"] = now = before + len(declined)
        if declined and before.bit_length() < now.bit_length():
            warnings.warn(
                f"judge: {now} completions so far have the lowest value, since they were too long for it or it declined them; "
                f"the last: {declined[-1]}",
                stacklevel=3,
            )

    @property
    def __signature__(self) -> Signature:
        """With the reference's column by its name, so that data without it are refused before training."""
        named = [self.reference] if self.reference.isidentifier() else []
        parameters = [Parameter(name, Parameter.KEYWORD_ONLY) for name in ("prompts", "completions", *named)]
        rest = [Parameter("columns", Parameter.VAR_KEYWORD)] if self.reference and not named else []
        return Signature([*parameters, *rest])

    def begin(self, prompts: Sequence[str | Chat], completions: Sequence[str | Chat], **columns: Sequence[Any]) -> None:
        """Ask about these groups already. The next call, which has them among others, waits for the answers that are not there."""
        self._ask(self._plans(prompts, completions, columns))

    uses_cores = False  # of this machine

    def _plans(
        self, prompts: Sequence[str | Chat], completions: Sequence[str | Chat], columns: Mapping[str, Sequence[Any]]
    ) -> list[_Plan]:
        """What is asked of each group."""
        references: Sequence[Any] = [None] * len(prompts)
        if self.reference:
            if self.reference not in columns:
                raise UserError(
                    f"rewards: judge: reference: {self.reference!r} is no column of the data; {nearest(self.reference, columns)}"
                )
            references = columns[self.reference]
        rows = zip(prompts, references, completions, strict=True)
        return [
            _plan(
                self,
                conversation(prompt),
                None if reference is None else str(reference),
                [completion_text(completion) for _, _, completion in group],
            )
            for (prompt, reference), group in groupby(rows, key=lambda row: row[:2])
        ]

    def _ask(self, plans: Sequence[_Plan]) -> None:
        """Have every question answered, from the cache or by the judge, that was not asked in this step before."""
        questions = (question for plan in plans for one in plan.comparisons for question in one.questions)
        new = [question for question in dict.fromkeys(questions) if question not in self._asked]
        keys = {question: self._cache_key(question) for question in new}
        cached = self._cache.read(keys.values()) if self._cache else {}
        missing = []
        for question, key in keys.items():
            verdict = _checked(question, cached.get(key))
            if verdict is None:
                missing.append(question)
            else:
                there: Future[list[Any]] = Future()
                there.set_result([verdict])
                self._asked[question] = there, 0

        def keep(number: int, verdict: Any) -> None:
            if self._cache:
                self._cache.write(keys[missing[number]], json.dumps(verdict))

        if missing:
            batch = self._client.ask(missing, keep)
            self._asked.update({question: (batch, number) for number, question in enumerate(missing)})

    def _cache_key(self, question: Question) -> str:
        """By everything that the verdict depends on: service, model, settings, and the request's own text."""
        parts = [self.url, self.fields, question.messages, question.schema]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _client(self) -> Client:
        return Client(self)

    @cached_property
    def _cache(self) -> Cache | None:
        if self.cache == "none":
            return None
        return Cache(Path(self.cache).expanduser() if self.cache else default_folder())

    def close(self) -> None:
        """End what was opened at the first call, the client first, which writes into the cache from a thread of its own."""
        for opened in ("_client", "_cache"):
            it = self.__dict__.pop(opened, None)
            if it is not None:
                it.close()


@dataclass(frozen=True)
class _Group:
    """What is judged together. texts: those of the prompt's completions that can be judged, each once and in order."""

    judge: Judge
    prompt: str
    reference: str | None
    texts: Sequence[str]

    def ask(self, form: Form, *answers: str, with_reference: bool = False) -> Question:
        shown = self.reference if with_reference else None
        rubric, reason = self.judge.rubric, self.judge.reason
        return make_question(
            form, rubric=rubric, prompt=self.prompt, answers=answers, reference=shown, with_reason=reason
        )


@dataclass(frozen=True)
class _Comparison:
    """Questions that count together, the texts they are about, and the share of each text, from 0 to 1, by their verdicts."""

    questions: Sequence[Question]
    texts: Sequence[str]
    shares: Callable[..., Sequence[float]]

    def parts(self, verdicts: Verdicts) -> Sequence[Part]:
        """The shares, or for each text the failure of a question."""
        found = [verdicts[question] for question in self.questions]
        failed = next((verdict for verdict in found if isinstance(verdict, RewardError)), None)
        return self.shares(*found) if failed is None else [failed] * len(self.texts)


@dataclass(frozen=True)
class _Plan:
    """What is asked of one group. texts: of its completions. wrong: of those that are not judged, and why."""

    texts: Sequence[str]
    wrong: Mapping[str, RewardError]
    comparisons: Sequence[_Comparison]

    def parts(self, verdicts: Verdicts) -> list[Part]:
        """Of each text the mean of its shares."""
        found: dict[str, list[Part]] = {text: [] for text in self.texts}
        for comparison in self.comparisons:
            for text, part in zip(comparison.texts, comparison.parts(verdicts), strict=True):
                found[text].append(part)
        return [self.wrong[text] if text in self.wrong else _mean(found[text]) for text in self.texts]


def _plan(judge: Judge, prompt: str, reference: str | None, texts: Sequence[str]) -> _Plan:
    """The same texts in any order are asked the same."""
    wrong = {text: reason for text in texts if (reason := _unfit(judge, prompt, reference, text)) is not None}
    group = _Group(judge, prompt, reference, sorted({text for text in texts if text not in wrong}))
    return _Plan(texts, wrong, list(_MODES[judge.mode](group)))


def _unfit(judge: Judge, prompt: str, reference: str | None, text: str) -> RewardError | None:
    """Why a completion can't be judged, before anything is asked."""
    if judge.reference and reference is None:
        return RewardError(f"has no reference answer in the column {judge.reference}")
    for name, given in {"prompt": prompt, "reference answer": reference or "", "completion": text}.items():
        if len(given) > judge.max_characters:
            kind = DeclinedError if name == "completion" else RewardError
            return kind(f"the {name} has {len(given)} characters, more than max_characters ({judge.max_characters})")
    return None


def _absolute(group: _Group) -> Iterator[_Comparison]:
    """Each text on the scale, which becomes 0 to 1."""
    form = Scale(group.judge.lowest, group.judge.highest)
    for text in group.texts:
        question = group.ask(form, text, with_reference=True)
        yield _Comparison([question], [text], lambda score: [form.share(score)])


def _pairwise(group: _Group) -> Iterator[_Comparison]:
    """What each text of a pair wins: 1, 1/2 for a tie, 0. A judge that prefers a place gives 1/2."""
    form = Winner()

    def shares(there: str, back: str) -> list[float]:
        first = (form.shares[there] + 1 - form.shares[back]) / 2
        return [first, 1 - first]

    if group.reference is not None:
        for text in group.texts:
            both = [group.ask(form, text, group.reference), group.ask(form, group.reference, text)]
            yield _Comparison(both, [text], lambda there, back: shares(there, back)[:1])
        return
    texts = [group.texts[i] for i in permutation(len(group.texts), "judge", group.prompt, *group.texts)]
    for a, b in islice(_rounds(len(texts)), group.judge.max_pairs):
        pair = texts[a], texts[b]
        yield _Comparison([group.ask(form, *pair), group.ask(form, *reversed(pair))], pair, shares)


def _ranking(group: _Group) -> Iterator[_Comparison]:
    """1 for the best text of a group, 0 for the worst, in equal steps; in as many orders as are asked for."""
    count = len(group.texts)

    def shares(best: Sequence[int]) -> list[float]:
        return [1 - best.index(number) / (count - 1) for number in range(1, count + 1)]

    for number in range(group.judge.orders if count > 1 else 0):
        texts = [group.texts[i] for i in permutation(count, "judge", number, group.prompt, *group.texts)]
        yield _Comparison([group.ask(Ranking(count), *texts, with_reference=True)], texts, shares)


def _mean(parts: Sequence[Part]) -> Part:
    """Of the numbers among them; the first failure where there are only failures; nothing of nothing."""
    numbers = [part for part in parts if isinstance(part, float)]
    if numbers:
        return sum(numbers) / len(numbers)
    return next((part for part in parts if isinstance(part, DeclinedError)), parts[0] if parts else None)


def _rounds(size: int) -> Iterator[tuple[int, int]]:
    """All pairs of a round-robin tournament, round by round, so that after any round each has met as many as the others."""
    players: list[int | None] = [*range(size), *([None] if size % 2 else [])]
    for _ in range(len(players) - 1):
        for place in range(len(players) // 2):
            one, two = players[place], players[-1 - place]
            if one is not None and two is not None:
                yield one, two
        players.insert(1, players.pop())


def _checked(question: Question, cached: str | None) -> Any:
    """A verdict from the cache, held to the same form as a reply; None where it is not of that form."""
    try:
        return None if cached is None else question.form.check(json.loads(cached))
    except (ValueError, RecursionError, ReplyError):
        return None


_MODES: dict[str, Callable[[_Group], Iterator[_Comparison]]] = {
    "absolute": _absolute,
    "pairwise": _pairwise,
    "ranking": _ranking,
}
