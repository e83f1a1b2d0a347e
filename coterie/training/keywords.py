"""A function of the user's own, with the settings that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from coterie.errors import UserError
from coterie.user_code import load_function


def own_function(name: str, setting: str, settings: Mapping[str, Any]) -> Callable[..., Any]:
    """The function that a setting names, given those of the settings that it takes as keyword-only arguments.

    UserError where it is missing, or needs one that does not exist.
    """
    function, chosen = load_function(name, setting), {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if parameter.name in settings:
            chosen[parameter.name] = settings[parameter.name]
        elif parameter.default is parameter.empty:
            raise UserError(
                f"{setting}: {name} needs {parameter.name}, which is no setting; there are: {', '.join(settings)}"
            )
    return partial(function, **chosen)
