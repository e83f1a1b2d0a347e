"""`report.html`: one page that tells how a run went, and opens with no network. It only reads the run's folder.

What it looks like stands in `report.html.jinja`; here is what it shows.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from markupsafe import Markup, escape

from coterie.errors import UserError
from coterie.recipe import load_recipe
from coterie.redact import hidden
from coterie.runs.profile import duration, figure_of, profile_panels, size
from coterie.runs.reader import Reader
from coterie.runs.signs import SIGN

_HERE = Path(__file__).parent
_COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2")
_GROUPS_PER_STEP = 2
_LOOKED_BACK = 50  # steps, for the last one with a group whose completions differ
_SMOOTHED_FROM = 60  # steps from which a running mean is drawn over the single values
_MOST_EVENTS = 200
_HELD_OUT = "Held-out"

_Card = tuple[
    sqlite3.Row, int, dict[str, float | None], Markup
]  # a completion, how often it was written, its parts, its tokens


def write_report(folder: Path) -> Path:
    """Write the report of a run and return its path. Raises FileNotFoundError where there is no run.

    The folder may be somebody else's: all of it is text, none of it a part of the page. UserError for what no run writes.
    """
    try:
        page = _page(folder)
    except UserError:
        raise
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        sqlite3.Error,
        TemplateError,
    ) as error:
        raise UserError(
            f"{folder}: its report can't be made: run.db, summary.json or profile.json holds what no run writes: "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error
    path, aside = folder / "report.html", folder / ".report.writing"
    aside.write_text(page, encoding="utf-8")
    aside.replace(path)
    return path


def _page(folder: Path) -> str:
    from plotly.offline import get_plotlyjs

    recipe = load_recipe(str(folder / "recipe.yaml"))
    plotly, draw = get_plotlyjs(), (_HERE / "report.js").read_text("utf-8")
    path = folder / "summary.json"
    summary = json.loads(path.read_text("utf-8")) if path.is_file() else None
    names = [name for name in summary["after"] if not name.endswith("_interval")] if summary is not None else []
    page = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, finalize=_shown, trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.jinja")  # fmt: skip
    with Reader(folder / "run.db") as record:
        return page.render(
            name=folder.name,
            policy=Markup(_policy(plotly, draw)),
            preset=recipe.preset,
            summary=summary,
            figures=names,
            sides={None: "", 0: "wrong", 1: "right"},
            marks_of=marks_of,
            signs=record.events_of(SIGN),
            has_rewards="reward/mean" in record.metric_names(),
            charts=_charts(record),
            profile=profile_panels(folder),
            duration=duration,
            size=size,
            steps=_steps(record),
            events=record.events(but=SIGN, most=_MOST_EVENTS),
            recipe=(folder / "recipe.yaml").read_text("utf-8"),
            plotly=Markup(plotly),
            draw=Markup(draw),
        )


def _shown(value: object) -> object:
    """What stands for a value in the page: keys are hidden in text, which is escaped then."""
    return value if isinstance(value, Markup | int | float) else hidden(str(value))


def _label(name: object) -> str:
    """A name in a chart, where plotly reads some HTML."""
    return str(escape(hidden(str(name)))).replace("_", " ")


def marks_of(example: Mapping[str, Any], when: str) -> str:
    """Whether an example's answer is right, where the task says so, and its reward: what goes behind `before` or `after`."""
    correct, reward = example.get(f"{when}_correct"), example.get(f"{when}_reward")
    marks = [] if correct is None else ["right" if correct else "wrong"]
    marks += [] if reward is None else [f"reward {reward:.2f}"]
    return f": {', '.join(marks)}" if marks else ""


def _charts(record: Reader) -> list[Markup]:
    """Learning curves; entropy, KL and clipping; length; signal; the optimiser; time."""
    recorded = record.metric_names()
    of_rewards = [name for name in recorded if name.startswith("reward/") and "num_" not in name]
    spreads = [name for name in of_rewards if name.endswith("_group_std")]
    of_all = ("reward/mean", "reward/std", "reward/highest", "reward/lowest")
    parts = [name for name in of_rewards if name not in (*spreads, *of_all)]
    wanted: list[tuple[str, list[str]]] = [
        ("Reward, the weighted sum", ["reward/mean"]),
        ("Each part of the reward, unweighted", parts),
        ("Std of each part within groups", spreads),
        (_HELD_OUT, []),
        ("Loss", ["loss/total"]),
        ("Pairs in the right order", ["preference/accuracy"]),
        ("Margin of the pairs", ["preference/chosen", "preference/rejected", "preference/margin"]),
        ("Entropy (nats per token)", ["policy/entropy"]),
        ("KL to the reference (nats per token)", ["policy/kl"]),
        ("Share of tokens clipped", ["policy/clip_low_share", "policy/clip_high_share"]),
        ("Completion length (tokens)", ["completion/tokens_mean", "completion/tokens_max"]),
        ("Share of completions cut, of groups without signal", ["completion/truncated_share", "group/no_signal_share"]),
        ("Value model: share of the returns explained", ["value/explained_variance"]),
        ("Weights that adapt", ["loss/kl_weight", "loss/entropy_weight"]),
        ("Gradient norm", ["optimiser/grad_norm"]),
        ("Learning rate", ["optimiser/learning_rate"]),
        ("Seconds per step", ["time/sample_seconds", "time/score_seconds", "time/train_seconds"]),
    ]
    panels = ((title, _curves(record, [name for name in names if name in recorded])) for title, names in wanted)
    traces = ((title, _evaluations(record) if title == _HELD_OUT else curves) for title, curves in panels)
    return [_chart(title, lines) for title, lines in traces if lines]


def _chart(title: str, traces: Sequence[Any]) -> Markup:
    """One panel, as wide as there is room. Its axes have plain numbers, and no room for rounding alone."""
    import plotly.graph_objects as go

    figure = go.Figure(list(traces))
    figure.update_layout(
        title={"text": title, "font": {"size": 14}, "x": 0.02},
        height=320,
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 12},
        margin={"l": 10, "r": 10, "t": 40, "b": 10},
        legend={"orientation": "h", "xanchor": "left", "x": 0, "yanchor": "top", "y": -0.12, "font": {"size": 11}},
        xaxis={"exponentformat": "none", "automargin": True},
        yaxis={"exponentformat": "none", "automargin": True, "range": _range(traces)},
    )
    return figure_of(figure)


def _range(traces: Sequence[Any]) -> list[float] | None:
    """Around 0 for values that are 0 but for rounding, from 0 up for a learning rate, which else is too small to be told from 0; None
    leaves it to the values."""
    largest = max((abs(value) for trace in traces for value in trace.y if value is not None), default=1.0)
    if any(trace.name == "learning rate" for trace in traces):
        return [0.0, 1.1 * largest] if largest else None
    with_intervals = any(trace.error_y.array is not None for trace in traces)
    return [-0.001, 0.001] if largest < 1e-6 and not with_intervals else None


def _curves(record: Reader, names: list[str]) -> list[Any]:
    """A line for each metric; noisy ones faint, with their running mean over them."""
    import plotly.graph_objects as go

    traces = []
    for colour, name in zip(_COLOURS * 3, names, strict=False):
        steps, values = record.series(name)
        label = _label(name.partition("/")[2])
        faint = len(steps) >= _SMOOTHED_FROM and name != "optimiser/learning_rate"
        line = {"color": colour, "width": 1 if faint else 2}
        traces.append(
            go.Scatter(x=steps, y=values, name=label, line=line, opacity=0.3 if faint else 1, showlegend=not faint,
                       legendgroup=name))  # fmt: skip
        if faint:
            line = {"color": colour, "width": 2}
            traces.append(go.Scatter(x=steps, y=_running_mean(values), name=label, line=line, legendgroup=name))
    return traces


def _evaluations(record: Reader) -> list[Any]:
    """Held-out shares with their intervals; the mean reward where there are no shares."""
    import plotly.graph_objects as go

    rows = record.evaluations()
    names = {row["name"] for row in rows}
    shares = sorted(names - {"reward", "tokens"}) or sorted(names & {"reward"})
    traces = []
    for colour, name in zip(_COLOURS, shares, strict=False):
        points = [row for row in rows if row["name"] == name]
        value = [row["value"] for row in points]
        spread = {
            "type": "data",
            "symmetric": False,
            "array": [row["high"] - row["value"] for row in points],
            "arrayminus": [row["value"] - row["low"] for row in points],
            "thickness": 1,
        }
        traces.append(
            go.Scatter(x=[row["step"] for row in points], y=value, error_y=spread, name=_label(name),
                       mode="lines+markers", line={"color": colour}, showlegend=True))  # fmt: skip
    return traces


def _running_mean(values: Sequence[float | None], width: int = 15) -> list[float | None]:
    means: list[float | None] = []
    for end in range(1, len(values) + 1):
        window = [value for value in values[max(0, end - width) : end] if value is not None]
        means.append(sum(window) / len(window) if window else None)
    return means


def _steps(record: Reader) -> list[tuple[int, list[tuple[str, list[_Card]]]]]:
    """Groups of the first step, and of the last ones up to the middle and the end that differ in reward: each prompt with its cards."""
    steps = record.steps_with_completions()
    if not steps:
        return []
    half = steps[: len(steps) // 2 + 1]
    chosen = dict.fromkeys((steps[0], *(_telling(record, some) for some in (half, steps))))
    return [(step, [_group(rows) for rows in record.groups(step, _GROUPS_PER_STEP)]) for step in chosen]


def _telling(record: Reader, steps: Sequence[int]) -> int:
    """The last of these steps in which the completions of a group differ in reward; of the latest ones, where they are many."""
    return next((step for step in reversed(steps[-_LOOKED_BACK:]) if record.tells_apart(step)), steps[-1])


def _group(rows: Sequence[sqlite3.Row]) -> tuple[str, list[_Card]]:
    """The prompt of a group; of those of its completions that are alike one, with their number, its parts and its tokens."""
    alike: dict[tuple[str, float | None], list[sqlite3.Row]] = {}
    for row in rows:
        alike.setdefault((row["text"], row["reward"]), []).append(row)
    cards = [(same[0], len(same), json.loads(same[0]["reward_parts"]), _tokens(same[0])) for same in alike.values()]
    return rows[0]["prompt"], cards


_TOKEN = Markup("<span style='--s:{:.2f}' title='log-probability {:.3f}, advantage {:+.3f}'>{}</span>")


def _tokens(row: sqlite3.Row) -> Markup:
    """The text of a completion, each token with its figures, which colour it."""
    pieces, logprobs = json.loads(row["pieces"]), json.loads(row["sampler_logprobs"])
    whole = "".join(pieces)
    if hidden(whole) != whole:  # a key goes over several tokens
        pieces, logprobs = [hidden(whole)], [0.0]
    return Markup("").join(
        _TOKEN.format(min(1.0, -logprob / 3), logprob, row["advantage"], piece.replace("\n", "⏎\n"))
        for piece, logprob in zip(pieces, logprobs, strict=True)
    )


def _policy(*scripts: str) -> str:
    """The page runs these scripts and no other, and asks the network for nothing, whatever stands in it."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'; "
        "base-uri 'none'"
    )
