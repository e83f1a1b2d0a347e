"""What a run came to: summary.json, and the table at its end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from coterie.redact import hidden_in
from coterie.runs.report import marks_of
from coterie.runs.writing import write_whole
from coterie.training.session import Session

_SHOWN_EXAMPLES = 4


def write_summary(run: Session) -> dict[str, Any]:
    """summary.json, from what run.db holds: the figures before and after, the examples, the seconds and the seed."""
    summary: dict[str, Any] = {}
    for when, step in (("before", 0), ("after", run.recipe.steps)):
        entry = summary[when] = {}
        for row in run.store.evaluations_after(step):
            name = row["name"] if row["mode"] == "sampled" else f"{row['mode']}_{row['name']}"
            entry[name] = row["value"]
            entry[f"{name}_interval"] = [row["low"], row["high"]]
    summary["examples"] = _telling_examples(run.store.examples(run.recipe.steps))
    summary["seconds"] = run.seconds
    summary["seed"] = run.recipe.seed
    write_whole(run.folder / "summary.json", json.dumps(hidden_in(summary), indent=2, ensure_ascii=False) + "\n")
    return summary


def _telling_examples(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that show most of what has changed: for better or worse, then in reward, then in words; of equals the first."""

    def change(example: dict[str, Any]) -> tuple[bool, ...]:
        return tuple(example[f"before{of}"] != example[f"after{of}"] for of in ("_correct", "_reward", ""))

    return sorted(examples, key=change, reverse=True)[:_SHOWN_EXAMPLES]


def say_results(run: Session, summary: dict[str, Any]) -> None:
    """The table at the end."""
    names = [name for name in summary["after"] if not name.endswith("_interval")]
    rows = [
        (
            name.replace("_", " "),
            *(
                _estimate(summary[when].get(name), summary[when].get(f"{name}_interval"))
                for when in ("before", "after")
            ),
        )
        for name in names
    ]
    run.console.say()
    if rows:
        run.console.table("Held-out results (95 % intervals)", ("", "before", "after"), rows)
    for example in summary["examples"]:
        run.console.say(f"\n{example['prompt']}")
        header = [f"{when}{marks_of(example, when)}" for when in ("before", "after")]
        run.console.table("", header, _side_by_side(example["before"], example["after"]))
    run.console.say(f"\n{run.seconds:.0f} seconds. Report: {run.folder / 'report.html'}  Model: {run.folder / 'model'}")


def _estimate(value: float | None, interval: Sequence[float] | None) -> str:
    return "-" if value is None or interval is None else f"{value:.3f}  [{interval[0]:.3f}, {interval[1]:.3f}]"


def _side_by_side(left: str, right: str) -> list[tuple[str, str]]:
    lefts, rights = left.splitlines() or [""], right.splitlines() or [""]
    size = max(len(lefts), len(rights))
    return list(zip(lefts + [""] * (size - len(lefts)), rights + [""] * (size - len(rights)), strict=True))
