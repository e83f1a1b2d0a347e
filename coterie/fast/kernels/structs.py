"""The structs that kernels.c takes, and a trial of a build: `python structs.py FILE BYTES` in a process of its own.

A build may be damaged, or made for another processor. Then it dies of a signal, which only another process survives. Nothing but
the standard library is imported here, so a trial takes a moment.
"""

from __future__ import annotations

import ctypes
import sys

_long, _pointer, _double = ctypes.c_long, ctypes.c_void_p, ctypes.c_double
_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class Stream(ctypes.Structure):
    _fields_ = [
        *((name, _long) for name in ("tokens", "num_groups", "heads", "kv_heads", "width", "window", "longest")),
        ("scaling", _double),
        *((name, _pointer) for name in ("starts", "prompts", "rows", "lengths")),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, _pointer) for name in ("before_attention", "before_mlp", "q_norm", "k_norm")),
        *((name, _pointer) for name in _PROJECTIONS),
        *((f"{name}_bias", _pointer) for name in _PROJECTIONS),
        *((name, _double) for name in ("epsilon_attention", "epsilon_mlp", "epsilon_q", "epsilon_k", "scaling")),
        ("window", _long),
    ]


class Cache(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in ("keys", "values", "prompt_keys", "prompt_values")]


class Step(ctypes.Structure):
    _fields_ = [
        *((name, _long) for name in ("num_layers", "rows", "width", "heads", "kv_heads", "head_width", "mlp_width")),
        *((name, _long) for name in ("vocabulary", "positions", "columns", "now", "slots", "longest_prompt")),
        *((name, _long) for name in ("num_steps", "max_tokens", "num_ends", "draws", "greedy")),
        *((name, _double) for name in ("epsilon", "temperature")),
        *((name, _pointer) for name in ("embeddings", "final_norm", "head", "head_bias", "cosine", "sine")),
        *((name, _pointer) for name in ("firsts", "starts", "prompts", "keys", "ends", "live", "logits", "tokens")),
        *((name, _pointer) for name in ("logprobs", "entropies", "was_live", "ended", "gemm")),
    ]


class _Field(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("place", _long), ("size", _long)]


def check_layout(library: ctypes.CDLL) -> None:
    """AssertionError where the compiler lays a struct out in another way than it is filled in here."""
    library.fields.restype = ctypes.POINTER(_Field)
    theirs, number = {}, 0
    while (field := library.fields()[number]).name is not None:
        theirs[field.name.decode()] = (field.place, field.size)
        number += 1
    ours = {}
    for struct in (Stream, Layer, Cache, Step):
        ours[struct.__name__] = (-1, ctypes.sizeof(struct))
        for name, *_ in struct._fields_:
            ours[f"{struct.__name__}.{name}"] = (getattr(struct, name).offset, getattr(struct, name).size)
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    assert not differing, f"kernels.c and structs.py differ in {', '.join(differing)}"


def _try_out(path: str, num_bytes: int) -> None:
    """Norms, gates and attention of a few numbers: AssertionError where they are not what they should be, or a signal."""
    library = ctypes.CDLL(path)
    check_layout(library)
    real = ctypes.c_float if num_bytes == 4 else ctypes.c_double

    def array(values: list[float]) -> ctypes.Array[ctypes.c_float] | ctypes.Array[ctypes.c_double]:
        return (real * len(values))(*values)

    def close(found: ctypes.Array[ctypes.c_float] | ctypes.Array[ctypes.c_double], wanted: list[float]) -> bool:
        return all(abs(a - b) <= 1e-4 for a, b in zip(found, wanted, strict=True))

    rows, width = 40, 256  # enough for more than one thread
    x, out, scale = array([2.0] * rows * width), array([0.0] * rows * width), array([0.0] * rows)
    library.norm_forward(x, array([3.0] * width), _double(0.0), out, scale, _long(rows), _long(width))
    assert close(out, [3.0] * rows * width), "norm"
    library.swiglu_forward(array([0.0] * rows * width), x, out, _long(rows * width))
    assert close(out, [0.0] * rows * width), "gate"
    prompt, length = 30, 10
    counts = [(ctypes.c_int64 * len(values))(*values) for values in ([0], [prompt], [0, 1], [length])]
    places = [ctypes.addressof(values) for values in counts]
    stream = Stream(rows, 1, 2, 1, width // 2, 0, prompt + length, 1.0, *places)
    keys, values = array([1.0] * rows * (width // 2)), array([5.0] * rows * (width // 2))
    state = library.attend_forward(ctypes.byref(stream), x, keys, values, out, array([0.0] * rows * 2))
    assert state == 0, "memory"
    assert close(out, [5.0] * rows * width), "attention"


if __name__ == "__main__":
    _try_out(sys.argv[1], int(sys.argv[2]))
