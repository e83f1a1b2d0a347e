"""Attention over the packed stream: a completion's tokens attend to their prompt and to themselves.

The stream is gathered into dense blocks with masks, for any device and any attention. A block is a set of
sequences of similar length. A "trunk" attends to itself: a prompt, or a prompt with its only completion. A "branch" is a
completion whose keys are preceded by those of its trunk, which were computed once for the whole group.

Legend: T tokens of the stream, R sequences of a block, L the longest of them, S the longest trunk, H heads, K key-value
heads, E width of a head, M places of all blocks together, padding included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.models.attention import AttentionSettings


@dataclass(frozen=True)
class _Block:
    """R sequences gathered into [R, L], at places start .. start + R*L of the dense tensor."""

    start: int
    num_rows: int
    length: int
    trunk: int | None = None  # which block holds the trunks of a branch
    trunk_row: Tensor | None = None  # [R] which row of that block
    trunk_lengths: tuple[int, ...] = ()

    def view(self, dense: Tensor, width: int) -> Tensor:
        """[M, heads * E] -> this block's [R, L, heads, E]."""
        part = dense[self.start : self.start + self.num_rows * self.length]
        return part.view(self.num_rows, self.length, -1, width)


class DenseLayout:
    """Dense blocks with masks: any device, window, soft cap, sinks, slopes."""

    def __init__(self, segments: Sequence[tuple[int, Sequence[int]]], device: torch.device | str = "cpu") -> None:
        self._blocks: list[_Block] = []
        self._masks: dict[tuple[int, int | None, torch.dtype], Tensor] = {}
        self._device = torch.device(device)
        starts, trunks, branches, here = [], [], [], 0
        for prompt, completions in segments:
            starts.append(here)
            shared = len(completions) > 1
            trunks.append(prompt if shared else prompt + sum(completions))
            branches.append(list(completions) if shared else [])
            here += prompt + sum(completions)
        places: list[Tensor] = []  # for each block [R, L]: which token of the stream stands there
        owners: list[Tensor] = []  # for each block [R, L] bool: no padding
        for groups in of_similar_length(trunks):
            trunk = len(self._blocks)
            self._add(places, owners, [starts[g] for g in groups], [trunks[g] for g in groups])
            rows = [
                (index, starts[group] + trunks[group] + sum(branches[group][:number]), length)
                for index, group in enumerate(groups)
                for number, length in enumerate(branches[group])
            ]
            for chosen in of_similar_length([length for _, _, length in rows]):
                self._add(
                    places,
                    owners,
                    [rows[r][1] for r in chosen],
                    [rows[r][2] for r in chosen],
                    trunk=trunk,
                    trunk_row=torch.tensor([rows[r][0] for r in chosen], device=self._device),
                    trunk_lengths=tuple(trunks[groups[rows[r][0]]] for r in chosen),
                )
        index, real = torch.cat([p.flatten() for p in places]), torch.cat([o.flatten() for o in owners])
        inverse = torch.empty(here, dtype=torch.long)
        inverse[index[real]] = torch.arange(len(index))[real]
        self._index, self._inverse = index.to(self._device), inverse.to(self._device)

    def _add(
        self, places: list[Tensor], owners: list[Tensor], starts: list[int], lengths: list[int], **trunk: Any
    ) -> None:
        steps = torch.arange(max(lengths))
        real = steps < torch.tensor(lengths)[:, None]
        places.append(torch.where(real, torch.tensor(starts)[:, None] + steps, 0))
        owners.append(real)
        last = self._blocks[-1] if self._blocks else None
        start = last.start + last.num_rows * last.length if last else 0
        self._blocks.append(_Block(start, len(lengths), max(lengths), **trunk))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        width = q.shape[-1]
        queries, keys, values = (_Pad.apply(_flat(x), self._index, self._inverse) for x in (q, k, v))
        outputs = []
        for number, block in enumerate(self._blocks):
            own_q, own_k, own_v = block.view(queries, width), block.view(keys, width), block.view(values, v.shape[-1])
            if block.trunk is not None:
                trunk = self._blocks[block.trunk]
                own_k = torch.cat([trunk.view(keys, width).index_select(0, block.trunk_row), own_k], 1)
                own_v = torch.cat([trunk.view(values, v.shape[-1]).index_select(0, block.trunk_row), own_v], 1)
            mask = self._mask(number, settings.window, q.dtype)
            if settings.slopes is not None:
                places = self._places(block)[0][:, None, None].to(q.dtype)  # [R or 1, 1, 1, keys]
                mask = mask + places * settings.slopes.to(q.dtype)[:, None, None]
            attended = dense_attention(own_q, own_k, own_v, mask, settings)  # [R, L, H, E]
            outputs.append(attended.reshape(block.num_rows * block.length, -1))
        stream = _Unpad.apply(torch.cat(outputs), self._index, self._inverse)
        return stream.view(1, len(self._inverse), q.shape[1], -1)

    def _places(self, block: _Block) -> tuple[Tensor, Tensor]:
        """Where a block's keys stand in their sequences, and which are no padding: [R, keys], or [1, keys] where all rows are alike."""
        own = torch.arange(block.length, device=self._device)
        if block.trunk is None:
            return own[None], torch.ones_like(own, dtype=torch.bool)[None]
        alike = len(set(block.trunk_lengths)) == 1
        lengths = torch.tensor(block.trunk_lengths[:1] if alike else block.trunk_lengths, device=self._device)[:, None]
        before = torch.arange(self._blocks[block.trunk].length, device=self._device).expand(len(lengths), -1)
        behind = lengths + own
        return torch.cat([before, behind], 1), torch.cat(
            [before < lengths, torch.ones_like(behind, dtype=torch.bool)], 1
        )

    def _mask(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """The mask that is added to a block's scores: [R or 1, 1, L, keys]."""
        if (number, window, dtype) not in self._masks:
            block = self._blocks[number]
            keys, real = self._places(block)
            back = keys[:, -block.length :, None] - keys[:, None]  # [R or 1, L, keys]
            allowed = real[:, None] & (back >= 0)
            if window is not None:
                allowed &= back < window
            mask = torch.zeros(allowed.shape, dtype=dtype, device=self._device)
            self._masks[number, window, dtype] = mask.masked_fill(~allowed, -torch.inf)[:, None]
        return self._masks[number, window, dtype]


def of_similar_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in buckets, longest first, so that padding a bucket to its longest wastes little."""
    bucket: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if bucket and lengths[index] < 0.75 * lengths[bucket[0]] - 8:
            yield bucket
            bucket = []
        bucket.append(index)
    if bucket:
        yield bucket


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, settings: AttentionSettings) -> Tensor:
    """Masked attention on dense blocks: q [R, L, H, E], k and v [R, keys, K, E], additive mask -> [R, L, H, E]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    if settings.plain:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=settings.scaling, enable_gqa=grouped).transpose(1, 2)
    if grouped:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores, cap = q @ k.transpose(2, 3), settings.softcap
    scores = torch.tanh(scores * (settings.scaling / cap)) * cap if cap is not None else scores * settings.scaling
    return (attention_weights(scores + mask, settings.sinks).to(q.dtype) @ v).transpose(1, 2)


def attention_weights(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """The softmax of masked scores [R, H, L, keys], in float32, beside the sinks [H] where there are any."""
    scores = scores.float()
    if sinks is None:
        return scores.softmax(-1)
    beside = sinks.float().view(-1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
    return torch.cat([scores, beside], -1).softmax(-1)[..., :-1]


def _flat(x: Tensor) -> Tensor:
    """[1, heads, T, E] -> [T, heads * E]."""
    return x[0].transpose(0, 1).flatten(1)


class _Pad(torch.autograd.Function):
    """Stream [T, W] -> blocks [M, W]. Both directions are gathers, which are fast and the same in every run."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return stream.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None  # padding got no gradient: it is masked, and dropped after


class _Unpad(torch.autograd.Function):
    """Blocks [M, W] -> stream [T, W]."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.num_places = len(index)
        return blocks.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inverse,) = ctx.saved_tensors
        blocks = grads[0].new_zeros(ctx.num_places, grads[0].shape[1])
        return blocks.index_copy_(0, inverse, grads[0]), None, None
