"""Log-probabilities of a head that is one product, in mixed precision: its softmax is taken of each block of logits as it is computed.

Legend: N tokens, V vocabulary, C columns of it, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from coterie.fast.half import Halves, add_half
from coterie.fast.kernels.calls import call

COLUMNS = 4096  # of the vocabulary, whose gradient is held at a time; a multiple of 32


class HalfLogprobs(torch.autograd.Function):
    """log softmax(head(hidden) / temperature)[targets], [N]: hidden [N, D], weight [V, D], bias [V] or none.

    Products are of bfloat16 numbers, logits and all that is made of them float32; the logits' gradient is rounded before its products.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        halves: Halves,
    ) -> Tensor:
        hidden, logprobs, normaliser = hidden.contiguous(), hidden.new_zeros(len(hidden)), hidden.new_empty(len(hidden))
        inputs, sizes = (hidden, halves.packed(weight), bias, float(temperature), targets), (*hidden.shape, len(weight))
        call("half_head_forward", *inputs, logprobs, normaliser, *sizes)
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        ctx.temperature, ctx.halves = float(temperature), halves
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad, inner = (grads[0] / ctx.temperature).contiguous(), hidden.to(torch.bfloat16)
        packed, rounded = ctx.halves.packed(weight), ctx.halves.rounded(weight)
        grad_hidden = torch.zeros_like(hidden) if of_hidden else None
        # What the weight has from other micro-batches is added to at once
        grad_weight = (weight.grad if weight.grad is not None else torch.zeros_like(weight)) if of_weight else None
        grad_bias = torch.zeros_like(bias) if of_bias else None
        for first in range(0, len(weight), COLUMNS):
            columns = slice(first, min(first + COLUMNS, len(weight)))
            across = inner.new_empty(columns.stop - first, len(hidden))
            logits = inner.new_empty(len(hidden), len(across))
            inputs = (hidden, packed, bias, ctx.temperature, targets, normaliser, grad)
            call("half_head_backward", *inputs, logits, across, *hidden.shape, len(across), first)
            if grad_hidden is not None:
                add_half(grad_hidden, logits @ rounded[columns])
            if grad_weight is not None:
                add_half(grad_weight[columns], across @ inner)
            if grad_bias is not None:
                grad_bias[columns] += across.float().sum(1)
        return grad_hidden, None if grad_weight is weight.grad else grad_weight, grad_bias, None, None, None
