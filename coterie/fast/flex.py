"""Attention over the stream in one call of FlexAttention, for GPUs: no prompt is copied, and no sequence is padded.

A tile of 128 queries reads only the tiles of 128 keys that hold something for it; which those are is worked out once for a stream.

Legend: T tokens of the stream with what pads it, H heads, K key-value heads, E width of a head.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from coterie.models.attention import AttentionSettings, Layout

_TILE = 128
_COMPILED = 64  # lengths, windows, and with and without gradients, before torch falls back to whole matrices
_QUERIES = 16 * _TILE  # whose masks are held at a time while the tiles are sorted


class FlexLayout:
    """The layout of a stream made of groups: (prompt length, lengths of its completions) each."""

    def __init__(self, segments: Sequence[tuple[int, Sequence[int]]], device: torch.device | str) -> None:
        # Of each sequence: whose keys it reads beside its own, its length, and where it begins
        sequences: list[tuple[int, int, int]] = []
        for prompt, completions in segments:
            trunk = len(sequences)
            sequences += [(trunk, prompt, 0), *((trunk, length, prompt) for length in completions)]
        trunks, lengths, firsts = (torch.tensor(column) for column in zip(*sequences, strict=True))
        self._num_tokens = int(lengths.sum())
        self._padding = max(_TILE, 1 << (self._num_tokens - 1).bit_length()) - self._num_tokens
        sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
        start = lengths.cumsum(0) - lengths
        position = torch.arange(self._num_tokens) + (firsts - start)[sequence]
        # What pads the stream reads itself alone: reading nothing would give no number
        alone = -1 - torch.arange(self._padding)
        columns = ((sequence, alone), (trunks[sequence], alone), (position, torch.zeros_like(alone)))
        self._sequence, self._trunk, self._position = (torch.cat(pair).to(device) for pair in columns)
        self._masks: dict[int | None, BlockMask] = {}  # by window

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        if settings.window not in self._masks:
            self._masks[settings.window] = self._mask(settings.window)
        q, k, v = (F.pad(x, (0, 0, 0, self._padding)) for x in (q, k, v))
        cap = settings.softcap or 0.0

        def capped(score: Tensor, *_: Tensor) -> Tensor:
            return torch.tanh(score / cap) * cap

        out: Any = _call(q.device.type)(
            q,
            k,
            v,
            score_mod=capped if cap else None,
            block_mask=self._masks[settings.window],
            scale=settings.scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[:, :, : self._num_tokens].transpose(1, 2)

    def _mask(self, window: int | None) -> BlockMask:
        sequence, trunk, position = self._sequence, self._trunk, self._position
        before = (
            position - window if window is not None else None
        )  # a tensor: a number would be compiled for each window

        def reads(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
            allowed = (sequence[key] == sequence[query]) | (sequence[key] == trunk[query])
            allowed = allowed & (key <= query)
            return allowed if before is None else allowed & (position[key] > before[query])

        places = torch.arange(len(sequence), device=sequence.device)
        # Of each tile of queries, about each tile of keys: whether any pair counts, whether all do
        some, all_of = list[Tensor](), list[Tensor]()
        for queries in places.split(_QUERIES):
            pairs = reads(None, None, queries[:, None], places).view(len(queries) // _TILE, _TILE, -1, _TILE)
            some.append(pairs.any(3).any(1))
            all_of.append(pairs.all(3).all(1))
        any_pair, whole = torch.cat(some), torch.cat(all_of)
        return BlockMask.from_kv_blocks(*_listed(any_pair & ~whole), *_listed(whole), _TILE, reads)


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """The number of tiles of keys that each tile of queries reads, and which, those first: bool [n, n] -> [1, 1, n], [1, 1, n, n]."""
    order = tiles.int().argsort(dim=1, descending=True, stable=True)
    return tiles.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]


@cache
def _call(device: str) -> Any:
    """FlexAttention is fast where it is compiled, at worst once for each length, which is why streams are padded to powers of two. A
    CPU's has no backward pass."""
    if device == "cpu":
        return flex_attention
    torch._dynamo.config.recompile_limit = max(_COMPILED, torch._dynamo.config.recompile_limit)
    # Scaling and soft cap are constants of a kernel: compiled for any length, it would get them as numbers that it can't hold
    torch._dynamo.config.specialize_float = True
    return torch.compile(flex_attention, dynamic=True)


def flex_serves(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, plain: Callable[..., Layout]) -> bool:
    """Whether FlexAttention runs on this device for tensors like these, and gives what `plain`, another layout, gives. Tried once."""
    return _tried(q.device, q.dtype, (q.shape[1], k.shape[1]), (q.shape[3], v.shape[3]), softcap, plain)


@cache
def _tried(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    widths: tuple[int, int],
    softcap: float | None,
    plain: Callable[..., Layout],
) -> bool:
    """heads: of queries, of keys and values. widths: of queries and keys, of values."""
    segments = [(70, (40, 90, 1)), (5, (60,)), (130, (20, 30))]
    length = sum(prompt + sum(completions) for prompt, completions in segments)
    seeds = count()

    def random(heads: int, last: int) -> Tensor:
        generator = torch.Generator().manual_seed(next(seeds))
        return torch.randn(1, heads, length, last, generator=generator).to(device, dtype)

    inputs = [random(heads[0], widths[0]), random(heads[1], widths[0]), random(heads[1], widths[1])]
    direction = random(heads[0], widths[1]).transpose(1, 2)
    settings = AttentionSettings(widths[0] ** -0.5, None, softcap)
    allowed = 1e-3 if dtype == torch.float32 else 0.05
    try:
        found = []
        for kind in (FlexLayout, plain):
            with torch.enable_grad():
                q, k, v = (x.clone().requires_grad_() for x in inputs)
                out = kind(segments, device).attend(0, q, k, v, settings)
                found.append([out.detach(), *torch.autograd.grad((out * direction).sum(), (q, k, v))])
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found, strict=True)]
        why = "" if max(errors) <= allowed else f"it differs from plain attention by {max(errors):.2g}"
    except Exception as error:  # broad: a compiler, or a device, may raise anything; there is another way
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    if why:
        warnings.warn(f"FlexAttention is not used for heads of {widths[0]} in {dtype} ({why})", stacklevel=2)
    return not why
