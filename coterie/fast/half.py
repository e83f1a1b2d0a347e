"""Mixed precision: products of bfloat16 numbers. On a CPU that has them in compiled loops, with what stands between two of them in
bfloat16; weights, norms, rotary positions, attention, the residual stream and log-probabilities in float32. Elsewhere what autocast leaves
to be done: logits that are not rounded, and weights that are rounded once and not for every token.

Legend: T tokens of a stream, D width, F width of the gated layer, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from coterie.fast.kernels.build import library
from coterie.fast.kernels.calls import call

_MANY = 1 << 18  # numbers of a weight that is put where there is room
_ROOM = 1 << 25  # numbers that there is made room for at once


@cache
def has_half_products() -> bool:
    """Whether this processor has products of bfloat16 numbers that are compiled here: those of AVX512-BF16 or AMX."""
    compiled = library(torch.float32)
    return compiled is not None and bool(compiled.half_kind())


def half_gemms() -> list[int | None]:
    """The addresses of what decoding calls for its products: those between layers, rounded to bfloat16, and for logits, which are not."""
    compiled = library(torch.float32)
    names = ("half_gemm", "half_gemm_unrounded")
    return [ctypes.cast(getattr(compiled, name), ctypes.c_void_p).value for name in names]


class Halves:
    """The bfloat16 copies of weights, each made again after the weight has changed."""

    def __init__(self) -> None:
        self._rounded, self._packed = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self._room = torch.empty(0, dtype=torch.bfloat16)  # for what is packed next

    def __deepcopy__(self, memo: dict[int, Any]) -> Halves:
        """Of other weights, which have none yet."""
        return Halves()

    def rounded(self, *weights: Tensor) -> Tensor:
        """Weights of layers that read the same, [out, in] each, one below the other: [sum of out, in]."""
        return _up_to_date(self._rounded, weights, _rounded)

    def packed(self, weight: Tensor) -> Tensor:
        """[out, in] as compiled products read it."""
        return _up_to_date(self._packed, (weight,), self._pack)

    def forget_packed(self, weights: Iterable[Tensor]) -> None:
        for weight in weights:
            self._packed.pop(weight, None)

    def product(self, x: Tensor, weights: Sequence[Any], biases: Sequence[Tensor | None]) -> Tensor:
        """The outputs of such layers side by side: x [T, in] in bfloat16 -> [T, sum of out], in bfloat16."""
        weight, given = self.rounded(*weights).t(), [bias for bias in biases if bias is not None]
        if len(given) == len(biases):
            return torch.addmm(self.rounded(*given), x, weight)
        out = x @ weight
        for bias, part in zip(biases, out.split([len(weight) for weight in weights], 1), strict=True):
            if bias is not None:
                part += self.rounded(bias)
        return out

    def _pack(self, weights: Sequence[Tensor], into: Tensor | None) -> Tensor:
        (weight,) = weights
        if into is None:
            compiled = library(torch.float32)
            assert compiled is not None
            compiled.half_size.restype = ctypes.c_long
            into = self._room_for(compiled.half_size(*map(ctypes.c_long, weight.shape)))
        call("half_pack", weight.contiguous(), into, *weight.shape)
        return into

    def _room_for(self, size: int) -> Tensor:
        """Memory for so many numbers, in large pages if they are many: to find a small page takes longer than to read it."""
        if size < _MANY:
            return torch.empty(size, dtype=torch.bfloat16)
        if size > len(self._room):
            self._room = torch.empty(max(size, _ROOM), dtype=torch.bfloat16)
            call("half_room", self._room, self._room.nbytes)
        found, self._room = self._room[:size], self._room[size:]
        return found


def _up_to_date(
    copies: Any, weights: Sequence[Tensor], make: Callable[[Sequence[Tensor], Tensor | None], Tensor]
) -> Tensor:
    """What is kept by the first of the weights, made again where any has changed."""
    versions, copy = copies.get(weights[0], (None, None))
    now = [weight._version for weight in weights]
    if versions != now:
        copy = make([weight.detach() for weight in weights], copy)
        copies[weights[0]] = (now, copy)
    found: Tensor = copy
    return found


def _rounded(weights: Sequence[Tensor], into: Tensor | None) -> Tensor:
    sizes = [len(weight) for weight in weights]
    if into is None:
        into = weights[0].new_empty(sum(sizes), *weights[0].shape[1:], dtype=torch.bfloat16)
    for weight, part in zip(weights, into.split(sizes), strict=True):
        part.copy_(weight)
    return into


def product(x: Tensor, packed: Tensor, columns: slice) -> Tensor:
    """Some outputs of a layer with packed weights, in float32 and not rounded: x [T, in] -> [T, columns], the first a multiple of 32."""
    assert columns.start % 32 == 0
    out = x.new_empty(len(x), columns.stop - columns.start)
    call("half_product", x.contiguous(), packed, out, *x.shape, out.shape[1], columns.start)
    return out


def head_product(x: Tensor, weight: Tensor, halves: Halves, columns: slice) -> Tensor:
    """Some outputs of a head, in float32 and not rounded: x [T, in], weight [out, in] -> [T, columns], the first a multiple of 32."""
    if x.device.type == "cpu" and has_half_products():
        return product(x, halves.packed(weight), columns)
    x, rounded = x.to(torch.bfloat16), halves.rounded(weight)[columns].t()
    if x.device.type == "cuda":
        return torch.mm(x, rounded, out_dtype=torch.float32)
    return x.float() @ rounded.float()


@contextmanager
def weights_rounded(model: nn.Module, but: nn.Module | None) -> Iterator[None]:
    """Let the linear layers of a model, but one, hold bfloat16 copies of their weights, which autocast would make in every forward pass:
    in sampling, for every token."""
    modules = [module for module in model.modules() if type(module) is nn.Linear and module is not but]
    places = [(module._parameters, name) for module in modules for name in ("weight", "bias")]
    held = [parameters[name] for parameters, name in places]
    copies = {one: one.detach().to(torch.bfloat16) for one in held if one is not None}  # layers may share a weight
    try:
        for (parameters, name), one in zip(places, held, strict=True):
            parameters[name] = copies[one] if one is not None else None
        yield
    finally:
        for (parameters, name), one in zip(places, held, strict=True):
            parameters[name] = one


def add_half(to: Tensor, x: Tensor) -> None:
    """Add bfloat16 numbers to float32 ones, in place."""
    call("half_add", to, x, to, x.numel())
