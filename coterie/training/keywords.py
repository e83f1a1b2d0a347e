"""Which settings a function of the user's own, or one of ours, takes as keywords."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from coterie.errors import UserError


def chosen_keywords(function: Callable[..., Any], settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Those settings that a function takes as keyword-only arguments. UserError where it needs one that does not exist."""
    chosen = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if parameter.name in settings:
            chosen[parameter.name] = settings[parameter.name]
        elif parameter.default is parameter.empty:
            raise UserError(f"{name} needs {parameter.name}, which is no setting; there are: {', '.join(settings)}")
    return chosen
