"""Attention over the packed stream: a completion's tokens attend to their prompt and to themselves.

The stream is gathered into dense blocks with masks, for any device and any attention. A block is a set of
sequences of similar length. A "trunk" attends to itself: a prompt, or a prompt with its only completion. A "branch" is a
completion whose keys are preceded by those of its trunk, which were computed once for the whole group.

For example, a prompt of two tokens with completions of three and one is the stream `p q a b c x`. It makes two blocks:

    a trunk     p q       its queries attend to the keys p q
    branches    a b c     to p q a b c
                x . .     to p q x . .   where a dot is padding, which is masked

Side by side they are the places `p q a b c x . .`: the gather is `index` = 0 1 2 3 4 5 0 0 (in padding any token may stand), and the way
back, from each token to its place, `inverse` = 0 1 2 3 4 5. A mask lets no token see what comes after it.

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
from coterie.models.scores import scored_attention

Span = tuple[int, int]  # a sequence's first place in the stream, and its length


@dataclass(frozen=True)
class _Block:
    """R sequences gathered into [R, L], at places start .. stop of the dense tensor; of branches, what stands before each."""

    start: int
    num_rows: int
    length: int
    trunks: _Trunks | None = None

    @property
    def stop(self) -> int:
        return self.start + self.num_rows * self.length

    def view(self, dense: Tensor, width: int) -> Tensor:
        """[M, heads * E] -> this block's [R, L, heads, E]."""
        return dense[self.start : self.stop].view(self.num_rows, self.length, -1, width)


@dataclass(frozen=True)
class _Trunks:
    """The trunks of R branches: the block that they stand in, which of its rows each is, [R], and how long."""

    block: _Block
    rows: Tensor
    lengths: tuple[int, ...]

    def before(self, dense: Tensor, own: Tensor) -> Tensor:
        """The trunk's keys or values before each branch's own: [M, K * E] and [R, L, K, E] -> [R, S + L, K, E]."""
        return torch.cat([self.block.view(dense, own.shape[3]).index_select(0, self.rows), own], 1)


class DenseLayout:
    """Dense blocks with masks: any device, window, soft cap, sinks, slopes."""

    def __init__(self, segments: Sequence[tuple[int, Sequence[int]]], device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._masks: dict[tuple[int, int | None, torch.dtype], Tensor] = {}
        self._blocks: list[_Block] = []
        trunks, branches = _spans(segments)
        tokens: list[Tensor] = []  # of each block [R, L]: which token of the stream stands there, -1 where none does
        for groups in of_similar_length([length for _, length in trunks]):
            tokens.append(self._add([trunks[group] for group in groups]))
            block = self._blocks[-1]
            ours = [
                (row, span) for row, group in enumerate(groups) for span in branches[group]
            ]  # with their trunk's row
            for chosen in of_similar_length([length for _, (_, length) in ours]):
                rows, spans = zip(*(ours[i] for i in chosen), strict=True)
                lengths = tuple(trunks[groups[row]][1] for row in rows)
                tokens.append(self._add(spans, _Trunks(block, torch.tensor(rows, device=self._device), lengths)))
        index = torch.cat([x.flatten() for x in tokens])  # [M]
        real = (index >= 0).nonzero().squeeze(1)  # [T] places
        inverse = torch.empty_like(real)
        inverse[index[real]] = real
        self._index, self._inverse = index.clamp(min=0).to(self._device), inverse.to(self._device)

    def _add(self, spans: Sequence[Span], trunks: _Trunks | None = None) -> Tensor:
        """Add a block of some sequences, and say which token stands at each of its places: [R, L]."""
        longest = max(length for _, length in spans)
        start = self._blocks[-1].stop if self._blocks else 0
        self._blocks.append(_Block(start, len(spans), longest, trunks))
        firsts, lengths = torch.tensor(spans).T[:, :, None]  # [R, 1] each
        steps = torch.arange(longest)
        return torch.where(steps < lengths, firsts + steps, -1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        queries, keys, values = (_Pad.apply(_flat(x), self._index, self._inverse) for x in (q, k, v))
        outputs = []
        for number, block in enumerate(self._blocks):
            own_q, own_k, own_v = (
                block.view(x, width) for x, width in ((queries, q.shape[3]), (keys, k.shape[3]), (values, v.shape[3]))
            )
            if block.trunks is not None:
                own_k, own_v = block.trunks.before(keys, own_k), block.trunks.before(values, own_v)
            mask = self._mask(number, settings.window, q.dtype)
            if settings.slopes is not None:
                positions = self._keys(block)[0][:, None, None].to(q.dtype)  # [R or 1, 1, 1, keys]
                mask = mask + positions * settings.slopes.to(q.dtype)[:, None, None]
            attended = dense_attention(own_q, own_k, own_v, mask, settings)  # [R, L, H, E]
            outputs.append(attended.reshape(block.stop - block.start, -1))
        stream = _Unpad.apply(torch.cat(outputs), self._index, self._inverse)
        return stream.view(1, len(self._inverse), q.shape[1], -1)

    def _keys(self, block: _Block) -> tuple[Tensor, Tensor]:
        """The positions of a block's keys in their sequences, and which are no padding of a trunk: [R, keys], or [1, keys] where all rows
        are alike. Padding behind a row's own keys needs no mask: it comes after all that is read of the row."""
        own = torch.arange(block.length, device=self._device)
        if block.trunks is None:
            return own[None], torch.ones_like(own, dtype=torch.bool)[None]
        different = block.trunks.lengths if len(set(block.trunks.lengths)) > 1 else block.trunks.lengths[:1]
        lengths = torch.tensor(different, device=self._device)[:, None]
        before = torch.arange(block.trunks.block.length, device=self._device).expand(len(lengths), -1)
        behind = lengths + own
        real = torch.cat([before < lengths, torch.ones_like(behind, dtype=torch.bool)], 1)
        return torch.cat([before, behind], 1), real

    def _mask(self, number: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """The mask that is added to a block's scores: [R or 1, 1, L, keys]."""
        if (number, window, dtype) not in self._masks:
            block = self._blocks[number]
            keys, real = self._keys(block)
            back = keys[:, -block.length :, None] - keys[:, None]  # [R or 1, L, keys]
            allowed = real[:, None] & (back >= 0)
            if window is not None:
                allowed &= back < window
            mask = torch.zeros(allowed.shape, dtype=dtype, device=self._device)
            self._masks[number, window, dtype] = mask.masked_fill(~allowed, -torch.inf)[:, None]
        return self._masks[number, window, dtype]


def _spans(segments: Sequence[tuple[int, Sequence[int]]]) -> tuple[list[Span], list[list[Span]]]:
    """The trunk of each group of a stream, and its branches: none where it has one completion, which its trunk goes on with."""
    trunks: list[Span] = []
    branches: list[list[Span]] = []
    here = 0
    for prompt, completions in segments:
        shared = len(completions) > 1
        trunks.append((here, prompt if shared else prompt + sum(completions)))
        here += trunks[-1][1]
        branches.append([])
        for length in completions if shared else ():
            branches[-1].append((here, length))
            here += length
    return trunks, branches


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
    if settings.plain:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, scale=settings.scaling, enable_gqa=grouped).transpose(1, 2)
    return scored_attention(q, k, v, mask, settings).transpose(1, 2)


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
