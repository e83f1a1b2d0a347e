"""The stream's attention on a CPU, without a copy of a prompt's keys for each completion and without masks.

A completion's token attends to its prompt and to its own row. The two are computed apart, each by the flash kernel that
scaled_dot_product_attention uses there: every sequence attends to itself, causally; and all completions of a group together
attend to the keys of their prompt. The kernel also gives the logarithm of each softmax's normaliser, with which the two are
summed exactly. Backward, the kernel takes the normaliser and the output of the whole, so each part finds its own share of the
gradient. Source: the merge is that of cascade inference (flashinfer), the backward pass that of FlashAttention,
arXiv 2205.14135, algorithm 4.

Legend: T tokens of the stream, R sequences of a block, L the longest of them, Q prompts of a block, S the longest of them,
H heads, K key-value heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coterie.models.layout import of_similar_length

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class _Rectangle:
    """Runs of tokens of similar length, side by side. index [R * L]: the token at each place; padding repeats a run's first.
    padding [R * L]: bool."""

    index: Tensor
    padding: Tensor
    num_rows: int

    @classmethod
    def of(cls, starts: Sequence[int], lengths: Sequence[int]) -> _Rectangle:
        steps, first = torch.arange(max(lengths)), torch.tensor(starts)[:, None]
        padding = steps >= torch.tensor(lengths)[:, None]
        return cls(torch.where(padding, first, first + steps).flatten(), padding.flatten(), len(lengths))

    @property
    def tokens(self) -> Tensor:
        """The token at each place, -1 for padding."""
        return self.index.masked_fill(self.padding, -1)

    def gather(self, x: Tensor) -> Tensor:
        """[T, heads, ...] -> [R, heads, L, ...]."""
        return x.index_select(0, self.index).view(self.num_rows, -1, *x.shape[1:]).transpose(1, 2)

    def gather_normaliser(self, x: Tensor) -> Tensor:
        """[T, heads] -> [R, heads, L], infinite for padding: its weights are 0 then, and no gradient comes from it."""
        found = x.index_select(0, self.index).masked_fill_(self.padding[:, None], torch.inf)
        return found.view(self.num_rows, -1, x.shape[1]).transpose(1, 2)


@dataclass(frozen=True)
class _Block:
    """Queries and the keys that they read: sequences that attend to themselves, causally; or the completions of some groups, which
    attend together to all of their prompts. mask: [Q, 1, 1, S] where the prompts differ in length."""

    queries: _Rectangle
    keys: _Rectangle
    causal: bool
    mask: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """The queries' attention and the logarithm of its normaliser, by place: [R * L, H, E] and [R * L, H]."""
        num_heads, num_kv_heads = q.shape[1], k.shape[1]
        queries = self._folded(self.queries.gather(q), num_kv_heads)
        keys, values = self._keys_values(k, v, num_heads)
        found = _flash(queries, keys, values, 0.0, self.causal, attn_mask=self._mask_of(q), scale=scaling)
        output, normaliser = (self._by_place(x, num_heads) for x in found)
        return output, normaliser

    def backward(self, saved: Sequence[Tensor], grad: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of the queries, the keys and the values, by place. saved: q, k, v, what all attended to, and its normaliser."""
        q, k, v, output, normaliser = saved
        num_heads, num_kv_heads = q.shape[1], k.shape[1]
        of_grad, queries, of_output = (self._folded(self.queries.gather(x), num_kv_heads) for x in (grad, q, output))
        of_normaliser = self._folded(self.queries.gather_normaliser(normaliser), num_kv_heads)
        inputs = (of_grad, queries, *self._keys_values(k, v, num_heads), of_output, of_normaliser)
        found = _flash_backward(*inputs, 0.0, self.causal, attn_mask=self._mask_of(q), scale=scaling)
        grad_q, (grad_k, grad_v) = self._by_place(found[0], num_heads), map(_by_token, found[1:])
        if grad_k.shape[1] != num_kv_heads:
            grad_k, grad_v = (x.unflatten(1, (num_kv_heads, -1)).sum(2) for x in (grad_k, grad_v))
        return grad_q, grad_k, grad_v

    def _keys_values(self, k: Tensor, v: Tensor, num_heads: int) -> Sequence[Tensor]:
        """Once for the heads that share them; where a place decides what is read, for each head."""
        keys, values = self.keys.gather(k), self.keys.gather(v)
        if not self.causal:
            return keys, values
        return [x.repeat_interleave(num_heads // k.shape[1], 1) for x in (keys, values)]

    def _folded(self, x: Tensor, num_kv_heads: int) -> Tensor:
        """[Q, H, L, ...] -> [Q, K, H / K * L, ...] where heads that share keys stand one after another, as if they were more queries."""
        return x if self.causal or x.shape[1] == num_kv_heads else x.unflatten(1, (num_kv_heads, -1)).flatten(2, 3)

    def _by_place(self, x: Tensor, num_heads: int) -> Tensor:
        """The places of `_folded` queries: [Q * L, H, ...]."""
        unfolded = x if x.shape[1] == num_heads else x.unflatten(2, (num_heads // x.shape[1], -1)).flatten(1, 2)
        return _by_token(unfolded)

    def _mask_of(self, q: Tensor) -> Tensor | None:
        return self.mask.to(q.dtype) if self.mask is not None else None


class Cascade:
    """Which tokens of a stream attend to which, as blocks: made once for a stream, used by every layer."""

    def __init__(self, segments: Sequence[tuple[int, Sequence[int]]]) -> None:
        runs: list[tuple[int, int]] = []  # start and length of what attends to itself
        shared: list[tuple[int, int, int]] = []  # start of a prompt, its length, tokens of its completions
        at = 0
        for prompt, completions in segments:
            alone = len(completions) < 2
            bounds = [prompt + sum(completions)] if alone else [prompt, *completions]
            if not alone:
                shared.append((at, prompt, sum(completions)))
            for length in bounds:
                runs.append((at, length))
                at += length
        self._own: list[_Block] = []
        for chosen in of_similar_length([length for _, length in runs]):
            run = _Rectangle.of(*zip(*(runs[i] for i in chosen), strict=True))
            self._own.append(_Block(run, run, causal=True))
        tokens, places = _chosen([block.queries for block in self._own])
        self._from_own = torch.empty(at, dtype=torch.long).index_copy_(0, tokens, places)  # [T]
        self._cross: list[_Block] = []
        for chosen in of_similar_length([prompt for _, prompt, _ in shared]):
            starts, prompts, totals = zip(*(shared[i] for i in chosen), strict=True)
            queries = _Rectangle.of([s + p for s, p in zip(starts, prompts, strict=True)], totals)
            keys = _Rectangle.of(starts, prompts)
            mask = torch.zeros(len(keys.index)).masked_fill_(keys.padding, -torch.inf).view(len(prompts), 1, 1, -1)
            self._cross.append(_Block(queries, keys, False, mask if keys.padding.any() else None))
        if self._cross:
            self._readers, self._from_queries = _chosen([block.queries for block in self._cross])
            self._read, self._from_keys = _chosen([block.keys for block in self._cross])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q [T, H, E], k and v [T, K, E] -> [T, H, E]."""
        return _Attention.apply(q, k, v, self, scaling)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        """Each token's attention, [T, H, E], and the logarithm of its normaliser, [T, H]."""
        output, normaliser = self._parts([block.forward(q, k, v, scaling) for block in self._own], self._from_own)
        if self._cross:
            read, read_normaliser = self._parts(
                [block.forward(q, k, v, scaling) for block in self._cross], self._from_queries
            )
            before, own = output.index_select(0, self._readers), normaliser.index_select(0, self._readers)
            whole = torch.logaddexp(own, read_normaliser)
            before = before.mul_((own - whole).exp_().unsqueeze(2).to(q.dtype))
            before.addcmul_(read, (read_normaliser - whole).exp_().unsqueeze(2).to(q.dtype))
            output.index_copy_(0, self._readers, before)
            normaliser.index_copy_(0, self._readers, whole)
        return output, normaliser

    def backward(self, saved: Sequence[Tensor], grad: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of q, k and v."""
        own = [block.backward(saved, grad, scaling) for block in self._own]
        grad_q, grad_k, grad_v = (torch.cat(parts).index_select(0, self._from_own) for parts in zip(*own, strict=True))
        if self._cross:
            crossed = [block.backward(saved, grad, scaling) for block in self._cross]
            more_q, more_k, more_v = (torch.cat(parts) for parts in zip(*crossed, strict=True))
            grad_q.index_add_(0, self._readers, more_q.index_select(0, self._from_queries))
            grad_k.index_add_(0, self._read, more_k.index_select(0, self._from_keys))
            grad_v.index_add_(0, self._read, more_v.index_select(0, self._from_keys))
        return grad_q, grad_k, grad_v

    @staticmethod
    def _parts(found: Sequence[tuple[Tensor, Tensor]], places: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and normalisers of blocks, in the order of their tokens."""
        outputs, normalisers = zip(*found, strict=True)
        return torch.cat(outputs).index_select(0, places), torch.cat(normalisers).index_select(0, places)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cascade: Cascade, scaling: float) -> Tensor:
        output, normaliser = cascade.forward(q, k, v, scaling)
        ctx.save_for_backward(q, k, v, output, normaliser)
        ctx.cascade, ctx.scaling = cascade, scaling
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (*ctx.cascade.backward(ctx.saved_tensors, grads[0], ctx.scaling), None, None)


def _by_token(x: Tensor) -> Tensor:
    """[R, heads, L, ...] -> [R * L, heads, ...]."""
    return x.transpose(1, 2).flatten(0, 1)


def _chosen(blocks: Sequence[_Rectangle]) -> tuple[Tensor, Tensor]:
    """The tokens that stand in some blocks, and where in all their places together. Each stands in one place."""
    tokens = torch.cat([block.tokens for block in blocks])
    places = (tokens >= 0).nonzero().squeeze(1)
    return tokens[places], places
