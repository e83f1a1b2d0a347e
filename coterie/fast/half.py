"""Mixed precision: products of bfloat16 numbers. On a CPU that has them in compiled loops, with what stands between two of them in
bfloat16; weights, norms, rotary positions, attention, the residual stream and log-probabilities in float32. Elsewhere what autocast leaves
to be done: logits that are not rounded, and weights that are rounded once and not for every token.

Legend: T tokens of a stream, D width, F width of the gated layer, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from coterie.fast.kernels.build import library
from coterie.fast.kernels.calls import call


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

    def __deepcopy__(self, memo: dict[int, Any]) -> Halves:
        """Of other weights, which have none yet."""
        return Halves()

    def rounded(self, weight: Tensor) -> Tensor:
        """A weight's own shape."""
        return _up_to_date(self._rounded, weight, _rounded)

    def packed(self, weight: Tensor) -> Tensor:
        """[out, in] as compiled products read it."""
        return _up_to_date(self._packed, weight, _packed)


def _up_to_date(copies: Any, weight: Tensor, make: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
    version, copy = copies.get(weight, (None, None))
    if version != weight._version:
        copy = make(weight.detach(), copy)
        copies[weight] = (weight._version, copy)
    found: Tensor = copy
    return found


def _rounded(weight: Tensor, into: Tensor | None) -> Tensor:
    return weight.to(torch.bfloat16) if into is None else into.copy_(weight)


def _packed(weight: Tensor, into: Tensor | None) -> Tensor:
    out, of = weight.shape
    if into is None:
        compiled = library(torch.float32)
        assert compiled is not None
        compiled.half_size.restype = ctypes.c_long
        into = torch.empty(compiled.half_size(ctypes.c_long(out), ctypes.c_long(of)), dtype=torch.bfloat16)
    call("half_pack", weight.contiguous(), into, out, of)
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


def linears(x: Tensor, modules: Sequence[nn.Linear], halves: Halves) -> tuple[Tensor, ...]:
    """The outputs of layers that read the same: x [T, in] -> [T, out] each, all in bfloat16."""
    weights = [parameter for module in modules for parameter in (module.weight, module.bias)]
    return _Linears.apply(x.to(torch.bfloat16), halves, *weights)


class _Linears(torch.autograd.Function):
    """x [T, in], then a weight [out, in] and a bias [out], or None, of each layer -> [T, out] each.

    A weight's gradient is added to what it has from other micro-batches at once, in float32, without an array of its own for each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, halves: Halves, *weights: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.halves = halves
        pairs = zip(weights[::2], weights[1::2], strict=True)
        return tuple(_product(x, halves, weight, bias) for weight, bias in pairs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, *weights = ctx.saved_tensors
        grad_x = torch.zeros(x.shape) if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        for number, grad in enumerate(grads):
            weight = weights[2 * number]
            if grad_x is not None:
                grad_x += grad @ ctx.halves.rounded(weight)
            found += [
                _added(weight, grad.t() @ x) if ctx.needs_input_grad[2 + 2 * number] else None,
                grad.float().sum(0) if ctx.needs_input_grad[3 + 2 * number] else None,
            ]
        return grad_x.to(torch.bfloat16) if grad_x is not None else None, None, *found


def _product(x: Tensor, halves: Halves, weight: Tensor, bias: Tensor | None) -> Tensor:
    rounded = halves.rounded(weight)
    return x @ rounded.t() if bias is None else torch.addmm(halves.rounded(bias), x, rounded.t())


def _added(weight: Tensor, grad: Tensor) -> Tensor | None:
    """A gradient as autograd takes it; or none, and it is added here."""
    if weight.grad is None:
        return grad.float()
    weight.grad += grad
    return None
