"""The rows that are being decoded, with their keys and values, and how a new token attends to them.

Columns are moments: in one step every row's key goes to the same column, `now`, whenever the row began. So rows that began at
different times share a grid, and storing a key is one copy. Long prompts are stored once and read by all rows of their group;
short ones are copied in front of each row's own keys, where one product reads both. Rows that have ended stay, unread, until
the grid is built anew without them.

Legend: R slots for rows, Q prompts with W slots each (R = Q * W; W is 1 where prompts are copied), S longest prompt,
C columns there is room for, n columns in use, H heads, K key-value heads, E width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.models.attention import AttentionSettings
from coterie.models.layout import StreamLayout

KeysValues = dict[int, tuple[Tensor, Tensor]]  # by layer

_ROOM = 64  # columns that are added at a time


@dataclass
class Grid:
    """rows [R]: each slot's completion, numbered over the whole job. live [R]: false where it has ended, or the slot is empty.
    firsts [R]: the first column that is its own or its copied prompt's. starts [R]: the column of its first own token.
    prompt_lengths [R]. logits [R, V]: what its next token is drawn from. now: the column of the next key. width: W.
    prompt_kv: keys and values [Q, K, S, E], or nothing where prompts are copied. own_kv: [R, K, C, E].
    """

    rows: Tensor
    live: Tensor
    firsts: Tensor
    starts: Tensor
    prompt_lengths: Tensor
    logits: Tensor
    now: int
    width: int
    prompt_kv: KeysValues
    own_kv: KeysValues

    @property
    def num_slots(self) -> int:
        return len(self.rows)

    @property
    def num_written(self) -> Tensor:
        """Tokens that each row has drawn and run: [R]."""
        return self.now - self.starts

    @property
    def longest_prompt(self) -> int:
        """S, or 0 where prompts are copied."""
        return next(iter(self.prompt_kv.values()))[0].shape[2] if self.prompt_kv else 0

    @cached_property
    def is_full(self) -> bool:
        """Whether every row may read every column and the whole of the longest prompt, so that no mask is needed."""
        short = (self.prompt_lengths < self.longest_prompt).any() if self.prompt_kv else False
        return not (bool(short) or bool(self.firsts.any()))

    def mask(self, window: int | None) -> Tensor | None:
        """What is added to the scores of the next token, [R, 1, 1, S + n], or None where every row reads all."""
        if window is None and self.is_full:
            return None
        columns = torch.arange(self.now + 1, device=self.rows.device)
        allowed = columns >= self.firsts[:, None]
        if window is not None:
            allowed &= self.now - columns < window
        if self.prompt_kv:
            places = torch.arange(self.longest_prompt, device=self.rows.device)
            in_prompt = places < self.prompt_lengths[:, None]
            if window is not None:
                in_prompt &= (self.prompt_lengths + self.num_written)[:, None] - places < window
            allowed = torch.cat([in_prompt, allowed], 1)
        mask = torch.zeros(allowed.shape, dtype=self.logits.dtype, device=self.rows.device)
        return mask.masked_fill_(~allowed, -torch.inf)[:, None, None]

    def make_room(self) -> None:
        """Columns for one more key."""
        if self.now >= next(iter(self.own_kv.values()))[0].shape[2]:
            self.own_kv = {i: (_padded(k, 0, _ROOM), _padded(v, 0, _ROOM)) for i, (k, v) in self.own_kv.items()}

    def compacted(self, width: int = 1) -> Grid:
        """The live rows alone, in the smallest grid with at least `width` slots a prompt, without columns that none reads."""
        slots = self.live.nonzero().squeeze(1)
        prompts, prompt_of = torch.unique_consecutive(slots // self.width, return_inverse=True)
        live = torch.ones_like(slots, dtype=torch.bool)
        if self.prompt_kv:
            counts = torch.bincount(prompt_of)
            width = max(width, int(counts.max()))
            member = torch.arange(len(slots), device=slots.device) - (counts.cumsum(0) - counts)[prompt_of]
            places = prompt_of * width + member
            live = torch.zeros(len(prompts) * width, dtype=torch.bool, device=slots.device)
            live[places] = True
            source = slots.new_full(live.shape, int(slots[0]))  # an empty slot copies any row; it is never read
            source[places] = slots
            slots = source
        oldest = int(self.firsts[slots].min())
        return Grid(
            rows=self.rows[slots],
            live=live,
            firsts=self.firsts[slots] - oldest,
            starts=self.starts[slots] - oldest,
            prompt_lengths=self.prompt_lengths[slots],
            logits=self.logits[slots],
            now=self.now - oldest,
            width=width if self.prompt_kv else 1,
            prompt_kv={i: (k[prompts], v[prompts]) for i, (k, v) in self.prompt_kv.items()},
            own_kv={i: tuple(x.index_select(0, slots)[:, :, oldest:] for x in pair) for i, pair in self.own_kv.items()},
        )

    def joined(self, new: Grid) -> Grid:
        """The live rows of two grids in one, moved so that both go on at the same column."""
        grids = (self.compacted(new.width), new)
        if grids[0].width != new.width:
            grids = (grids[0], new.compacted(grids[0].width))
        now = max(grid.now for grid in grids)
        shifts = torch.cat([grid.firsts.new_full((grid.num_slots,), now - grid.now) for grid in grids])

        def beside(name: str) -> Tensor:
            return torch.cat([getattr(grid, name) for grid in grids])

        def own(layer: int, which: int) -> Tensor:
            return torch.cat([_padded(g.own_kv[layer][which][:, :, : g.now], now - g.now, _ROOM) for g in grids])

        def prompts(layer: int, which: int) -> Tensor:
            longest = max(grid.longest_prompt for grid in grids)
            parts = [grid.prompt_kv[layer][which] for grid in grids]
            return torch.cat([_padded(part, 0, longest - part.shape[2]) for part in parts])

        return Grid(
            rows=beside("rows"),
            live=beside("live"),
            firsts=beside("firsts") + shifts,
            starts=beside("starts") + shifts,
            prompt_lengths=beside("prompt_lengths"),
            logits=beside("logits"),
            now=now,
            width=grids[0].width,
            prompt_kv={i: (prompts(i, 0), prompts(i, 1)) for i in new.prompt_kv},
            own_kv={i: (own(i, 0), own(i, 1)) for i in new.own_kv},
        )


def _padded(x: Tensor, before: int, after: int) -> Tensor:
    """[*, *, c, E] -> [*, *, before + c + after, E]."""
    return F.pad(x, (0, 0, before, after))


class PrefillLayout:
    """Prompts that attend to themselves, with their keys and values kept: [Q, K, S, E] by layer, each prompt from the left."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._layout = StreamLayout([(length, ()) for length in lengths], device)
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)[:, None]
        steps = torch.arange(max(lengths))
        self._places = torch.where(steps < torch.tensor(lengths)[:, None], starts + steps, 0).to(device)  # [Q, S]
        self.stored: KeysValues = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        keys, values = (x[0].transpose(0, 1)[self._places].transpose(1, 2).contiguous() for x in (k, v))
        self.stored[layer] = (keys, values)
        return self._layout.attend(layer, q, k, v, settings)


def copied(stored: KeysValues, lengths: Tensor, which: Tensor) -> KeysValues:
    """Prompts in front of the rows' own keys: [Q, K, S, E] and each row's prompt, which [R] -> [R, K, S + room, E].

    Prompts end where the rows' own keys begin, at column S.
    """
    longest = next(iter(stored.values()))[0].shape[2]
    columns = torch.arange(longest, device=lengths.device) - (longest - lengths[:, None])  # [Q, S]
    source = columns.clamp(min=0)[which]  # [R, S]

    def rows(x: Tensor) -> Tensor:
        index = source[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return _padded(x[which].gather(2, index), 0, _ROOM)

    return {layer: (rows(k), rows(v)) for layer, (k, v) in stored.items()}


def empty(stored: KeysValues, num_slots: int) -> KeysValues:
    """Room for rows that have no keys yet: [R, K, room, E] by layer."""

    def room(x: Tensor) -> Tensor:
        return x.new_zeros(num_slots, x.shape[1], _ROOM, x.shape[3])

    return {layer: (room(k), room(v)) for layer, (k, v) in stored.items()}


class DecodeLayout:
    """One new token of each row, attending to its prompt and to its own earlier tokens."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._masks: dict[int | None, Tensor | None] = {}  # by window

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        grid = self._grid
        keys, values = grid.own_kv[layer]
        keys[:, :, grid.now] = k[0].transpose(0, 1)
        values[:, :, grid.now] = v[0].transpose(0, 1)
        keys, values = keys[:, :, : grid.now + 1], values[:, :, : grid.now + 1]  # [R, K, n, E]
        num_slots, num_kv_heads = keys.shape[:2]
        queries = (q[0].transpose(0, 1) * settings.scaling).reshape(
            num_slots, num_kv_heads, -1, q.shape[3]
        )  # [R, K, H / K, E]
        scores = queries @ keys.transpose(2, 3)  # [R, K, H / K, n]
        if grid.prompt_kv:
            prompt_keys, prompt_values = grid.prompt_kv[layer]
            num_prompts, _, longest, _ = prompt_keys.shape
            to_prompt = _by_prompt(queries, num_prompts) @ prompt_keys.transpose(2, 3)  # [Q, K, W * H / K, S]
            scores = torch.cat([_by_slot(to_prompt, num_slots), scores], 3)
        if settings.softcap is not None:
            scores = torch.tanh(scores / settings.softcap) * settings.softcap
        if settings.window not in self._masks:
            self._masks[settings.window] = grid.mask(settings.window)
        mask = self._masks[settings.window]
        if mask is not None:
            scores += mask
        weights = scores.float().softmax(3).to(v.dtype)
        if not grid.prompt_kv:
            attended = weights @ values
        else:
            from_prompt = _by_prompt(weights[..., :longest], num_prompts) @ prompt_values
            attended = _by_slot(from_prompt, num_slots) + weights[..., longest:] @ values
        return attended.reshape(1, num_slots, -1, v.shape[3])


def _by_prompt(x: Tensor, num_prompts: int) -> Tensor:
    """[Q * W, K, r, n] -> [Q, K, W * r, n]: the rows of a prompt side by side, so that they share its keys."""
    _, heads, each, n = x.shape
    return x.reshape(num_prompts, -1, heads, each, n).transpose(1, 2).reshape(num_prompts, heads, -1, n)


def _by_slot(x: Tensor, num_slots: int) -> Tensor:
    """[Q, K, W * r, n] -> [Q * W, K, r, n]."""
    prompts, heads, _, n = x.shape
    return x.view(prompts, heads, num_slots // prompts, -1, n).transpose(1, 2).reshape(num_slots, heads, -1, n)
