"""What benchmark results have in common: what they were measured with and on, tables and plots."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def stamp(command: list[str], device: str = "cpu") -> dict:
    """The command, commit, versions and hardware of a measurement."""
    hardware = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device == "cuda":
        hardware["accelerator"] = torch.cuda.get_device_name()
    return {
        "command": f"python {Path(command[0]).relative_to(ROOT) if Path(command[0]).is_absolute() else command[0]} "
        f"{' '.join(command[1:])}".strip(),
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": hardware,
    }


def commit() -> str | None:
    """The commit that is measured, with a word where the code is not quite that; None outside of a checkout."""
    asked = (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "coterie", "benchmarks/*.py"])
    head, changes = (
        subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True) for words in asked
    )
    return head.stdout.strip() + (", changed" if changes.stdout else "") if head.returncode == 0 else None


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def write_json(name: str, values: dict, folder: Path = RESULTS) -> None:
    (folder / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n")


def rounded(value: Any) -> Any:
    """The same values with four digits each: more are noise."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(str(cell) for cell in cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def spread_cell(found: dict) -> str:
    """A median with what it lies between."""
    low, high = found["range"]
    return f"{found['median']:.2f} ({low:.2f} to {high:.2f})"


def share_cell(found: dict) -> str:
    """The same in per cent."""
    low, high = found["range"]
    return f"{found['median']:.1%} ({low:.1%} to {high:.1%})"


def short_number(value: float) -> str:
    """As a tick of a plot: 820480 -> "820k"."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def make_pyplot() -> Any:
    """matplotlib for SVG files that are the same for the same data."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "coterie"
    from matplotlib import pyplot

    return pyplot


def save_plot(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def write_objectives(name: str, measured: dict, results: dict[str, list[dict]], steps: int) -> None:
    """NAME.json, NAME.md and NAME.svg."""
    write_json(name, {**measured, "steps": steps, "methods": results})
    lines = [
        "| method | before | accuracy | per seed | every step | entropy | KL from the start | one-step | seconds a step | peak MB | trained MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, rows in results.items():
        seeds = ", ".join(f"{row['accuracy']:.3f}" for row in rows)
        cells = [f"{mean([row[key] for row in rows]):.3f}" for key in ("before", "accuracy")] + [seeds]
        cells.append(f"{mean([row['all_steps'] for row in rows]):.3f}")
        for quantity, shape in (("entropy", ".3f"), ("kl_from_start", ".3f"), ("one_step_accuracy", ".3f"), ("step_seconds", ".2f"), ("peak_megabytes", ".0f"), ("trained_megabytes", ".1f")):  # fmt: skip
            values = [row[quantity] for row in rows if row[quantity] is not None]
            cells.append(f"{mean(values):{shape}}" if values else "-")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    figure, axes = make_pyplot().subplots(figsize=(9, 5))
    for number, (method, rows) in enumerate(results.items()):
        curves = [row["rewards"] for row in rows if row["rewards"]]
        if not curves:
            continue
        means = [mean(list(values)) for values in zip(*curves, strict=True)]
        smooth = [mean(means[max(0, i - 4) : i + 1]) for i in range(len(means))]
        axes.plot(range(1, len(smooth) + 1), smooth, label=method, linestyle=("-", "--", ":")[number // 7])
    axes.set(xlabel="step", ylabel="mean reward of the samples, over 5 steps and all seeds")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    save_plot(figure, RESULTS / f"{name}.svg")
