"""Positions that depend on how long a sequence is: which sequences may be run together, and which can be sampled.

Rotary positions of the kinds longrope and dynamic turn every token of a sequence by angles that the longest sequence of the call
decides. Each row alone is right, so rows are run with those that get the same angles: rows on one side of the limit of longrope,
and of dynamic, above its limit, rows of one length. While a sequence is sampled its length is not known; so one that could cross
such a limit is refused.

Legend: T tokens of a stream, N places that are wanted of it, B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from coterie.errors import UserError
from coterie.types import Stream


@dataclass(frozen=True)
class Lengths:
    """Which lengths a model tells apart; by default none.

    switches: above each of these all positions are others. stretches: above each of these every length has positions of its own.
    stretching: the modules that remember the longest sequence they met. alone: whether rows can't be run beside others at all.
    """

    switches: tuple[int, ...] = ()
    stretches: tuple[int, ...] = ()
    stretching: tuple[nn.Module, ...] = ()
    alone: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> Lengths:
        switches, stretches, stretching = set(), set(), []
        for module in model.modules():
            for kind, parameters in _rotary_kinds(module):
                if "dynamic" in kind:
                    stretches.add(int(module.original_max_seq_len))
                    stretching.append(module)
                elif kind == "longrope":
                    limit = parameters.get("original_max_position_embeddings") or getattr(
                        module.config, "original_max_position_embeddings", None
                    )
                    switches.add(int(limit or module.original_max_seq_len))
        return cls(tuple(sorted(switches)), tuple(sorted(stretches)), tuple(stretching))

    def kind(self, length: int) -> Hashable:
        """Equal for sequences that get the same positions."""
        return (*(length > limit for limit in self.switches), *(max(length, limit) for limit in self.stretches))

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """A forward pass as if it were the first: a longer sequence before it would leave its angles behind."""
        self._forget()
        yield
        self._forget()

    def _forget(self) -> None:
        for module in self.stretching:
            prefixes = [f"{kind}_" for kind in module.rope_type] if isinstance(module.rope_type, dict) else [""]
            for prefix in prefixes:
                original = getattr(module, f"{prefix}original_inv_freq")
                module.register_buffer(
                    f"{prefix}inv_freq", original.to(getattr(module, f"{prefix}inv_freq").device), persistent=False
                )
                setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)

    def check(self, prompt_length: int, max_new_tokens: int) -> None:
        """Raises UserError where a sequence's positions could change while it is sampled."""
        longest = prompt_length + max_new_tokens
        crossed = [limit for limit in self.switches if prompt_length <= limit < longest]
        crossed += [limit for limit in self.stretches if limit < longest]
        if crossed:
            rule = "may not cross" if crossed[0] in self.switches else "may not exceed"
            raise UserError(
                f"sampling.max_new_tokens: a prompt of {prompt_length} tokens and max_new_tokens={max_new_tokens} make "
                f"{longest}, and above {crossed[0]} tokens this model's positions depend on how long the whole sequence becomes "
                f"(longrope or dynamic rotary positions), which nobody knows while it is written: they {rule} {crossed[0]}"
            )

    def alike(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of sequences that may be run together, by the lengths of the sequences."""
        kinds: dict[Hashable, list[int]] = {}
        for index, length in enumerate(lengths):
            kinds.setdefault(index if self.alone else self.kind(length), []).append(index)
        return list(kinds.values())


def context_length_of(config: PretrainedConfig) -> int | None:
    """The most tokens that one sequence may have, or None where the configuration sets no limit."""
    text = config.get_text_config()
    limits = (getattr(text, name, None) for name in ("max_position_embeddings", "n_positions"))
    return next((limit for limit in limits if limit and limit > 0), None)  # XLNet's is -1


def _rotary_kinds(module: Any) -> list[tuple[str, dict[str, Any]]]:
    """The kinds of rotary positions that a module computes, with their parameters; a module may have one for each kind of layer."""
    kinds = getattr(module, "rope_type", None)
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    if isinstance(kinds, dict):
        return [(kind, parameters.get(layer_type) or {}) for layer_type, kind in kinds.items() if kind]
    return [(kinds, parameters)] if isinstance(kinds, str) else []


@dataclass(frozen=True)
class SubStream:
    """Rows of a stream that are run together, as a stream: tokens [t], positions [t], segments. wanted: places in it, on the host;
    entries: which of those that were asked for they are."""

    tokens: Tensor
    positions: Tensor
    segments: list[tuple[int, list[int]]]
    wanted: Tensor
    entries: Tensor


def rows_apart(stream: Stream, wanted: Tensor, rows: Tensor, lengths: Lengths) -> list[SubStream]:
    """A stream in parts whose rows get the same positions, each prompt in every part that has rows of it."""
    totals = [prompt + length for prompt, of_prompt in stream.segments for length in of_prompt]
    together = lengths.alike(totals)
    if len(together) < 2:
        return [SubStream(stream.tokens, stream.positions, stream.segments, wanted, torch.arange(len(wanted)))]
    return [_sub_stream(stream, wanted, rows.cpu(), chosen) for chosen in together]


def _sub_stream(stream: Stream, wanted: Tensor, rows: Tensor, chosen: Sequence[int]) -> SubStream:
    places: list[int] = []
    segments: list[tuple[int, list[int]]] = []
    row = at = 0
    for prompt, of_prompt in stream.segments:
        starts = list(accumulate(of_prompt, initial=at + prompt))
        mine = [i for i in range(len(of_prompt)) if row + i in chosen]
        if mine:
            places += range(at, at + prompt)
            places += (place for i in mine for place in range(starts[i], starts[i + 1]))
            segments.append((prompt, [of_prompt[i] for i in mine]))
        row, at = row + len(of_prompt), starts[-1]
    here = torch.tensor(places)
    moved = torch.empty(len(stream.tokens), dtype=torch.long)
    moved[here] = torch.arange(len(here))
    entries = torch.isin(rows, torch.tensor(chosen)).nonzero().squeeze(1)
    on_device = here.to(stream.tokens.device)
    return SubStream(stream.tokens[on_device], stream.positions[on_device], segments, moved[wanted[entries]], entries)


def side_by_side(run: Callable[..., Tensor], rows: Sequence[Tensor], lengths: Lengths) -> list[Tensor]:
    """The outputs of `run(input_ids=, attention_mask=, use_cache=)`, [B, longest, ...], for each of B rows, padded on the right.

    Rows that may not be run together are not, and a row alone is not padded.
    """
    found: dict[int, Tensor] = {}
    for chosen in lengths.alike([len(row) for row in rows]):
        with lengths.fresh():
            outputs = run(**_padded([rows[b] for b in chosen]), use_cache=False)
        found |= {b: output[: len(rows[b])] for b, output in zip(chosen, outputs, strict=True)}
    return [found[b] for b in range(len(rows))]


def _padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Rows side by side, with zeros behind the shorter ones, and which tokens are theirs: [B, longest] each."""
    if len(rows) == 1:
        return {"input_ids": rows[0][None]}
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return {"input_ids": pad(rows), "attention_mask": pad([torch.ones_like(row) for row in rows])}
