"""Keys, tokens and passwords, kept out of what is written and printed. They belong in the environment, which no run records."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

_VARIABLE = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_SETTING = re.compile(r"(api|access|auth|secret)_?(key|token)$|(^|_)(password|passwd|secret|bearer)$", re.IGNORECASE)
_FORM = re.compile(
    r"\b(sk-[\w-]{16,}|hf_\w{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[abp]-[\w-]{16,}|AKIA[A-Z0-9]{16})"
)
_IN_ADDRESS = re.compile(r"://[^/\s@]+:[^/\s@]+@|[?&](api_?key|key|token|access_token|password)=[^&\s]", re.IGNORECASE)
_SHORTEST = 8  # characters; a shorter value of a variable could be any word


def hidden(text: str) -> str:
    """The text without the keys that the environment holds, and without what has the form of one."""
    values = [value for name, value in os.environ.items() if _VARIABLE.search(name) and len(value) >= _SHORTEST]
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return _FORM.sub("***", text)


def keys_in(values: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """The dotted names of settings that hold a key or a password."""
    for name, value in values.items():
        place = f"{before}{name}"
        if isinstance(value, Mapping):
            yield from keys_in(value, f"{place}.")
        elif isinstance(value, list | tuple):
            yield from keys_in({str(number): entry for number, entry in enumerate(value)}, f"{place}.")
        elif (
            isinstance(value, str)
            and value
            and (
                _SETTING.search(str(name)) or _FORM.search(value) or _IN_ADDRESS.search(value) or hidden(value) != value
            )
        ):
            yield place
