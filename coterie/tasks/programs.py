"""Python functions to be written from a few examples of what they do, judged by running them.

A prompt shows two calls and their results, `f(0) = 7; f(100) = 307`; the answer is a function's source. It is judged by its
results on other inputs, which the prompt does not show; of a list or text they have other lengths, values and orders. Which
functions are held out depends on the function alone: those of numbers by their coefficients, those of lists and texts by the
steps that they are made of. Single steps are never held out, so a held-out function is a combination that was never seen of
steps that were.

Most demonstrations of a cold start repeat the examples, `if x == 0: return 7`, and fail the tests; fewer are right. A model
learns both from them, and which of the two is worth something from its rewards alone.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from coterie.models.codec import Codec
from coterie.noise import key
from coterie.recipe.settings import RewardSpec
from coterie.rewards.load import load_rewards
from coterie.rewards.score import score
from coterie.tasks.base import Encoded, Task
from coterie.tasks.chance import drawn
from coterie.tasks.functions import KINDS, Function, grammar, program
from coterie.tasks.words import make_word_tokenizer
from coterie.types import Messages, Prompt, Scored, entries_of

HELDOUT_SHARE = 0.1  # of the functions that are not a single step
QUALITIES = {"right": 0.4, "hard_coded": 0.5, "wrong": 0.1}
BASIC_SHARE = 0.1  # of the demonstrations: single steps, always right
NUM_SHOWN, NUM_TESTS = 2, 5
SETS_PER_FUNCTION = 2  # prompts of each function, with other examples in each
REWARD = "code"  # the built-in reward, whose part says which share of the tests a program passes

_WORDS = (
    "def f(x):", "def f(xs):", "def f(s):", "\n    return ", "\n    if ", ":\n        return ", " == ", "f(", "f([", 'f("', ") = ",
    "]) = ", '") = ', "; ", "]; ", '"; ', ", ", "sorted(", "xs", "[::-1]", "[1:]", "[:-1]", " + ", " * ", ".upper()",
)  # fmt: skip


@dataclass(frozen=True)
class Exercise:
    """A function and a key, on which depends what the prompt shows and what the tests ask.

    The examples leave no doubt: no other function of the grammar agrees with all that are shown, or passes all tests.
    """

    function: Function
    key: int

    @functools.cached_property
    def examples(self) -> list[tuple[str, str]]:
        """What the prompt shows: inputs and results, as text."""
        return [(json.dumps(given), json.dumps(result)) for given, result in self._pairs(NUM_SHOWN, hidden=False)]

    @property
    def text(self) -> str:
        return "; ".join(f"f({given}) = {result}" for given, result in self.examples)

    @property
    def columns(self) -> dict[str, Any]:
        """What the reward `code` takes."""
        tests = [{"args": [given], "expected": result} for given, result in self._pairs(NUM_TESTS, hidden=True)]
        return {"tests": tests, "function": "f"}

    @property
    def hard_coded(self) -> str:
        """A program that repeats the examples: right for them, and for nothing else."""
        *first, last = self.examples
        name = KINDS[self.function.kind]
        lines = [f"    if {name} == {given}:\n        return {result}" for given, result in first]
        return program(self.function.kind, "\n".join([*lines, f"    return {last[1]}"]))

    def _pairs(self, count: int, *, hidden: bool) -> list[tuple[Any, Any]]:
        """Inputs and what the function makes of them."""
        found = grammar(self.function.kind)
        outputs = found.outputs[self.function.row]
        places = found.draw_inputs(self.function, count, self.key, hidden=hidden)
        return [(found.inputs[place], outputs[place]) for place in places]


FUNCTIONS = [function for kind in KINDS for function in grammar(kind).functions]


def is_heldout(function: Function) -> bool:
    """Decided by the function, the same in every run."""
    return not function.basic and _chance("programs", function.expression) < HELDOUT_SHARE


class Programs(Task):
    """The task. `train`, `heldout` and `examples` are prompts; each of its functions has some, with different examples."""

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec)
        train, heldout = ([f for f in FUNCTIONS if is_heldout(f) is side] for side in (False, True))
        self._train_functions = {kind: [f for f in train if f.kind == kind] for kind in KINDS}
        self._heldout_functions = {kind: [f for f in heldout if f.kind == kind] for kind in KINDS}
        self.train = self._prompts(train)
        self.heldout = self._prompts(heldout)
        first = {prompt.columns["kind"]: prompt for prompt in reversed(self.heldout)}
        self.examples = [first[kind] for kind in KINDS]

    def _prompts(self, functions: list[Function]) -> list[Prompt]:
        """Up to SETS_PER_FUNCTION of each function: there are only few ways to show one of numbers or lists."""
        exercises = [Exercise(f, key(f.expression, number)) for f in functions for number in range(SETS_PER_FUNCTION)]
        return [
            Prompt(place, _asked(p), self._codec.encode_prompt(_asked(p)), {**p.columns, "kind": p.function.kind})
            for place, p in enumerate({exercise.text: exercise for exercise in exercises}.values())
        ]

    def demonstrations(self, count: int, *, seed: int, step: int) -> list[Encoded]:
        """Programs of mixed quality: right ones, some that repeat the examples, and some that do something else."""
        pairs = _exercises(self._train_functions, BASIC_SHARE, count, seed, "demonstrations", step)
        return [self.encoded(_asked(p), _answer(p, other, _quality(p))) for p, other in pairs]

    def preferences(self, count: int, *, seed: int, step: int) -> list[Encoded]:
        """Right programs, each beside one that repeats the examples or does something else."""
        return self._preferences(_exercises(self._train_functions, BASIC_SHARE, count, seed, "preferences", step))

    def heldout_preferences(self, count: int, *, seed: int) -> list[Encoded]:
        return self._preferences(_exercises(self._heldout_functions, 0, count, seed, "heldout preferences"))

    def _preferences(self, exercises: list[tuple[Exercise, Function]]) -> list[Encoded]:
        pairs = []
        for exercise, other in exercises:
            rejected = _answer(exercise, other, ("hard_coded", "wrong")[key(exercise.key, "rejected") % 2])
            pairs.append(self.encoded(_asked(exercise), exercise.function.source, rejected))
        return pairs

    def columns_of(self, text: str) -> Mapping[str, Any] | None:
        """Any examples that a person typed: they are the tests, for nothing else is known of the function."""
        tests = parse_examples(text)
        return {"tests": tests, "function": "f", "kind": "typed"} if tests else None

    def judge(self, scored: Scored) -> Mapping[str, list[bool]]:
        """Whether a program passes every hidden test, and whether it repeats the examples.

        One that the sandbox failed on, which has no share of passed tests, counts as one that does not pass.
        """
        pairs = entries_of(scored.groups)
        return {
            "accuracy": [share == 1 for share in _shares(scored)],
            "hard_coded": [hard_codes(completion.text, prompt.text) for prompt, completion in pairs],
        }


def _shares(scored: Scored) -> list[float]:
    """The share of the tests that each program passes: from the reward, or where the recipe has not that one, run here."""
    if REWARD not in scored.parts:
        (reward,) = load_rewards([RewardSpec(function=REWARD, name=REWARD)])
        scored = score(scored.groups, [reward])
        reward.close()
    return list(scored.parts[REWARD].flatten().tolist())


def _asked(exercise: Exercise) -> Messages:
    return [{"role": "user", "content": exercise.text}]


def _answer(exercise: Exercise, other: Function, quality: str) -> str:
    return {"right": exercise.function.source, "hard_coded": exercise.hard_coded, "wrong": other.source}[quality]


def _exercises(
    functions: Mapping[str, list[Function]], basic_share: float, count: int, *parts: int | str
) -> list[tuple[Exercise, Function]]:
    """New exercises, each kind as likely, each with another function of its kind. basic_share: drawn from the single steps."""
    basic = {kind: [function for function in made if function.basic] for kind, made in functions.items()}
    exercises = []
    for number in range(count):
        drawn_key = key(*parts, number)
        kind = list(KINDS)[key(drawn_key, "kind") % len(KINDS)]
        choices = functions[kind]
        function = _picked(basic[kind] if _chance(drawn_key, "basic") < basic_share else choices, drawn_key, "function")
        place = choices.index(function) + 1 + key(drawn_key, "other") % (len(choices) - 1)
        exercises.append((Exercise(function, drawn_key), choices[place % len(choices)]))
    return exercises


def _picked(choices: list[Function], *parts: int | str) -> Function:
    return choices[key(*parts) % len(choices)]


def _chance(*parts: int | str) -> float:
    """A number in [0, 1)."""
    return key(*parts) % (1 << 53) / (1 << 53)


def _quality(exercise: Exercise) -> str:
    """Single steps are always right: they show what each piece does, which a small model could otherwise only guess."""
    return "right" if exercise.function.basic else drawn(QUALITIES, _chance(exercise.key, "quality"))


def parse_examples(text: str) -> list[dict[str, Any]]:
    """`f(3) = 7; f(5) = 11` as tests. Inputs and results are written as in JSON; what is not an example is passed over."""
    found = []
    for part in re.split(r"[;\n]", text):
        example = re.search(r"\bf\((.*)\)\s*=(?!=)(.*)", part)
        try:
            found += [{"args": json.loads(f"[{example[1]}]"), "expected": json.loads(example[2])}] if example else []
        except (ValueError, RecursionError):  # a person may type anything
            continue
    return found


def hard_codes(text: str, prompt: str) -> bool:
    """Whether a program compares with an input that the prompt shows."""
    given = [json.dumps(test["args"][0]) for test in parse_examples(prompt) if test["args"]]
    return any(re.search(rf"== {re.escape(value)}(?!\d)", text) for value in given)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The task's own tokenizer: single characters, the pieces of which its prompts and programs are made, and an end token."""
    return make_word_tokenizer([chr(code) for code in range(32, 127)], _WORDS)
