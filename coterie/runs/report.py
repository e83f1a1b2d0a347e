"""`report.html`: one page that tells how a run went, and opens with no network. It only reads the run's folder."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coterie.errors import UserError
from coterie.recipe import load_recipe
from coterie.redact import hidden
from coterie.runs.profile import figure_of, profile_panel
from coterie.runs.signs import SIGN
from coterie.runs.store import Store

_COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2")
_GROUPS_PER_STEP = 2
_LOOKED_BACK = 50  # steps, for the last one with a group whose completions differ
_SMOOTHED_FROM = 60  # steps from which a running mean is drawn over the single values


def write_report(folder: Path) -> Path:
    """Write the report of a run and return its path. Raises FileNotFoundError where there is no run.

    The folder may be somebody else's: all of it is text, none of it a part of the page. UserError for what no run writes.
    """
    try:
        return _write_report(folder)
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        sqlite3.Error,
    ) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder}: its report can't be made: run.db, summary.json or profile.json holds what no run writes: "
            f"{type(error).__name__}: {str(error)[:200]}"
        ) from error


def _write_report(folder: Path) -> Path:
    from plotly.offline import get_plotlyjs

    recipe = load_recipe(str(folder / "recipe.yaml"))
    plotly = get_plotlyjs()
    store = Store(folder / "run.db", read_only=True)
    try:
        parts = [
            _head(folder.name, _policy(plotly, _DRAW)),
            _results(folder, recipe.preset),
            _signs(store),
            "<h2>Curves</h2>",
            _charts(store),
            profile_panel(folder),
            _groups(store),
            _events(store),
            f"<h2>Recipe</h2><pre class='recipe'>{_text((folder / 'recipe.yaml').read_text('utf-8'))}</pre>",
            f"<script>{plotly}</script><script>{_DRAW}</script></main></body></html>",
        ]
    finally:
        store.close()
    path, aside = folder / "report.html", folder / ".report.writing"
    aside.write_text("\n".join(parts), encoding="utf-8")
    aside.replace(path)
    return path


def _text(value: object) -> str:
    """Text of a run's as text of the page."""
    return html.escape(hidden(str(value)))


def _label(name: str) -> str:
    """A name in a chart, where plotly reads some HTML."""
    return html.escape(hidden(str(name)), quote=False).replace("_", " ")


def _head(name: str, policy: str) -> str:
    title = _text(name)
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title} · coterie</title>
<meta http-equiv="Content-Security-Policy" content="{policy}"><meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body><main>
<h1>{title}</h1>"""


def _results(folder: Path, preset: str) -> str:
    """The figures before and after, and the answers to the examples."""
    path = folder / "summary.json"
    if not path.is_file():
        return f"<p class='note'>preset {_text(preset)}; the run is not finished</p>"
    summary = json.loads(path.read_text("utf-8"))
    names = [name for name in summary["after"] if not name.endswith("_interval")]
    rows = [
        f"<tr><th>{_text(name.replace('_', ' '))}</th>"
        + "".join(f"<td>{_figure(summary[when], name)}</td>" for when in ("before", "after"))
        + "</tr>"
        for name in names
    ]
    note = f"preset {preset} · seed {summary['seed']} · {summary['seconds']:.0f} seconds"
    table = (
        "<table><thead><tr><th>held out</th><th>before</th><th>after</th></tr></thead><tbody>"
        + "".join(rows)
        + "</tbody></table><p class='note'>with 95 % intervals, over prompts</p>"
        if rows
        else "<p class='note'>no prompts were held out</p>"
    )
    examples = "".join(
        f"<section class='example'><h3>{_text(example['prompt'])}</h3><div class='pair'>"
        + "".join(
            f"<figure><figcaption class='{_side_of(example, when)}'>{when}{marks_of(example, when)}</figcaption><pre>{_text(example[when])}</pre></figure>"
            for when in ("before", "after")
        )
        + "</div></section>"
        for example in summary["examples"]
    )
    return f"<p class='note'>{_text(note)}</p><h2>Results</h2>{table}<div class='examples'>{examples}</div>"


def marks_of(example: Mapping[str, Any], when: str) -> str:
    """Whether an example's answer is right, where the task says so, and its reward: what goes behind `before` or `after`."""
    correct, reward = example.get(f"{when}_correct"), example.get(f"{when}_reward")
    marks = [] if correct is None else ["right" if correct else "wrong"]
    marks += [] if reward is None else [f"reward {reward:.2f}"]
    return f": {', '.join(marks)}" if marks else ""


def _side_of(example: Mapping[str, Any], when: str) -> str:
    return {None: "", 0: "wrong", 1: "right"}[example.get(f"{when}_correct")]


def _figure(figures: dict[str, Any], name: str) -> str:
    if name not in figures:
        return "–"
    low, high = figures[f"{name}_interval"]
    return f"<b>{figures[name]:.3f}</b> <span class='note'>{low:.3f} to {high:.3f}</span>"


def _signs(store: Store) -> str:
    """Signs of reward hacking, each when it began; that there are none where they were looked for."""
    rows = store.read("SELECT step, kind, message FROM events WHERE kind LIKE ? ORDER BY step, time", f"{SIGN}%")
    if not rows:
        looked = "reward/mean" in _names(store)
        return "<p class='note'>No signs of reward hacking were seen.</p>" if looked else ""
    entries = "".join(
        f"<li><b>{_text(kind.removeprefix(SIGN).replace('_', ' '))}</b> from step {_text(step)}: {_text(message)}</li>"
        for step, kind, message in rows
    )
    return (
        f"<h2>Signs of reward hacking</h2><ul class='signs'>{entries}</ul><p class='note'>Each is a reason to read "
        "completions, not a verdict.</p>"
    )


def _charts(store: Store) -> str:
    """Learning curves; entropy, KL and clipping; length; signal; the optimiser; time."""
    of_rewards = [name for name in _names(store) if name.startswith("reward/") and "num_" not in name]
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
    recorded = set(_names(store))
    has_evaluations = bool(store.read("SELECT 1 FROM evaluations LIMIT 1"))
    panels = [
        (title, [name for name in names if name in recorded])
        for title, names in wanted
        if recorded.intersection(names) or (title == _HELD_OUT and has_evaluations)
    ]
    charts = "".join(
        _chart(title, _evaluations(store) if title == _HELD_OUT else _curves(store, names)) for title, names in panels
    )
    return f"<div class='charts'>{charts}</div>"


def _chart(title: str, traces: Sequence[Any]) -> str:
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
        yaxis={"exponentformat": "none", "automargin": True, "range": _least_range(traces)},
    )
    return f"<div class='chart'>{figure_of(figure)}</div>"


def _least_range(traces: Sequence[Any]) -> list[float] | None:
    """A range around 0 for values that are 0 but for rounding; None leaves it to the values."""
    largest = max((abs(value) for trace in traces for value in trace.y if value is not None), default=1.0)
    return [-0.001, 0.001] if largest < 1e-6 and not any(trace.name == "learning rate" for trace in traces) else None


_HELD_OUT = "Held-out"
_DRAW = """
for (const place of document.querySelectorAll('.figure')) {
  const figure = JSON.parse(place.nextElementSibling.textContent);
  Plotly.newPlot(place, figure.data, figure.layout, {displayModeBar: false, responsive: true});
}
addEventListener('load', () => {  // drawn while the page is still being laid out
  for (const place of document.querySelectorAll('.figure')) Plotly.Plots.resize(place);
});
for (const button of document.querySelectorAll('input[name=by]'))
  button.addEventListener('change', () => { document.body.dataset.by = button.value; });
"""


def _curves(store: Store, names: list[str]) -> list[Any]:
    """A line for each metric; noisy ones faint, with their running mean over them."""
    import plotly.graph_objects as go

    traces = []
    for colour, name in zip(_COLOURS * 3, names, strict=False):
        steps, values = _series(store, name)
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


def _evaluations(store: Store) -> list[Any]:
    """Held-out shares with their intervals; the mean reward where there are no shares."""
    import plotly.graph_objects as go

    rows = store.read("SELECT * FROM evaluations WHERE mode IN ('sampled', 'pairs') ORDER BY step")
    shares = sorted({row["name"] for row in rows} - {"reward", "tokens"}) or ["reward"]
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
                       mode="lines+markers", line={"color": colour}))  # fmt: skip
    return traces


def _groups(store: Store) -> str:
    """Groups of the first step, and of the last ones up to the middle and the end that differ in reward, with every token coloured."""
    steps = _steps(store)
    if not steps:
        return ""
    chosen = list(dict.fromkeys((steps[0], _telling(store, steps[: len(steps) // 2 + 1]), _telling(store, steps))))
    parts = [
        "<h2>Groups</h2><p class='note'>Every completion that a prompt got, best first. Hover a token for its figures.</p>"
        "<p><label><input type='radio' name='by' value='logprob' checked> "
        "by log-probability <span class='key surprise'>surprising</span></label> "
        "<label><input type='radio' name='by' value='advantage'> by advantage "
        "<span class='key better'>better than the group</span> <span class='key worse'>worse</span></label></p>"
    ]
    for step in chosen:
        prompts = store.read(
            "SELECT prompt_number, MAX(reward) - MIN(reward) AS spread FROM completions WHERE stage = 'train' AND "
            "step = ? GROUP BY prompt_number ORDER BY COALESCE(spread, 0) DESC, prompt_number LIMIT ?",
            step,
            _GROUPS_PER_STEP,
        )
        parts.append(f"<h3>Step {_text(step)}</h3>")
        for row in prompts:
            completions = store.read(
                "SELECT * FROM completions WHERE stage = 'train' AND step = ? AND prompt_number = ? "
                "ORDER BY reward DESC, completion_number",
                step,
                row["prompt_number"],
            )
            alike: dict[tuple[str, float | None], list[sqlite3.Row]] = {}
            for completion in completions:
                alike.setdefault((completion["text"], completion["reward"]), []).append(completion)
            cards = "".join(_card(same[0], len(same)) for same in alike.values())
            prompt = _text(completions[0]["prompt"])
            parts.append(f"<div class='group'><p class='prompt'>{prompt}</p><div class='cards'>{cards}</div></div>")
    return "\n".join(parts)


def _steps(store: Store) -> list[int]:
    """The steps with completions: each is looked up by key after the one before, since all completions may be gigabytes."""
    query = (
        "WITH RECURSIVE steps(step) AS (SELECT MIN(step) FROM completions WHERE stage = 'train' UNION ALL SELECT (SELECT "
        "MIN(step) FROM completions WHERE stage = 'train' AND step > steps.step) FROM steps WHERE steps.step IS NOT NULL) "
        "SELECT step FROM steps WHERE step IS NOT NULL"
    )
    return [row["step"] for row in store.read(query)]


def _telling(store: Store, steps: Sequence[int]) -> int:
    """The last of these steps in which the completions of a group differ in reward; of the latest ones, where they are many."""
    query = (
        "SELECT 1 FROM completions WHERE stage = 'train' AND step = ? GROUP BY prompt_number "
        "HAVING MAX(reward) > MIN(reward) LIMIT 1"
    )
    return next((step for step in reversed(steps[-_LOOKED_BACK:]) if store.read(query, step)), steps[-1])


def _card(row: sqlite3.Row, count: int) -> str:
    """A completion that was written `count` times: its reward and parts, why it ended, and its tokens."""
    advantage = row["advantage"]
    tokens = []
    pieces, logprobs = json.loads(row["pieces"]), json.loads(row["sampler_logprobs"])
    whole = "".join(pieces)
    if hidden(whole) != whole:  # a key goes over several tokens
        pieces, logprobs = [hidden(whole)], [0.0]
    for piece, logprob in zip(pieces, logprobs, strict=True):
        shown = html.escape(piece).replace("\n", "⏎\n")
        surprise = min(1.0, -logprob / 3)
        tokens.append(
            f"<span style='--s:{surprise:.2f}' title='log-probability {logprob:.3f}, advantage {advantage:+.3f}'>{shown}</span>"
        )
    strength = min(1.0, abs(advantage) / 2)
    side = "better" if advantage > 0 else "worse"
    given = " · ".join(
        f"{_text(name.replace('_', ' '))} {'–' if value is None else f'{value:.2f}'}"
        for name, value in json.loads(row["reward_parts"]).items()
    )
    reward = "abstains" if row["reward"] is None else f"reward {row['reward']:.2f}"
    failure = f"<p class='failure'>{_text(row['failure'])}</p>" if row["failure"] else ""
    return (
        f"<div class='card {side}' style='--a:{strength:.2f}'><p><b>{reward}</b> advantage {advantage:+.2f}"
        f"{f' · {count} times' if count > 1 else ''}</p>"
        f"<p class='note'>{given} · ended by {'the length limit' if row['ended'] == 'length' else 'itself'}</p>"
        f"<pre>{''.join(tokens)}</pre>{failure}</div>"
    )


def _events(store: Store) -> str:
    query = "SELECT stage, step, kind, message FROM events WHERE kind NOT LIKE ? ORDER BY time LIMIT 200"
    rows = store.read(query, f"{SIGN}%")
    if not rows:
        return ""
    body = "".join("<tr>" + "".join(f"<td>{_text(str(value))}</td>" for value in row) + "</tr>" for row in rows)
    return (
        "<h2>Events</h2><table><thead><tr><th>stage</th><th>step</th><th>kind</th><th>what</th></tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def _names(store: Store) -> list[str]:
    return [row["name"] for row in store.read("SELECT DISTINCT name FROM metrics WHERE stage = 'train' ORDER BY name")]


def _series(store: Store, name: str) -> tuple[list[int], list[float | None]]:
    rows = store.read("SELECT step, value FROM metrics WHERE stage = 'train' AND name = ? ORDER BY step", name)
    return [int(row["step"]) for row in rows], [None if row["value"] is None else float(row["value"]) for row in rows]


def _running_mean(values: Sequence[float | None], width: int = 15) -> list[float | None]:
    means: list[float | None] = []
    for end in range(1, len(values) + 1):
        window = [value for value in values[max(0, end - width) : end] if value is not None]
        means.append(sum(window) / len(window) if window else None)
    return means


def _policy(*scripts: str) -> str:
    """The page runs these scripts and no other, and asks the network for nothing, whatever stands in it."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'; "
        "base-uri 'none'"
    )


_STYLE = """
:root { --ink: #1f2937; --soft: #6b7280; --edge: #e5e7eb; --paper: #ffffff; --tint: #f9fafb; }
body { margin: 0; background: var(--tint); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { margin: 0; font-size: 1.8rem; } h2 { margin: 2.2rem 0 .6rem; font-size: 1.25rem; } h3 { margin: 1.2rem 0 .4rem; font-size: 1rem; }
.note { color: var(--soft); font-size: .85rem; margin: .1rem 0; }
table { display: block; max-width: fit-content; overflow-x: auto; border-collapse: collapse; background: var(--paper); border: 1px solid var(--edge); border-radius: 8px; }
th, td { text-align: left; padding: .35rem .9rem; border-bottom: 1px solid var(--edge); font-weight: normal; }
thead th { color: var(--soft); font-size: .85rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.55 ui-monospace, monospace; }
table.figures td:not(:first-child), table.figures th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
.profile { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; margin: .8rem 0; } .profile > div { overflow-x: auto; } .profile td, .profile th { white-space: nowrap; font-size: .85rem; padding: .2rem .7rem; }
.profile td:first-child { white-space: normal; overflow-wrap: anywhere; }
.examples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1rem; }
.signs { margin: .4rem 0; padding: .6rem .8rem .6rem 2rem; background: var(--paper); border: 1px solid #d97706; border-radius: 8px; }
.signs li { margin: .2rem 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; }
figure, .card, .recipe { margin: 0; background: var(--paper); border: 1px solid var(--edge); border-radius: 8px; padding: .6rem .8rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 1rem; }
.chart { min-width: 0; background: var(--paper); border: 1px solid var(--edge); border-radius: 8px; }
h1, h3, li { overflow-wrap: anywhere; }
@media (max-width: 600px) { main { padding: 1rem .7rem 3rem; } .pair { grid-template-columns: 1fr; } th, td { padding: .3rem .5rem; } }
figcaption { color: var(--soft); font-size: .8rem; } .right, .wrong { font-weight: 600; }
.right { color: #047857; } .wrong { color: #b91c1c; }
.group { margin: 0 0 1.2rem; } .prompt { font-weight: 600; margin: .2rem 0 .4rem; white-space: pre-wrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: .6rem; }
.card p { margin: 0 0 .2rem; } .failure { color: #b91c1c; font-size: .85rem; }
.card span, .key { border-radius: 3px; }
.card span { background: rgba(217, 119, 6, calc(var(--s) * .75)); }
.better { --tone: 5, 150, 105; } .worse { --tone: 220, 38, 38; }
[data-by=advantage] .card span { background: rgba(var(--tone), calc(var(--a) * .45)); }
.key { padding: 0 .4rem; font-size: .8rem; } .key.surprise { background: rgba(217, 119, 6, .6); }
.key.better, .key.worse { background: rgba(var(--tone), .4); } label { margin-right: 1.2rem; }
"""
