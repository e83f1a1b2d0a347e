"""`coterie score`: a recipe's rewards over completions of a file or a run, so that a reward is debugged without training.

Legend: R completions, P prompts, G the largest number of completions that a prompt has.
"""

from __future__ import annotations

import inspect
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.algorithms.advantages import group_std, has_signal
from coterie.errors import BadRowError, UserError, standing_at
from coterie.recipe import Recipe
from coterie.recipe.settings import DatasetTask
from coterie.redact import hidden, hidden_in
from coterie.rewards.base import Reward
from coterie.rewards.check import check_fits
from coterie.rewards.load import closing_all, load_rewards
from coterie.rewards.score import score
from coterie.runs.console import Console
from coterie.runs.reader import Reader
from coterie.tasks.rows import answer_of, jsonl_rows, prompt_of
from coterie.types import Completion, Group, Prompt, RewardFailure
from coterie.user_code import awaited

_UNKNOWN = [0]  # stands for tokens that nobody knows; no reward gets to see it
_MAX_REASONS = 12  # that are printed
_MAX_REASON_LENGTH = 160


@dataclass(frozen=True)
class Candidate:
    """One completion to score. origin: where it stands. group: what it shares with its siblings. tokens: if known."""

    origin: str
    group: str
    prompt: Prompt
    text: str
    tokens: list[int] | None = None


@dataclass(frozen=True)
class Scores:
    """What the rewards said of rows that are ordered by group.

    sizes [P]: how many rows each group has. rewards [R]: the weighted sum, NaN where a completion abstains. parts: each
    reward by name, [R]. failures: `group` is the number of the row. seconds: that each reward took.
    """

    rows: list[Candidate]
    sizes: list[int]
    rewards: Tensor
    parts: Mapping[str, Tensor]
    failures: list[RewardFailure]
    seconds: Mapping[str, float]

    def by_group(self, values: Tensor) -> Tensor:
        """Values [R] -> [P, G], NaN where a group has fewer than G rows."""
        table = torch.full((len(self.sizes), max(self.sizes)), math.nan, dtype=torch.float64)
        for number, part in enumerate(values.split(self.sizes)):
            table[number, : len(part)] = part
        return table


def score_completions(recipe: Recipe, source: str, out: Path | None) -> None:
    """Print what each reward makes of the completions, and write it to `out` if there is one."""
    console = Console()
    if not recipe.rewards:
        raise UserError("score: the recipe has no rewards")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):  # said before the rewards have taken their time
        raise UserError(
            f"--out {out}: {'is a folder' if out.is_dir() else f'there is no folder {out.parent}'}; name a file to write"
        )
    rewards = load_rewards(recipe.rewards)
    with closing_all(rewards):
        rows = _rows_of_run(recipe, Path(source)) if Path(source).is_dir() else _rows_of_file(recipe, Path(source))
        check_fits(rewards, [row.prompt for row in rows])
        scores = score_rows(
            _with_tokens(console, rows, recipe, rewards), rewards, groups_per_call=recipe.prompts_per_step
        )
    _print_parts(console, scores, rewards)
    _print_times(console, scores, rewards)
    _print_failures(console, scores)
    if out is not None:
        _write(scores, out)
        console.say(f"each completion with its parts: {out}")


def score_rows(rows: Sequence[Candidate], rewards: Sequence[Reward], *, groups_per_call: int) -> Scores:
    """Every reward of every row. A call gets whole groups, as many as a step of training has, for its time limit's sake."""
    by_group: dict[str, list[Candidate]] = {}
    for row in rows:
        by_group.setdefault(row.group, []).append(row)
    groups = list(by_group.values())
    timed = [_Timed(reward.function, all(row.tokens is not None for row in rows)) for reward in rewards]
    timing = [replace(reward, function=timer) for reward, timer in zip(rewards, timed, strict=True)]
    calls = [list(chain(*groups[at : at + groups_per_call])) for at in range(0, len(groups), groups_per_call)]
    scored = [score([Group(row.prompt, [_completion(row)]) for row in call], timing) for call in calls]  # [rows, 1]
    starts = accumulate(map(len, calls), initial=0)
    return Scores(
        rows=list(chain(*groups)),
        sizes=[len(group) for group in groups],
        rewards=torch.cat([part.rewards[:, 0] for part in scored]),
        parts={reward.name: torch.cat([part.parts[reward.name][:, 0] for part in scored]) for reward in rewards},
        failures=[
            replace(f, group=at + f.group) for at, part in zip(starts, scored, strict=False) for f in part.failures
        ],
        seconds={reward.name: timer.seconds for reward, timer in zip(rewards, timed, strict=True)},
    )


class _Timed:
    """A reward function whose seconds are counted, and which is not shown tokens that nobody knows."""

    def __init__(self, function: Callable[..., Any], knows_tokens: bool) -> None:
        self.__wrapped__ = function  # inspect.signature gives the function's own
        self._knows_tokens = knows_tokens
        self.seconds = 0.0

    def __call__(self, **columns: Any) -> Any:
        if not self._knows_tokens:
            columns.pop("completion_ids", None)
        started = time.perf_counter()
        try:
            return awaited(self.__wrapped__(**columns))
        finally:
            self.seconds += time.perf_counter() - started


def _completion(row: Candidate) -> Completion:
    tokens = row.tokens or _UNKNOWN
    nothing = torch.zeros(len(tokens))
    return Completion(tokens, nothing, nothing, "stop", row.text)


def _rows_of_file(recipe: Recipe, path: Path) -> list[Candidate]:
    """One row for each completion. Raises UserError with file:line for a line that can't be used."""
    if not path.is_file():
        raise UserError(f"score: {path} is neither a file nor a run folder")
    task = recipe.task
    named, chat = (task.prompt, task.chat) if isinstance(task, DatasetTask) else ("prompt", False)
    rows = []
    for origin, columns in jsonl_rows(path):
        with standing_at(origin):
            if isinstance(columns, BadRowError):
                raise columns
            column = named if named in columns else "prompt"
            content, texts = prompt_of(columns, column, chat and column == named), _texts(columns)
        others = {name: v for name, v in columns.items() if name not in (column, "completion", "completions")}
        prompt = Prompt(0, content, _UNKNOWN, others, origin)
        group = json.dumps(content, sort_keys=True)
        rows += [Candidate(origin, group, prompt, text) for text in texts]
    return rows


def _texts(columns: Mapping[str, Any]) -> list[str]:
    """The completions of a line: one text or chat message, or a list of them."""
    if ("completion" in columns) == ("completions" in columns):
        both = "both" if "completion" in columns else "neither"
        wrong = f"has {both} of the columns 'completion' and 'completions'; one of them is needed"
        raise BadRowError("without completions", wrong)
    if "completion" in columns:
        return [answer_of(columns, "completion")]
    given = columns["completions"]
    if not isinstance(given, list) or not given:
        wrong = f"column 'completions' holds {given!r:.60}; a list with at least one is needed"
        raise BadRowError("without completions", wrong)
    return [answer_of({"completions": one}, "completions") for one in given]


def _rows_of_run(recipe: Recipe, folder: Path) -> list[Candidate]:
    """What a run recorded of its training, with the columns that the recipe's task has for each prompt."""
    if not (folder / "run.db").is_file():
        raise UserError(f"score: {folder} is no run: {folder / 'run.db'} does not exist")
    from coterie.tasks.load import load_codec, make_task  # imports transformers, which a file does without

    codec = load_codec(recipe)
    task = make_task(recipe.task, codec)
    known = {prompt.text: prompt for prompt in (*task.heldout, *task.train)}
    with Reader(folder / "run.db") as record:
        recorded = list(record.completions_of_training())
    rows = []
    for step, number, text, completion, tokens in recorded:
        origin = f"{folder}, step {step}, prompt {number + 1}"
        if text not in known:
            raise UserError(f"{origin}: the recipe's task has no prompt {text!r:.80}")
        rows.append(Candidate(origin, f"{step} {number}", known[text], completion, tokens))
    if not rows:
        raise UserError(f"score: {folder} has recorded no completions")
    return rows


def _with_tokens(console: Console, rows: list[Candidate], recipe: Recipe, rewards: Sequence[Reward]) -> list[Candidate]:
    """The rows with their tokens, where a reward asks for `completion_ids`: nothing else needs the tokenizer.

    Raises UserError where there is no tokenizer; a reward that can do without gets none, and a warning says why.
    """
    reading = [reward.function for reward in rewards if reward.reads_tokens]
    signatures = [inspect.signature(function).parameters for function in reading]
    asked = [parameters["completion_ids"] for parameters in signatures if "completion_ids" in parameters]
    if not asked or all(row.tokens is not None for row in rows):
        return rows
    from coterie.tasks.load import load_codec

    try:
        codec = load_codec(recipe)
    except UserError as error:
        if any(parameter.default is parameter.empty for parameter in asked):
            raise
        console.warn(f"rewards get no completion_ids: {error}")
        return rows
    return [replace(row, tokens=codec.encode_answer(row.text)) for row in rows]


def _print_parts(console: Console, scores: Scores, rewards: Sequence[Reward]) -> None:
    """A line for each reward and one for their sum: its values, who abstained, and whether groups are told apart."""
    header = ("", "weight", "mean", "std", "min", "max", "abstained", "failed", "std in group", "no signal")
    lines = [
        (reward.name, f"{reward.weight:g}", *_figures(scores, scores.parts[reward.name], reward.name))
        for reward in rewards
    ]
    lines.append(("sum", "", *_figures(scores, scores.rewards, None)))
    title = f"{_counted(len(scores.rows), 'completion')} of {_counted(len(scores.sizes), 'prompt')}"
    console.table(title, header, lines)
    if max(scores.sizes) == 1:
        console.say("no prompt has two completions, so nothing can be said of the spread in a group")


def _figures(scores: Scores, values: Tensor, name: str | None) -> tuple[str, ...]:
    """mean, std, min, max, abstained, failed, mean std in a group, groups without signal; name: None for the sum."""
    given = values[~values.isnan()]
    num_failed = len({f.group for f in scores.failures if name in (None, f.reward)})
    num_abstained = len(values) - len(given) - num_failed
    table = scores.by_group(values)[torch.tensor(scores.sizes) > 1]  # [P, G] of the groups that can be told apart
    spread = group_std(table)
    spread = spread[~spread.isnan()]
    return (
        *(_number(given.mean()), _number(given.std()) if len(given) > 1 else "-"),
        *((_number(given.min()), _number(given.max())) if len(given) else ("-", "-")),
        *(str(num_abstained), str(num_failed)),
        _number(spread.mean()) if len(spread) else "-",
        f"{(~has_signal(table)).double().mean():.0%}" if len(table) else "-",
    )


def _number(value: Tensor) -> str:
    return "-" if value.isnan() else f"{value.item():.4g}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _print_times(console: Console, scores: Scores, rewards: Sequence[Reward]) -> None:
    """Seconds of each reward, over the completions that it is for."""
    lines = []
    for reward in rewards:
        seconds = scores.seconds[reward.name]
        count = sum(reward.applies_to(row.prompt.columns) for row in scores.rows)
        each = f"{1000 * seconds / count:.3g} ms" if count else "-"
        lines.append((reward.name, f"{seconds:.3g} s", each, str(count)))
    console.table("Time", ("", "in all", "per completion", "completions"), lines)


def _print_failures(console: Console, scores: Scores) -> None:
    """Equal reasons counted together, the most frequent first, each with where it was met first."""
    if not scores.failures:
        return
    counts = Counter((failure.reward, failure.reason) for failure in scores.failures)
    first: dict[tuple[str, str], str] = {}
    for failure in scores.failures:
        first.setdefault((failure.reward, failure.reason), scores.rows[failure.group].origin)
    lines = [
        (name, str(count), first[name, reason], " ".join(hidden(reason).split())[:_MAX_REASON_LENGTH])
        for (name, reason), count in counts.most_common(_MAX_REASONS)
    ]
    console.table(_counted(len(scores.failures), "failure"), ("", "times", "first at", "reason"), lines)
    if len(counts) > _MAX_REASONS:
        console.say(f"and {_counted(len(counts) - _MAX_REASONS, 'other reason')}")


def _write(scores: Scores, path: Path) -> None:
    """A JSON object a line, in the order of the groups: null where something abstains."""
    reasons: dict[int, dict[str, str]] = {}
    for failure in scores.failures:
        reasons.setdefault(failure.group, {})[failure.reward] = failure.reason
    try:
        with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for number, row in enumerate(scores.rows):
                entry = {
                    "row": row.origin,
                    "prompt": row.prompt.content,
                    "completion": row.text,
                    "reward": _or_none(scores.rewards[number]),
                    "parts": {name: _or_none(part[number]) for name, part in scores.parts.items()},
                    "failures": reasons.get(number, {}),
                }
                file.write(json.dumps(hidden_in(entry), ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"--out {path}: can't be written: {error.strerror}") from None


def _or_none(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()
