"""What the bits of a run depend on beside its inputs: versions, threads, the processor. A resume compares them with before."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import transformers

import coterie
from coterie.fast.kernels.build import library
from coterie.models.load import choose_device
from coterie.recipe import Recipe

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")


def surroundings(recipe: Recipe) -> dict[str, str]:
    """Each by its name."""
    found = {**versions(), "python": platform.python_version()}
    for name in (*_PACKAGES, *(["peft"] if recipe.lora is not None else [])):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    device = choose_device(recipe.device)
    found["threads"] = str(torch.get_num_threads())
    found |= _processor()
    if device.type == "cpu":
        found["compiled loops"] = "not used" if library(torch.float32) is None else "used"
    else:
        found["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        found["cuda"] = str(torch.version.cuda)
    return found


def what_differs(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """In words, of what both know: an older run does not know all of it."""
    return [f"{name}: was {before[name]}, is {now[name]}" for name in now if before.get(name, now[name]) != now[name]]


def versions() -> dict[str, str]:
    """What made a run: versions, and the commit where the package lies in a git checkout."""
    found = {"coterie": coterie.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    try:
        home = Path(coterie.__file__).resolve().parent.parent
        asked = subprocess.run(
            ["git", "-C", str(home), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
        inside = (home / ".git").exists() and asked.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        inside = False
    return {**found, "commit": asked.stdout.strip()} if inside else found


def _processor() -> dict[str, str]:
    """Its model, the vectors that torch uses on it, and a digest of everything that it can do."""
    found = {
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "processor": platform.processor() or platform.machine(),
    }
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return found
    pairs = [line.partition(":") for line in reversed(lines)]  # so that the first processor's counts
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    found["processor"] = fields.get("model name") or fields.get("CPU part") or found["processor"]
    flags = " ".join(sorted((fields.get("flags") or fields.get("Features") or "").split()))
    return {**found, "processor flags": hashlib.sha256(flags.encode()).hexdigest()[:12]}
