"""What `profile.json` tells, as a panel of the report and as a table in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

_COLOURS = {
    "sample": "#2563eb",
    "score": "#d97706",
    "reference": "#7c3aed",
    "value": "#db2777",
    "train": "#059669",
    "evaluate": "#0891b2",
}
_GREY = "#9ca3af"


def load_profile(folder: Path) -> dict[str, Any] | None:
    """The profile of a run, or None where it has none."""
    path = folder / "profile.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def profile_table(folder: Path) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and rows: the sections in the order of a step, with the figures of each stage."""
    stages = (load_profile(folder) or {"stages": {}})["stages"]
    if not stages:
        return "\nWhere a step goes: no step was watched", ["section"], []
    of_stage = [{section["name"]: section for section in stage["sections"]} for stage in stages.values()]
    names = dict.fromkeys(name for sections in reversed(of_stage) for name in sections if name != "other")
    rows = [[name, *(_cell(sections.get(name)) for sections in of_stage)] for name in (*names, "other")]
    whole = [f"{duration(stage['step_seconds']):>8}" for stage in stages.values()]
    header = ["section", *(stage.replace("_", " ") for stage in stages)]
    return (
        "\nWhere a step goes: time, share, how much of it its products need, peak memory",
        header,
        [*rows, ["step", *whole]],
    )


def _cell(section: Mapping[str, Any] | None) -> str:
    if section is None:
        return ""
    products = section.get("product_seconds")
    bound = f"{products / section['seconds']:>4.0%}" if products and section["seconds"] else "   –"
    return f"{duration(section['seconds']):>8}  {section['share']:>5.1%}  {bound}  {size(section['peak_bytes']):>8}"


def profile_panels(folder: Path) -> list[tuple[str, str, Markup, dict[str, Any]]]:
    """For each stage its title, which steps its figures are of, a bar for each section, and the figures. Empty where there are none."""
    stages = (load_profile(folder) or {"stages": {}})["stages"]
    return [
        (name.replace("_", " ").capitalize(), _note(stage), _bars(stage["sections"]), stage)
        for name, stage in stages.items()
    ]


def _note(stage: Mapping[str, Any]) -> str:
    """Which steps the figures are of, and what watching them costs."""
    first, last = stage["steps"][0], stage["steps"][-1]
    which = f"step {first}" if first == last else f"steps {first} to {last}"
    note = f"{duration(stage['step_seconds'])} a step, the mean of {which}."
    costs = {mode: seconds for mode, seconds in stage["bare_step_seconds"].items() if seconds is not None}
    if len(costs) > 1:
        shown = ", ".join(f"{duration(seconds)} {mode}" for mode, seconds in costs.items())
        note += f" What watching costs, evaluation and checkpoint aside: {shown}."
    if stage["traced_step"] is not None:
        note += f" Memory and operators are those of step {stage['traced_step']}, which was traced."
    return note


def _bars(sections: list[dict[str, Any]]) -> Markup:
    import plotly.graph_objects as go

    by_time = sorted(sections, key=lambda section: section["seconds"])
    bar = go.Bar(
        x=[float(section["seconds"]) for section in by_time],
        y=[str(escape(section["name"])) for section in by_time],
        orientation="h",
        text=[f"{duration(section['seconds'])}  {section['share']:.1%}" for section in by_time],
        textposition="outside",
        cliponaxis=False,
        marker={"color": [_COLOURS.get(section["name"].partition("/")[0], _GREY) for section in by_time]},
        hovertemplate="%{y}: %{text}<extra></extra>",
    )
    figure = go.Figure(bar)
    figure.update_layout(
        height=60 + 26 * len(sections),
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 12},
        margin={"l": 130, "r": 110, "t": 10, "b": 40},
        xaxis={"title": "seconds a step", "rangemode": "tozero"},
        yaxis={"ticksuffix": "  "},
        bargap=0.3,
    )
    return figure_of(figure)


def figure_of(figure: Any) -> Markup:
    """A plotly figure as a place in the page, and as data that the page's script draws there: nothing that a browser would run."""
    data = figure.to_json().replace("<", "\\u003c")
    place = Markup("<div class='figure' style='height:{}px'></div>").format(figure.layout.height)
    return place + Markup(f"<script type='application/json'>{data}</script>")


def duration(seconds: float) -> str:
    """Three digits, in the unit that fits."""
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{_three(seconds / unit)} {name}"
    return f"{seconds * 1e6:.0f} µs"


def size(num_bytes: int | None) -> str:
    """Three digits, in the unit that fits; a dash for what is not known."""
    if num_bytes is None:
        return "–"
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{_three(num_bytes / unit)} {name}"
    return f"{num_bytes} B"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
