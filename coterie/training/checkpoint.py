"""Checkpoints that hold everything the next step depends on, and that can't lie about it.

Written aside, each file hashed and synced, then renamed. On the way back every file is compared with the manifest; a folder
that is not whole is named, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.errors import UserError

MANIFEST = "manifest.json"
STAGES = ("cold_start", "train")


@dataclass(frozen=True)
class Position:
    """Where a run stands: `step` steps of `stage` are done. seconds: how long it has run, all sessions together."""

    stage: str
    step: int
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"step_{self.step:06d}" if self.stage == "train" else f"{self.stage}_{self.step:06d}"

    @property
    def order(self) -> tuple[int, int]:
        return STAGES.index(self.stage), self.step


class Trained(Protocol):
    """A module, or a policy or scorer, which may name the parameters of an adapter alone."""

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...


@dataclass(frozen=True)
class TrainState:
    """All that changes while a run trains.

    models: by file name, the policy's as "model". optimisers: by file name, each with the model it trains. numbers: what
    controllers hold, changed in place.
    """

    models: Mapping[str, Trained]
    optimisers: Mapping[str, tuple[Trained, torch.optim.Optimizer]] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)


def save_checkpoint(folder: Path, position: Position, state: TrainState) -> Path:
    """Write `folder/NAME`, whole or not at all. A checkpoint of that name is replaced."""
    final, aside = folder / position.name, folder / f".{position.name}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for name, model in state.models.items():
        save_file(_parameters(model), aside / f"{name}.safetensors")
    for name, (model, optimiser) in state.optimisers.items():
        save_file(_optimiser_tensors(model, optimiser), aside / f"{name}.safetensors")
    (aside / "position.json").write_text(json.dumps({**asdict(position), "numbers": state.numbers}))
    files = sorted(aside.iterdir())
    manifest = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*files, aside / MANIFEST, aside):
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _sync(folder)
    return final


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Put what a checkpoint holds in place: all that `state` names. UserError where it is damaged or lacks something."""
    wrong = _damage(path)
    for name in (*state.models, *state.optimisers):
        if wrong is None and not (path / f"{name}.safetensors").is_file():
            wrong = f"{name}.safetensors is missing"
    if wrong is not None:
        raise UserError(f"{path}: {wrong}")
    with torch.no_grad():
        for name, model in state.models.items():
            tensors = load_file(path / f"{name}.safetensors")
            for key, parameter in model.named_parameters():
                parameter.copy_(tensors[key])
    for name, (model, optimiser) in state.optimisers.items():
        found = load_file(path / f"{name}.safetensors")
        for key, parameter in model.named_parameters():
            slots = {
                place.rpartition("/")[2]: value for place, value in found.items() if place.rpartition("/")[0] == key
            }
            if slots:  # a checkpoint of the very start has none
                optimiser.state[parameter] = {slot: value.to(parameter.device) for slot, value in slots.items()}
    state.numbers.update(json.loads((path / "position.json").read_text())["numbers"])


def find_checkpoint(folder: Path, report: Callable[[str], None]) -> Position:
    """Where the newest whole checkpoint stands. Damaged ones are reported and passed over; UserError where none is left."""
    damaged = []
    candidates = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith("."):
            continue
        try:
            candidates.append((_position(path), path))
        except (OSError, ValueError, TypeError, KeyError):
            damaged.append(f"{path}: position.json is missing or unreadable")
    for position, path in sorted(candidates, key=lambda item: item[0].order, reverse=True):
        wrong = _damage(path)
        if wrong is None:
            for line in damaged:
                report(f"damaged checkpoint passed over: {line}")
            return position
        damaged.append(f"{path}: {wrong}")
    if damaged:
        raise UserError("no checkpoint is whole:\n" + "\n".join(damaged))
    raise UserError(f"{folder}: there is no checkpoint to resume from")


def prune_checkpoints(folder: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last`, and the start of their stage, which a reference or an adapter stands on."""
    whole = {}
    for path in folder.iterdir():
        if path.name.startswith("."):  # left by a save that was interrupted
            shutil.rmtree(path, ignore_errors=True)
            continue
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # a damaged one is kept, to be looked at
            whole[path] = _position(path)
    in_order = sorted(whole, key=lambda path: whole[path].order)
    starts = {Position(whole[path].stage, 0).name for path in in_order[-keep_last:]}
    for path in in_order[:-keep_last]:
        if path.name not in starts:
            shutil.rmtree(path, ignore_errors=True)


def _parameters(model: Trained) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}


def _optimiser_tensors(model: Trained, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as `parameter/slot` -> tensor."""
    return {
        f"{name}/{slot}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for slot, value in optimiser.state.get(parameter, {}).items()
    }


def _position(path: Path) -> Position:
    stored = json.loads((path / "position.json").read_text())
    position = Position(stored["stage"], stored["step"], stored["seconds"])
    if position.stage not in STAGES or not isinstance(position.step, int):
        raise ValueError(position)
    return position


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is missing or unreadable: {error}"
    for name in ("model.safetensors", "optimiser.safetensors", "position.json"):
        if name not in expected:
            return f"{MANIFEST} does not name {name}"
    for name in expected:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected[name][0]:
            return f"{name} has {file.stat().st_size} bytes instead of {expected[name][0]}"
        if _sha256(file) != expected[name][1]:
            return f"{name} was changed: its sha256 differs from the manifest"
    try:
        load_file(path / "optimiser.safetensors")
    except SafetensorError as error:
        return f"optimiser.safetensors can't be read: {error}"
    return None


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
