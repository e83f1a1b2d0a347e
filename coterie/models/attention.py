"""How a model's attention is handed to us: through transformers' attention interface, with the model itself unchanged.

A model's linear layers run on the stream [1, T, D]; only its attention asks a `Layout` which tokens attend to which.

Legend: T tokens of the stream, H heads, K key-value heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

NAME = "coterie_stream"


class Layout(Protocol):
    """Says which tokens of a stream attend to which. `attend` maps q, k, v [1, H or K, T, E] to [1, T, H, E]."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor: ...


@dataclass(frozen=True)
class AttentionSettings:
    """What a model calls a layer's attention with. window: how many tokens back it sees. softcap: a limit on its scores."""

    scaling: float
    window: int | None
    softcap: float | None


class UnservedModelError(RuntimeError):
    """The model's attention does something that a layout can't reproduce."""


@contextmanager
def stream_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let the model's attention read the `layout=` it is called with. Outside of this the model is its plain self."""
    configs = (model.config, model.config.get_text_config())  # the same one, unless the model sees pictures too
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: Layout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer."""
    name = type(module).__name__
    if layout is None:
        raise UnservedModelError(f"{name} was not handed the stream's layout by its model")
    for unserved in ("s_aux", "sinks", "position_bias", "head_mask"):
        if others.get(unserved) is not None:
            raise UnservedModelError(f"{name} asks for {unserved}")
    layer = int(module.layer_idx)
    kinds = getattr(getattr(module, "config", None), "layer_types", None)
    kind = kinds[layer] if kinds else None
    if kind not in (None, "full_attention", "sliding_attention"):
        raise UnservedModelError(f"{name} is of the kind {kind}")
    if kind == "sliding_attention" and sliding_window is None:
        raise UnservedModelError(f"{name} has a sliding window and does not say how wide it is")
    if kind == "full_attention":
        sliding_window = None
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    return layout.attend(layer, query, key, value, AttentionSettings(scaling, sliding_window, softcap)), None


AttentionInterface.register(NAME, _attention)
