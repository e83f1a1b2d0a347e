"""Where a run is: by its folder, or by its bare name for `runs/NAME`. Only paths are looked at, so this is done at once."""

from __future__ import annotations

from pathlib import Path

from coterie.errors import UserError, closest

RUNS = Path("runs")


def is_run(folder: Path) -> bool:
    """Whether training has written this folder: its recipe, and beside it what it recorded or saved."""
    recorded = (folder / "run.db").is_file() or (folder / "checkpoints").is_dir()
    return recorded and (folder / "recipe.yaml").is_file()


def find_run(name: str) -> Path | None:
    """The folder of a run: the one of that name, or for a bare name runs/NAME. None where there is no run, or a model is."""
    bare = len(Path(name).parts) == 1 and "/" not in name and not (Path(name) / "config.json").is_file()
    for folder in (Path(name), *([RUNS / name] if bare else [])):
        if is_run(folder):
            return folder
    return None


def run_at(name: str, what: str) -> Path:
    """As `find_run`. UserError, which begins with `what`, where there is no run; it names the run that may be meant."""
    found = find_run(name)
    if found is not None:
        return found
    path = Path(name)
    if path.is_dir():
        reason = "is a folder, and no run is there"
    else:
        reason = "is a file, and no run" if path.exists() else "no run is there"
    meant = _run_like(path)
    raise UserError(f"{what} {name}: {reason}" + (f"; did you mean {meant}?" if meant else ""))


def _run_like(path: Path) -> Path | None:
    """The run that a path lies in, or that is called like it."""
    around = next((folder for folder in path.parents if is_run(folder)), None)
    if around is not None:
        return around
    runs = {folder.name: folder for folder in sorted(RUNS.glob("*")) if is_run(folder)}
    for called in (
        path.name,
        path.stem,
        path.parent.name,
    ):  # runs are called like the recipe's file, or like its folder
        close = closest(called, runs, cutoff=0.7)
        if close:
            return runs[close]
    return None
