"""From a recipe to its task, and what stands between its text and tokens."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerFast

from coterie.errors import UserError
from coterie.models.codec import Codec
from coterie.models.load import codec_of, make_byte_tokenizer
from coterie.models.template import Chat
from coterie.recipe import Recipe
from coterie.recipe.settings import DatasetTask, ReasoningTask, Sampling
from coterie.tasks import arithmetic, dialogue, equations, programs
from coterie.tasks.base import Task
from coterie.tasks.dataset import Dataset
from coterie.tasks.reasoning import ReasoningGym

BYTES = "bytes"  # the name of the built-in tokenizer


def load_codec(recipe: Recipe) -> Codec:
    """The tokenizer that the recipe names, or the model's, or the task's own for a fresh model."""
    source: str | PreTrainedTokenizerFast
    if recipe.tokenizer == BYTES:
        source = make_byte_tokenizer()
    elif recipe.tokenizer is not None:
        source = recipe.tokenizer
    elif isinstance(recipe.model, str):
        source = recipe.model
    elif not isinstance(recipe.task, str):
        what = "a data set" if isinstance(recipe.task, DatasetTask) else "reasoning_gym"
        raise UserError(f"tokenizer: is missing; a fresh model on {what} needs one: a path, a hub id, or bytes")
    else:
        source = _BUNDLED[recipe.task][1]()
    return codec_of(source, recipe.model, Chat.of(recipe))


def make_task(task: str | DatasetTask | ReasoningTask, codec: Codec) -> Task:
    """The bundled task of that name, the user's data set, or problems of reasoning-gym."""
    if isinstance(task, DatasetTask):
        return Dataset(task, codec)
    if isinstance(task, ReasoningTask):
        return ReasoningGym(task, codec)
    return _BUNDLED[task][0](codec)


def check_chat(recipe: Recipe, task: Task) -> None:
    """Raises UserError for settings of chats where no prompt is one."""
    given = (
        ["system_prompt"]
        if recipe.system_prompt
        else [f"chat_template_kwargs.{n}" for n in recipe.chat_template_kwargs]
    )
    if given and all(isinstance(prompt.content, str) for prompt in (*task.train, *task.heldout)):
        raise UserError(f"{given[0]}: has no effect: the prompts of the task are text, and no chats")


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
    "arithmetic": (arithmetic.Arithmetic, arithmetic.make_tokenizer),
}
