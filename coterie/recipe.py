"""Recipes: what a run is, as a short YAML file, checked strictly before anything costs time.

A recipe names a preset and says only what differs from it. Its settings are two levels deep: the first stands here, the
sections in `settings.py`. Nothing here imports torch, so a wrong recipe is refused at once.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from coterie.algorithms.presets import CHOSEN_BY_OBJECTIVE, OBJECTIVE_SETTINGS, PRESETS
from coterie.errors import UserError, nearest
from coterie.keys import keys_in
from coterie.older import of_older
from coterie.reading import MAX_DEPTH, read_yaml, read_yaml_file, short
from coterie.settings import (
    KL,
    Advantage,
    Checkpoint,
    ColdStart,
    Correction,
    DatasetTask,
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
    Redraw,
    Reference,
    RewardSpec,
    Sampling,
    Settings,
    Share,
    Value,
    Whole,
)

_NOT_FOR_TEMPLATES = (  # what rendering a chat is itself told
    "conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation",
    "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "sanitize_control_tokens", "tokenizer_kwargs",
)  # fmt: skip


class Recipe(Settings):
    """Everything a run is. `load_recipe` is the way to make one."""

    preset: Preset = "grpo"
    method: Literal["grpo", "ppo", "dpo", "sft", "reward_model"] = Field(
        "grpo", description="the trainer, from the preset"
    )
    seed: Annotated[Whole, Field(ge=0, lt=2**31)] = 0
    model: str | ModelShape
    tokenizer: str | None = Field(None, description="path or hub id; default: the task's own, or the model's")
    system_prompt: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="the system message of every chat that has none"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="what the chat template is given beside the messages, as enable_thinking: false"
    )
    task: Literal["equations", "programs", "dialogue"] | DatasetTask
    rewards: tuple[RewardSpec, ...] = ()
    max_failed_rewards: Share = Field(0.1, description="share of a step's rewards that may fail before the run stops")
    steps: PositiveInt = 100
    prompts_per_step: PositiveInt = 8
    group_size: PositiveInt = 8
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    cold_start: ColdStart | None = None
    sampling: Sampling = Sampling()
    advantage: Advantage = Advantage()
    loss: Loss = Loss()
    kl: KL = KL()
    entropy: Entropy = Entropy()
    reference: Reference = Reference()
    correction: Correction = Correction()
    redraw: Redraw = Redraw()
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
        of_sampling = ("advantage", "loss", "kl", "entropy", "correction", "redraw", "overlong", "group_size")
        idle = {
            "grpo": ("value", "preference"),
            "ppo": ("advantage", "correction", "redraw", "overlong", "preference", "reference"),
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
            idle("redraw", ("rounds",), "group_size is 1")
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
    package = Path(__file__).resolve().parent
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
    _plain_rewards(merged, folder)
    _absolute_paths(merged, folder)
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        raise UserError(_explain(error, source)) from None
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


def _plain_rewards(values: dict[str, Any], folder: Path) -> None:
    """Let a reward be written as a bare string, resolve its files, and name it after its function.

    A reward model stands on the recipe's device, unless its own options name another.
    """
    rewards = values.get("rewards")
    if isinstance(rewards, str | dict):
        rewards = [rewards]
    if not isinstance(rewards, list | tuple):
        return
    specs = []
    for reward in rewards:
        spec = {"function": reward} if isinstance(reward, str) else reward
        if isinstance(spec, dict) and isinstance(spec.get("function"), str):
            home, colon, function = spec["function"].rpartition(":")
            if home.endswith(".py"):
                home = _resolved_code(home, folder)
            spec = {**spec, "function": f"{home}{colon}{function}", "name": spec.get("name") or function}
            options = spec.get("options") or {}
            if isinstance(options, dict):
                of_recipe = {"device": values.get("device", "auto")} if function == "reward_model" else {}
                resolved = _resolved_options(options, _PATH_OPTIONS.get(function), folder)
                spec = {**spec, "options": {**of_recipe, **resolved}}
        specs.append(spec)
    values["rewards"] = specs


_PATH_OPTIONS = {"reward_model": ("model",), "judge": ("cache",)}  # of the built-in rewards that have some


def _resolved_options(options: dict[str, Any], names: Iterable[str] | None, folder: Path) -> dict[str, Any]:
    """A reward's options with their files and folders resolved: those of these names, or all that are written as paths.

    A bare word is no path there: a folder that happens to be called like it changes nothing.
    """
    resolved = dict(options)
    for name, value in options.items():
        if isinstance(value, str) and value and (name in names if names is not None else "/" in value):
            with contextlib.suppress(OSError, RuntimeError):  # a text that no file could be called
                resolved[name] = _resolved(value, folder)
    return resolved


def _absolute_paths(values: dict[str, Any], folder: Path) -> None:
    """Make local files absolute, so that a run can be resumed from anywhere. Hub ids stay as they are."""
    for section, name in (("loss", "objective"), ("advantage", "function")):
        given = values.get(section)
        if isinstance(given, dict) and isinstance(given.get(name), str) and ":" in given[name]:
            home, _, function = given[name].rpartition(":")
            values[section] = {**given, name: f"{_resolved_code(home, folder)}:{function}"}
    task = values.get("task")
    if isinstance(task, dict):
        named = {name: task[name] for name in ("data", "evaluation") if isinstance(task.get(name), str)}
        values["task"] = {**task, **{name: _resolved(value, folder) for name, value in named.items()}}
    for key in ("model", "tokenizer"):
        if isinstance(values.get(key), str):
            values[key] = _resolved(values[key], folder)


def _resolved(name: str, folder: Path) -> str:
    """The absolute path if there is such a file beside the recipe or here, else the name unchanged."""
    for candidate in (folder / Path(name).expanduser(), Path(name).expanduser()):
        if candidate.exists():
            return str(candidate.resolve())
    return name


def _resolved_code(home: str, folder: Path) -> str:
    """The file or module before a function's name. A file that is nowhere is looked for beside the recipe, and named as there."""
    found = _resolved(home, folder)
    return str(folder / Path(found).expanduser()) if found.endswith(".py") and not Path(found).is_file() else found


def is_local_path(name: str) -> bool:
    """Whether a name is meant as a file or folder here, and not as a hub id such as `Qwen/Qwen3-0.6B`."""
    looks_local = name.startswith((".", "/", "~", "runs/")) or name.endswith(
        (".jsonl", ".json", ".parquet", ".py", ".yaml")
    )
    return looks_local or name.count("/") > 1 or Path(name).exists()


_KINDS = {"int_type": "a whole number", "int_parsing": "a whole number", "int_from_float": "a whole number",
          "float_type": "a number", "float_parsing": "a number", "string_type": "text", "finite_number": "a finite number",
          "bool_parsing": "true or false", "bool_type": "true or false", "tuple_type": "a list", "model_type": "a group of settings",
          "model_attributes_type": "a group of settings", "dict_type": "a group of settings"}  # fmt: skip


def _explain(error: ValidationError, source: str) -> str:
    """One sentence for each wrong setting: its key, what was given, and what is allowed."""
    lines: list[str] = []
    problems = error.errors()
    for problem in problems[:_MAX_EXPLAINED]:
        place = [
            part[:80]
            for part in map(str, problem["loc"])
            if part not in _UNION_TAGS and not part.startswith("literal[")
        ]
        key, kind, given = ".".join(place), problem["type"], problem.get("input")
        if kind == "extra_forbidden":
            owner = _settings_at(place[:-1])
            allowed = {name for name in owner.model_fields if name != "made_with"}
            line = f"{key}: there is no such setting; {_nearest_setting(key, place[-1], owner, allowed)}"
        elif kind == "value_error":
            line = f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
        elif kind == "missing":
            line = f"{key}: is missing, and has no default"
        elif kind == "literal_error":
            choices = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
            line = f"{key}: {short(given)} is not allowed; {nearest(given if isinstance(given, str) else short(given), choices)}"
        elif kind in _KINDS:
            line = f"{key}: {short(given)} is not {_KINDS[kind]}"
        else:
            line = f"{key}: {short(given)} is not allowed; {problem['msg'][0].lower() + problem['msg'][1:]}"
        if line not in lines:
            lines.append(line)
    if len(problems) > _MAX_EXPLAINED:
        lines.append(f"and {len(problems) - _MAX_EXPLAINED:,} more")
    return f"{source}: " + "\n".join(_without_union_noise(lines))


_MAX_EXPLAINED = 10  # problems, in one error
_UNION_TAGS = {"ModelShape", "DatasetTask", "str"}


def _without_union_noise(lines: list[str]) -> list[str]:
    """A setting of several kinds reports one error a kind; the most specific key tells the reader enough."""
    keys = [line.partition(":")[0] for line in lines]
    return [
        line for line, key in zip(lines, keys, strict=True) if not any(other.startswith(key + ".") for other in keys)
    ]


def _settings_at(place: list[str]) -> type[Settings]:
    """The class of settings that stands at a key."""
    homes: dict[str, type[Settings]] = {
        "task": DatasetTask, "rewards": RewardSpec, "cold_start": ColdStart, "sampling": Sampling, "advantage": Advantage,
        "loss": Loss, "kl": KL, "entropy": Entropy, "reference": Reference, "correction": Correction, "redraw": Redraw,
        "overlong": Overlong, "value": Value, "preference": Preference, "lora": Lora, "optimiser": Optimiser, "evaluation": Evaluation,
        "checkpoint": Checkpoint, "record": Record, "limits": Limits,
    }  # fmt: skip
    return homes.get(place[0], Recipe) if place else Recipe


def _nearest_setting(key: str, name: str, owner: type[Settings], allowed: set[str]) -> str:
    """The nearest name at the same place, or the same name where it stands in another section."""
    elsewhere = [
        f"{section}.{name}"
        for section, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings)
        and field.annotation is not owner and name in field.annotation.model_fields
    ]  # fmt: skip
    if name in Recipe.model_fields and owner is not Recipe:
        elsewhere.append(name)
    return f"did you mean {elsewhere[0]!r}?" if elsewhere else nearest(name, allowed)
