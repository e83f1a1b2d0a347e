"""Modules of benchmarks/, which is no package and stays off the path: files of its names are also what users call theirs."""

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


def load(name):
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)
