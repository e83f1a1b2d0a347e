"""Norms, rotary positions, gates and attention in compiled loops, as one autograd function each.

Legend: T tokens of a stream, D width, H heads, K key-value heads, E width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coterie.fast.kernels.calls import Groups, call, rooms, served


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, *, half: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last dimension: x [T, D], weight [D]. half: in bfloat16, as mixed precision takes it."""
    assert served(x, weight)
    return _RMSNorm.apply(x.contiguous(), weight, epsilon, half)


def rope(x: Tensor, weight: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor) -> Tensor:
    """Each head normalised, where there is a weight [E], and rotated by its token's position: x [T, H * E], cos and sin [T, E].

    x * cos + (halves of each head swapped) * sin; the sines of the first halves are negative.
    """
    assert served(x, weight, cos, sin)
    return _Rope.apply(x.contiguous(), weight, epsilon, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    assert served(gate, up)
    return _Swiglu.apply(gate.contiguous(), up.contiguous())


def attend(q: Tensor, k: Tensor, v: Tensor, groups: Groups, scaling: float, window: int | None) -> Tensor:
    """Attention over a stream's groups: q [T, H, E], k and v [T, K, E] -> [T, H, E]."""
    assert served(q, k, v)
    return _Attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), groups, scaling, window)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, half: bool) -> Tensor:
        out = torch.empty_like(x, dtype=torch.bfloat16 if half else x.dtype)
        scale = x.new_empty(len(x))  # what each row was multiplied with
        call("half_rms_norm_forward" if half else "rms_norm_forward", x, weight, float(epsilon), out, scale, *x.shape)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, scale = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        inputs, outputs = (grads[0].contiguous(), x, weight, scale), (grad_x, grad_weight)
        name = "half_rms_norm_backward" if grads[0].dtype is torch.bfloat16 else "rms_norm_backward"
        call(name, *inputs, *outputs, rooms(x, 2 * len(weight)), *x.shape)
        return grad_x, grad_weight, None, None


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, epsilon: float, cos: Tensor, sin: Tensor) -> Tensor:
        (tokens, width), heads = cos.shape, x.shape[1] // cos.shape[1]
        out, scale = torch.empty_like(x), x.new_empty(tokens, heads) if weight is not None else None
        call("rope_forward", x, weight, float(epsilon), cos, sin, out, scale, tokens, heads, width)
        ctx.save_for_backward(x if weight is not None else None, weight, cos, sin, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, cos, sin, scale = ctx.saved_tensors
        grad = grads[0].contiguous()
        (tokens, width), heads = cos.shape, grad.shape[1] // cos.shape[1]
        grad_x, grad_weight = torch.empty_like(grad), torch.empty_like(weight) if weight is not None else None
        inputs, outputs = (grad, x, weight, cos, sin, scale), (grad_x, grad_weight)
        call("rope_backward", *inputs, *outputs, rooms(grad, width), tokens, heads, width)
        return grad_x, grad_weight, None, None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty_like(gate)
        call("swiglu_forward", gate, up, out, gate.numel())
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        call("swiglu_backward", grads[0].contiguous(), gate, up, grad_gate, grad_up, gate.numel())
        return grad_gate, grad_up


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: Groups, scaling: float, window: int | None
    ) -> Tensor:
        out, normaliser = torch.empty_like(q), q.new_empty(q.shape[:2])
        about = groups.about(q, k, scaling, window)
        call("attend_forward", about, q, k, v, out, normaliser)
        ctx.save_for_backward(q, k, v, out, normaliser)
        ctx.about, ctx.groups = about, groups  # the struct has the addresses of what the groups hold
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors  # read once: a recomputed layer hands them out no second time
        found = [torch.empty_like(x) for x in saved[:3]]
        call("attend_backward", ctx.about, *saved, grads[0].contiguous(), *found)
        return *found, None, None, None
