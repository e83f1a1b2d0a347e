"""Where the time and the memory of a step go: what `--profile` adds to a run, written to `profile.json`.

Seconds come from a stopwatch, operators and memory from one later step under torch.profiler, which costs something for every
operator and allocation. So the profiler's own cost is in no section's seconds.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from coterie.models.load import load_config
from coterie.recipe import Recipe
from coterie.sections import OTHER, Stopwatch, timing

MODES = ("untouched", "timed", "traced")
NUM_OPERATORS = 12
_MARK = "coterie/"
_NOT_EVERY_STEP = ("evaluate", "checkpoint")


def plan(first: int, last: int) -> dict[int, str]:
    """What is done to which of the steps `first` to `last`; those that are not named run without any of it.

    "untouched": only a stopwatch runs. "timed": on a GPU each section waits for the device too, so that it is charged for its
    own work. "traced": under torch.profiler as well. The first step warms up. Tracing comes after timing, since it may leave
    something of itself behind; where there are few steps it is the last one.
    """
    traced = min(first + 5, last)
    timed = list(range(first + 2, traced)) or [traced - 1]
    modes = {first + 1: "untouched", first + 6: "untouched", **dict.fromkeys(timed, "timed"), traced: "traced"}
    return {step: mode for step, mode in sorted(modes.items()) if first <= step <= last}


@dataclass(frozen=True)
class Watched:
    """A step that was watched. nanoseconds, calls, products: by section. peaks, operators: what torch.profiler saw, if it ran."""

    step: int
    mode: str
    nanoseconds: Mapping[str, int]
    calls: Mapping[str, int]
    peaks: Mapping[str, int]
    operators: Sequence[Mapping[str, Any]]
    products: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.nanoseconds.values()) / 1e9

    @property
    def bare_seconds(self) -> float:
        """Without what few steps have, so that single steps can be compared."""
        return self.seconds - sum(self.nanoseconds.get(name, 0) for name in _NOT_EVERY_STEP) / 1e9


class Profiler:
    """Watches a few steps of each stage of a run. rate: see `product_rate`. A resumed run keeps what was written of stages that it does not touch."""

    def __init__(self, folder: Path, device: torch.device, rate: float | None = None) -> None:
        self._path, self._device, self._rate = folder / "profile.json", device, rate
        self._stages = json.loads(self._path.read_text("utf-8"))["stages"] if self._path.is_file() else {}
        self._modes: dict[int, str] = {}
        self._watched: list[Watched] = []

    def begin_stage(self, first: int, last: int) -> None:
        """Choose among the steps `first` to `last`, which are those that this session takes."""
        self._modes, self._watched = plan(first, last), []

    @contextmanager
    def step(self, stage: str, number: int) -> Iterator[None]:
        """Watch a step, if it is one of those that are, and write what was seen so far. A step that fails leaves nothing."""
        mode = self._modes.get(number)
        if mode is None:
            yield
            return
        waits = mode != "untouched" and self._device.type == "cuda"
        with (
            self._trace() if mode == "traced" else nullcontext() as trace,
            closing(_Marks(waits=waits, traced=mode == "traced")) as marks,
            timing(Stopwatch(marks.turn)) as stopwatch,
        ):
            yield
        events = (
            trace.profiler.kineto_results.events() if trace is not None else ()
        )  # the one place that has allocations
        peaks = peak_memory(events, self._device.type)
        operators = slowest_operators(trace.key_averages() if trace is not None else (), NUM_OPERATORS)
        seen = (stopwatch.nanoseconds, stopwatch.calls, peaks, operators, stopwatch.products)
        self._watched.append(Watched(number, mode, *seen))
        self._stages[stage] = summarise(self._watched, self._rate)
        written = json.dumps(
            {"device": self._device.type, "products_per_second": self._rate, "stages": self._stages}, indent=1
        )
        self._path.write_text(written + "\n", encoding="utf-8")

    def _trace(self) -> Any:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        else:  # there kineto prints only that it starts and stops
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        return torch.profiler.profile(activities=activities, profile_memory=True)


def product_rate(recipe: Recipe, device: torch.device) -> float | None:
    """Multiplications and additions a second of a product of 2,048 rows with a layer of the recipe's model, in its precision: the best of
    some. None where the model's configuration does not tell its width."""
    config = load_config(recipe).get_text_config()
    width, dtype = (
        getattr(config, "hidden_size", None),
        torch.bfloat16 if recipe.precision == "mixed" else torch.float32,
    )
    if width is None:
        return None
    wide = getattr(config, "intermediate_size", None) or 4 * width
    x, weight = (torch.ones(rows, width, dtype=dtype, device=device) for rows in (2048, wide))
    best = math.inf
    for _ in range(10):
        begins = time.perf_counter()
        x @ weight.t()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begins)
    return float(2 * 2048 * width * wide / best)


def summarise(watched: Sequence[Watched], rate: float | None = None) -> dict[str, Any]:
    """What `profile.json` holds of a stage. Seconds are means over the timed steps; where none was, over those that were seen.

    product_seconds: how long a section's matrix products would take at `rate`, where they are counted.

    bare_step_seconds: of a step without evaluation and checkpoint, by mode, which shows what watching costs.
    """
    by_mode = {mode: [one for one in watched if one.mode == mode] for mode in MODES}
    chosen = by_mode["timed"] or by_mode["untouched"] or by_mode["traced"]
    traced = by_mode["traced"][-1] if by_mode["traced"] else None
    names = dict.fromkeys(name for one in watched for name in one.nanoseconds if name != OTHER)
    whole = sum(one.seconds for one in chosen) / len(chosen)
    sections = []
    for name in (*names, OTHER):
        seconds = sum(one.nanoseconds.get(name, 0) for one in chosen) / 1e9 / len(chosen)
        products = sum(one.products.get(name, 0.0) for one in chosen) / len(chosen)
        refined = any(finer.startswith(f"{name}/") for finer in names)
        sections.append(
            {
                "name": f"{name}/{OTHER}" if refined else name,
                "seconds": seconds,
                "share": seconds / whole,
                "calls": sum(one.calls.get(name, 0) for one in chosen) / len(chosen),
                "product_seconds": products / rate if rate and products else None,
                "peak_bytes": traced.peaks.get(name) if traced else None,
            }
        )
    return {
        "steps": [one.step for one in chosen],
        "step_seconds": whole,
        "bare_step_seconds": {
            mode: sum(one.bare_seconds for one in seen) / len(seen) if seen else None for mode, seen in by_mode.items()
        },
        "sections": sections,
        "traced_step": traced.step if traced else None,
        "operators": traced.operators if traced else [],
    }


class _Marks:
    """What happens where one section ends and the next begins: the device catches up, and the trace gets a label."""

    def __init__(self, *, waits: bool, traced: bool) -> None:
        self._waits, self._traced = waits, traced
        self._label: Any = None

    def turn(self, begins: str) -> None:
        if self._waits:
            torch.cuda.synchronize()
        if self._traced:
            self.close()
            self._label = record_function(_MARK + begins)
            self._label.__enter__()

    def close(self) -> None:
        if self._label is not None:
            self._label.__exit__(None, None, None)
            self._label = None


def peak_memory(events: Sequence[Any], device: str) -> dict[str, int]:
    """The most bytes held in each section beyond those held at the start, from the profiler's events of one step.

    Sections follow one another, so an allocation belongs to the last one that began before it. On the CPU the profiler does not
    see that memory from before the step is freed, so what replaces such memory counts as added.
    """
    turns, changes = [], []
    for event in events:
        name = event.name()
        if name.startswith(_MARK) and event.device_type().name == "CPU":
            turns.append((event.start_ns(), 0, name.removeprefix(_MARK)))
        elif name == "[memory]" and event.device_type().name.lower() == device:
            changes.append((event.start_ns(), event.nbytes(), None))
    level, current = 0, OTHER
    peaks = {OTHER: 0}
    for _, change, begins in sorted([*turns, *changes], key=lambda item: item[0]):
        level, current = level + change, begins or current
        peaks[current] = max(peaks.get(current, 0), level)
    return peaks


def slowest_operators(rows: Iterable[Any], count: int) -> list[dict[str, Any]]:
    """The operators that took longest by themselves, without those that they call, from the rows of torch's `key_averages`.

    seconds: on the CPU, where launching work for a GPU counts too. device_seconds: of what it launched on the GPU, by which they
    are ordered where there is one.
    """
    operators = [
        row
        for row in rows
        if row.device_type.name == "CPU" and not row.is_user_annotation and not row.is_async
        if not row.key.startswith(("[", "profiler::"))
    ]
    on_device = any(row.self_device_time_total for row in operators)
    operators.sort(key=lambda row: (row.self_device_time_total, row.self_cpu_time_total), reverse=True)
    return [
        {
            "name": row.key,
            "calls": row.count,
            "seconds": row.self_cpu_time_total / 1e6,
            "device_seconds": row.self_device_time_total / 1e6 if on_device else None,
        }
        for row in operators[:count]
    ]
