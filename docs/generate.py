"""Write the pages that are made from the code: `python docs/generate.py`. Tests keep each page what this would write.

Settings, presets and objectives, metrics, run.db, and the Python interface. What the code can't say of itself, as what a metric
means, stands in the tables below; the tests compare their names with the code's.
"""

from __future__ import annotations

import ast
import inspect
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic_core import PydanticUndefined

import coterie
from coterie.algorithms import objectives
from coterie.recipe import Recipe, Sampled, methods, presets, settings
from coterie.recipe.kinds import SET, Idle, OneOf, Settings
from coterie.recipe.objectives import LOSSES, Loss
from coterie.runs import store

DOCS = Path(__file__).parent
MADE = "This page is made from the code by `python docs/generate.py`, and a test keeps it up to date.\n"

# --- Settings ---------------------------------------------------------------------------------------------------------

SETTINGS_HEAD = f"""# Settings

Every setting of a recipe, with what is allowed, its default, and its unit where it has one. A preset sets some of them
([which](presets.md)); `coterie check` shows what a recipe comes to. {MADE}"""
BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}", "min_length": "at least {} long"}


def settings_page() -> str:
    """The first level of every method, then its own; then the sections, `loss` with the objectives in which each setting acts."""
    parts = [SETTINGS_HEAD, f"## Recipe\n{_words(Recipe)}\n", _settings_table(Recipe.model_fields)]
    for owner in (Sampled, *methods.METHODS.kinds.values()):
        own = {name: field for name, field in owner.model_fields.items() if name not in _inherited(owner)}
        if own:
            method = owner.model_fields["method"].default
            title = f"With `method: {method}`" if isinstance(method, str) else "With `method: grpo` and `ppo`"
            parts += [f"\n### {title}\n{_words(owner)}\n", _settings_table(own)]
    for owner in vars(settings).values():
        if isinstance(owner, type) and issubclass(owner, Settings) and owner is not Settings:
            parts += [f"\n## {owner.__name__}\n{_words(owner)}\n", _settings_table(owner.model_fields)]
            if owner.__name__ == "Advantage":
                parts += [f"\n## Loss\n{_words(Loss)}\n", _settings_table(LOSSES.fields(), LOSSES)]
    return "\n".join(parts) + "\n"


def _words(owner: type[Settings]) -> str:
    """The first paragraph of what a class says of itself."""
    return " ".join((owner.__doc__ or "").split("\n\n")[0].split())


def _inherited(owner: type[Settings]) -> set[str]:
    return {"method"}.union(*(base.model_fields for base in owner.__bases__ if issubclass(base, Settings)))


def _settings_table(fields: dict[str, Any], choice: OneOf | None = None) -> str:
    rows = []
    for name, field in fields.items():
        if name == "made_with":
            continue
        allowed = "; ".join([_kind(field.annotation), *dict.fromkeys(_bounds(field.annotation, field.metadata))])
        about = field.description or _about(field.annotation)
        if (choice is not None and f"loss.{name}" == choice.key) or name == "method":
            one_of = choice or methods.METHODS
            allowed = ", ".join(f"`{kind}`" for kind in one_of.kinds) + (
                ", or your own as file.py:function" if one_of.own else ""
            )
            rows.append((f"`{name}`", allowed, f"`{next(iter(one_of.kinds))}`", about or ABOUT[one_of.key]))
            continue
        rows.append(
            (f"`{name}`", allowed, _default(field), "; ".join(filter(None, [about, *_acting(name, field, choice)])))
        )
    return table(("setting", "allowed", "default", "what it is"), rows)


ABOUT = {"method": "the trainer, from the preset", "loss.objective": "what gives a loss to each token"}


def _acting(name: str, field: Any, choice: OneOf | None) -> list[str]:
    """When a setting acts, where that depends on others."""
    said = [f"no effect while {_conditions(mark)}" for mark in field.metadata if isinstance(mark, Idle)]
    if choice is not None and any(name not in kind.model_fields for kind in choice.kinds.values()):
        said.append("in " + ", ".join(f"`{key}`" for key, kind in choice.kinds.items() if name in kind.model_fields))
    return said


def _conditions(mark: Idle) -> str:
    words, shown = {None: "not set", SET: "set", (): "empty"}, []
    for name, wanted in mark.conditions:
        shown.append(f"`{name}` is {' or '.join(str(words.get(value, value)) for value in wanted)}")
    return " and ".join(shown).replace("`loss.needs_reference` is False", "the objective needs no reference")


def _kind(annotation: Any) -> str:
    """A type in words."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kind(get_args(annotation)[0])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in get_args(annotation) if part is not type(None))
    if origin is tuple:
        return f"a list of {_kind(get_args(annotation)[0])}"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return f"[settings](#{annotation.__name__.lower()})"
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}.get(
        annotation, "settings by name"
    )


def _bounds(annotation: Any, metadata: list[Any]) -> list[str]:
    """What a number may be, wherever that is said."""
    found = [*metadata]
    for part in (annotation, *get_args(annotation)):
        found += getattr(part, "__metadata__", ())
    flat = [inner for item in found for inner in (item, *getattr(item, "metadata", ()))]
    return [
        text.format(value)
        for name, text in BOUNDS.items()
        for item in flat
        if (value := getattr(item, name, None)) is not None
    ]


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "needed"
    if isinstance(field.default, Settings):
        return "as there"
    if isinstance(field.default, tuple) and field.default:
        return f"`[{', '.join(field.default)}]`"
    if field.default in (None, (), {}, ""):
        return "none"
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _about(annotation: Any) -> str:
    """Of a section what it says of itself, in its first sentence."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    said = next((kind.__doc__ for kind in kinds if issubclass(kind, Settings)), None) or ""
    return " ".join(said.split("\n\n")[0].split()).partition(". ")[0].rstrip(".")


# --- Presets and objectives -------------------------------------------------------------------------------------------

PRESETS_HEAD = f"""# Presets and objectives

A **preset** is a name for a published combination of settings. A recipe names one (`preset: dapo`) and overrides what it likes. Each
is shown here as the part of a recipe that it stands for; [Objectives](objectives/README.md) has them side by side in one table.
An **objective** (`loss.objective`) turns ratio and advantage into one loss for each token. {MADE}"""
OBJECTIVE_PAGES = {"dual_clip": "clip"}  # what has no page of its own


def presets_page() -> str:
    rows = []
    for name in objectives.OBJECTIVES:
        acting = ", ".join(f"`{setting}`" for setting in sorted(LOSSES.kinds[name]().keywords))
        page = f"objectives/{OBJECTIVE_PAGES.get(name, name)}.md"
        rows.append((f"[`{name}`]({page})", acting, _first_words(_formula(name))))
    columns = ("objective", "settings of `loss` that act", "loss of a token")
    parts = [PRESETS_HEAD, "## Objectives\n", table(columns, rows), "\n## Presets\n"]
    for name, source in _preset_comments().items():
        values = yaml.safe_dump({"preset": name, **presets.PRESETS[name]}, sort_keys=False).strip()
        parts.append(f"### {name}\n{source}\n\n```yaml\n{values}\n```\n")
    return "\n".join(parts).rstrip() + "\n"


def _first_words(formula: Callable[..., Any]) -> str:
    """A formula as its docstring has it, without the shapes: the paragraph that begins with it, or else the first."""
    paragraphs = [" ".join(part.split()) for part in (inspect.getdoc(formula) or "").split("\n\n")]
    chosen = next((part for part in paragraphs if part.startswith("-")), paragraphs[0])
    chosen = re.sub(r"[:.,]? \[[NB]\].*|\. The .*", "", chosen)
    return chosen.replace("`clipped_loss`", "That of `clip`")


def _formula(objective: str) -> Callable[..., Any]:
    """The function of tensors that has an objective's formula."""
    names = {"clip": "clipped_loss", "dual_clip": "dual_clipped_loss"}
    function: Callable[..., Any] = getattr(objectives, names.get(objective, f"{objective}_loss"))
    return function


def _preset_comments() -> dict[str, str]:
    """What stands above each preset in its file, with links to the papers."""
    found, comment = {}, list[str]()
    for line in inspect.getsource(presets).partition("PRESETS:")[2].splitlines():
        if line.startswith("    # "):
            comment.append(line.removeprefix("    # "))
        elif (start := re.match(r'    "(\S+)": \{', line)) and start[1] in presets.PRESETS:
            words = " ".join(comment) or "Supervised fine-tuning on demonstrations."
            found[start[1]] = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", words)
            comment = []
    return found


# --- Metrics ----------------------------------------------------------------------------------------------------------

METRICS_HEAD = f"""# Metrics

What a step records in the table `metrics` of [run.db](database.md). Means are over the step's completions or tokens unless said otherwise; a
metric that has no value in a step is left out. "Methods" says who writes it: `grpo` is every preset without a method of its own.
A cold start writes what `sft` writes. {MADE}"""
SAMPLING, PAIRS, ALL = "grpo, ppo", "dpo, reward_model", "grpo, ppo, dpo, reward_model, sft"
# name: (unit, methods, meaning); NAME stands for a reward's name
METRICS = {
    "reward/mean": ("reward", SAMPLING, "The weighted sum of the rewards, over completions that did not abstain."),
    "reward/std": ("reward", SAMPLING, "Standard deviation of that sum over the step's completions."),
    "reward/highest": ("reward", SAMPLING, "The largest of them."),
    "reward/lowest": ("reward", SAMPLING, "The smallest of them."),
    "reward/NAME": ("reward", SAMPLING, "Mean of one reward, before its weight, where it did not abstain."),
    "reward/NAME_group_std": ("reward", SAMPLING, "Its standard deviation within a group, averaged over groups. Near 0 it teaches nothing."),
    "reward/kl": ("reward", "grpo", "What the KL adds to the reward: its sum over a completion, times -`loss.kl_weight`. With `kl.place: reward`."),
    "reward/overlong": ("reward", SAMPLING, "What `overlong: {treatment: punish}` takes from the reward, at most 0."),
    "reward/overlong_group_std": ("reward", SAMPLING, "Its standard deviation within a group, averaged over groups."),
    "reward/num_abstained": ("completions", SAMPLING, "Completions without any reward, failed ones among them."),
    "reward/num_failed": ("completions", SAMPLING, "Completions for which a reward failed. The reasons are in `completions.failure`."),
    "group/no_signal_share": ("share of groups", SAMPLING, "Groups whose completions all have the same reward, so that they teach nothing."),
    "completion/tokens_mean": ("tokens", SAMPLING, "Mean length of a completion, its end token included."),
    "completion/tokens_max": ("tokens", SAMPLING, "The longest completion."),
    "completion/num_tokens": ("tokens", SAMPLING, "Tokens that the step sampled, in all."),
    "completion/truncated_share": ("share of completions", SAMPLING, "Completions that the length limit cut."),
    "policy/entropy": ("nats per token", SAMPLING, "Entropy of the distribution that a token was drawn from."),
    "policy/kl": ("nats per token", SAMPLING, "KL of the policy to the reference, by the k3 estimator. Where the KL has no weight, over a part of the groups."),
    "policy/kl_to_sampler": ("nats per token", SAMPLING, "KL of the policy to the weights that sampled, by k3. 0 in the first update on a batch."),
    "policy/ratio_mean": ("ratio", SAMPLING, "Probability of a token (or completion: `loss.ratio`) now, divided by that at sampling."),
    "policy/ratio_max": ("ratio", SAMPLING, "The largest of these ratios."),
    "policy/clip_low_share": ("share of tokens", SAMPLING, "Tokens at which the lower clip bound acts. For objectives that clip."),
    "policy/clip_high_share": ("share of tokens", SAMPLING, "Tokens at which the upper clip bound acts. For objectives that clip."),
    "policy/sampler_gap_max": ("nats", SAMPLING, "Largest difference between the sampler's log-probability of a token and the trainer's."),
    "policy/sampler_rounding": ("nats", SAMPLING, "How much of that gap rounding explains. Measured only where the gap is large."),
    "policy/correction_mean": ("ratio", SAMPLING, "Mean importance weight. With a `correction`."),
    "policy/correction_cut_share": ("share of weights", SAMPLING, "Importance weights that were bounded or set to 0. With a `correction`."),
    "dynamic_sampling/num_dropped_groups": ("groups", "grpo", "Groups that dynamic sampling dropped. With `dynamic_sampling`."),
    "dynamic_sampling/num_dropped_tokens": ("tokens", "grpo", "Tokens that were sampled for them."),
    "loss/total": ("loss", ALL, "The loss that was minimised, with every term that it has."),
    "loss/kl_weight": ("weight", SAMPLING, "The KL's weight in this step. With `kl.target`."),
    "loss/entropy_weight": ("weight", SAMPLING, "The entropy bonus's weight in this step. With `entropy.target`."),
    "value/loss": ("loss", "ppo", "The value model's loss, in place of `loss/total` the policy's."),
    "value/mean": ("reward", "ppo", "What the value model expects, over tokens."),
    "value/explained_variance": ("share of variance", "ppo", "Share of the returns' variance that the value model explains; 1 is all of it."),
    "value/skipped_share": ("share of updates", "ppo", "Updates of the value model left out, since loss or gradient was not finite."),
    "preference/accuracy": ("share of pairs", PAIRS, "Pairs whose chosen answer has the higher score."),
    "preference/margin": ("score", PAIRS, "Score of the chosen answer less that of the rejected one."),
    "preference/chosen": ("score", PAIRS, "Score of the chosen answer. For DPO: beta times how much likelier than at the start it is, in nats."),
    "preference/rejected": ("score", PAIRS, "The same for the rejected answer."),
    "optimiser/learning_rate": ("per update", ALL, "The learning rate of this step."),
    "optimiser/grad_norm": ("norm", ALL, "Length of the gradient before it is scaled down to `optimiser.max_grad_norm`."),
    "optimiser/skipped_share": ("share of updates", ALL, "Updates left out, since loss or gradient was not finite."),
    "record/num_left_out_groups": ("groups", SAMPLING, "Groups that `record.max_megabytes_per_step` kept out of the table `completions`."),
    "time/sample_seconds": ("seconds", SAMPLING, "Sampling the completions."),
    "time/score_seconds": ("seconds", SAMPLING, "Calling the rewards."),
    "time/train_seconds": ("seconds", "grpo, ppo, dpo, reward_model", "The update, with the reference's log-probabilities and packing."),
    "time/step_seconds": ("seconds", "grpo, ppo, dpo, reward_model", "The whole step, without recording, evaluation and checkpoint."),
}  # fmt: skip
NAMED = {  # put together while a run goes on
    "reward/NAME",
    "reward/NAME_group_std",
    "reward/overlong",
    "reward/overlong_group_std",
    "loss/kl_weight",
    "loss/entropy_weight",
}


def metrics_page() -> str:
    parts = [METRICS_HEAD]
    for part in dict.fromkeys(name.partition("/")[0] for name in METRICS):
        rows = [
            (f"`{name}`", words, unit, methods)
            for name, (unit, methods, words) in METRICS.items()
            if name.startswith(f"{part}/")
        ]
        parts += [f"## {part}\n", table(("metric", "what it is", "unit", "methods"), rows), ""]
    return "\n".join(parts).rstrip() + "\n"


def metrics_in_code() -> set[str]:
    """Every text in coterie/training and coterie/runs that is called as a metric is."""
    kinds = {name.partition("/")[0] for name in METRICS}
    pattern = re.compile(rf"(?:{'|'.join(kinds)})/[a-z_]+")
    found = set()
    package = Path(coterie.__file__).parent
    for file in (*(package / "training").glob("**/*.py"), package / "runs" / "recorder.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and pattern.fullmatch(node.value):
                found.add(node.value)
    return found


# --- run.db -----------------------------------------------------------------------------------------------------------

DATABASE_HEAD = f"""# run.db

Everything that is recorded of a run, in one SQLite file in its folder. A step is written in one transaction, so a reader sees whole steps only, also
while the run goes on. To read it with pandas:

```python
import sqlite3, pandas

metrics = pandas.read_sql("SELECT * FROM metrics WHERE stage = 'train'", sqlite3.connect("runs/equations/run.db"))
print(metrics.pivot(index="step", columns="name", values="value")[["reward/mean", "policy/entropy"]])
```

`stage` is `train`, or `cold_start` for the supervised steps before it. {MADE}"""
STAGE_STEP = {"stage": "the stage of the run", "step": "the step, from 1; 0 is before the first"}
TABLES = {
    "metrics": ("One row for each [metric](metrics.md) of a step.", {**STAGE_STEP, "name": "the metric", "value": "its value; null where it is not finite"}),
    "completions": ("The sampled completions, up to `record.max_megabytes_per_step`.", {
        **STAGE_STEP, "prompt_number": "which group of the step, from 0", "completion_number": "which completion of the group, from 0",
        "prompt": "the prompt's text", "text": "the completion's text", "tokens": "its token ids, as JSON", "pieces": "the text of each token, as JSON",
        "sampler_logprobs": "log-probability of each token at sampling, in nats, as JSON", "advantage": "its advantage; for PPO the mean over its tokens",
        "reward": "the weighted sum; null where it abstained", "reward_parts": "each reward before its weight, and `kl` and `overlong` as they enter the sum, as a JSON object", "ended": "why it ended; `length` where the limit cut it",
        "failure": "which reward failed, and why; else null"}),
    "evaluations": ("Held-out figures, with 95 % intervals ([what they rest on](evaluation.md)).", {
        **STAGE_STEP, "mode": "how the answers were made, such as `greedy` or `sampled`", "name": "the figure, such as accuracy or reward", "value": "its estimate",
        "low": "lower end of the interval", "high": "upper end", "count": "how many it is of"}),
    "examples": ("Some completions of an evaluation, for the report.", {
        **STAGE_STEP, "number": "which example", "prompt": "the prompt's text", "text": "the completion's text", "reward": "its reward", "correct": "1 or 0; null where the task does not say"}),
    "events": ("What happened on the way: failures, limits passed, signs of reward hacking, resumes.", {
        "time": "seconds since 1970", **STAGE_STEP, "kind": "its kind, such as `reward_failure` or `step_skipped`", "message": "a sentence, with keys hidden"}),
    "inputs": ("What the run depends on: settings, and hashes of files. A resume compares them.", {"name": "a setting or file", "value": "its value or hash"}),
    "surroundings": ("Where it runs: versions, processor, threads.", {"name": "what", "value": "as it was found"}),
}  # fmt: skip


def database_page() -> str:
    parts = [DATABASE_HEAD, f"The schema's number (`PRAGMA user_version`) is {store.SCHEMA}.\n"]
    for name, (columns, key) in store._TABLES.items():
        about, meanings = TABLES[name]
        rows = []
        for column in columns.split(", "):
            called, kind = column.split()
            rows.append((f"`{called}`", kind, meanings[called]))
        keyed = f" The primary key is {', '.join(f'`{part}`' for part in key.split(', '))}." if key else ""
        parts += [f"## {name}\n{about}{keyed}\n", table(("column", "type", "what it is"), rows), ""]
    return "\n".join(parts).rstrip() + "\n"


# --- Python -----------------------------------------------------------------------------------------------------------

PYTHON_HEAD = f"""# Python interface

What `import coterie` offers. The import is cheap: torch is loaded when one of these names is first used. All but `train` and `load_recipe` are for
[a loop of your own](update.md). {MADE}"""
METHODS = {  # of the classes, those for a loop of one's own
    "NativeEngine": ("generate",),
    "Policy": ("of", "with_adapter", "recomputing", "named_parameters"),
}
SETTINGS_LINK = "A section of a recipe; its fields are listed in [Settings](settings.md#{})."


def python_page() -> str:
    parts = [PYTHON_HEAD]
    for name in sorted(coterie.__all__, key=str.lower):
        offered = getattr(coterie, name)
        parts.append(f"## coterie.{name}\n")
        if isinstance(offered, type) and issubclass(offered, Settings):
            parts += [_prose(offered), "", SETTINGS_LINK.format(name.lower()), ""]
            continue
        if isinstance(offered, type):
            parts += [_prose(offered), ""]
            for method in METHODS[name]:
                function = getattr(offered, method)
                title = name if method == "__init__" else f"{name}.{method}"
                parts += [f"### {title}\n", _code(title, function), _prose(function), ""]
        else:
            parts += [_code(name, offered), _prose(offered), ""]
    return "\n".join(parts).rstrip() + "\n"


def _code(name: str, function: Any) -> str:
    """A signature, one line for each parameter where it is long."""
    signature = _unquoted(inspect.signature(function))
    shown = f"{name}{signature}"
    if len(shown) > 100:
        parameters, star = list[str](), False
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.KEYWORD_ONLY and not star:
                parameters.append("*")
                star = True
            parameters.append(str(parameter))
        returns = signature.return_annotation
        inner = "".join(f"    {parameter},\n" for parameter in parameters)
        shown = f"{name}(\n{inner})" + ("" if returns is signature.empty else f" -> {returns}")
    shown = shown.replace("'", '"')
    return f"```python\n{shown}\n```\n"


def _unquoted(signature: inspect.Signature) -> inspect.Signature:
    """Annotations as they are written, without quotes."""
    parameters = [
        parameter.replace(annotation=_Word(parameter.annotation))
        if isinstance(parameter.annotation, str)
        else parameter
        for name, parameter in signature.parameters.items()
        if name != "self"
    ]
    returns = signature.return_annotation
    return signature.replace(
        parameters=parameters, return_annotation=_Word(returns) if isinstance(returns, str) else returns
    )


class _Word(str):
    """Text that shows as itself in a signature."""

    __repr__ = str.__str__


def _prose(documented: Any) -> str:
    """A docstring as Markdown: what it explains as `name: what it is` becomes a list."""
    text = (inspect.getdoc(documented) or "").replace("<", "\\<").replace("[", "\\[")
    names = rf"(?:{'|'.join(inspect.signature(documented).parameters)})\b"
    begins = rf"(?:^|(?<=\. ))(?={names} ?(?:\\\[[^]]*\])?:|Raises |Returns )"
    paragraphs = [
        [" ".join(part.split()) for line in paragraph.split("\n") for part in re.split(begins, line) if part]
        for paragraph in text.split("\n\n")
    ]
    return "\n\n".join(_listed(parts, names) for parts in paragraphs)


def _listed(parts: list[str], names: str) -> str:
    """A paragraph in pieces, each of which goes on with the one before or begins a point of a list."""
    shown = ""
    for part in parts:
        if name := re.match(rf"({names})(?= ?(?:\\\[[^]]*\])?:)", part):
            shown += f"\n- `{name[0]}`{part[name.end() :]}"
        else:
            shown += f"\n\n{part}" if re.match("Raises |Returns ", part) and shown else f" {part}"
    return shown.strip()


# --- All --------------------------------------------------------------------------------------------------------------


def table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of Markdown."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(value.replace('|', chr(92) + '|').replace(chr(10), ' ') for value in row)} |" for row in rows]  # fmt: skip
    return "\n".join(lines)


PAGES: dict[str, Callable[[], str]] = {
    "settings.md": settings_page,
    "presets.md": presets_page,
    "metrics.md": metrics_page,
    "database.md": database_page,
    "python.md": python_page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page(), encoding="utf-8")
