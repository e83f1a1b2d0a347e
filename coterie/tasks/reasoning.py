"""Problems of reasoning-gym: one or several of its generators, each with its own share.

Source: https://github.com/open-thought/reasoning-gym (Apache-2.0), of the extra `reasoning`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from coterie.errors import UserError, nearest
from coterie.models.codec import Codec
from coterie.noise import permutation
from coterie.recipe.settings import ReasoningTask
from coterie.tasks.base import Task
from coterie.types import Messages, Prompt, Scored, entries_of

_SEEDS = 2**31
_APART = 2**30  # a generator's problem i depends on seed + i alone, so neighbouring seeds give the same problems


class ReasoningGym(Task):
    """The task. Held-out problems are drawn apart, and no question of theirs is trained on.

    Prompts are chats where the tokenizer has a chat template. Columns: `generator`, `answer`, and `entry`, which the reward
    `reasoning_gym` reads.
    """

    def __init__(self, settings: ReasoningTask, codec: Codec) -> None:
        super().__init__(codec)
        generators, seed = settings.reasoning_gym, settings.seed
        entries = list(_entries(generators, settings.num_problems, seed))
        asked = {entry["question"] for entry in entries}
        drawn = _entries(generators, 2 * settings.num_heldout, seed + _APART)
        others = [entry for entry in drawn if entry["question"] not in asked]
        if not others:
            names = ", ".join(generators)
            raise UserError(f"task.num_problems: {names} can't ask anything else than these; ask for fewer problems")
        others = [others[place] for place in permutation(len(others), seed, "heldout")[: settings.num_heldout]]
        self.train = [self._prompt(number, entry) for number, entry in enumerate(entries)]
        self.heldout = [self._prompt(number, entry) for number, entry in enumerate(others)]
        self.examples = self.heldout[:2]

    def _prompt(self, number: int, entry: Mapping[str, Any]) -> Prompt:
        content, tokens = self._codec.encode_user(entry["question"].strip())
        generator = entry["metadata"]["source_dataset"]
        columns = {"generator": generator, "answer": entry["answer"], "entry": entry}
        return Prompt(number, content, tokens, columns, origin=f"{generator} {number + 1}")

    def asked(self, text: str) -> str | Messages:
        return self._codec.encode_user(text)[0]

    def columns_of(self, text: str) -> Mapping[str, Any] | None:
        found = (prompt for prompt in (*self.train, *self.heldout) if text in (prompt.text, prompt.asked))
        return next((prompt.columns for prompt in found), None)

    def judge(self, scored: Scored) -> Mapping[str, Sequence[bool | None]]:
        """Whether the verifier is fully content: of all problems, and where there are several generators of each one's."""
        if "reasoning_gym" not in scored.parts:
            return {}
        right = (scored.parts["reasoning_gym"] >= 1 - 1e-6).flatten().tolist()
        made_by = [prompt.columns["generator"] for prompt, _ in entries_of(scored.groups)]
        names = dict.fromkeys(prompt.columns["generator"] for prompt in self.heldout)
        of_each = {
            f"accuracy_{name}": [one if of == name else None for one, of in zip(right, made_by, strict=True)]
            for name in (names if len(names) > 1 else ())
        }
        return {"accuracy": right, **of_each}


def _entries(generators: Mapping[str, Mapping[str, Any]], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Problems of all generators, each according to its weight and at least one, no question twice."""
    total = sum(settings.get("weight", 1) for settings in generators.values())
    for name, settings in generators.items():
        size = max(1, round(count * settings.get("weight", 1) / total))
        seen: set[str] = set()
        for entry in _made(name, settings, size, seed):
            if entry["question"] not in seen:
                seen.add(entry["question"])
                yield entry


def _made(name: str, settings: Mapping[str, Any], size: int, seed: int) -> list[dict[str, Any]]:
    """Problems of one generator. Raises UserError where it, or one of its settings, does not exist, or can't be used."""
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise UserError("task.reasoning_gym: needs the extra: pip install 'coterie[reasoning]'") from None
    if name not in DATASETS:
        raise UserError(f"task.reasoning_gym: there is no generator {name!r}; {nearest(name, DATASETS)}")
    own = {key: value for key, value in settings.items() if key != "weight"}
    known = DATASETS[name][1].__dataclass_fields__
    for key in own:
        if key not in known or key in ("seed", "size"):
            raise UserError(f"task.reasoning_gym: {name} has no setting {key!r}; {nearest(key, known)}")
    try:
        return list(create_dataset(name, **own, size=size, seed=seed % _SEEDS))  # some settings fail at a problem only
    except Exception as error:  # each generator checks its settings in its own way
        raise UserError(
            f"task.reasoning_gym: {name} refuses these settings: {error or type(error).__name__}"
        ) from error
