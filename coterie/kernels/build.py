"""Compiles kernels.c with the machine's own C compiler, once, and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-w")
_TYPES = {torch.float32: ("-DDOUBLE=0", "sgemm_"), torch.float64: ("-DDOUBLE=1", "dgemm_")}


@cache
def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled kernels for a type of number, or None where there is no compiler, or not one that can."""
    if dtype not in _TYPES or not (compiler := shutil.which("cc")):
        return None
    command = [compiler, _TYPES[dtype][0], *_FLAGS, str(SOURCE)]
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    name = hashlib.sha256("\0".join([*command, SOURCE.read_text(), version, _processor()]).encode()).hexdigest()[:24]
    built = _folder() / f"kernels-{name}.so"
    try:
        if not built.exists():
            _compile(command, built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError):
        return None


@cache
def matrix_product(dtype: torch.dtype) -> int | None:
    """The address of the BLAS product that torch itself was built with, where it can be found."""
    name = _TYPES[dtype][1]
    for path in Path(torch.__file__).with_name("lib").glob("libtorch_cpu.*"):
        found = getattr(ctypes.CDLL(str(path)), name, None)
        if found is not None:
            return ctypes.cast(found, ctypes.c_void_p).value
    return None


def _compile(command: list[str], built: Path) -> None:
    with tempfile.TemporaryDirectory(dir=built.parent) as aside:
        part = Path(aside) / built.name
        subprocess.run([*command, "-o", str(part), "-lm"], check=True, capture_output=True, timeout=120)
        part.replace(built)


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
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
