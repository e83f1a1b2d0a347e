"""From a recipe to its task, and everything else short of the model."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerFast

from coterie.errors import UserError
from coterie.models.adapters import check_lora
from coterie.models.codec import Codec
from coterie.models.load import choose_device, codec_of, load_config, make_byte_tokenizer
from coterie.models.policy import context_length_of
from coterie.recipe import Recipe
from coterie.rewards.load import load_rewards
from coterie.rewards.score import Reward
from coterie.settings import DatasetTask, ModelShape, Sampling
from coterie.tasks import dialogue, equations, programs
from coterie.tasks.base import Task
from coterie.tasks.dataset import Dataset
from coterie.trust import check_code

BYTES = "bytes"  # the name of the built-in tokenizer


def prepare(recipe: Recipe) -> tuple[list[Reward], Codec, Task]:
    """Rewards, tokenizer and prompts. Raises UserError for what can't work, before any weights are read."""
    choose_device(recipe.device)
    for setting, function in (
        ("loss.objective", recipe.loss.objective),
        ("advantage.function", recipe.advantage.function),
    ):
        if function and ":" in function:
            check_code(function.rpartition(":")[0], setting)
    rewards = load_rewards(recipe.rewards)
    config = load_config(recipe)
    if recipe.lora is not None:
        check_lora(config, recipe.lora)
    codec = load_codec(recipe)
    task = make_task(recipe.task, codec)
    context_length = context_length_of(config)
    if recipe.method != "reward_model":
        check_lengths(task, recipe.sampling, context_length)
    if isinstance(task, Dataset) and context_length is not None:
        task.check_answers(context_length)
    return rewards, codec, task


def load_codec(recipe: Recipe) -> Codec:
    """The tokenizer that the recipe names, or the model's, or the task's own for a fresh model."""
    if recipe.tokenizer == BYTES:
        return Codec.of(make_byte_tokenizer())
    if recipe.tokenizer is None and isinstance(recipe.model, ModelShape):
        if isinstance(recipe.task, DatasetTask):
            raise UserError("tokenizer: is missing; a fresh model on a data set needs one: a path, a hub id, or bytes")
        return Codec.of(_BUNDLED[recipe.task][1]())
    source = recipe.tokenizer or recipe.model
    assert isinstance(source, str)
    return codec_of(source)


def make_task(task: str | DatasetTask, codec: Codec) -> Task:
    """The bundled task of that name, or the user's data set."""
    if isinstance(task, DatasetTask):
        return Dataset(task, codec)
    return _BUNDLED[task][0](codec)


def check_lengths(task: Task, sampling: Sampling, context_length: int | None) -> None:
    """Raises UserError where a prompt and the longest completion do not fit the model's context."""
    if context_length is None:
        return
    for prompt in sorted((*task.train, *task.heldout), key=lambda prompt: prompt.key):
        if len(prompt.tokens) + sampling.max_new_tokens > context_length:
            raise UserError(
                f"{prompt.origin or repr(prompt.text)}: the prompt has {len(prompt.tokens)} tokens, and with "
                f"sampling.max_new_tokens={sampling.max_new_tokens} that is more than the model's context of {context_length}"
            )


# Bundled tasks: the task, and the tokenizer of a fresh model for it
_BUNDLED: dict[str, tuple[Callable[[Codec], Task], Callable[[], PreTrainedTokenizerFast]]] = {
    "equations": (equations.Equations, equations.make_tokenizer),
    "programs": (programs.Programs, programs.make_tokenizer),
    "dialogue": (dialogue.Dialogue, dialogue.make_tokenizer),
}
