"""A language model behind an OpenAI-compatible endpoint as a judge: by a scale, in pairs, or ranking a group.

Legend: a group is the completions of one prompt; equal completions of a group are judged once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from inspect import Parameter, Signature
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import httpx

from coterie.errors import RewardError, UserError, nearest
from coterie.noise import permutation
from coterie.redact import conceal
from coterie.rewards.arguments import GIVEN
from coterie.rewards.judge.cache import Cache, default_folder
from coterie.rewards.judge.client import Client, DeclinedError, Service
from coterie.rewards.judge.request import (
    Form,
    Question,
    Ranking,
    ReplyError,
    Score,
    Winner,
    conversation,
    make_question,
)
from coterie.rewards.text_of import Chat, completion_text
from coterie.trust import check_sending, check_writing

Value = float | RewardError | None
Verdicts = Mapping[Question, Any]  # a RewardError where the judge said nothing of use


@dataclass(frozen=True)
class Judge:
    """What a language model makes of each completion by a rubric: a number from 0 to 1, or a failure where it says nothing.

    One that is too long for it, or that it declines, has 0, the lowest: to abstain would let it escape. An outage is a failure.

    model, url: the model's name, and the endpoint up to /chat/completions. key_variable: the environment variable that holds
    the key; empty for none. rubric: what is good. mode: absolute, each on the scale from `lowest` to `highest`; pairwise, each
    against the reference, or against others of its group in at most `max_pairs` pairs, always in both orders; ranking, a group
    in one request, asked in `orders` orders. reference: the column with a reference answer. reason: the judge writes its reason
    before its verdict. temperature: null sends none. extra: further fields of a request. max_characters: of a text; a longer
    completion has 0. concurrency: requests at the same time. attempts: for each question. request_seconds,
    step_seconds: for an attempt, and for all questions of a step. failures_in_a_row: so many, and nothing is asked for
    pause_seconds. cache: the folder of the verdicts; none for no cache, empty for one in the user's cache folder.
    """

    model: str
    rubric: str
    mode: str = "absolute"
    url: str = "https://api.openai.com/v1"
    key_variable: str = "OPENAI_API_KEY"
    reference: str = ""
    lowest: float = 1
    highest: float = 10
    max_pairs: int = 16
    orders: int = 1
    reason: bool = True
    temperature: float | None = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    max_characters: int = 20_000
    concurrency: int = 8
    attempts: int = 4
    request_seconds: float = 60.0
    step_seconds: float = 600.0
    failures_in_a_row: int = 5
    pause_seconds: float = 60.0
    cache: str = ""
    # The questions of a step: of each the verdicts of its batch, to come, and its place among them
    _asked: dict[Question, tuple[Future[list[Any]], int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _declined: list[None] = field(
        default_factory=list, init=False, repr=False, compare=False
    )  # one each, to be counted

    def __post_init__(self) -> None:
        for wrong in _wrong(self):
            raise UserError(f"rewards: judge: {wrong}")
        url = httpx.URL(self.url)
        variable = self.key_variable if _key_in(self.key_variable) else ""
        conceal(self.key_variable)
        check_sending("prompts and completions", str(url), url.host, variable, "rewards: judge: url")
        if self.cache not in ("", "none"):
            check_writing(Path(self.cache).expanduser(), "rewards: judge: cache")

    def __call__(
        self, prompts: Sequence[str | Chat], completions: Sequence[str | Chat], **columns: Sequence[Any]
    ) -> list[Value]:
        """One entry for each completion. Completions that follow one another with the same prompt are a group."""
        plans = self._plans(prompts, completions, columns)
        questions = [question for plan in plans for question in plan.questions]
        try:
            self._ask(questions)
            verdicts = {question: batch.result()[number] for question, (batch, number) in self._asked.items()}
        finally:
            for batch, _ in self._asked.values():
                batch.cancel()
            self._asked.clear()
        values = [value for plan in plans for value in plan.values(verdicts)]
        self._say_declined([value for value in values if isinstance(value, DeclinedError)])
        return [0.0 if isinstance(value, DeclinedError) else value for value in values]

    def _say_declined(self, declined: Sequence[DeclinedError]) -> None:
        """Warn when there are 1, 2, 4, 8 ... of them since the start."""
        before, now = len(self._declined), len(self._declined) + len(declined)
        self._declined.extend([None] * len(declined))
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
        self._ask([question for plan in self._plans(prompts, completions, columns) for question in plan.questions])

    uses_cores = False  # of this machine

    def _plans(
        self, prompts: Sequence[str | Chat], completions: Sequence[str | Chat], columns: Mapping[str, Sequence[Any]]
    ) -> list[_Plan]:
        return [_plan(self, *group) for group in self._groups(prompts, completions, columns)]

    def _groups(
        self, prompts: Sequence[str | Chat], completions: Sequence[str | Chat], columns: Mapping[str, Sequence[Any]]
    ) -> Iterator[tuple[str, str | None, list[str]]]:
        """Prompt, reference and texts of each group."""
        references: Sequence[Any] = [None] * len(prompts)
        if self.reference:
            if self.reference not in columns:
                raise UserError(
                    f"rewards: judge: reference: {self.reference!r} is no column of the data; {nearest(self.reference, columns)}"
                )
            references = columns[self.reference]
        rows = zip(prompts, references, completions, strict=True)
        for (prompt, reference), group in groupby(rows, key=lambda row: row[:2]):
            known = None if reference is None else str(reference)
            yield conversation(prompt), known, [completion_text(completion) for _, _, completion in group]

    def _ask(self, questions: Sequence[Question]) -> None:
        """Have every question answered, from the cache or by the judge, that was not asked in this step before."""
        new = [question for question in dict.fromkeys(questions) if question not in self._asked]
        keys = {question: self._cache_key(question) for question in new}
        cached = self._cache.read(keys.values()) if self._cache else {}
        checked = {question: _checked(question, cached.get(key)) for question, key in keys.items()}
        known = {question: verdict for question, verdict in checked.items() if verdict is not None}
        missing = [question for question in new if question not in known]

        def keep(number: int, verdict: Any) -> None:
            if self._cache:
                self._cache.write(keys[missing[number]], json.dumps(verdict))

        there: Future[list[Any]] = Future()
        there.set_result(list(known.values()))
        batches = [(list(known), there), *([(missing, self._client.ask(missing, keep))] if missing else [])]
        for batch, verdicts in batches:
            self._asked.update({question: (verdicts, number) for number, question in enumerate(batch)})

    def _cache_key(self, question: Question) -> str:
        """By everything that the verdict depends on: service, model, settings, and the request's own text."""
        parts = [self.url, self._fields, question.messages, question.schema]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def _fields(self) -> dict[str, Any]:
        temperature = {} if self.temperature is None else {"temperature": self.temperature}
        return {"model": self.model, **temperature, **self.extra}

    @cached_property
    def _client(self) -> Client:
        service = Service(
            self.url,
            self._fields,
            self.concurrency,
            self.attempts,
            self.request_seconds,
            self.step_seconds,
            self.failures_in_a_row,
            self.pause_seconds,
        )
        return Client(service, _key_in(self.key_variable))

    @cached_property
    def _cache(self) -> Cache | None:
        if self.cache == "none":
            return None
        return Cache(Path(self.cache).expanduser() if self.cache else default_folder())

    def close(self) -> None:
        """End what was opened at the first call."""
        cache = self.__dict__.pop("_cache", None)
        if cache is not None:
            cache.close()
        client = self.__dict__.pop("_client", None)
        if client is not None:
            client.close()


@dataclass(frozen=True)
class _Plan:
    """What is asked of one group, and how the verdicts become values.

    texts: of its completions. wrong: of those that are not judged, and why. judged: from verdicts to the value of each of the
    other texts.
    """

    texts: Sequence[str]
    wrong: Mapping[str, RewardError]
    questions: Sequence[Question]
    judged: Callable[[Verdicts], Mapping[str, Value]]

    def values(self, verdicts: Verdicts) -> list[Value]:
        found = {**self.judged(verdicts), **self.wrong}
        return [found[text] for text in self.texts]


def _plan(judge: Judge, prompt: str, reference: str | None, texts: Sequence[str]) -> _Plan:
    """The same texts in any order are asked the same."""
    wrong = {text: reason for text in texts if (reason := _unfit(judge, prompt, reference, text)) is not None}
    others = sorted({text for text in texts if text not in wrong})

    def ask(form: Form, *answers: str, shown: str | None = None) -> Question:
        return make_question(
            form, rubric=judge.rubric, prompt=prompt, answers=answers, reference=shown, with_reason=judge.reason
        )

    questions, judged = _MODES[judge.mode](judge, ask, prompt, reference, others)
    return _Plan(texts, wrong, questions, judged)


def _unfit(judge: Judge, prompt: str, reference: str | None, text: str) -> RewardError | None:
    """Why a completion can't be judged, before anything is asked."""
    if judge.reference and reference is None:
        return RewardError(f"has no reference answer in the column {judge.reference}")
    for name, given in {"prompt": prompt, "reference answer": reference or "", "completion": text}.items():
        if len(given) > judge.max_characters:
            kind = DeclinedError if name == "completion" else RewardError
            return kind(f"the {name} has {len(given)} characters, more than max_characters ({judge.max_characters})")
    return None


Made = tuple[list[Question], Callable[[Verdicts], Mapping[str, Value]]]
Ask = Callable[..., Question]


def _absolute(judge: Judge, ask: Ask, prompt: str, reference: str | None, texts: Sequence[str]) -> Made:
    """Each text on the scale, which becomes 0 to 1."""
    form = Score(judge.lowest, judge.highest)
    asked = {text: ask(form, text, shown=reference) for text in texts}

    def judged(verdicts: Verdicts) -> dict[str, Value]:
        found = {text: verdicts[question] for text, question in asked.items()}
        return {text: v if isinstance(v, RewardError) else form.share(v) for text, v in found.items()}

    return list(asked.values()), judged


def _pairwise(judge: Judge, ask: Ask, prompt: str, reference: str | None, texts: Sequence[str]) -> Made:
    """The mean over a text's pairs of what it wins: 1, 1/2 for a tie, 0. A judge that prefers a place gives 1/2."""
    if judge.reference:
        pairs: list[tuple[str, str | None]] = [(text, None) for text in texts]
    else:
        order = permutation(len(texts), "judge", prompt, *texts)
        pairs = [(texts[order[a]], texts[order[b]]) for a, b in islice(_rounds(len(texts)), judge.max_pairs)]
    form = Winner()
    asked = {
        (one, two): (ask(form, one, other), ask(form, other, one))
        for one, two in pairs
        if (other := reference if two is None else two) is not None
    }

    def judged(verdicts: Verdicts) -> dict[str, Value]:
        won: dict[str, list[Value]] = {text: [] for text in texts}
        for (one, two), (there, back) in asked.items():
            outcomes = verdicts[there], verdicts[back]
            failed = next((outcome for outcome in outcomes if isinstance(outcome, RewardError)), None)
            share = failed or (form.shares[outcomes[0]] + 1 - form.shares[outcomes[1]]) / 2
            won[one].append(share)
            if two is not None:
                won[two].append(1 - share if isinstance(share, float) else share)
        return {text: _mean(values) for text, values in won.items()}

    return [question for both in asked.values() for question in both], judged


def _ranking(judge: Judge, ask: Ask, prompt: str, reference: str | None, texts: Sequence[str]) -> Made:
    """1 for the best text of a group, 0 for the worst, in equal steps; the mean over the orders that were asked."""
    count = len(texts)
    if count < 2:
        return [], lambda _: dict.fromkeys(texts)
    shuffled = [permutation(count, "judge", number, prompt, *texts) for number in range(judge.orders)]
    asked = [(ask(Ranking(count), *(texts[i] for i in order), shown=reference), order) for order in shuffled]

    def judged(verdicts: Verdicts) -> dict[str, Value]:
        found: dict[str, list[Value]] = {text: [] for text in texts}
        for question, order in asked:
            verdict = verdicts[question]
            for place in range(count):
                if isinstance(verdict, RewardError):
                    found[texts[place]].append(verdict)
                else:
                    found[texts[order[verdict[place] - 1]]].append(1 - place / (count - 1))
        return {text: _mean(values) for text, values in found.items()}

    return [question for question, _ in asked], judged


def _mean(values: Sequence[Value]) -> Value:
    """Of the numbers among them; the first failure where there are only failures; nothing of nothing."""
    numbers = [value for value in values if isinstance(value, float)]
    if numbers:
        return sum(numbers) / len(numbers)
    return next((value for value in values if isinstance(value, DeclinedError)), values[0] if values else None)


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


def _key_in(variable: str) -> str:
    """The key, or nothing. Raises UserError where the variable holds what can't be sent; it is never shown."""
    key = os.environ.get(variable, "").strip() if variable else ""
    if not key.isascii() or not key.isprintable():
        raise UserError(f"rewards: judge: key_variable: {variable} holds characters that a key can't have")
    return key


_OWN_FIELDS = ("model", "messages", "response_format", "stream", "n", "temperature")


def _wrong(judge: Judge) -> Iterator[str]:
    """What is wrong with the options, and what is allowed."""
    for name in ("model", "rubric", "mode", "url"):
        value = getattr(judge, name)
        if not isinstance(value, str) or not value.strip():
            yield f"{name}: {value!r} is no text"
    for name in ("key_variable", "reference", "cache"):
        if not isinstance(getattr(judge, name), str):
            yield f"{name}: {getattr(judge, name)!r} is no text"
    if judge.reference in GIVEN:
        yield f"reference: {judge.reference!r} can't be the name of a column"
    for name in ("max_pairs", "orders", "max_characters", "concurrency", "attempts", "failures_in_a_row"):
        if type(getattr(judge, name)) is not int or getattr(judge, name) < 1:
            yield f"{name}: {getattr(judge, name)!r} is no whole number above 0"
    for name in ("request_seconds", "step_seconds", "pause_seconds"):
        if not _is_number(getattr(judge, name)) or getattr(judge, name) <= 0:
            yield f"{name}: {getattr(judge, name)!r} is no number above 0"
    if not all(map(_is_number, (judge.lowest, judge.highest))) or judge.lowest >= judge.highest:
        yield f"lowest, highest: {judge.lowest!r} and {judge.highest!r} are no scale"
    if judge.temperature is not None and (not _is_number(judge.temperature) or judge.temperature < 0):
        yield f"temperature: {judge.temperature!r} is neither null nor a number from 0"
    if not isinstance(judge.reason, bool):
        yield f"reason: {judge.reason!r} is neither true nor false"
    if not _is_plain(judge.extra) or set(judge.extra) & set(_OWN_FIELDS):
        yield f"extra: holds further fields of a request, and none of {', '.join(_OWN_FIELDS)}"
    if judge.mode not in _MODES:
        yield f"mode: there is no {judge.mode!r}; {nearest(judge.mode, _MODES)}"
    yield from _wrong_address(judge)


def _wrong_address(judge: Judge) -> Iterator[str]:
    try:
        url = httpx.URL(judge.url)
    except httpx.InvalidURL as error:
        yield f"url: {judge.url!r} is no address: {error}"
        return
    if url.userinfo:
        yield "url: holds a name or password, which would be written into the run; put the key into an environment variable"
    if url.scheme not in ("http", "https") or not url.host:
        yield f"url: {judge.url!r} is no address; an endpoint such as http://localhost:8000/v1 is needed"
    named = judge.key_variable != Judge.key_variable or url.host == httpx.URL(Judge.url).host
    if judge.key_variable and named and not _key_in(judge.key_variable):
        yield f"key_variable: the environment variable {judge.key_variable} is not set, and the key is taken from it"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_plain(value: Any) -> bool:
    """Whether a mapping can be sent as JSON."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return isinstance(value, Mapping)


_MODES: dict[str, Callable[[Judge, Ask, str, str | None, Sequence[str]], Made]] = {
    "absolute": _absolute,
    "pairwise": _pairwise,
    "ranking": _ranking,
}
