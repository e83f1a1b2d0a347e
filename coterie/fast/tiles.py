"""Log-probabilities of a head that is one product, a tile of its logits at a time.

Legend: N tokens, C tokens of a tile, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.fast.half import Halves, head_product
from coterie.models.policy import AFTER_HEAD, Policy

# Logits of a tile, and how many of the vocabulary it covers
TILE_LOGITS = {"cpu": (1 << 20, 2048), "cuda": (1 << 24, 8192)}


def plain_head(policy: Policy) -> nn.Linear | None:
    """A policy's head, where it is one product, of float32 weights, and nothing follows it."""
    head, config = policy.model.get_output_embeddings(), policy.model.config.get_text_config()
    follows = any(getattr(config, name, None) is not None for name in AFTER_HEAD)
    plain = type(head) is nn.Linear and head.weight.dtype in (torch.float32, torch.float64)
    plain &= not policy.mixed or getattr(policy, "halves", None) is not None
    return head if plain and not follows and policy.served == "stream" else None


class TiledLogprobs(torch.autograd.Function):
    """log softmax(head(hidden) / temperature)[targets], [N], for a head that is one product: hidden [N, D], weight [V, D].

    A tile is some tokens by some of the vocabulary, small enough to stay in a CPU's cache for all that is done to it: with a
    large vocabulary, passing over logits in memory costs more than the products. The normalisers are summed from tile to tile; in the
    backward pass a tile's logits are computed again and turned into their gradient in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        halves: Halves | None = None,
    ) -> Tensor:
        tiles = _Tiles(weight, bias, temperature, halves)
        chosen, normaliser = hidden.new_zeros(len(hidden)), hidden.new_empty(len(hidden))
        for rows in tiles.rows(len(hidden)):
            largest = hidden.new_full((len(hidden[rows]),), -torch.inf)
            total = torch.zeros_like(largest)
            for columns in tiles.columns:
                logits = tiles.logits(hidden[rows], columns)
                at, inside = tiles.places(targets[rows], columns)
                chosen[rows] += logits.gather(1, at)[:, 0].where(inside, 0)
                before, largest = largest, torch.maximum(largest, logits.amax(1))
                total = total * (before - largest).exp() + logits.sub_(largest[:, None]).exp_().sum(1)
            normaliser[rows] = largest + total.log()
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        ctx.temperature, ctx.halves = temperature, halves
        return chosen - normaliser

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        tiles = _Tiles(weight, bias, ctx.temperature, ctx.halves)
        grad = grads[0] / ctx.temperature
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        for rows in tiles.rows(len(hidden)):
            for columns in tiles.columns:
                at, inside = tiles.places(targets[rows], columns)
                grad_logits = (
                    tiles.logits(hidden[rows], columns).sub_(normaliser[rows, None]).exp_().mul_(-grad[rows, None])
                )
                grad_logits.scatter_add_(1, at, grad[rows].where(inside, 0)[:, None])
                tiles.add_products(grad_logits, hidden[rows], columns, grad_hidden[rows], grad_weight)
                if grad_bias is not None:
                    grad_bias[columns] += grad_logits.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None


class _Tiles:
    """A head's logits, a tile at a time. halves: of mixed precision, in which products are of bfloat16 numbers and logits in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, temperature: float, halves: Halves | None) -> None:
        size, width = TILE_LOGITS["cpu" if weight.device.type == "cpu" else "cuda"]
        width = min(width, len(weight))
        self._weight, self._bias, self._temperature, self._halves = weight, bias, temperature, halves
        self._size = max(1, size // width)
        starts = range(0, len(weight), width)
        self.columns = [slice(start, min(start + width, len(weight))) for start in starts]

    def rows(self, tokens: int) -> list[slice]:
        return [slice(start, start + self._size) for start in range(0, tokens, self._size)]

    def logits(self, hidden: Tensor, columns: slice) -> Tensor:
        bias = self._bias[columns] if self._bias is not None else None
        if self._halves is None:
            logits = F.linear(hidden, self._weight[columns], bias)
        else:
            logits = head_product(hidden, self._weight, self._halves, columns)
            logits = logits if bias is None else logits.add_(bias)
        return logits if self._temperature == 1 else logits.div_(self._temperature)

    def add_products(
        self, grad_logits: Tensor, hidden: Tensor, columns: slice, grad_hidden: Tensor, grad_weight: Tensor | None
    ) -> None:
        """Add what a tile's gradient, [C, columns], gives the hidden states, [C, D], and the weight, [V, D] or none."""
        if self._halves is None:
            grad_hidden.addmm_(grad_logits, self._weight[columns])
            if grad_weight is not None:
                grad_weight[columns].addmm_(grad_logits.t(), hidden)
            return
        rounded = grad_logits.to(torch.bfloat16)
        grad_hidden += rounded @ self._halves.rounded(self._weight)[columns]
        if grad_weight is not None:
            grad_weight[columns] += rounded.t() @ hidden.to(torch.bfloat16)

    def places(self, targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Where the targets stand among these columns, [C, 1], and which do, [C]: the others' places mean nothing."""
        inside = (targets >= columns.start) & (targets < columns.stop)
        return (targets.clamp(columns.start, columns.stop - 1) - columns.start)[:, None], inside
