"""Asking an OpenAI-compatible server, which may be busy, slow, broken or gone.

What comes of a call is its verdict, or a RewardError that says why there is none. The key stands in the request's header and
nowhere else: every reason is cleaned of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import itertools
import json
import math
import random
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any

import httpx

from coterie.deadline import running
from coterie.errors import RewardError
from coterie.redact import MASK, hidden
from coterie.rewards.judge.request import Question, QuotationError, ReplyError
from coterie.rewards.judge.service import Service

MAX_BODY = 1_000_000  # bytes of an answer
_PARTING = 5.0  # seconds for connections to close
# What servers say of a request whose texts are too long, or not to be read; of one whose `extra` asks for too many tokens; and how a
# reply in words begins that gives no verdict
_OF_THE_TEXT = re.compile(
    r"context.?(?:length|window|size|limit)|too (?:long|large|many (?:input )?tokens)|content.?(?:policy|filter|management)"
    r"|moderation|flagged|inappropriate|unsafe|sensitive content|reduce the length"
    r"|\binputs?\b.{0,40}\btokens\b.{0,80}(?:exceed|must be (?:<|less|at most))|prompt.{0,40}exceed",
    re.IGNORECASE,
)
_OF_THE_LIMIT = re.compile(r"max_(?:completion_|new_|output_)?tokens\W{0,3}\s*(?:is|:)?\s*too large", re.IGNORECASE)
_DECLINES = re.compile(
    r"\W*(?:(?:unfortunately|apologies|as an ai)\b|(?:i['’]?m|i am)(?: very| so| really)? (?:sorry|unable|not able)\b|sorry\b|i apologi[sz]e\b"
    r"|i (?:can(?:no|['’])t|can not|won['’]t|will not|must decline|decline)\b|抱歉|很抱歉|对不起|我无法|我不能)",
    re.IGNORECASE,
)
_FORMATS = ("json_schema", "json_object", "plain")  # each for servers that refuse the one before


@dataclass(eq=False)
class NoVerdictError(Exception):
    """Why an attempt gave no verdict.

    again: another may. is_up: the service works, which is all that the breaker asks. declined: it is for the text that was to be judged.
    after: the seconds that the service asks to wait.
    """

    reason: str
    _: KW_ONLY
    again: bool = False
    is_up: bool = False
    declined: bool = False
    after: float | None = None


def _unreadable(reason: str, *, declined: bool = False) -> NoVerdictError:
    """The service answered, and not what it was asked for."""
    return NoVerdictError(f"gave a reply {reason}", again=True, is_up=True, declined=declined)


class DeclinedError(RewardError):
    """There is no verdict because of what was to be judged, and not because of an outage."""


class Breaker:
    """Stops asking a service that is down. After the pause one question is asked; its answer closes the breaker again."""

    def __init__(self, limit: int, pause: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._pause, self._clock = limit, pause, clock
        self._num_failed = 0
        self._open_until: float | None = None

    @property
    def open(self) -> bool:
        return self._open_until is not None and self._clock() < self._open_until

    @property
    def on_trial(self) -> bool:
        """Whether a pause has passed and no answer has come since."""
        return self._open_until is not None and not self.open

    def heard(self, *, is_up: bool) -> None:
        """What came of a question: the service works, or it does not."""
        self._num_failed = 0 if is_up else self._num_failed + 1
        self._open_until = self._clock() + self._pause if self._num_failed >= self._limit else None

    @property
    def reason(self) -> str:
        return f"not asked: the judge failed {self._num_failed} times in a row, and is left alone for {self._pause:g} s"


class Client:
    """Asks the questions of a step, and remembers from step to step what the service understands and whether it is up.

    A thread of its own does the asking, so that it goes on beside other work.
    """

    def __init__(self, service: Service) -> None:
        self._service, self._key = service, service.key
        self._breaker = Breaker(service.failures_in_a_row, service.pause_seconds)
        self._format = 0  # of _FORMATS: the first that the service has not refused
        self._resume_at = -math.inf  # on the monotonic clock: the service asked for quiet until then
        self._loop: asyncio.AbstractEventLoop | None = None

    def ask(self, questions: Sequence[Question], keep: Callable[[int, Any], None]) -> Future[list[Any | RewardError]]:
        """The verdicts to come, in order. `keep(number, verdict)` is called with each as it comes, in the client's thread."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=_serve, args=[self._loop], name="judge", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(self._ask_all(questions, keep), self._loop)

    def close(self) -> None:
        """Give up what is still asked, and the connections."""
        if self._loop is not None:
            with contextlib.suppress(TimeoutError):
                asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(_PARTING)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_PARTING)
            self._loop = None

    async def _end(self) -> None:
        await _cancelled(asyncio.all_tasks() - {asyncio.current_task()})
        if "_http" in self.__dict__:
            await self.__dict__.pop("_http").aclose()

    @cached_property
    def _free(self) -> asyncio.Semaphore:
        """Places for requests, of all that is asked at the same time."""
        return asyncio.Semaphore(self._service.concurrency)

    @cached_property
    def _http(self) -> httpx.AsyncClient:
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        most = self._service.concurrency
        limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
        return httpx.AsyncClient(headers=headers, limits=limits, timeout=None)  # an attempt as a whole has one

    async def _ask_all(
        self, questions: Sequence[Question], keep: Callable[[int, Any], None]
    ) -> list[Any | RewardError]:
        service = self._service
        until = running() + service.step_seconds

        async def answer(number: int) -> Any | RewardError:
            verdict = await self._ask(questions[number], until)
            if not isinstance(verdict, RewardError):
                keep(number, verdict)
            return verdict

        tasks: list[asyncio.Task[Any]] = []
        try:
            if self._breaker.on_trial:
                tasks.append(asyncio.create_task(answer(0)))
                await _done(tasks, until)
            tasks += [asyncio.create_task(answer(number)) for number in range(len(tasks), len(questions))]
            await _done(tasks, until)
        finally:
            await _cancelled(tasks)
        too_late = f"the judge took longer than {service.step_seconds:g} s for all questions of a step"
        return [RewardError(too_late) if task.cancelled() else task.result() for task in tasks]

    async def _ask(self, question: Question, until: float) -> Any | RewardError:
        """One question, asked again where that may help."""
        for attempt in itertools.count(1):
            try:
                verdict: Any = await self._attempt(question, until)
                break
            except RewardError as error:  # not asked at all
                return error
            except NoVerdictError as error:
                pause = _backoff(attempt) if error.after is None else error.after + _spread(error.after)
                if not error.again or attempt >= self._service.attempts or running() + pause >= until:
                    self._breaker.heard(is_up=error.is_up)
                    return (DeclinedError if error.declined else RewardError)(self._clean(f"the judge {error.reason}"))
            await asyncio.sleep(pause)
        self._breaker.heard(is_up=True)
        return verdict

    async def _attempt(self, question: Question, until: float) -> Any:
        """One attempt, when its turn has come. Raises RewardError where the service is not to be asked."""
        async with self._free:
            if self._resume_at - time.monotonic() > until - running():
                raise RewardError("not asked: the judge wants to be left alone for longer than the step may take")
            await asyncio.sleep(max(self._resume_at - time.monotonic(), 0))
            if self._breaker.open:
                raise RewardError(self._breaker.reason)
            try:
                async with asyncio.timeout(self._service.request_seconds):
                    return await self._exchange(question)
            except TimeoutError:
                late = f"gave no answer within {self._service.request_seconds:g} s"
                raise NoVerdictError(late, again=True) from None
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                lost = f"can't be reached: {str(error) or type(error).__name__}"
                raise NoVerdictError(lost, again=True) from None

    async def _exchange(self, question: Question) -> Any:
        """Ask in the strictest form that the service takes, and read what it answers."""
        for number in range(self._format, len(_FORMATS)):
            status, headers, body = await self._post(question, _FORMATS[number])
            if status not in (400, 422):
                break
        if status != 200:
            raise self._refusal(status, headers, body)
        self._format = max(self._format, number)
        try:
            return question.read(_reply_in(body), prose=_FORMATS[number] == "plain")
        except ReplyError as error:
            raise _unreadable(f"that {error}", declined=isinstance(error, QuotationError)) from None

    async def _post(self, question: Question, form: str) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body, of which no more than a megabyte is read."""
        fields = {**self._service.fields, "messages": question.messages, "stream": False}
        if form == "json_schema":
            schema = {"name": "verdict", "strict": True, "schema": question.schema}
            fields["response_format"] = {"type": form, "json_schema": schema}
        elif form == "json_object":
            fields["response_format"] = {"type": form}
        url = httpx.URL(self._service.url)
        url = url.copy_with(path=f"{url.path.rstrip('/')}/chat/completions")
        async with self._http.stream("POST", url, content=json.dumps(fields).encode()) as answer:
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise _unreadable("that is compressed, which was not asked for")
            body = b""
            async for chunk in answer.aiter_raw():
                body += chunk
                if len(body) > MAX_BODY:
                    raise _unreadable(f"of more than {MAX_BODY:,} bytes")
            return answer.status_code, answer.headers, body

    def _refusal(self, status: int, headers: httpx.Headers, body: bytes) -> NoVerdictError:
        if status in (408, 409, 425, 429) or status >= 500:
            after = _seconds_in(headers.get("Retry-After"))
            if after is not None:
                self._resume_at = max(self._resume_at, time.monotonic() + after)
            return NoVerdictError(f"answered {status}", again=True, after=after)
        if status in (401, 403):
            return NoVerdictError(f"answered {status}: the key is missing, or not accepted")
        if 300 <= status < 400:
            return NoVerdictError(f"answered {status}, a redirect, which is not followed")
        said = " ".join(self._clean(body[:4000].decode("utf-8", "replace")).split())
        of_this_question = status in (400, 422)
        of_the_text = _OF_THE_TEXT.search(said) is not None and _OF_THE_LIMIT.search(said) is None
        declined = status == 413 or (of_this_question and of_the_text)
        return NoVerdictError(f"answered {status}: {said[:200]}", is_up=of_this_question or declined, declined=declined)

    def _clean(self, reason: str) -> str:
        """A reason without the key, which a server may repeat."""
        return hidden(reason.replace(self._key, MASK) if self._key else reason)


def _reply_in(body: bytes) -> str:
    """What the model wrote, in a chat completion. Raises NoVerdictError."""
    try:
        (choice,) = json.loads(body)["choices"]
        message = choice["message"]
        content, refusal, ended = message["content"], message.get("refusal"), choice.get("finish_reason")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise _unreadable("that is no chat completion") from None
    in_words = isinstance(content, str) and "{" not in content and _DECLINES.match(content)
    if refusal or in_words or ended == "content_filter":
        raise NoVerdictError("does not want to judge this", is_up=True, declined=True)
    if ended == "length":
        raise _unreadable("that its length limit cut")
    if not isinstance(content, str):
        raise _unreadable("without text")
    return content


def _seconds_in(retry_after: str | None) -> float | None:
    """The header Retry-After as seconds from now: a number, or a date. None where it is neither."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def _backoff(attempt: int) -> float:
    """Seconds before the next attempt: longer each time, and not the same for all that wait."""
    return random.uniform(0, min(20.0, 0.5 * 2 ** min(attempt - 1, 10)))


def _spread(after: float) -> float:
    """Seconds beyond those that the service asks for, so that not everyone comes back at once."""
    return random.uniform(0, min(1.0, 0.1 * after))


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run what the loop is given, until it is stopped."""
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _done(tasks: Sequence[asyncio.Task[Any]], until: float) -> None:
    """Wait for all, until that moment as `running` counts: not for asyncio's clock, which goes on while the process is stopped."""
    while any(not task.done() for task in tasks) and running() < until:
        await asyncio.wait(tasks, timeout=until - running())


async def _cancelled(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    """End those that are not done, and wait for it."""
    running = [task for task in tasks if task is not None and not task.done()]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
