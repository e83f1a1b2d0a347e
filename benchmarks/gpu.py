"""One GPU in at most nine minutes: `python benchmarks/gpu.py`. Does every path for a GPU run, is it right, and how fast is it?

  machine         which GPU, driver and versions; its bandwidth (a large copy) and matrix rate (a large product), measured
  equations       `coterie check equations`, and 20 steps of it in both precisions: what was warned of, sampler against trainer
  tests           the tests that need a GPU, then others with their models on it (COTERIE_TEST_DEVICE), and of runs
  equal           every path for a GPU beside the plain one: FlexAttention, recorded decoding, mixed precision, logits in tiles
  recompilation   50 streams of different lengths; recordings of decoding; memory
  0.6b 1.7b 4b    shapes of Qwen3 with random weights: decoding, training, 20 whole steps and where their time goes, `model.generate`
  trl             TRL's step on the work of 0.6b, where trl can be imported

Each part is a process with a time limit, so that a crash or a hang loses no other. Figures are written to gpu.json as they come,
and a failure with the end of its traceback. `--tiny` runs all of it on a CPU in a minute: whether it runs, not how fast it is;
what needs CUDA is recorded as "not on a CPU" there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOT_HERE = "not on a CPU"
WHOLE = 540  # seconds
LIMITS = {  # seconds of each part at most, in this order
    "machine": 40, "equations": 90, "tests": 120, "equal": 110, "recompilation": 60, "0.6b": 130, "trl": 80, "1.7b": 100, "4b": 110,
}  # fmt: skip
PATIENCE = 4  # times as long for tiny sizes, where machines that do other things too have to be waited for
LAST_LINES = 14  # of a traceback, or of what a process said


class Figures:
    """A JSON file that one process at a time writes, whole each time: what was measured, by part."""

    def __init__(self, path: Path, part: str = "") -> None:
        self._path, self._part = path, part

    def put(self, name: str, value: Any) -> None:
        """Write a figure of this part, at once."""
        whole = json.loads(self._path.read_text()) if self._path.is_file() else {}
        (whole.setdefault("measured", {}).setdefault(self._part, {}) if self._part else whole)[name] = value
        aside = self._path.with_suffix(".writing")
        aside.write_text(json.dumps(whole, indent=1) + "\n")
        aside.replace(self._path)

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """Go on after a failure, which is what is written under this name."""
        try:
            yield
        except Exception as error:
            lines = "".join(traceback.format_exception(error)).splitlines()[-LAST_LINES:]
            print("\n".join(lines), file=sys.stderr, flush=True)
            self.put(name, {"failure": lines})


@dataclass(frozen=True)
class Setting:
    """What a part gets. device: "cuda" or "cpu". tiny: sizes that only show whether it runs. deadline: of the part, by time.monotonic()."""

    figures: Figures
    device: str
    tiny: bool
    deadline: float

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def measure(self, name: str, work: Callable[[], Any], *, needs_gpu: bool = False) -> Any:
        """Write what `work` returns, or why it failed, under a name."""
        if needs_gpu and not self.on_gpu:
            self.figures.put(name, NOT_HERE)
            return None
        with self.figures.trying(name):
            found = work()
            self.figures.put(name, rounded(found))
            return found
        return None


def rounded(value: Any) -> Any:
    """The same values with four digits each."""
    from tables import rounded as of_tables

    return of_tables(value)


def run_part(name: str, setting: Setting) -> None:
    """In a process of its own."""
    import gpu_equal
    import gpu_runs
    import gpu_speed

    parts: dict[str, Callable[[Setting], None]] = {
        "machine": gpu_runs.machine,
        "equations": gpu_runs.equations,
        "tests": gpu_runs.tests,
        "equal": gpu_equal.equal,
        "recompilation": gpu_equal.recompilation,
        "trl": gpu_speed.trl_steps,
    }
    with setting.figures.trying("failure"):
        parts[name](setting) if name in parts else gpu_speed.model(name, setting)


def in_process(name: str, given: argparse.Namespace, path: Path, limit: float) -> dict[str, Any]:
    """A part with its limit: seconds, and what went wrong. Everything that it started is ended with it."""
    command = [sys.executable, __file__, "--part", name, "--out", str(given.out), "--device", given.device]
    command += ["--tiny"] if given.tiny else []
    started, environment = time.monotonic(), {**os.environ, "COTERIE_GPU_SECONDS": str(limit)}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"ended after {limit:.0f} seconds"
        finally:
            ended(process)
        said.seek(0)
        lines = said.read().splitlines()
    found: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1)}
    if code != 0:
        found |= {"exit": code, "said": lines[-2 * LAST_LINES :]}
    Figures(path, name).put("process", found)
    return found


def ended(process: subprocess.Popen[bytes]) -> None:
    """With what it started: it leads a group of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on a CPU: whether it runs")
    parser.add_argument("--only", nargs="+", choices=tuple(LIMITS), help="some of the parts")
    parser.add_argument("--seconds", type=float, default=WHOLE, help=f"for all of it ({WHOLE})")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="the folder of gpu.json")
    parser.add_argument("--collect-wheels", type=Path, metavar="FOLDER", help="what a machine without network lacks")
    parser.add_argument("--device", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.collect_wheels:
        from gpu_wheels import collect

        collect(given.collect_wheels)
        return
    path = given.out / "gpu.json"
    given.device = given.device or ("cpu" if given.tiny else "cuda")
    if given.part:
        deadline = time.monotonic() + float(os.environ.get("COTERIE_GPU_SECONDS", WHOLE))
        run_part(given.part, Setting(Figures(path, given.part), given.device, given.tiny, deadline))
        return
    import torch
    from tables import stamp

    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --tiny runs on a CPU")
    given.out.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    for key, value in stamp(sys.argv, given.device).items():
        Figures(path).put(key, value)
    patience = PATIENCE if given.tiny else 1
    deadline = time.monotonic() + given.seconds * patience
    for name in given.only or LIMITS:
        limit = min(LIMITS[name] * patience, deadline - time.monotonic())
        if limit < 15:
            Figures(path, name).put("process", {"exit": "no time was left"})
            continue
        print(name, json.dumps(in_process(name, given, path, limit)), flush=True)
    print(path)


if __name__ == "__main__":
    main()
