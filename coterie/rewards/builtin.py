"""The rewards that a recipe names without a module.

Each is a frozen dataclass: its fields are the reward's options, and calling it scores completions.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from importlib import import_module
from typing import Any

from coterie.errors import UserError, nearest

BUILTIN: dict[str, str] = {
    "answer": "coterie.rewards.maths.answers:Answer",
    "code": "coterie.rewards.code.reward:Code",
    "format": "coterie.rewards.texts.shape:Format",
    "judge": "coterie.rewards.judge.reward:Judge",
    "language": "coterie.rewards.texts.language:Language",
    "length": "coterie.rewards.texts.shape:Length",
    "reasoning_gym": "coterie.rewards.reasoning:ReasoningGym",
    "repetition": "coterie.rewards.texts.shape:Repetition",
    "reward_model": "coterie.rewards.learned:RewardModel",
    "self_correction": "coterie.rewards.texts.corrections:SelfCorrection",
    "steps": "coterie.rewards.maths.solutions:Steps",
}


def make_builtin(name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """The built-in reward of that name. Raises UserError for a name or an option that there is not, or is missing."""
    if name not in BUILTIN:
        if name.endswith(".py"):
            raise UserError(f"rewards: {name!r} names a file and no function of it; write {name}:function")
        raise UserError(
            f"rewards: there is no {name!r}; {nearest(name, BUILTIN)}; your own is module:function or file.py:function"
        )
    module, _, kind = BUILTIN[name].partition(":")
    made = getattr(import_module(module), kind)
    known = [field for field in fields(made) if field.init]
    names = [field.name for field in known]
    for option in options:
        if option not in names:
            raise UserError(f"rewards: {name} has no option {option!r}; {nearest(option, names)}")
    for field in known:
        if field.default is field.default_factory is MISSING and field.name not in options:
            raise UserError(f"rewards: {name} needs the option {field.name!r}")
    return made(**options)
