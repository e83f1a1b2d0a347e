"""The service that a judge asks: an OpenAI-compatible endpoint, and how much is asked of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from coterie.errors import UserError
from coterie.redact import conceal
from coterie.trust import check_sending

_OWN_FIELDS = ("model", "messages", "response_format", "stream", "n", "temperature")


@dataclass(frozen=True, kw_only=True)
class Service:
    """The options of a judge that are about whom it asks.

    model, url: the model's name, and the endpoint up to /chat/completions. key_variable: the environment variable that holds
    the key; empty for none. temperature: null sends none. extra: further fields of a request. concurrency: requests at the same
    time. attempts: for each question. request_seconds, step_seconds: for an attempt, and for all questions of a step.
    failures_in_a_row: so many questions without an answer, and none is asked for `pause_seconds`.
    """

    model: str
    url: str = "https://api.openai.com/v1"
    key_variable: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    extra: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 8
    attempts: int = 4
    request_seconds: float = 60.0
    step_seconds: float = 600.0
    failures_in_a_row: int = 5
    pause_seconds: float = 60.0

    def __post_init__(self) -> None:
        """Raises UserError for an option that can't be, and where the texts or the key may not be sent there."""
        for wrong in self._wrong():
            raise UserError(f"rewards: judge: {wrong}")
        url = httpx.URL(self.url)
        conceal(self.key_variable)
        variable = self.key_variable if self.key else ""
        check_sending("prompts and completions", str(url), url.host, variable, "rewards: judge: url")

    @property
    def fields(self) -> dict[str, Any]:
        """What goes into every request."""
        temperature = {} if self.temperature is None else {"temperature": self.temperature}
        return {"model": self.model, **temperature, **self.extra}

    @property
    def key(self) -> str:
        """The key, or nothing. Raises UserError where the variable holds what can't be sent; it is never shown."""
        key = os.environ.get(self.key_variable, "").strip() if self.key_variable else ""
        if not key.isascii() or not key.isprintable():
            raise UserError(f"rewards: judge: key_variable: {self.key_variable} holds characters that a key can't have")
        return key

    def _wrong(self) -> Iterator[str]:
        """What is wrong with the options, and what is allowed."""
        for name in ("model", "url"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                yield f"{name}: {getattr(self, name)!r} is no text"
        if not isinstance(self.key_variable, str):
            yield f"key_variable: {self.key_variable!r} is no text"
        yield from wrong_counts(self, "concurrency", "attempts", "failures_in_a_row")
        for name in ("request_seconds", "step_seconds", "pause_seconds"):
            if not is_number(getattr(self, name)) or getattr(self, name) <= 0:
                yield f"{name}: {getattr(self, name)!r} is no number above 0"
        if self.temperature is not None and (not is_number(self.temperature) or self.temperature < 0):
            yield f"temperature: {self.temperature!r} is neither null nor a number from 0"
        if not _is_json_object(self.extra) or set(self.extra) & set(_OWN_FIELDS):
            yield f"extra: holds further fields of a request, and none of {', '.join(_OWN_FIELDS)}"
        yield from self._wrong_address()

    def _wrong_address(self) -> Iterator[str]:
        try:
            url = httpx.URL(self.url)
        except httpx.InvalidURL as error:
            yield f"url: {self.url!r} is no address: {error}"
            return
        if url.userinfo:
            yield "url: holds a name or password, which would be written into the run; put the key into an environment variable"
        if url.scheme not in ("http", "https") or not url.host:
            yield f"url: {self.url!r} is no address; an endpoint such as http://localhost:8000/v1 is needed"
        named = self.key_variable != Service.key_variable or url.host == httpx.URL(Service.url).host
        if self.key_variable and named and not self.key:
            yield f"key_variable: the environment variable {self.key_variable} is not set, and the key is taken from it"


def wrong_counts(options: object, *names: str) -> Iterator[str]:
    """What is said of those that are no counts."""
    for name in names:
        value = getattr(options, name)
        if type(value) is not int or value < 1:
            yield f"{name}: {value!r} is no whole number above 0"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_json_object(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return isinstance(value, Mapping)
