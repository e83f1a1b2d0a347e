"""Checkpoints that hold everything the next step depends on, and that can't lie about it.

The state is copied, and training goes on while the copy is written: aside, each file hashed and synced, then renamed. On the way
back every file is compared with the manifest; a folder that is not whole is named, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.errors import UserError

MANIFEST = "manifest.json"
_LEFT = (".writing", ".replaced", ".deleting")
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


@dataclass(frozen=True)
class Snapshot:
    """A copy of what a checkpoint holds: tensors by file, and the position."""

    position: Position
    tensors: Mapping[str, dict[str, Tensor]]
    numbers: Mapping[str, float]

    @classmethod
    def of(cls, position: Position, state: TrainState) -> Snapshot:
        """Copies, on the CPU: the state may change while they are written."""
        tensors = {name: _parameters(model) for name, model in state.models.items()}
        tensors |= {name: _optimiser_tensors(model, opt) for name, (model, opt) in state.optimisers.items()}
        return cls(position, tensors, dict(state.numbers))

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for of_file in self.tensors.values() for tensor in of_file.values())


def write_checkpoint(folder: Path, snapshot: Snapshot) -> Path:
    """Write `folder/NAME`, whole or not at all. A checkpoint of that name is replaced. OSError says what space was needed."""
    name = snapshot.position.name
    final, aside, replaced = folder / name, folder / f".{name}.writing", folder / f".{name}.replaced"
    for left in (aside, replaced):
        shutil.rmtree(left, ignore_errors=True)
    try:
        _write_files(aside, snapshot)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{error}; {_space(folder, snapshot)}") from error
    if final.exists():
        final.rename(replaced)
    aside.rename(final)
    _sync(folder)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


def _write_files(aside: Path, snapshot: Snapshot) -> None:
    aside.parent.mkdir(exist_ok=True)  # a run folder that is gone is not made anew
    aside.mkdir()
    manifest = {
        f"{name}.safetensors": _write(aside / f"{name}.safetensors", of) for name, of in snapshot.tensors.items()
    }
    position = {**asdict(snapshot.position), "numbers": snapshot.numbers, "files": list(snapshot.tensors)}
    manifest["position.json"] = _write(aside / "position.json", position)
    _write(aside / MANIFEST, manifest)
    _sync(aside)


def _write(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write tensors, or JSON, and bring them to the disk. Returns what the manifest says of the file."""
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        file.write_text(json.dumps(content, indent=1))
    _sync(file)
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _space(folder: Path, snapshot: Snapshot) -> str:
    """What a save needs and what is there."""
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free"
    except OSError as error:
        free = f"the free space is unknown: {error.strerror}"
    earlier = sorted(path.name for path in folder.glob("[!.]*")) if folder.is_dir() else []
    kept = f"; earlier checkpoints are untouched: {', '.join(earlier)}" if earlier else ""
    return f"this save needs {snapshot.num_bytes / 1e6:,.1f} MB, and {free}{kept}"


def load_checkpoint(path: Path, state: TrainState, *, checked: bool = False) -> None:
    """Put what a checkpoint holds in place: all that `state` names. UserError where it is damaged or lacks something.

    checked: it was compared with its manifest already, as `find_checkpoint` does.
    """
    wrong = None if checked else _damage(path)
    for name in (*state.models, *state.optimisers):
        if wrong is None and not (path / f"{name}.safetensors").is_file():
            wrong = f"{name}.safetensors is missing"
    if wrong is not None:
        raise UserError(f"{path}: {wrong}")
    with torch.no_grad():
        for name, model in state.models.items():
            tensors = load_file(path / f"{name}.safetensors")
            for key, parameter in model.named_parameters():
                if key not in tensors or tensors[key].shape != parameter.shape:
                    raise UserError(
                        f"{path}: {name}.safetensors does not fit the model at {key}; it is of another model"
                    )
                parameter.copy_(tensors[key])
    for name, (model, optimiser) in state.optimisers.items():
        slots: dict[str, dict[str, Tensor]] = {}  # by parameter; a checkpoint of the very start has none
        for place, value in load_file(path / f"{name}.safetensors").items():
            key, _, slot = place.rpartition("/")
            slots.setdefault(key, {})[slot] = value
        for key, parameter in model.named_parameters():
            if key in slots:
                optimiser.state[parameter] = {slot: value.to(parameter.device) for slot, value in slots[key].items()}
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
        except _UNREADABLE:
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


def prune_checkpoints(folder: Path, keep_last: int, best_steps: Collection[int] = ()) -> list[str]:
    """Delete all but the newest `keep_last`, the `best_steps`, and the start of their stage, which a reference or an adapter
    stands on. Returns what can't be deleted, and why."""
    whole = {}
    for path in folder.iterdir():
        if path.name.startswith("."):
            if path.suffix in _LEFT:  # by a save that was interrupted
                shutil.rmtree(path, ignore_errors=True)
            continue
        with contextlib.suppress(*_UNREADABLE):  # a damaged one is kept, to be looked at
            whole[path] = _position(path)
    in_order = sorted(whole, key=lambda path: whole[path].order)
    kept = {Position(whole[path].stage, 0).name for path in in_order[-keep_last:]}
    kept |= {Position(STAGES[-1], step).name for step in best_steps}
    undeleted = []
    for path in in_order[:-keep_last]:
        if path.name not in kept:
            try:  # renamed first, so that one that is half deleted is not taken for a damaged checkpoint
                shutil.rmtree(path.rename(path.with_name(f".{path.name}.deleting")))
            except OSError as error:
                undeleted.append(f"{path}: {error.strerror}")
    return undeleted


def _parameters(model: Trained) -> dict[str, Tensor]:
    return {name: _copy(parameter) for name, parameter in model.named_parameters()}


def _optimiser_tensors(model: Trained, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as `parameter/slot` -> tensor."""
    return {
        f"{name}/{slot}": _copy(value)
        for name, parameter in model.named_parameters()
        for slot, value in optimiser.state.get(parameter, {}).items()
    }


def _copy(tensor: Tensor) -> Tensor:
    copied = tensor.detach().to("cpu", copy=True)
    return copied.contiguous()


def _position(path: Path) -> Position:
    stored = _json_of(path / "position.json")
    position = Position(stored["stage"], stored["step"], stored["seconds"])
    if position.stage not in STAGES or not isinstance(position.step, int):
        raise ValueError(position)
    return position


def _json_of(file: Path) -> Any:
    """What a plain file holds: to read anything else may take for ever."""
    if not file.is_file():
        raise OSError(f"{file.name} is no file")
    return json.loads(file.read_text())


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = _json_of(path / MANIFEST)
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except _UNREADABLE as error:
        return f"{MANIFEST} is missing or unreadable: {error}"
    try:
        written = [f"{name}.safetensors" for name in _json_of(path / "position.json").get("files", ())]
    except _UNREADABLE as error:
        return f"position.json is missing or unreadable: {error}"
    for name in (*written, "model.safetensors", "optimiser.safetensors", "position.json"):
        if name not in expected:
            return f"{MANIFEST} does not name {name}"
    wrongs = ((name, _damage_of(path / name, *expected[name])) for name in expected)
    return next((f"{name} {wrong}" for name, wrong in wrongs if wrong is not None), None)


def _damage_of(file: Path, size: object, sha256: object) -> str | None:
    """What is wrong with one file, or None."""
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != size:
        return f"has {file.stat().st_size} bytes instead of {size}"
    try:
        return None if _sha256(file) == sha256 else "was changed: its sha256 differs from the manifest"
    except OSError as error:  # a bad sector, or a file that this user may not read
        return f"can't be read: {error.strerror}"


_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)  # a JSON file that is not ours


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
