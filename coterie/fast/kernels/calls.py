"""Calls of the kernels, with tensors that are dense, on the CPU and of one type, which `served` checks.

Legend: T tokens of a stream, H heads, K key-value heads, E width of a head.
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


def served(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these: of one type that there are kernels for, on the CPU."""
    first = next(x for x in tensors if x is not None)
    alike = all(x is None or (x.dtype == first.dtype and x.device.type == "cpu") for x in tensors)
    return alike and library(first.dtype) is not None


def rope_fits(width: int) -> bool:
    """Whether heads of this width can have rotary positions: an even number, up to what the kernels have arrays for."""
    return width <= MOST_WIDTH and width % 2 == 0


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

    def about(self, q: Tensor, k: Tensor, scaling: float, window: int | None) -> Attention:
        """The sizes and places that attention is told beside its tensors: q [T, H, E], k [T, K, E]."""
        (tokens, heads, width), places = q.shape, [x.data_ptr() for x in self.tensors]
        sizes = (tokens, len(self.tensors[0]), heads, k.shape[1], width)
        return Attention(*sizes, window or 0, self.longest, scaling, *places)


def rooms(x: Tensor, width: int) -> Tensor:
    """Room for each thread to add up in by itself: [threads, width]."""
    found = library(x.dtype)
    assert found is not None
    return x.new_empty(found.max_threads(), width)


def run(function: Callable[..., int | None], *arguments: object) -> None:
    """Call a kernel. MemoryError where it finds none; AssertionError for sizes that it would overrun."""
    state = function(*arguments)
    if state == _NO_MEMORY:
        raise MemoryError("a compiled loop can't allocate memory for its keys and values")
    assert state != _NO_ROOM, "a compiled loop was handed sizes that it has no room for"


def call(name: str, *arguments: Tensor | float | ctypes.Structure | None) -> None:
    """A kernel of the first tensor's type, with tensors, sizes (int) and numbers (float) in the order that it declares. Those of mixed
    precision are among the ones of float32."""
    dtype = next(x.dtype for x in arguments if isinstance(x, Tensor))
    found = library(torch.float32 if dtype is torch.bfloat16 else dtype)
    assert found is not None
    run(getattr(found, name), *map(_as_argument, arguments))


def _as_argument(x: Tensor | float | ctypes.Structure | None) -> object:
    if isinstance(x, Tensor):
        assert x.is_contiguous()
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, ctypes.Structure):
        return ctypes.byref(x)
    if x is None:
        return None
    return ctypes.c_long(x) if isinstance(x, int) else ctypes.c_double(x)
