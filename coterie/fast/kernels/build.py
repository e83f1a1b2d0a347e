"""Compiles the loops with the machine's own C compiler, once, and loads them.

What was compiled is kept under a name that ends in its own hash, so that a file that was cut short or changed is built again and
never loaded. Before it gets that name, another process has tried it: a build that does not fit the machine dies of a signal.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

_HERE = Path(__file__).parent
SOURCES = sorted(_HERE.glob("*.c"))
SWITCH = "COTERIE_KERNELS"  # an environment variable: off does without
_TRIAL = _HERE / "structs.py"
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-w")
_TYPES = {torch.float32: ("-DDOUBLE=0", "sgemm_"), torch.float64: ("-DDOUBLE=1", "dgemm_")}
_missing: dict[torch.dtype, str] = {}


class _UnbuiltError(Exception):
    """Why there are no kernels, in words for a person."""


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled kernels for a type of number, or None: `why_missing` says why."""
    if dtype not in _TYPES:
        return None
    try:
        return ctypes.CDLL(str(_built(dtype)))
    except (OSError, _UnbuiltError) as error:
        _missing[dtype] = str(error)
        return None


def why_missing(dtype: torch.dtype) -> str | None:
    """Why there are no kernels for a type of number that there could be some for; None where there are."""
    return _missing.get(dtype) if library(dtype) is None else None


@cache
def matrix_product(dtype: torch.dtype) -> int | None:
    """The address of the BLAS product that torch itself was built with, where it can be found."""
    name = _TYPES[dtype][1]
    for path in Path(torch.__file__).with_name("lib").glob("libtorch_cpu.*"):
        found = getattr(ctypes.CDLL(str(path)), name, None)
        if found is not None:
            return ctypes.cast(found, ctypes.c_void_p).value
    return None


def _built(dtype: torch.dtype) -> Path:
    """The file of a build that is whole, made now if there is none."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false"):
        raise _UnbuiltError(f"{SWITCH} is {os.environ[SWITCH]}")
    compiler = shutil.which("cc")
    if compiler is None:
        raise _UnbuiltError("no C compiler (cc) was found")
    command = [compiler, _TYPES[dtype][0], *_FLAGS, *map(str, SOURCES)]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    texts = [file.read_text() for file in (*SOURCES, *sorted(_HERE.glob("*.h")))]
    about = "\0".join([*command, *texts, version, _processor()])
    name = f"kernels-{hashlib.sha256(about.encode()).hexdigest()[:24]}"
    folder = _folder()
    for file in sorted(folder.glob(f"{name}-*.so")):
        if file.stem == f"{name}-{_hash(file)}":
            return file
        file.unlink(missing_ok=True)
    return _compile(command, folder, name, torch.finfo(dtype).bits // 8)


def _compile(command: list[str], folder: Path, name: str, num_bytes: int) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        part = Path(aside) / "kernels.so"
        try:
            subprocess.run([*command, "-o", str(part), "-lm"], check=True, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            raise _UnbuiltError("the C compiler did not come to an end in 120 seconds") from None
        except subprocess.CalledProcessError as error:
            said = next((line for line in error.stderr.splitlines() if "error" in line), "it gives no reason")
            raise _UnbuiltError(f"the C compiler (cc, which needs OpenMP) failed: {said}") from None
        _try_out(part, num_bytes)
        with part.open("rb") as written:
            os.fsync(written.fileno())
        return part.replace(folder / f"{name}-{_hash(part)}.so")


def _try_out(built: Path, num_bytes: int) -> None:
    """Run a few numbers through a build, in another process."""
    command = [sys.executable, "-I", str(_TRIAL), str(built), str(num_bytes)]
    try:
        trial = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise _UnbuiltError("what the C compiler built hangs") from None
    if trial.returncode < 0:
        raise _UnbuiltError(f"what the C compiler built dies of {signal.Signals(-trial.returncode).name}")
    if trial.returncode:
        said = (trial.stderr.strip().splitlines() or ["it gives no reason"])[-1]
        raise _UnbuiltError(f"what the C compiler built does not pass its trial: {said}")


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:24]


def _folder() -> Path:
    """Where what was compiled is kept: a folder of the user's that nobody else can write to, or else one of this process's."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coterie"
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = home.stat()
        if about.st_uid == os.getuid() and not about.st_mode & 0o022 and os.access(home, os.W_OK):
            return home
    except OSError:
        pass
    return Path(_own_folder().name)


@cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="coterie-")


def _processor() -> str:
    """The features of the processor, which `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
