"""The native engine: the trainer's own weights, one prefill per prompt for its whole group, rows that come and go.

Decoding keeps a grid of Q prompts with room for W completions each. Keys and values of a prompt are stored once and read by
all its rows; those of a completion lie in the row's own slot. Finished rows leave the linear layers at once; the grid is
built anew, smaller or with waiting prompts in it, when enough of them have left.

Legend: P prompts, G completions per prompt, R live rows, Q prompts in the grid, W slots of each, S longest prompt,
L tokens of the longest completion so far, H heads, K key-value heads, E width of a head, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from coterie.models.attention import StreamLayout
from coterie.models.policy import Policy
from coterie.recipe import Sampling
from coterie.rollouts.engine import History, sample_tokens
from coterie.types import Completion

_MIN_SLOT_LENGTH = 32


class NativeEngine:
    """Samples from a policy that serves the packed stream. It holds no weights of its own, so there is nothing to load."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def load_weights(self, policy: Policy, version: int) -> None:
        self.policy = policy

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], keys: Tensor, sampling: Sampling, end_tokens: Sequence[int]
    ) -> list[list[Completion]]:
        """Sample G completions of each prompt: keys [P, G] -> P lists of G. See `Engine`."""
        num_completions = keys.shape[1]
        device = self.policy.device
        keys = keys.to(device).flatten()
        ends = torch.tensor(list(end_tokens), device=device)
        waiting = deque(range(len(prompts)))
        history = History()
        grid: _Grid | None = None
        while waiting or grid:
            live = len(grid.rows) if grid else 0
            room = sampling.max_rows - live
            if waiting and (not grid or room >= max(num_completions, sampling.max_rows // 4)):
                admitted = [waiting.popleft()]
                while waiting and (len(admitted) + 1) * num_completions <= room:
                    admitted.append(waiting.popleft())
                new = self._prefill([prompts[i] for i in admitted], admitted, num_completions)
                grid = new if grid is None else _Grid.joined(grid, new)
            elif grid and live <= 0.6 * grid.num_slots:
                grid = grid.compacted()
            assert grid is not None
            sampled = sample_tokens(grid.logits, keys[grid.rows], grid.lengths, sampling)
            history.add(grid.rows, sampled)
            going_on = ~torch.isin(sampled.tokens, ends) & (grid.lengths + 1 < sampling.max_new_tokens)
            grid = grid.only(going_on)
            if grid is not None:
                grid = self._decode(grid, sampled.tokens[going_on])
        return history.completions(len(prompts), num_completions, set(end_tokens))

    def _prefill(self, prompts: Sequence[Sequence[int]], which: Sequence[int], num_completions: int) -> _Grid:
        """Run each prompt once and open slots for its completions."""
        device = self.policy.device
        lengths = [len(prompt) for prompt in prompts]
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        recorder = _PrefillLayout(lengths, device)
        hidden = self.policy.run(tokens, positions, recorder)
        last = torch.tensor(lengths, device=device).cumsum(0) - 1
        logits = self.policy.logits(hidden.index_select(0, last))  # [P, V]
        members = torch.arange(num_completions, device=device)
        num_rows = len(prompts) * num_completions
        return _Grid(
            rows=(torch.tensor(which, device=device)[:, None] * num_completions + members).flatten(),
            slots=torch.arange(num_rows, device=device),
            lengths=torch.zeros(num_rows, dtype=torch.long, device=device),
            logits=logits.repeat_interleave(num_completions, 0),
            prompt_lengths=torch.tensor(lengths, device=device),
            width=num_completions,
            prompt_kv=recorder.stored,
            own_kv={},
        )

    def _decode(self, grid: _Grid, tokens: Tensor) -> _Grid:
        """Feed each live row the token it drew: tokens [R] -> the grid with the logits that follow."""
        grid.make_room()
        layout = _DecodeLayout(grid)
        positions = grid.prompt_lengths[grid.slots // grid.width] + grid.lengths
        hidden = self.policy.run(tokens, positions, layout)  # [R, D]
        grid.lengths = grid.lengths + 1
        grid.logits = self.policy.logits(hidden)
        return grid


@dataclass
class _Grid:
    """The rows being decoded, and their keys and values.

    rows [R]: each row's number in the whole job. slots [R]: its place in the grid, prompt * W + member. lengths [R]: tokens
    of it already run. logits [R, V]: what its next token is drawn from. prompt_lengths [Q].
    prompt_kv: by layer, keys and values [Q, K, S, E]. own_kv: by layer, [Q * W, K, slot length, E].
    """

    rows: Tensor
    slots: Tensor
    lengths: Tensor
    logits: Tensor
    prompt_lengths: Tensor
    width: int
    prompt_kv: dict[int, tuple[Tensor, Tensor]]
    own_kv: dict[int, tuple[Tensor, Tensor]]

    @property
    def num_slots(self) -> int:
        return len(self.prompt_lengths) * self.width

    def only(self, keep: Tensor) -> _Grid | None:
        """Let the other rows go: keep [R] bool. Their slots stay until the grid is built anew."""
        if not keep.any():
            return None
        if not keep.all():
            self.rows, self.slots, self.lengths, self.logits = (
                x[keep] for x in (self.rows, self.slots, self.lengths, self.logits)
            )
        return self

    def make_room(self) -> None:
        """Lengthen the slots if the longest row has filled its own."""
        needed = int(self.lengths.max()) + 1
        for layer, (keys, values) in self.own_kv.items():
            if keys.shape[2] < needed:
                grown = max(needed, 2 * keys.shape[2]) - keys.shape[2]
                self.own_kv[layer] = (F.pad(keys, (0, 0, 0, grown)), F.pad(values, (0, 0, 0, grown)))

    def compacted(self) -> _Grid:
        """The same rows in the smallest grid that holds them."""
        prompts, prompt_of_row = torch.unique(self.slots // self.width, return_inverse=True)
        counts = torch.bincount(prompt_of_row)
        width = int(counts.max())
        order = torch.argsort(prompt_of_row, stable=True)
        first = counts.cumsum(0) - counts
        member = torch.arange(len(order), device=order.device) - first[prompt_of_row[order]]
        slots = torch.empty_like(self.slots)
        slots[order] = prompt_of_row[order] * width + member
        source = self.slots.new_zeros(len(prompts) * width)  # an empty slot copies any; it is never read
        source[slots] = self.slots
        return _Grid(
            rows=self.rows,
            slots=slots,
            lengths=self.lengths,
            logits=self.logits,
            prompt_lengths=self.prompt_lengths[prompts],
            width=width,
            prompt_kv={i: (k[prompts], v[prompts]) for i, (k, v) in self.prompt_kv.items()},
            own_kv={i: (k[source], v[source]) for i, (k, v) in self.own_kv.items()},
        )

    @staticmethod
    def joined(old: _Grid, new: _Grid) -> _Grid:
        """Rows under way and rows just prefilled, in one grid."""
        old = old.compacted()
        width = max(old.width, new.width)
        num_old = len(old.prompt_lengths)
        old_slots = old.slots // old.width * width + old.slots % old.width
        new_slots = (new.slots // new.width + num_old) * width + new.slots % new.width
        num_slots = (num_old + len(new.prompt_lengths)) * width
        own_kv = {}
        for layer, pair in old.own_kv.items():
            keys, values = (x.new_zeros(num_slots, *x.shape[1:]) for x in pair)
            keys[old_slots], values[old_slots] = pair[0][old.slots], pair[1][old.slots]
            own_kv[layer] = (keys, values)
        return _Grid(
            rows=torch.cat([old.rows, new.rows]),
            slots=torch.cat([old_slots, new_slots]),
            lengths=torch.cat([old.lengths, new.lengths]),
            logits=torch.cat([old.logits, new.logits]),
            prompt_lengths=torch.cat([old.prompt_lengths, new.prompt_lengths]),
            width=width,
            prompt_kv={
                i: (_stacked(pair[0], new.prompt_kv[i][0]), _stacked(pair[1], new.prompt_kv[i][1]))
                for i, pair in old.prompt_kv.items()
            },
            own_kv=own_kv,
        )


def _stacked(a: Tensor, b: Tensor) -> Tensor:
    """[Q1, K, S1, E] and [Q2, K, S2, E] -> [Q1 + Q2, K, max(S1, S2), E]."""
    longest = max(a.shape[2], b.shape[2])
    return torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[2])) for x in (a, b)])


class _PrefillLayout:
    """Prompts that attend to themselves, with their keys and values kept."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._layout = StreamLayout([(length, ()) for length in lengths], device)
        starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)[:, None]
        steps = torch.arange(max(lengths))
        self._places = torch.where(steps < torch.tensor(lengths)[:, None], starts + steps, 0).to(device)  # [Q, S]
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor:
        by_prompt = (x[0].transpose(0, 1)[self._places].transpose(1, 2).contiguous() for x in (k, v))
        keys, values = by_prompt
        self.stored[layer] = (keys, values)
        return self._layout.attend(layer, q, k, v, scaling=scaling, window=window, softcap=softcap)


class _DecodeLayout:
    """One new token of each live row, attending to its prompt and to its own earlier tokens."""

    def __init__(self, grid: _Grid) -> None:
        self._grid = grid
        self._longest = int(grid.lengths.max()) + 1
        self._masks: dict[int | None, Tensor] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scaling: float, window: int | None, softcap: float | None
    ) -> Tensor:
        grid = self._grid
        num_heads, width, num_kv_heads = q.shape[1], q.shape[3], k.shape[1]
        num_prompts, num_slots = len(grid.prompt_lengths), grid.num_slots
        if layer not in grid.own_kv:
            grid.own_kv[layer] = tuple(
                x.new_zeros(num_slots, num_kv_heads, max(_MIN_SLOT_LENGTH, self._longest), x.shape[3]) for x in (k, v)
            )
        own_keys, own_values = grid.own_kv[layer]
        own_keys[grid.slots, :, grid.lengths] = k[0].transpose(0, 1)
        own_values[grid.slots, :, grid.lengths] = v[0].transpose(0, 1)
        own_keys, own_values = own_keys[:, :, : self._longest], own_values[:, :, : self._longest]
        prompt_keys, prompt_values = grid.prompt_kv[layer]

        slotted = q.new_zeros(num_slots, num_heads, width)
        slotted[grid.slots] = q[0].transpose(0, 1) * scaling
        queries = slotted.view(num_slots, num_kv_heads, -1, width)  # [Q * W, K, H / K, E]
        own = queries @ own_keys.transpose(2, 3)  # [Q * W, K, H / K, L]
        prompt = _by_prompt(queries, num_prompts) @ prompt_keys.transpose(2, 3)  # [Q, K, W * H / K, S]
        scores = torch.cat([_by_slot(prompt, num_slots), own], 3)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = (scores + self._mask(window, prompt_keys.shape[2])).float().softmax(3).to(v.dtype)
        to_prompt, to_own = weights.split([prompt_keys.shape[2], self._longest], 3)
        from_prompt = _by_slot(_by_prompt(to_prompt, num_prompts) @ prompt_values, num_slots)
        attended = (from_prompt + to_own @ own_values).reshape(num_slots, num_heads, -1)
        return attended[grid.slots][None]

    def _mask(self, window: int | None, longest_prompt: int) -> Tensor:
        """What is added to the scores: [Q * W, 1, 1, S + L]."""
        if window not in self._masks:
            grid, device = self._grid, self._grid.slots.device
            prompt = grid.prompt_lengths.repeat_interleave(grid.width)[:, None]  # [Q * W, 1]
            length = torch.zeros_like(prompt)
            length[grid.slots, 0] = grid.lengths
            prompt_at, own_at = torch.arange(longest_prompt, device=device), torch.arange(self._longest, device=device)
            allowed = torch.cat([prompt_at < prompt, own_at <= length], 1)
            if window is not None:
                distance = prompt + length - torch.cat([prompt_at.expand(len(prompt), -1), prompt + own_at], 1)
                allowed = allowed & (distance < window)
            mask = torch.zeros(allowed.shape, device=device).masked_fill(~allowed, -torch.inf)
            self._masks[window] = mask[:, None, None]
        return self._masks[window]


def _by_prompt(x: Tensor, num_prompts: int) -> Tensor:
    """[Q * W, K, r, n] -> [Q, K, W * r, n]: the rows of a prompt side by side, so that they share its keys."""
    _, heads, each, n = x.shape
    return x.view(num_prompts, -1, heads, each, n).transpose(1, 2).reshape(num_prompts, heads, -1, n)


def _by_slot(x: Tensor, num_slots: int) -> Tensor:
    """[Q, K, W * r, n] -> [Q * W, K, r, n]."""
    prompts, heads, _, n = x.shape
    return x.view(prompts, heads, num_slots // prompts, -1, n).transpose(1, 2).reshape(num_slots, heads, -1, n)
