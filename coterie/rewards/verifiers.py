"""The verifiers of reasoning-gym, as worker processes call them: they may hang, and some evaluate what a model wrote."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from reasoning_gym.factory import DATASETS

# Verifiers that let Python or SymPy evaluate what the model wrote, as `eval(answer)` or `parse_expr(answer)`.
_EVALUATES = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(\s*\w*(?:answer|expr|text|solution|response)\w*\b(?!\[)")
_FUNCTIONS = ("sqrt", "sin", "cos", "tan", "exp", "log", "ln", "asin", "acos", "atan", "sinh", "cosh", "tanh", "Abs")
_PLAIN = (
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Name, ast.Load, ast.Call),
    *(ast.BinOp, ast.UnaryOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.USub, ast.UAdd),
)


def verify(entry: Mapping[str, Any], answers: Sequence[str]) -> float:
    """The best score among the answers, by the verifier of the generator that made the entry."""
    scorer, evaluates = _verifier(entry["metadata"]["source_dataset"])
    best = 0.0
    for answer in answers:
        if evaluates and answer != entry["answer"] and not is_arithmetic(answer):
            continue
        try:
            best = max(best, min(float(scorer(answer, entry)), 1.0))
        except Exception:  # a verifier that stumbles over what a model wrote: that is no right answer
            continue
    return best


def is_arithmetic(text: str) -> bool:
    """Whether a text is numbers, one-letter variables, lists, arithmetic and functions such as sqrt: nothing that can do harm as code."""
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return all(map(_is_plain, nodes))


def _is_plain(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    if isinstance(node, ast.Name):
        return len(node.id) == 1 or node.id in _FUNCTIONS
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS and not node.keywords
    return isinstance(node, _PLAIN)


@cache
def _verifier(generator: str) -> tuple[Any, bool]:
    """The verifier of a generator, and whether it evaluates answers as code."""
    kind, config = DATASETS[generator]
    return kind(config=config()).score_answer, evaluates_answers(kind)


def evaluates_answers(kind: type) -> bool:
    """Whether a generator's class lets an answer be evaluated, as far as its source shows."""
    return bool(_EVALUATES.search(inspect.getsource(kind)))
