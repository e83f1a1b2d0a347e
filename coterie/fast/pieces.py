"""Norms, rotary positions and gates as one autograd function each: compiled loops where they serve, tensor operations elsewhere.

Legend: T tokens of a stream, D width, H heads, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.fast.kernels import calls


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last dimension: x [T, D], weight [D]."""
    if calls.served(x, weight):
        return _CompiledNorm.apply(x.contiguous(), weight, epsilon)
    if torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, epsilon)
    return F.rms_norm(x, weight.shape, weight, epsilon)


def turned_heads(x: Tensor, weight: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Each head normalised, where there is a weight [E], and turned by its token's position: x [T, H * E], cos and sin [T, E].

    x * cos + (halves of each head swapped) * sin; the sines of the first halves are negative.
    """
    if calls.turns(cos.shape[1]) and calls.served(x, weight, cos, sin):
        return _CompiledTurn.apply(x.contiguous(), weight, epsilon, cos, sin)
    if weight is not None:
        x = rms_norm(x.view(-1, len(weight)), weight, epsilon).view_as(x)
    width = cos.shape[1]
    cos, sin = (one.repeat(1, x.shape[1] // width) for one in (cos, sin))
    if torch.is_grad_enabled():
        return _Turn.apply(x, cos, sin, width)
    return (x * cos).addcmul_(_swapped(x, width), sin)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if calls.served(gate, up):
        return _CompiledGated.apply(gate.contiguous(), up.contiguous())
    return _Gated.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


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


class _CompiledTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor) -> Tensor:
        out, scale = calls.turn(x, weight, epsilon, cos, sin)
        ctx.save_for_backward(x if weight is not None else None, weight, cos, sin, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, *others = ctx.saved_tensors
        grad = grads[0].contiguous()
        of_x, of_weight = calls.turn_backward(grad, x if x is not None else grad, *others)
        return of_x, of_weight, None, None, None


class _CompiledGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return calls.gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return calls.gated_backward(grads[0].contiguous(), *ctx.saved_tensors)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        scale = torch.rsqrt((x * x).mean(1, keepdim=True).add_(epsilon))
        normal = x * scale
        ctx.save_for_backward(normal, scale, weight)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        normal, scale, weight = ctx.saved_tensors
        of_weight = (grads[0] * normal).sum(0)
        grad = grads[0] * weight
        return (grad.addcmul_(normal, (grad * normal).mean(1, keepdim=True), value=-1)).mul_(scale), of_weight, None


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, width: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.width = width
        return (x * cos).addcmul_(_swapped(x, width), sin)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, sin = ctx.saved_tensors
        return (grads[0] * cos).add_(_swapped(grads[0] * sin, ctx.width)), None, None, None


def _swapped(x: Tensor, width: int) -> Tensor:
    """The halves of each head exchanged: [T, H * E]."""
    return x.view(-1, width).roll(width // 2, 1).view_as(x)


class _Gated(torch.autograd.Function):
    """The gate's activation is computed again in the backward pass, not kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return of_gate, F.silu(gate).mul_(grads[0])
