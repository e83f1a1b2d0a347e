"""Norms, rotary positions, gates and attention in compiled loops, as one autograd function each.

Legend: T tokens of a stream, D width, H heads, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coterie.fast.kernels import calls


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last dimension: x [T, D], weight [D]."""
    assert calls.served(x, weight)
    return _CompiledNorm.apply(x.contiguous(), weight, epsilon)


def rope(x: Tensor, weight: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Each head normalised, where there is a weight [E], and turned by its token's position: x [T, H * E], cos and sin [T, E].

    x * cos + (halves of each head swapped) * sin; the sines of the first halves are negative.
    """
    assert calls.served(x, weight, cos, sin)
    return _CompiledRope.apply(x.contiguous(), weight, epsilon, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    assert calls.served(gate, up)
    return _CompiledSwiglu.apply(gate.contiguous(), up.contiguous())


class CompiledAttention(torch.autograd.Function):
    """Attention over a stream's groups: q [T, H, E], k and v [T, K, E] -> [T, H, E]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: calls.Groups, scaling: float, window: int | None
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, normaliser = calls.attend(groups, q, k, v, scaling, window)
        ctx.save_for_backward(q, k, v, out, normaliser)
        ctx.how = groups, scaling, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        groups, scaling, window = ctx.how
        found = calls.attend_backward(groups, ctx.saved_tensors, grads[0].contiguous(), scaling, window)
        return *found, None, None, None


class _CompiledNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out, scale = calls.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *calls.rms_norm_backward(grads[0].contiguous(), *ctx.saved_tensors), None


class _CompiledRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor) -> Tensor:
        out, scale = calls.rope(x, weight, epsilon, cos, sin)
        ctx.save_for_backward(x if weight is not None else None, weight, cos, sin, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, *others = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x, grad_weight = calls.rope_backward(grad, x if x is not None else grad, *others)
        return grad_x, grad_weight, None, None, None


class _CompiledSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return calls.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return calls.swiglu_backward(grads[0].contiguous(), *ctx.saved_tensors)
