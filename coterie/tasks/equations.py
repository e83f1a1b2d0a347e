"""Linear equations in English and Chinese, to be solved with every step written.

`ax + b = c` with a in 2..9, b in -9..9 without 0, x in 1..9, and c of 1 or more. Whether an equation is held out depends on its numbers
alone, so both languages of one are on the same side; the two that the documentation shows are always held out.

The cold start also shows equations of one step, `x + b = c`, with x in 1..81. They are no part of the task itself: they show
the sums that its equations need without the factor, from which a small model would otherwise guess the product.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from coterie.models.codec import Codec
from coterie.noise import key
from coterie.rewards.maths.linear import all_steps, check, parse_equation
from coterie.tasks.base import Encoded, Task
from coterie.tasks.chance import chance, chances, drawn
from coterie.tasks.words import make_word_tokenizer
from coterie.types import Messages, Prompt, Scored, entries_of

HELDOUT_SHARE = 0.1
EXAMPLES = ("2x + 3 = 7", "3x - 5 = 10")
QUALITIES = {"guess": 0.46, "terse": 0.07, "complete": 0.47}
ONE_STEP_SHARE = 0.3  # of the demonstrations: equations of one step, always solved in full

LANGUAGES = ("en", "zh")
_WORDS = ("Solve ", "Add ", "Subtract ", "Divide ", "by ", "解方程 ", "加 ", "减 ", "除以 ")


@dataclass(frozen=True)
class Exercise:
    """One equation and its solution."""

    factor: int
    offset: int
    solution: int

    @property
    def result(self) -> int:
        return self.factor * self.solution + self.offset

    @property
    def equation(self) -> str:
        return f"{self._term} {_signed(self.offset)} = {self.result}"

    @property
    def _term(self) -> str:
        return "x" if self.factor == 1 else f"{self.factor}x"

    def prompt(self, language: str) -> str:
        return f"{'Solve' if language == 'en' else '解方程'} {self.equation}"

    def solution_text(self, language: str, quality: str, guess: int) -> str:
        """A demonstration: a bare answer (`guess`), the main step and the answer, or every step."""
        if quality == "guess":
            return f"x = {guess}"
        product = self.factor * self.solution
        if quality == "terse":
            return f"{self.factor}x = {product}\nx = {self.solution}"
        colon = ": " if language == "en" else "："
        undo, divide = ("Subtract" if self.offset > 0 else "Add"), "Divide by"
        if language == "zh":
            undo, divide = ("减" if self.offset > 0 else "加"), "除以"
        steps = (
            f"{undo} {abs(self.offset)}{colon}{self._term} = {self.result} {_signed(-self.offset)}\n"
            f"{self._term} = {product}"
        )
        if self.factor == 1:
            return steps
        return f"{steps}\n{divide} {self.factor}{colon}x = {product} / {self.factor}\nx = {self.solution}"


def _signed(number: int) -> str:
    return f"{'-' if number < 0 else '+'} {abs(number)}"


def _exercises(factors: range, solutions: range) -> list[Exercise]:
    """All with a result of 1 or more."""
    offsets = [offset for offset in range(-9, 10) if offset != 0]
    made = [Exercise(f, b, x) for f in factors for b in offsets for x in solutions]
    return [exercise for exercise in made if exercise.result >= 1]


EXERCISES = _exercises(range(2, 10), range(1, 10))
_BY_EQUATION = {exercise.equation: exercise for exercise in EXERCISES}
ONE_STEP_EXERCISES = _exercises(range(1, 2), range(1, 82))


def exercise_of(equation: str) -> Exercise:
    """The exercise that an equation of the task states."""
    return _BY_EQUATION[equation]


def is_heldout(exercise: Exercise) -> bool:
    """Decided by the numbers of the equation, the same in every run and language."""
    numbers = key(exercise.factor, exercise.offset, exercise.solution)
    return exercise.equation in EXAMPLES or chance("equations", numbers) < HELDOUT_SHARE


class Equations(Task):
    """The task. `train`, `heldout` and `examples` are prompts in both languages."""

    def __init__(self, codec: Codec) -> None:
        super().__init__(codec)
        heldout = [exercise for exercise in EXERCISES if is_heldout(exercise)]
        self._train_exercises = [exercise for exercise in EXERCISES if not is_heldout(exercise)]
        self.train = self._prompts(self._train_exercises)
        self.heldout = self._prompts(heldout)
        self.examples = [prompt for prompt in self.heldout if prompt.columns["equation"] == EXAMPLES[1]]

    def _prompts(self, exercises: list[Exercise]) -> list[Prompt]:
        prompts: list[Prompt] = []
        for exercise in exercises:
            for language in LANGUAGES:
                content = _asked(exercise, language)
                columns = {"equation": exercise.equation, "language": language}
                prompts.append(Prompt(len(prompts), content, self._codec.encode_prompt(content), columns))
        return prompts

    def demonstrations(self, count: int, *, seed: int, step: int) -> list[Encoded]:
        """Worked solutions of mixed quality: many bare guesses, as right as chance; some terse; some complete."""
        return [self._demonstration(*row) for row in chances(count, 4, seed, "demonstrations", step)]

    def _demonstration(self, of_kind: float, of_prompt: float, of_quality: float, of_guess: float) -> Encoded:
        one_step = of_kind < ONE_STEP_SHARE
        exercises = ONE_STEP_EXERCISES if one_step else self._train_exercises
        which, language = divmod(int(of_prompt * len(exercises) * len(LANGUAGES)), len(LANGUAGES))
        exercise, quality = exercises[which], "complete" if one_step else drawn(QUALITIES, of_quality)
        answer = exercise.solution_text(LANGUAGES[language], quality, guess=1 + int(of_guess * 9))
        return self.encoded(_asked(exercise, LANGUAGES[language]), answer)

    def preferences(self, count: int, *, seed: int, step: int) -> list[Encoded]:
        """Complete solutions, each beside a worse answer: a guess, a terse solution, or a wrong sum."""
        return [self._preference(self.train, *row) for row in chances(count, 3, seed, "preferences", step)]

    def heldout_preferences(self, count: int, *, seed: int) -> list[Encoded]:
        return [self._preference(self.heldout, *row) for row in chances(count, 3, seed, "heldout preferences")]

    def _preference(self, prompts: Sequence[Prompt], of_prompt: float, of_kind: float, of_number: float) -> Encoded:
        prompt = prompts[int(of_prompt * len(prompts))]
        language, exercise = prompt.columns["language"], exercise_of(prompt.columns["equation"])
        chosen = exercise.solution_text(language, "complete", 0)
        if of_kind < 1 / 3:
            rejected = exercise.solution_text(language, "guess", 1 + int(of_number * 9))
        elif of_kind < 2 / 3:
            rejected = exercise.solution_text(language, "terse", 0)
        else:  # right up to the sum, which is off by up to 4 and not 0
            wrong = exercise.factor * exercise.solution + (-4, -3, -2, -1, 1, 2, 3, 4)[int(of_number * 8)]
            first, _, *rest = chosen.split("\n")
            rejected = "\n".join([first, f"{exercise.factor}x = {wrong}", *rest])
        return self.encoded(prompt.content, chosen, rejected)

    def columns_of(self, text: str) -> Mapping[str, Any] | None:
        """Any linear equation after a word or two."""
        for run in re.findall(r"(?<![A-Za-z])[-+*/=.\dx\s]+", text):
            equation = parse_equation(run)
            if equation is not None and equation.solution is not None:
                return {"equation": run.strip().rstrip("."), "language": "en" if text.isascii() else "zh"}
        return None

    def judge(self, scored: Scored) -> Mapping[str, list[bool]]:
        """Whether the answer is right, and whether every step is written."""
        reports = [check(p.columns["equation"], c.text) for p, c in entries_of(scored.groups)]
        return {"accuracy": [r.right for r in reports], "all_steps": [all_steps(r) for r in reports]}


def _asked(exercise: Exercise, language: str) -> Messages:
    return [{"role": "user", "content": exercise.prompt(language)}]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The task's own tokenizer: its words, single characters, and an end token."""
    characters = sorted(set("".join(_WORDS)) | {chr(c) for c in range(32, 127)} | set("：。，答案所以"))
    return make_word_tokenizer(characters, (*_WORDS, "= ", ": ", "+ ", "- ", "/ ", "x "))
