"""Recipes: what a run is, as a short YAML file, checked strictly before anything costs time.

A recipe names a preset and says only what differs from it. Its settings are two levels deep: the first stands here, the
sections in `settings.py`. Nothing here imports torch, so a wrong recipe is refused at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from coterie.errors import UserError, nearest
from coterie.reading import MAX_DEPTH, read_yaml, read_yaml_file, short
from coterie.recipe.explain import explained
from coterie.recipe.older import of_older, with_new_names
from coterie.recipe.paths import absolute_paths, plain_rewards
from coterie.recipe.presets import CHOSEN_BY_OBJECTIVE, OBJECTIVE_SETTINGS, PRESETS
from coterie.recipe.settings import (
    KL,
    Advantage,
    Checkpoint,
    ColdStart,
    Correction,
    DatasetTask,
    DynamicSampling,
    Entropy,
    Evaluation,
    Limits,
    Lora,
    Loss,
    ModelShape,
    Optimiser,
    Overlong,
    PositiveInt,
    Preference,
    Preset,
    Record,
    Reference,
    RewardSpec,
    Sampling,
    Settings,
    Share,
    Value,
    Whole,
)
from coterie.redact import keys_in

_NOT_FOR_TEMPLATES = (  # what rendering a chat is itself told
    "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "sanitize_control_tokens", "tokenizer_kwargs",
)  # fmt: skip


class Recipe(Settings):
    """Everything a run is. `load_recipe` is the way to make one."""

    preset: Preset = Field("grpo", description="what the settings begin with")
    method: Literal["grpo", "ppo", "dpo", "sft", "reward_model"] = Field(
        "grpo", description="the trainer, from the preset"
    )
    seed: Annotated[Whole, Field(ge=0, lt=2**31)] = Field(0, description="what every random number depends on")
    model: str | ModelShape = Field(description="folder or hub id, or the shape of a fresh one")
    tokenizer: str | None = Field(None, description="path or hub id; default: the task's own, or the model's")
    system_prompt: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="the system message of every chat that has none"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="what the chat template is given beside the messages, as enable_thinking: false"
    )
    task: Literal["equations", "programs", "dialogue"] | DatasetTask = Field(
        description="a bundled task, or your own data"
    )
    rewards: tuple[RewardSpec, ...] = Field((), description="one or more; your own is file.py:function")
    max_failed_rewards: Share = Field(0.1, description="share of a step's rewards that may fail before the run stops")
    steps: PositiveInt = Field(100, description="updates of the policy")
    prompts_per_step: PositiveInt = Field(8, description="prompts in a batch")
    group_size: PositiveInt = Field(8, description="completions of each prompt")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the weights")
    cold_start: ColdStart | None = None
    sampling: Sampling = Sampling()
    advantage: Advantage = Advantage()
    loss: Loss = Loss()
    kl: KL = KL()
    entropy: Entropy = Entropy()
    reference: Reference = Reference()
    correction: Correction = Correction()
    dynamic_sampling: DynamicSampling = DynamicSampling()
    overlong: Overlong = Overlong()
    value: Value = Value()
    preference: Preference = Preference()
    lora: Lora | None = None
    optimiser: Optimiser = Optimiser()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    record: Record = Record()
    limits: Limits = Limits()
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
        self._check_data()
        self._check_groups()
        if self.needs_rewards and not self.rewards:
            raise ValueError("rewards: at least one is needed, as module:function or file.py:function")
        if self.method == "ppo" and self.value.warmup_steps >= self.steps:
            raise ValueError(
                f"value.warmup_steps: {self.value.warmup_steps} leaves none of the {self.steps} steps to the policy"
            )
        names = [spec.name for spec in self.rewards]
        taken = {
            "mean",
            "std",
            "highest",
            "lowest",
            "num_abstained",
            "num_failed",
            "kl",
            "overlong",
            *(f"{name}_group_std" for name in (*names, "overlong")),
        }
        for name in sorted(taken.intersection(names)):
            raise ValueError(f"rewards: the name {name!r} is taken by a metric; give that reward another `name`")
        if len(set(names)) < len(names):
            raise ValueError(f"rewards: two have the same name among {', '.join(names)}; give each a `name`")
        return self

    def refuse_idle(self, given: Mapping[str, Any]) -> None:
        """Raises ValueError for a setting among `given` that does nothing. A preset's own give way without a word."""
        sections = self._idle_sections()
        idle = [(name, why) for name, why in sections.items() if name in given]
        idle += [
            (f"{section}.{name}", why)
            for section, name, why in self._without_effect()
            if section not in sections and isinstance(given.get(section), dict) and name in given[section]
        ]
        if idle:
            raise ValueError(
                "\n".join(f"{name}: has no effect while {why}; change that, or leave this out" for name, why in idle)
            )

    def _check_data(self) -> None:
        """Whether the task has what the method learns from."""
        if isinstance(self.task, str):
            return
        if self.cold_start is not None and not self.task.answer:
            raise ValueError("cold_start: needs demonstrations; name the column with the answers as task.answer")
        needed = {"sft": ("answer",), "dpo": ("chosen", "rejected"), "reward_model": ("chosen", "rejected")}
        for column in needed.get(self.method, ()):
            if not getattr(self.task, column):
                raise ValueError(f"task.{column}: method {self.method} learns from it; name the data's column")

    def _check_groups(self) -> None:
        """Whether a group is large enough for what is asked of it."""
        advantage = self.advantage
        if self.method != "grpo" or advantage.function:
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
        added = [("kl.place", "reward")] if self.loss.kl_weight and self.kl.place == "reward" else []
        added += [("overlong.treatment", "punish")] if self.overlong.treatment == "punish" else []
        if added and advantage.combine == "each":
            raise ValueError(
                f"{added[0][0]}: {added[0][1]} adds a part to the reward, whose size advantage.combine=each would normalise "
                "away; use the combine sum, or another treatment"
            )
        if self.group_size == 1 and of_group:
            raise ValueError(
                f"group_size: 1 leaves nothing to compare with while advantage.baseline is {advantage.baseline}; "
                "use 2 or more, or the baseline batch or none"
            )

    @property
    def samples(self) -> bool:
        """Whether the method samples completions and scores them."""
        return self.method in ("grpo", "ppo")

    @property
    def needs_rewards(self) -> bool:
        return self.samples

    @property
    def cold_start_adapts(self) -> bool:
        """Whether the cold start, too, trains LoRA's matrices: beside the random weights of a fresh model they would learn little."""
        return self.lora is not None and isinstance(self.model, str)

    @property
    def needs_reference(self) -> bool:
        """Whether a reference takes part in what is learned."""
        return self.method == "dpo" or self.loss.kl_weight > 0 or self.loss.objective == "anchored"

    def _idle_sections(self) -> dict[str, str]:
        """Whole sections, and plain settings, that do nothing with the chosen method, and why."""
        of_sampling = ("advantage", "loss", "kl", "entropy", "correction", "dynamic_sampling", "overlong", "group_size")
        idle = {
            "grpo": ("value", "preference"),
            "ppo": ("advantage", "correction", "dynamic_sampling", "overlong", "preference", "reference"),
            "dpo": (*of_sampling, "value", "reference", "max_failed_rewards", "record"),
            "sft": (*of_sampling, "value", "preference", "reference", "cold_start", "max_failed_rewards", "record"),
            "reward_model": (
                *of_sampling,
                "value",
                "preference",
                "reference",
                "sampling",
                "rewards",
                "max_failed_rewards",
                "record",
            ),
        }
        return dict.fromkeys(idle[self.method], f"method is {self.method}")

    def _without_effect(self) -> list[tuple[str, str, str]]:
        """Settings that do nothing in the chosen mode: section, name and why."""
        found: list[tuple[str, str, str]] = []

        def idle(section: str, names: Iterable[str], why: str) -> None:
            found.extend((section, name, why) for name in sorted(names))

        objective, advantage = self.loss.objective, self.advantage
        if objective in OBJECTIVE_SETTINGS:
            unused = CHOSEN_BY_OBJECTIVE - OBJECTIVE_SETTINGS[objective]
            idle("loss", unused, f"loss.objective is {objective}")
        if self.loss.kl_weight == 0:
            idle("kl", ("estimator", "place", "target", "adapt_rate"), "loss.kl_weight is 0")
        elif self.kl.target is None:
            idle("kl", ("adapt_rate",), "kl.target is not set")
        if self.entropy.target is None:
            idle("entropy", ("adapt_rate",), "entropy.target is not set")
        if advantage.function:
            idle("advantage", ("combine",), "advantage.function is set")
        elif advantage.scale == "none" and advantage.combine == "sum":
            idle("advantage", ("epsilon",), "advantage.scale is none")
        if not self.needs_reference and self.method == "grpo":
            idle("reference", ("kind", "decay", "every"), "loss.kl_weight is 0")
        else:
            kept = {"frozen": "", "moving": "decay", "replaced": "every"}[self.reference.kind]
            idle("reference", {"decay", "every"} - {kept}, f"reference.kind is {self.reference.kind}")
        if self.correction.kind == "none":
            idle("correction", ("level", "limit"), "correction.kind is none")
        if self.overlong.treatment != "punish":
            idle("overlong", ("margin", "penalty"), f"overlong.treatment is {self.overlong.treatment}")
        if self.optimiser.schedule == "constant":
            idle("optimiser", ("final_share",), "optimiser.schedule is constant")
        if not self.samples:
            idle("optimiser", ("updates_per_batch",), f"method is {self.method}")
        if self.method == "reward_model":
            idle("evaluation", ("samples",), "method is reward_model")
            idle("task", ("correct_above",), "method is reward_model")
        elif not self.rewards:
            idle("task", ("correct_above",), "there are no rewards")
        if not self.evaluation.every or self.method == "sft":
            idle("checkpoint", ("keep_best",), "there are no evaluations on the way (evaluation.every)")
        if self.group_size == 1:
            idle("dynamic_sampling", ("rounds",), "group_size is 1")
        if isinstance(self.task, DatasetTask):
            own = self.task.evaluation is not None
            idle(
                "task",
                ("heldout",) if own else ("evaluation_split",),
                f"task.evaluation is {'set' if own else 'not set'}",
            )
        if self.method == "sft":
            idle("optimiser", ("final_share",), "method is sft")
            idle("evaluation", ("every",), "method is sft")
        return found

    def to_yaml(self) -> str:
        """The resolved recipe: every setting that acts, and nothing that does not."""
        values = self.model_dump(mode="json", exclude_none=True)
        for section, name, _ in self._without_effect():
            if isinstance(values.get(section), dict):
                values[section].pop(name, None)
        for section in self._idle_sections():
            values.pop(section, None)
        values = {key: value for key, value in values.items() if value != {}}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def in_short(self) -> str:
        """The resolved objective on one line; recipe.yaml in the run folder has everything."""
        idle = {(section, name) for section, name, _ in self._without_effect()}
        values = [
            f"{section}.{name}={value}"
            for section in ("advantage", "loss", "kl", "entropy", "reference", "value", "preference")
            if section not in self._idle_sections()
            for name, value in getattr(self, section).model_dump(exclude_none=True).items()
            if (section, name) not in idle and (section, name, value) != ("entropy", "weight", 0)
        ]
        return f"preset {self.preset}, seed {self.seed}: {' '.join(values)}"


def find_recipe(name: str) -> Path:
    """The file behind a path or the name of a bundled recipe. Raises UserError where there is none."""
    path = Path(name)
    if path.is_file():
        return path
    package = Path(__file__).resolve().parents[1]
    bundled = {
        file.stem: file for home in (package / "recipes", package.parent / "recipes") for file in home.glob("*.yaml")
    }
    stem = path.name.removesuffix(".yaml")
    is_bundled_name = path.parent == Path(".") or path.parent == Path("recipes")
    if is_bundled_name and stem in bundled:
        return bundled[stem]
    if path.is_dir():
        raise UserError(f"recipe {name!r} is a folder; give a .yaml file or one of: {', '.join(sorted(bundled))}")
    raise UserError(f"recipe {name!r} was not found as a file or among the bundled ones; {nearest(stem, bundled)}")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override (`section.key=value`), fill in from the preset, and check. Raises UserError that names the key."""
    path = find_recipe(name)
    values = read_yaml_file(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of settings, not {type(values).__name__}")
    if "made_with" in values:  # a run's own
        values = of_older(values)
    for override in overrides:
        _override(values, override)
    return make_recipe(values, source=str(path), folder=path.resolve().parent)


def make_recipe(values: Mapping[str, Any], *, source: str = "recipe", folder: Path | None = None) -> Recipe:
    """A checked recipe from plain values; `folder` is what its relative paths start from."""
    folder = folder or Path.cwd()
    try:
        with_key = next(keys_in(values), None)
    except RecursionError:  # YAML can write what holds itself
        raise UserError(f"{source}: is nested too deeply for a recipe") from None
    if with_key is not None:
        raise UserError(
            f"{source}: {with_key}: holds a key or a password, and a recipe is copied into the run and its report; put it into an "
            "environment variable, and let your code read it there"
        )
    try:
        values, renamed = with_new_names(values)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    for old, new in renamed.items():
        warnings.warn(f"{source}: {old} is called {new} now; the old name is still read", stacklevel=2)
    given_values = {key: value for key, value in values.items() if value is not None}  # an empty section is no section
    merged = {key: dict(value) if isinstance(value, dict) else value for key, value in given_values.items()}
    preset = merged.get("preset", "grpo")
    if isinstance(preset, str) and preset not in PRESETS:
        raise UserError(f"{source}: preset: there is no {short(preset)}; {nearest(preset, PRESETS)}")
    for section, settings in PRESETS.get(preset, {}).items() if isinstance(preset, str) else ():
        given = merged.get(section)
        if not isinstance(settings, dict):
            merged.setdefault(section, settings)
        elif given is None or isinstance(given, dict):
            merged[section] = {**settings, **(given or {})}
    plain_rewards(merged, folder)
    absolute_paths(merged, folder)
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        raise UserError(explained(error, source, Recipe)) from None
    try:
        recipe.refuse_idle(given_values)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    return recipe


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise UserError(f"--set {short(override)}: write section.key=value, as in --set loss.clip_high=0.3")
    try:
        value = read_yaml(text)
    except UserError as error:
        raise UserError(f"--set {short(override)}: {error}; quote the value if it is text") from None
    here = values
    if parts[0] == "rewards" and len(parts) > 2:
        here, parts = _reward_named(values, parts[1], override), parts[2:]
    for part in parts[:-1]:
        inner = here.get(part)
        if inner is None:
            inner = {}
        elif not isinstance(inner, dict):
            raise UserError(
                f"--set {short(override)}: {part[:80]} is {short(inner)} in the recipe, which has no settings inside"
            )
        here[part] = dict(inner)
        here = here[part]
    here[parts[-1]] = value


def _reward_named(values: dict[str, Any], name: str, override: str) -> dict[str, Any]:
    """The settings of the reward of that name, to be changed in place."""
    given = values.get("rewards")
    rewards = given if isinstance(given, list) else [] if given is None else [given]
    specs = [dict(reward) if isinstance(reward, dict) else {"function": reward} for reward in rewards]
    names = [str(spec.get("name") or str(spec.get("function")).rpartition(":")[2]) for spec in specs]
    if name not in names:
        raise UserError(f"--set {short(override)}: there is no reward {short(name)}; {nearest(name, names)}")
    values["rewards"] = specs
    return specs[names.index(name)]
