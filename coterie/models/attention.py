"""The seam to a model's attention: transformers' attention interface, with the model itself unchanged.

A model's linear layers run on the stream [1, T, D]; only its attention asks a `Layout` which tokens attend to which. On the stream
no mask is made: how far back each layer sees was found out when the policy was made (`models/observe.py`).

Legend: T tokens of the stream, H heads, K key-value heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from coterie.models.alibi import has_own_attention, replaced_attention

_STREAM = "coterie_stream"
_UNMASKED = "coterie_unmasked"  # for models whose attention is replaced, with masks that nobody reads


class Layout(Protocol):
    """Says which tokens of a stream attend to which. `attend` maps q, k, v [1, H or K, T, E] to [1, T, H, E]."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor: ...


@dataclass(frozen=True)
class AttentionSettings:
    """The settings that a model calls a layer's attention with. window: how many tokens back it sees. softcap: a limit on its scores.
    sinks: [H], a score of each head that takes part in the softmax and stands for no token.
    slopes: [H], what each head adds to a score for each token that the key stands further on."""

    scaling: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None = None
    slopes: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether scores are products and nothing else."""
        return self.softcap is None and self.sinks is None and self.slopes is None


Windows = Mapping[int, int | None]  # by layer


class UnservedModelError(RuntimeError):
    """The model's attention does something that a layout can't reproduce."""


_acting: ContextVar[tuple[Layout, Windows]] = ContextVar("acting")


@contextmanager
def stream_attention(model: PreTrainedModel, layout: Layout, windows: Windows, name: str = _STREAM) -> Iterator[None]:
    """Let a layout attend for the model. Outside of this the model is its plain self.

    windows: how far back each layer sees. name: under which transformers finds what it calls for attention, and for masks.
    """
    name = _UNMASKED if has_own_attention(model) else name
    config = model.config.get_text_config()
    before = config._attn_implementation
    token = _acting.set((layout, windows))
    try:
        config._attn_implementation = name
        with replaced_attention(model, _attend_with_slopes):
            yield
    finally:
        _acting.reset(token)
        config._attn_implementation = before


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention of a layer, called by transformers."""
    if attention_mask is not None:
        raise UnservedModelError(f"{type(module).__name__} has a mask of its own")
    window = _acting.get()[1][int(module.layer_idx)]
    return attend(module, query, key, value, scaling, window, softcap, s_aux), None


def attend(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """A layer's attention by the layout that acts: q, k, v [1, H or K, T, E] -> [1, T, H, E]."""
    settings = AttentionSettings(q.shape[-1] ** -0.5 if scaling is None else scaling, window, softcap, sinks, slopes)
    q, k = q.to(v.dtype), k.to(v.dtype)  # rotary positions in float32 widen those of mixed precision
    return _acting.get()[0].attend(int(module.layer_idx), q, k, v, settings)


def _attend_with_slopes(module: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, slopes: Tensor) -> Tensor:
    return attend(module, q, k, v, scaling, slopes=slopes)


AttentionInterface.register(_STREAM, _attention)
AttentionInterface.register(_UNMASKED, _attention)
AttentionMaskInterface.register(_UNMASKED, lambda **others: torch.zeros(()))
