"""The structs of structs.h as Python fills them in, and a trial of a build: `python structs.py FILE BYTES` in a process of its own.

A build may be damaged, or made for another processor. Then it dies of a signal, which only another process survives. Nothing but
the standard library is imported here, so a trial takes a moment.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path
from typing import Any

_long, _double = ctypes.c_long, ctypes.c_double


def _fields_of(struct: str) -> list[tuple[str, Any]]:
    """The names and types of a struct's fields, in the order of structs.h: a long, a double, a layer, or where something lies."""
    header = re.sub(r"/\*.*?\*/", "", Path(__file__).with_name("structs.h").read_text(), flags=re.DOTALL)
    body = re.search(rf"struct \{{([^}}]*)\}} {struct};", header)
    assert body is not None
    by_value = {"long": _long, "double": _double} | ({"Linear": Linear} if struct == "LayerWeights" else {})
    fields = []
    for kind, names in re.findall(r"(\w+) (\*?\w+(?:, \*?\w+)*);", body[1]):
        fields += [(name.strip(" *"), by_value.get(kind, ctypes.c_void_p)) for name in names.split(",")]
    return fields


class Attention(ctypes.Structure):
    _fields_ = _fields_of("Attention")


class Linear(ctypes.Structure):
    _fields_ = _fields_of("Linear")


class LayerWeights(ctypes.Structure):
    _fields_ = _fields_of("LayerWeights")


class LayerCache(ctypes.Structure):
    _fields_ = _fields_of("LayerCache")


class Decoding(ctypes.Structure):
    _fields_ = _fields_of("Decoding")


def _try_out(path: str, num_bytes: int) -> None:
    """Norms, gates and attention of a few numbers: AssertionError where they are not what they should be, or a signal."""
    library = ctypes.CDLL(path)
    real = ctypes.c_float if num_bytes == 4 else ctypes.c_double

    def array(values: list[float]) -> ctypes.Array[Any]:
        return (real * len(values))(*values)

    def close(found: ctypes.Array[Any], wanted: list[float]) -> bool:
        return all(abs(a - b) <= 1e-4 for a, b in zip(found, wanted, strict=True))

    rows, width = 40, 256  # enough for more than one thread
    x, out, scale = array([2.0] * rows * width), array([0.0] * rows * width), array([0.0] * rows)
    library.rms_norm_forward(x, array([3.0] * width), _double(0.0), out, scale, _long(rows), _long(width))
    assert close(out, [3.0] * rows * width), "norm"
    library.swiglu_forward(array([0.0] * rows * width), x, out, _long(rows * width))
    assert close(out, [0.0] * rows * width), "gate"
    prompt, length = 30, 10
    counts = [(ctypes.c_int64 * len(values))(*values) for values in ([0], [prompt], [0, 1], [length])]
    places = [ctypes.addressof(values) for values in counts]
    stream = Attention(rows, 1, 2, 1, width // 2, 0, prompt + length, 1.0, *places)
    keys, values = array([1.0] * rows * (width // 2)), array([5.0] * rows * (width // 2))
    state = library.attend_forward(ctypes.byref(stream), x, keys, values, out, array([0.0] * rows * 2))
    assert state == 0, "memory"
    assert close(out, [5.0] * rows * width), "attention"


if __name__ == "__main__":
    _try_out(sys.argv[1], int(sys.argv[2]))
