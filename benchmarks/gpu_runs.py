"""Parts of gpu.py: the machine, runs of `equations`, and the tests."""

from __future__ import annotations

import os
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from gpu import LAST_LINES, ROOT, Setting
from measure import Place
from roofline import copying, matrix_product

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "peft", "accelerate", "trl", "datasets", "pydantic")
TINY_MODEL = (
    "model={type: qwen3, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 1, head_dim: 16, max_position_embeddings: 128, tie_word_embeddings: true}"
)
TESTS = {  # what pytest is told
    "that need a GPU": "-m gpu tests/fast/test_gpu.py",
    "of models": "-m 'not slow' tests/models/test_stream.py tests/models/test_token_statistics.py "
    "tests/models/test_recompute.py tests/training/test_policy_update.py",
    "of runs": "-m 'not slow' tests/training/test_methods.py tests/training/test_run.py -k 'same_bits or metrics'",
}
TINY_TESTS = {
    "that need a GPU": "-m gpu tests/fast/test_gpu.py",
    "of models": "tests/models/test_token_statistics.py -k what_is_not_asked_for",
}
EVERY_STEP = ("policy/sampler_gap_max", "policy/sampler_rounding", "reward/mean", "time/step_seconds", "time/sample_seconds")  # fmt: skip


def machine(setting: Setting) -> None:
    setting.measure("versions", versions)
    setting.measure("gpu", gpu, needs_gpu=True)
    setting.measure("rates", lambda: rates(setting))


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "python": sys.version.split()[0], "c compiler": shutil.which("cc")}


def gpu() -> dict[str, Any]:
    one = torch.cuda.get_device_properties(0)
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"],
        capture_output=True, text=True,
    )  # fmt: skip
    return {
        "name": one.name,
        "capability": f"{one.major}.{one.minor}",
        "megabytes": one.total_memory / 1e6,
        "multiprocessors": one.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver, clock, power": asked.stdout.strip() or asked.stderr.strip(),
        "float32 products": torch.get_float32_matmul_precision(),
    }


def rates(setting: Setting) -> dict[str, float]:
    """Bytes a second of a large copy, read and written; FLOP a second of a large product, in bfloat16 and in float32."""
    size, megabytes = (128, 8) if setting.tiny else (8192, 8000)
    half, single = Place(setting.device, "bfloat16"), Place(setting.device)
    return {
        "bytes_per_second": copying(megabytes, single)()["bytes_per_second"],
        "bfloat16_flop_per_second": matrix_product(size, half)()["flop_per_second"],
        "float32_flop_per_second": matrix_product(size, single)()["flop_per_second"],
    }


def equations(setting: Setting) -> None:
    """The bundled recipe, as a person runs it. `check` samples and scores one group."""
    setting.measure("check", lambda: said(["check", "equations", *overrides(setting)], setting))
    for precision in ("float32", "mixed"):
        setting.measure(precision, lambda precision=precision: trained(setting, precision))


def overrides(setting: Setting) -> list[str]:
    chosen = [f"device={setting.device}", "steps=20", "evaluation={prompts: 64, samples: 1, every: 20}", "checkpoint.every=20"]  # fmt: skip
    if setting.tiny:
        sizes = (TINY_MODEL, "cold_start={steps: 2, rows_per_step: 8}", "steps=2", "prompts_per_step=2", "group_size=2",
                 "sampling.max_new_tokens=6", "evaluation={prompts: 4, samples: 1, every: 2}", "checkpoint.every=2")  # fmt: skip
        chosen += sizes
    else:
        chosen.append("cold_start.steps=200")
    return [word for one in chosen for word in ("--set", one)]


def said(arguments: list[str], setting: Setting) -> dict[str, Any]:
    """What the command says: its last lines, and every warning, which names the paths that are not used."""
    command = [sys.executable, "-m", "coterie", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(1.0, setting.seconds_left))
    lines = (done.stdout + done.stderr).splitlines()
    warned = [line for line in lines if "warning" in line.lower() or "Warning" in line]
    return {"exit": done.returncode, "warnings": warned, "said": lines[-LAST_LINES:]}


def trained(setting: Setting, precision: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "run"
        words = ["train", "equations", "--out", str(folder), *overrides(setting), "--set", f"precision={precision}"]
        found = said(words, setting)
        if found["exit"] == 0:
            found |= metrics(folder)
    return found


def metrics(folder: Path) -> dict[str, Any]:
    """Of a run's own stage: each of some metrics step by step."""
    query = "SELECT name, value FROM metrics WHERE stage = 'train' AND step > 0 ORDER BY step"
    with closing(sqlite3.connect(folder / "run.db")) as db:
        rows = db.execute(query).fetchall()
    return {name: [value for of, value in rows if of == name] for name in EVERY_STEP}


def tests(setting: Setting) -> None:
    """Those that need a GPU; those of models with the models on it; and runs, which take a GPU where there is one."""
    for name, words in (TINY_TESTS if setting.tiny else TESTS).items():
        setting.measure(name, lambda words=words: tested(words, setting))


def tested(words: str, setting: Setting) -> dict[str, Any]:
    """How many tests passed, and of the others the name and the last line."""
    with tempfile.TemporaryDirectory() as home:
        report = Path(home) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        environment = {**os.environ, "COTERIE_TEST_DEVICE": setting.device, "PYTHONFAULTHANDLER": "1"}
        limit = max(1.0, setting.seconds_left - 5)
        try:
            done = subprocess.run(
                [*command, *shlex.split(words)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=limit,
                env=environment,
            )
        except subprocess.TimeoutExpired as error:
            text = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            return {"failure": ["no time was left", *text.splitlines()[-LAST_LINES:]]}
        if not report.is_file():
            return {"exit": done.returncode, "failure": (done.stdout + done.stderr).splitlines()[-LAST_LINES:]}
        return {"exit": done.returncode, **counts(ElementTree.parse(report).getroot())}


def counts(report: ElementTree.Element) -> dict[str, Any]:
    """From pytest's report in XML."""
    found: dict[str, Any] = {"passed": 0, "skipped": 0, "failed": {}}
    for case in report.iter("testcase"):
        wrong = next((child for child in case if child.tag in ("failure", "error")), None)
        if wrong is not None:
            message = (wrong.get("message") or wrong.text or "").splitlines()
            found["failed"][f"{case.get('classname')}::{case.get('name')}"] = " | ".join(message)[:300]
        elif any(child.tag == "skipped" for child in case):
            found["skipped"] += 1
        else:
            found["passed"] += 1
    return found
