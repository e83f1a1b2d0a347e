"""Recipes: a class for each method, with the sections that act in it, over what every run has.

Settings are two levels deep: the first stands here, the sections in `settings.py` and `objectives.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from coterie.recipe import settings as of
from coterie.recipe.kinds import Idle, OneOf, Place, Settings, idle_settings
from coterie.recipe.objectives import LOSSES, Clip, Loss
from coterie.recipe.settings import PositiveInt, Share, Whole

_NOT_FOR_TEMPLATES = (  # what rendering a chat is itself told
    "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "sanitize_control_tokens", "tokenizer_kwargs",
)  # fmt: skip
_NAMES_OF_METRICS = {"mean", "std", "highest", "lowest", "num_abstained", "num_failed", "kl", "overlong", "overlong_group_std"}  # fmt: skip


def _kind_of_task(given: Any) -> str:
    if isinstance(given, Mapping):
        return "ReasoningTask" if "reasoning_gym" in given else "DatasetTask"
    return type(given).__name__ if isinstance(given, Settings) else "str"


class Recipe(Settings):
    """What a run of any method is. `load_recipe` is the way to make one.

    learns_from: the columns of a data set that the method needs. samples: it samples completions and scores them. scores: it
    trains a model with a score in place of the vocabulary.
    """

    learns_from: ClassVar[tuple[str, ...]] = ()
    samples: ClassVar[bool] = False
    scores: ClassVar[bool] = False

    preset: of.Preset = Field("grpo", description="what the settings begin with")
    method: str
    seed: Annotated[Whole, Field(ge=0, lt=2**31)] = Field(0, description="what every random number depends on")
    model: str | of.ModelShape = Field(description="folder or hub id, or the shape of a fresh one")
    tokenizer: str | None = Field(None, description="path or hub id; default: the task's own, or the model's")
    system_prompt: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="the system message of every chat that has none"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="what the chat template is given beside the messages, as enable_thinking: false"
    )
    task: Annotated[
        Annotated[Literal["equations", "programs", "dialogue", "arithmetic"], Tag("str")]
        | Annotated[of.DatasetTask, Tag("DatasetTask")]
        | Annotated[of.ReasoningTask, Tag("ReasoningTask")],
        Discriminator(_kind_of_task),
    ] = Field(description="a bundled task, your own data, or generators of reasoning-gym")
    rewards: Annotated[tuple[of.RewardSpec, ...], Idle(("method", "reward_model"))] = Field(
        (), description="one or more; your own is file.py:function"
    )
    steps: PositiveInt = Field(100, description="updates of the policy")
    prompts_per_step: PositiveInt = Field(8, description="prompts in a batch")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one")
    precision: Literal["auto", "float32", "mixed"] = Field(
        "auto",
        description="mixed: products of bfloat16 numbers, while weights, their sums and updates stay float32; auto chooses it where it is faster",
    )
    cold_start: Annotated[of.ColdStart | None, Idle(("method", "sft"))] = None
    sampling: Annotated[of.Sampling, Idle(("method", "reward_model"))] = of.Sampling()
    lora: of.Lora | None = None
    optimiser: of.Optimiser = of.Optimiser()
    evaluation: of.Evaluation = of.Evaluation()
    checkpoint: of.Checkpoint = of.Checkpoint()
    limits: of.Limits = of.Limits()
    made_with: dict[str, Any] | None = Field(None, description="written into a run's copy: versions and commit")

    @field_validator("chat_template_kwargs")
    @classmethod
    def _for_the_template(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if name in _NOT_FOR_TEMPLATES or not name.isidentifier():
                raise ValueError(f"{name!r} is no variable of a chat template's own, such as enable_thinking")
        return given

    @model_validator(mode="after")
    def _settings_agree(self) -> Recipe:
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature: 0 is greedy, and equal completions teach nothing; use more than 0")
        if isinstance(self.task, of.DatasetTask):
            if self.cold_start is not None and not self.task.answer:
                raise ValueError("cold_start: needs demonstrations; name the column with the answers as task.answer")
            for column in self.learns_from:
                if not getattr(self.task, column):
                    raise ValueError(f"task.{column}: method {self.method} learns from it; name the data's column")
        if self.lora is not None and self.lora.base != "float32":
            if not isinstance(self.model, str):
                raise ValueError(
                    f"lora.base: {self.lora.base} keeps a pretrained model's weights; a fresh one has none yet"
                )
            if self.cold_start is not None:
                raise ValueError(
                    f"lora.base: {self.lora.base} has no room for what a cold_start adds to the weights; run the cold start as "
                    "a recipe of its own (preset: sft), and name its model here"
                )
        if isinstance(self.task, of.ReasoningTask) and (self.cold_start is not None or self.learns_from):
            what = f"method {self.method} learns" if self.learns_from else "cold_start: learns"
            raise ValueError(f"{what} from answers that are given, and reasoning_gym has problems and verifiers alone")
        self._check_method()
        names = [spec.name for spec in self.rewards]
        taken = _NAMES_OF_METRICS | {f"{name}_group_std" for name in names}
        for name in sorted(taken.intersection(names)):
            raise ValueError(f"rewards: the name {name!r} is taken by a metric; give that reward another `name`")
        if len(set(names)) < len(names):
            raise ValueError(f"rewards: two have the same name among {', '.join(names)}; give each a `name`")
        return self

    def _check_method(self) -> None:
        """What a method asks for on top: ValueError that names the setting."""

    @property
    def cold_start_adapts(self) -> bool:
        """Whether the cold start, too, trains LoRA's matrices: beside the random weights of a fresh model they would learn little."""
        return self.lora is not None and isinstance(self.model, str)

    @property
    def functions(self) -> dict[str, str]:
        """The user's own functions beside the rewards, by the setting that names them."""
        return {}

    def to_yaml(self) -> str:
        """The resolved recipe: every setting that acts, and nothing that does not."""
        values = self.model_dump(mode="json", exclude_none=True)
        for name in idle_settings(self):
            section, _, key = name.rpartition(".")
            (values.get(section, {}) if section else values).pop(key, None)
        made_with = values.pop("made_with", {})
        values = {key: value for key, value in {**values, "made_with": made_with}.items() if value != {}}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def in_short(self) -> str:
        """The resolved objective on one line; recipe.yaml in the run folder has everything."""
        idle = idle_settings(self)
        values = [
            f"{section}.{name}={value}"
            for section in ("advantage", "loss", "kl", "entropy", "reference", "value", "preference")
            if section in type(self).model_fields and section not in idle
            for name, value in getattr(self, section).model_dump(exclude_none=True).items()
            if f"{section}.{name}" not in idle and (section, name, value) != ("entropy", "weight", 0)
        ]
        return f"preset {self.preset}, seed {self.seed}: {' '.join(values)}"


class Sampled(Recipe):
    """What methods have that learn from completions with rewards."""

    samples = True

    max_failed_rewards: Share = Field(0.1, description="share of a step's rewards that may fail before the run stops")
    group_size: PositiveInt = Field(8, description="completions of each prompt")
    loss: Annotated[Loss, LOSSES] = Clip()
    kl: Annotated[of.KL, Idle(("loss.kl_weight", 0))] = of.KL()
    entropy: of.Entropy = of.Entropy()
    record: of.Record = of.Record()

    def _check_method(self) -> None:
        if not self.rewards:
            raise ValueError("rewards: at least one is needed, as module:function or file.py:function")

    @property
    def kl_in_reward(self) -> bool:
        return self.loss.kl_weight > 0 and self.kl.place == "reward"

    @property
    def needs_reference(self) -> bool:
        """Whether a reference takes part in what is learned."""
        return self.loss.kl_weight > 0 or self.loss.needs_reference

    @property
    def functions(self) -> dict[str, str]:
        return {"loss.objective": self.loss.objective} if ":" in self.loss.objective else {}


class GRPO(Sampled):
    """Group-relative policy optimisation: the whole family."""

    method: Literal["grpo"] = "grpo"
    advantage: of.Advantage = of.Advantage()
    reference: Annotated[of.Reference, Idle(("loss.kl_weight", 0), ("loss.needs_reference", False))] = of.Reference()
    correction: of.Correction = of.Correction()
    dynamic_sampling: of.DynamicSampling = of.DynamicSampling()
    overlong: of.Overlong = of.Overlong()

    def _check_method(self) -> None:
        """Whether a group is large enough for what is asked of it, too."""
        super()._check_method()
        advantage = self.advantage
        if advantage.function:
            return
        of_group = advantage.baseline in ("group", "leave_one_out")
        if not of_group and advantage.scale in ("sample", "population"):
            raise ValueError(
                f"advantage.scale: {advantage.scale} divides by the std of a group, and advantage.baseline is "
                f"{advantage.baseline}; use the scale batch or none, or the baseline group"
            )
        if not of_group and advantage.combine == "each":
            raise ValueError(
                f"advantage.combine: each needs the baseline group or leave_one_out, not {advantage.baseline}"
            )
        added = ["kl.place: reward"] if self.kl_in_reward else []
        added += ["overlong.treatment: punish"] if self.overlong.punishes else []
        if added and advantage.combine == "each":
            raise ValueError(
                f"{added[0]} adds a part to the reward, whose size advantage.combine=each would normalise "
                "away; use the combine sum, or another treatment"
            )
        if self.group_size == 1 and of_group:
            raise ValueError(
                f"group_size: 1 leaves nothing to compare with while advantage.baseline is {advantage.baseline}; "
                "use 2 or more, or the baseline batch or none"
            )

    @property
    def functions(self) -> dict[str, str]:
        return super().functions | ({"advantage.function": self.advantage.function} if self.advantage.function else {})


class PPO(Sampled):
    """Proximal policy optimisation: a value model says what an advantage is measured against."""

    scores = True
    method: Literal["ppo"] = "ppo"
    value: of.Value = of.Value()

    def _check_method(self) -> None:
        super()._check_method()
        if self.value.warmup_steps >= self.steps:
            raise ValueError(
                f"value.warmup_steps: {self.value.warmup_steps} leaves none of the {self.steps} steps to the policy"
            )


class DPO(Recipe):
    """Direct preference optimisation, on pairs."""

    learns_from = ("chosen", "rejected")
    method: Literal["dpo"] = "dpo"
    preference: of.Preference = of.Preference()


class SFT(Recipe):
    """Supervised fine-tuning on demonstrations."""

    learns_from = ("answer",)
    method: Literal["sft"] = "sft"


class RewardModel(Recipe):
    """A model with a score, from pairs."""

    learns_from = ("chosen", "rejected")
    scores = True
    method: Literal["reward_model"] = "reward_model"


METHODS = OneOf("method", GRPO, PPO, DPO, SFT, RewardModel)


def place_of(place: Sequence[str], values: Mapping[str, Any]) -> Place:
    """Where a setting stands, by the parts of its dotted name, in a recipe with these values."""
    found = Place(METHODS.chosen(values), METHODS)
    if len(place) > 1:
        found = Place.of_field(found.fields.get(place[0]), values.get(place[0]))
    return found


def taken_out(values: dict[str, Any]) -> dict[str, str]:
    """Take out of a recipe's values the sections and settings that the chosen kinds lack and others have: their names, and why."""
    found = {}
    for section, inside in [*values.items()]:
        if place_of((section,), values).is_shut_out(section):
            del values[section]
            found[section] = METHODS.said(values)
            continue
        here = place_of((section, ""), values)
        for name in [*inside] if isinstance(inside, dict) else ():
            if here.choice is not None and here.is_shut_out(name):
                found[f"{section}.{name}"] = here.choice.said(inside)
                values[section] = {key: value for key, value in values[section].items() if key != name}
    return found
