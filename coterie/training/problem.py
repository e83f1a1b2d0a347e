"""What a run learns from, made once at set-up, before any weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coterie.models.adapters import check_lora
from coterie.models.codec import Codec
from coterie.models.lengths import context_length_of
from coterie.models.load import choose_device, load_config
from coterie.recipe import Recipe, RewardModel
from coterie.rewards.base import Reward
from coterie.rewards.check import check_fits
from coterie.rewards.load import load_rewards
from coterie.tasks.base import Task
from coterie.tasks.load import check_chat, check_lengths, load_codec, make_task
from coterie.user_code import check_home


@dataclass(frozen=True)
class Problem:
    """The task, what judges its completions, and what stands between text and tokens."""

    task: Task
    rewards: Sequence[Reward]
    codec: Codec

    @classmethod
    def of(cls, recipe: Recipe) -> Problem:
        """What a recipe asks for. Raises UserError for what can't work, in the recipe, its data, its code or its model's files."""
        choose_device(recipe.device)
        for setting, function in recipe.functions.items():
            check_home(function.rpartition(":")[0], setting)
        rewards = load_rewards(recipe.rewards)
        config = load_config(recipe)
        if recipe.lora is not None:
            check_lora(config, recipe.lora)
        codec = load_codec(recipe)
        task = make_task(recipe.task, codec)
        check_chat(recipe, task)
        check_fits(rewards, [*task.train, *task.heldout])
        context_length = context_length_of(config)
        if not isinstance(recipe, RewardModel):
            check_lengths(task, recipe.sampling, context_length)
        task.check_answers(context_length)
        return cls(task, rewards, codec)
