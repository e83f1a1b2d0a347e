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

from coterie.fast.stream import StreamLayout
from coterie.models.attention import AttentionSettings
from coterie.models.scores import attention_weights

# By layer; keys have their columns last: a query reads many columns at once
KeysValues = dict[int, tuple[Tensor, Tensor]]

_ROOM = 64  # columns that are added at a time


@dataclass
class Grid:
    """The slots for rows. rows [R]: each slot's completion, numbered over the whole job. live [R]: false where it has ended, or the slot is empty.
    firsts [R]: the first column that is its own or its copied prompt's. starts [R]: the column of its first own token.
    prompt_lengths [R]. logits [R, V]: what its next token is drawn from. now: the column of the next key. width: W.
    prompt_kv: keys [Q, K, E, S] and values [Q, K, S, E], or nothing where prompts are copied. own_kv: [R, K, E, C] and
    [R, K, C, E].
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

    @classmethod
    def of(
        cls, stored: KeysValues, lengths: Tensor, logits: Tensor, rows: Tensor, live: Tensor, copies_prompts: bool
    ) -> Grid:
        """Rows that begin: prompts' keys and values, lengths [Q] and last logits [Q, V], and W slots each, rows and live [Q, W]."""
        which = torch.arange(len(lengths), device=rows.device)[:, None].expand_as(live)
        if copies_prompts:
            which, rows, live = which[live], rows[live], live[live]  # no empty slots where no rectangle is needed
        width = 1 if copies_prompts else rows.shape[1]
        which, rows, live = which.flatten(), rows.flatten(), live.flatten()
        start = int(lengths.max()) if copies_prompts else 0
        return cls(
            rows=rows,
            live=live,
            firsts=start - lengths[which] if copies_prompts else torch.zeros_like(rows),
            starts=torch.full_like(rows, start),
            prompt_lengths=lengths[which],
            logits=logits[which],
            now=start,
            width=width,
            prompt_kv={} if copies_prompts else stored,
            own_kv=_copied(stored, lengths, which) if copies_prompts else _empty(stored, len(rows)),
        )

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
        return next(iter(self.prompt_kv.values()))[1].shape[2] if self.prompt_kv else 0

    @cached_property
    def is_full(self) -> bool:
        """Whether every row may read every column and the whole of the longest prompt, so that no mask is needed."""
        return not bool((self.prompt_lengths < self.longest_prompt).any() or self.firsts.any())

    def mask(self, window: int | None) -> Tensor | None:
        """The mask that is added to the scores of the next token, [R, 1, 1, S + n], or None where every row reads all."""
        if window is None and self.is_full:
            return None
        return self.mask_at(self.now, self.now + 1, window)

    def mask_at(self, now: int | Tensor, num_columns: int, window: int | None) -> Tensor:
        """The mask that is added to the scores of a token that is written to column `now`, over the prompts and so many columns."""
        columns = torch.arange(num_columns, device=self.rows.device)
        own = (columns >= self.firsts[:, None]) & (columns <= now)
        in_prompt = torch.arange(self.longest_prompt, device=self.rows.device) < self.prompt_lengths[:, None]
        allowed = torch.cat([in_prompt, own], 1)
        if window is not None:
            allowed &= (self.prompt_lengths + now - self.starts)[:, None] - self.places_of_keys(num_columns) < window
        mask = torch.zeros(allowed.shape, dtype=self.logits.dtype, device=self.rows.device)
        return mask.masked_fill_(~allowed, -torch.inf)[:, None, None]

    def places_of_keys(self, num_columns: int) -> Tensor:
        """Where the keys that a row may read stand in its sequence, the prompts' and those of so many columns: [R, S + columns]."""
        columns = torch.arange(num_columns, device=self.rows.device)
        in_prompt = torch.arange(self.longest_prompt, device=self.rows.device).expand(self.num_slots, -1)
        return torch.cat([in_prompt, (self.prompt_lengths - self.starts)[:, None] + columns], 1)

    @property
    def num_columns(self) -> int:
        """C."""
        return next(iter(self.own_kv.values()))[1].shape[2]

    def make_room(self, num_columns: int, spare: int = 0) -> None:
        """Columns for so many keys more; where there are none, some to spare too."""
        if self.now + num_columns > self.num_columns:
            self.own_kv = {i: _padded(pair, 0, self.now + num_columns + spare) for i, pair in self.own_kv.items()}

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
            own_kv={
                i: _padded((k[..., oldest : self.now][slots], v[:, :, oldest : self.now][slots]), 0, self.now - oldest)
                for i, (k, v) in self.own_kv.items()
            },
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

        def own(layer: int) -> tuple[Tensor, Tensor]:
            written = [(g, *g.own_kv[layer]) for g in grids]
            parts = [_padded((k[..., : g.now], v[:, :, : g.now]), now - g.now, now) for g, k, v in written]
            return torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])

        def prompts(layer: int) -> tuple[Tensor, Tensor]:
            longest = max(grid.longest_prompt for grid in grids)
            keys, values = zip(*(grid.prompt_kv[layer] for grid in grids), strict=True)
            return (
                torch.cat([F.pad(k, (0, longest - k.shape[3])) for k in keys]),
                torch.cat([F.pad(v, (0, 0, 0, longest - v.shape[2])) for v in values]),
            )

        return Grid(
            rows=beside("rows"),
            live=beside("live"),
            firsts=beside("firsts") + shifts,
            starts=beside("starts") + shifts,
            prompt_lengths=beside("prompt_lengths"),
            logits=beside("logits"),
            now=now,
            width=grids[0].width,
            prompt_kv={i: prompts(i) for i in new.prompt_kv},
            own_kv={i: own(i) for i in new.own_kv},
        )


def _capacity(least: int) -> int:
    """Columns there is room for: an odd multiple of 16, for those of a power of two would share a few places of a CPU's cache."""
    return -(-least // _ROOM) * _ROOM + 16


def _padded(pair: tuple[Tensor, Tensor], before: int, least: int) -> tuple[Tensor, Tensor]:
    """Keys [*, *, E, c] and values [*, *, c, E] with columns in front, and room for `least` columns in all."""
    keys, values = pair
    after = _capacity(least) - before - keys.shape[3]
    return F.pad(keys, (before, after)), F.pad(values, (0, 0, before, after))


class PrefillLayout:
    """Prompts that attend to themselves, with their keys [Q, K, E, S] and values [Q, K, S, E] kept by layer, each from the left."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._layout = StreamLayout([(length, ()) for length in lengths], device)
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)[:, None]
        steps = torch.arange(max(lengths))
        self._places = torch.where(steps < torch.tensor(lengths)[:, None], starts + steps, 0).to(device)  # [Q, S]
        self.stored: KeysValues = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        keys, values = (x[0].transpose(0, 1)[self._places] for x in (k, v))  # [Q, S, K, E]
        self.stored[layer] = (keys.permute(0, 2, 3, 1).contiguous(), values.transpose(1, 2).contiguous())
        return self._layout.attend(layer, q, k, v, settings)


def _copied(stored: KeysValues, lengths: Tensor, which: Tensor) -> KeysValues:
    """Prompts in front of the rows' own keys, from those of the prompts and each row's prompt, which [R].

    Prompts end where the rows' own keys begin, at column S.
    """
    longest = next(iter(stored.values()))[1].shape[2]
    columns = torch.arange(longest, device=lengths.device) - (longest - lengths[:, None])  # [Q, S]
    source = columns.clamp(min=0)

    def rows(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        moved_keys = keys.gather(3, source[:, None, None].expand_as(keys))
        moved_values = values.gather(2, source[:, None, :, None].expand_as(values))
        return _padded((moved_keys[which], moved_values[which]), 0, longest)

    return {layer: rows(*pair) for layer, pair in stored.items()}


def _empty(stored: KeysValues, num_slots: int) -> KeysValues:
    """Room for rows that have no keys yet."""

    def room(values: Tensor) -> tuple[Tensor, Tensor]:
        _, heads, _, width = values.shape
        columns = _capacity(_ROOM)
        return values.new_zeros(num_slots, heads, width, columns), values.new_zeros(num_slots, heads, columns, width)

    return {layer: room(values) for layer, (_, values) in stored.items()}


class DecodeLayout:
    """One new token of each row, attending to its prompt and to its own earlier tokens."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._masks: dict[int | None, Tensor | None] = {}  # by window

    def _stored(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put the new keys and values, [1, K, R, E], in the grid. Returns the rows' own: [R, K, E, n] and [R, K, n, E]."""
        keys, values = self._grid.own_kv[layer]
        keys[..., self._grid.now] = k[0].transpose(0, 1)
        values[:, :, self._grid.now] = v[0].transpose(0, 1)
        return keys[..., : self._grid.now + 1], values[:, :, : self._grid.now + 1]

    def _mask(self, window: int | None) -> Tensor | None:
        return self._grid.mask(window)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        grid = self._grid
        keys, values = self._stored(layer, k, v)
        num_slots, num_kv_heads = values.shape[:2]
        queries = q[0].transpose(0, 1) * settings.scaling  # [R, H, E]
        queries = queries.reshape(num_slots, num_kv_heads, -1, q.shape[3])  # [R, K, H / K, E]
        scores = queries @ keys  # [R, K, H / K, n]
        if grid.prompt_kv:
            prompt_keys, prompt_values = grid.prompt_kv[layer]
            num_prompts, _, longest, _ = prompt_values.shape
            to_prompt = _by_prompt(queries, num_prompts) @ prompt_keys  # [Q, K, W * H / K, S]
            scores = torch.cat([_by_slot(to_prompt, num_slots), scores], 3)
        if settings.softcap is not None:
            scores = torch.tanh(scores / settings.softcap) * settings.softcap
        if settings.window not in self._masks:
            self._masks[settings.window] = self._mask(settings.window)
        mask = self._masks[settings.window]
        if mask is not None:
            scores += mask
        by_head = scores.reshape(num_slots, -1, 1, scores.shape[3])  # [R, H, 1, keys]
        if settings.slopes is not None:
            places = grid.places_of_keys(values.shape[2])[:, None, None]
            by_head = by_head + (places * settings.slopes[:, None, None]).to(by_head.dtype)
        weights = attention_weights(by_head, settings.sinks).view_as(scores).to(v.dtype)
        if not grid.prompt_kv:
            attended = weights @ values
        else:
            from_prompt = _by_prompt(weights[..., :longest], num_prompts) @ prompt_values
            attended = _by_slot(from_prompt, num_slots) + weights[..., longest:] @ values
        return attended.reshape(1, num_slots, -1, v.shape[3])


class StaticLayout(DecodeLayout):
    """The same with every column there is room for, whichever is the next: shapes do not change, nor does it wait for the device.

    now [1]: the column of the new keys.
    """

    def __init__(self, grid: Grid, now: Tensor) -> None:
        super().__init__(grid)
        self._now = now

    def _stored(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._grid.own_kv[layer]
        keys.index_copy_(3, self._now, k[0].transpose(0, 1)[..., None])
        values.index_copy_(2, self._now, v[0].transpose(0, 1)[:, :, None])
        return keys, values

    def _mask(self, window: int | None) -> Tensor:
        return self._grid.mask_at(self._now, self._grid.num_columns, window)


def _by_prompt(x: Tensor, num_prompts: int) -> Tensor:
    """[Q * W, K, r, n] -> [Q, K, W * r, n]: the rows of a prompt side by side, so that they share its keys."""
    _, heads, each, n = x.shape
    return x.reshape(num_prompts, -1, heads, each, n).transpose(1, 2).reshape(num_prompts, heads, -1, n)


def _by_slot(x: Tensor, num_slots: int) -> Tensor:
    """[Q, K, W * r, n] -> [Q * W, K, r, n]."""
    prompts, heads, _, n = x.shape
    return x.view(prompts, heads, num_slots // prompts, -1, n).transpose(1, 2).reshape(num_slots, heads, -1, n)
