"""Installed from its wheel, the package has its recipes and trains from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_bundled_recipe_trains_from_the_wheel_in_any_folder(tmp_path, tiny_recipe):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, timeout=120)
    (wheel,) = tmp_path.glob("coterie-*.whl")
    site, home = tmp_path / "site", tmp_path / "home"
    zipfile.ZipFile(wheel).extractall(site)
    home.mkdir()
    assert (site / "coterie" / "recipes" / "equations.yaml").is_file()
    settings = [word for override in tiny_recipe for word in ("--set", override)]
    trained = subprocess.run(
        [sys.executable, "-m", "coterie.cli", "train", "equations", *settings],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert trained.returncode == 0, trained.stderr
    assert (home / "runs" / "equations" / "model" / "model.safetensors").is_file()
    made_by = subprocess.run(
        [sys.executable, "-c", "import coterie; print(coterie.__file__)"],
        cwd=home, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert made_by.stdout.startswith(str(site))
    assert (home / "runs" / "equations" / "report.html").is_file()  # from a template in the wheel
