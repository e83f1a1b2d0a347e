"""The kernels as functions of tensors. Every tensor is dense, on the CPU and of one type, which `served` checks.

Legend: T tokens of a stream, D width, H heads, K key-value heads, E width of a head, P groups, B completions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from coterie.fast.kernels.build import library
from coterie.fast.kernels.structs import Attention

MOST_WIDTH = 512  # of a head with rotary positions: kernels.h has arrays of this size
_NO_MEMORY, _NO_ROOM = 1, 2
_long, _pointer, _double = ctypes.c_long, ctypes.c_void_p, ctypes.c_double


def served(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these: of one type that there are kernels for, on the CPU."""
    first = next(x for x in tensors if x is not None)
    alike = all(x is None or (x.dtype == first.dtype and x.device.type == "cpu") for x in tensors)
    return alike and library(first.dtype) is not None


def rope_fits(width: int) -> bool:
    """Whether heads of this width can have rotary positions: an even number, up to what the kernels have arrays for."""
    return width <= MOST_WIDTH and width % 2 == 0


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x [T, D], weight [D] -> the normalised rows times the weight, and what each row was multiplied with, [T]."""
    out, scale = torch.empty_like(x), x.new_empty(len(x))
    _call("rms_norm_forward", x, weight, _double(epsilon), out, scale, *x.shape)
    return out, scale


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and the weight."""
    grad_x, grad_weight, room = torch.empty_like(x), torch.empty_like(weight), _rooms(x, len(weight))
    _call("rms_norm_backward", grad, x, weight, scale, grad_x, grad_weight, room, *x.shape)
    return grad_x, grad_weight


def rope(x: Tensor, weight: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
    """Heads normalised, where there is a weight [E], and rotated by their positions: x [T, H * E], cos and sin [T, E], sin
    negative in the first half -> [T, H * E], and what each head was multiplied with, [T, H]."""
    tokens, width = len(x), cos.shape[1]
    heads = x.shape[1] // width
    out, scale = torch.empty_like(x), x.new_empty(tokens, heads) if weight is not None else None
    _call("rope_forward", x, weight, _double(epsilon), cos, sin, out, scale, tokens, heads, width)
    return out, scale


def rope_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and the weight."""
    tokens, width = len(x), cos.shape[1]
    heads, grad_x = x.shape[1] // width, torch.empty_like(x)
    grad_weight = torch.empty_like(weight) if weight is not None else None
    room = _rooms(x, width)
    _call("rope_backward", grad, x, weight, cos, sin, scale, grad_x, grad_weight, room, tokens, heads, width)
    return grad_x, grad_weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    out = torch.empty_like(gate)
    _call("swiglu_forward", gate, up, out, gate.numel())
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    _call("swiglu_backward", grad, gate, up, grad_gate, grad_up, gate.numel())
    return grad_gate, grad_up


@dataclass(frozen=True)
class Groups:
    """A stream's groups as the kernels read them: where each starts, the length of its prompt, which rows are its, and the
    length of each row."""

    tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    longest: int

    @classmethod
    def of(cls, segments: Sequence[tuple[int, Sequence[int]]]) -> Groups:
        sizes = [prompt + sum(lengths) for prompt, lengths in segments]
        starts, counts = accumulate(sizes[:-1], initial=0), accumulate((len(c) for _, c in segments), initial=0)
        lists = (starts, (prompt for prompt, _ in segments), counts, (n for _, lengths in segments for n in lengths))
        longest = max(prompt + max(lengths, default=0) for prompt, lengths in segments)
        starts, prompts, rows, lengths = (torch.tensor(list(values), dtype=torch.int64) for values in lists)
        return cls((starts, prompts, rows, lengths), longest)


def attend(
    groups: Groups, q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """q [T, H, E], k and v [T, K, E] -> what each token attends to, [T, H, E], and the logarithm of its normaliser, [T, H]."""
    out, normaliser = torch.empty_like(q), q.new_empty(q.shape[:2])
    _call("attend_forward", _about(groups, q, k, scaling, window), q, k, v, out, normaliser)
    return out, normaliser


def attend_backward(
    groups: Groups, saved: Sequence[Tensor], grad: Tensor, scaling: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v. saved: q, k, v and what `attend` returned."""
    q, k, v, _, _ = saved
    found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _call("attend_backward", _about(groups, q, k, scaling, window), *saved, grad, *found)
    return found


def _about(groups: Groups, q: Tensor, k: Tensor, scaling: float, window: int | None) -> Attention:
    (tokens, heads, width), arrays = q.shape, [x.data_ptr() for x in groups.tensors]
    return Attention(
        tokens, len(groups.tensors[0]), heads, k.shape[1], width, window or 0, groups.longest, scaling, *arrays
    )


def _rooms(x: Tensor, width: int) -> Tensor:
    """What each thread adds up in by itself."""
    found = library(x.dtype)
    assert found is not None
    return x.new_empty(found.max_threads(), width)


def run(function: Callable[..., int | None], *arguments: object) -> None:
    """Call a kernel. MemoryError where it finds none; AssertionError for sizes that it would overrun."""
    state = function(*arguments)
    if state == _NO_MEMORY:
        raise MemoryError("a compiled loop can't allocate memory for its keys and values")
    assert state != _NO_ROOM, "a compiled loop was handed sizes that it has no room for"


def _call(name: str, *arguments: Tensor | int | ctypes.Structure | ctypes._SimpleCData | None) -> None:
    """A kernel of the first tensor's type."""
    found = library(next(x.dtype for x in arguments if isinstance(x, Tensor)))
    assert found is not None
    run(getattr(found, name), *map(_as_argument, arguments))


def _as_argument(x: Tensor | int | ctypes.Structure | ctypes._SimpleCData | None) -> object:
    if isinstance(x, Tensor):
        assert x.is_contiguous()
        return _pointer(x.data_ptr())
    if isinstance(x, ctypes.Structure):
        return ctypes.byref(x)
    return _long(x) if isinstance(x, int) else x
