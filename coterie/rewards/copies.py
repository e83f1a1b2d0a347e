"""Copies of what the data hold, which a reward function may change as it likes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from coterie.errors import UserError

_FIXED = (str, int, float, bool, bytes, complex, type(None))


class Copies:
    """Copies values for the calls of reward functions, so that nothing that can be changed is shared.

    So a function may do what it likes with what it is given: other completions, calls and rewards get the data's own again. What can't be
    changed, texts and numbers, is not copied. How a value is copied is found out once for all the completions that have it.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Callable[[], Any] | None]] = {}  # by the object, which is kept alive

    def of(self, value: Any) -> Any:
        """A copy, or the value itself where it can't be changed."""
        if type(value) in _FIXED:
            return value
        if id(value) not in self._known:
            try:
                self._known[id(value)] = (value, _copier(value))
            except RecursionError:
                raise UserError("rewards: a column holds what is nested too deeply to be copied for them") from None
        copy = self._known[id(value)][1]
        return value if copy is None else copy()


def own_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A call's own copy of its options: lists and mappings, and no other objects, which may be models."""
    copy = _copier(dict(options), others=None)
    assert copy is not None
    made: dict[str, Any] = copy()
    return made


def _copier(value: Any, *, others: Callable[[Any], Any] | None = deepcopy) -> Callable[[], Any] | None:
    """What makes a copy that shares nothing that can be changed; None where the value itself can't be.

    others: what copies an object that is neither a plain container nor a plain value; None leaves those as they are.
    """
    kind = type(value)
    if kind in _FIXED:
        return None
    if kind is list or kind is dict:
        places = enumerate(value) if kind is list else value.items()
        inner = {place: copy for place, one in places if (copy := _copier(one, others=others)) is not None}
        return lambda: _filled(value.copy(), inner)
    if kind is tuple and all(_copier(one, others=others) is None for one in value):
        return None
    if others is None:
        return None
    return lambda: others(value)


def _filled(copy: Any, inner: Mapping[Any, Callable[[], Any]]) -> Any:
    for place, make in inner.items():
        copy[place] = make()
    return copy
