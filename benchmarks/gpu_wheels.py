"""What a machine with a GPU and no network lacks, as wheels in a folder: `python benchmarks/gpu.py --collect-wheels FOLDER`.

It has Python 3.12, torch, triton, transformers, peft and what they need, pyarrow, pandas, typer, rich, sympy, pytest and hypothesis.
These are the other packages that coterie and its tests import, for Python 3.12 on Linux; about 20 MB.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PACKAGES = (
    "pydantic", "pydantic-core", "typing-inspection", "annotated-types", "plotly", "httpx", "math-verify",
    "latex2sympy2-extended", "py3langid", "datasets", "dill", "multiprocess", "trl==1.16.0",
)  # fmt: skip
FROM_SOURCE = ("antlr4-python3-runtime==4.13.2",)  # pure Python, of which some indexes have no wheel
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MOST_MEGABYTES = 50


def commands(folder: Path) -> list[list[str]]:
    """What is run, through the index that pip is set up with."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    where = [word for platform in PLATFORMS for word in ("--platform", platform)]
    target = ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp", *where]
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    return [[*download, *target, *PACKAGES], [*wheel, *FROM_SOURCE]]


def collect(folder: Path) -> None:
    """Fill the folder, and say how large it is and how the wheels are installed. SystemExit where it is too large to carry."""
    folder.mkdir(parents=True, exist_ok=True)
    for command in commands(folder):
        subprocess.run(command, check=True)
    wheels = sorted(folder.glob("*.whl"))
    megabytes = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(f"{len(wheels)} wheels, {megabytes:.1f} MB in {folder}")
    print(f"there: python -m pip install --no-index --no-deps --target site {folder}/*.whl; PYTHONPATH=site:. ...")
    if megabytes > MOST_MEGABYTES:
        raise SystemExit(f"more than {MOST_MEGABYTES} MB")
