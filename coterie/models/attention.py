"""How a model's attention is handed to us: through transformers' attention interface, with the model itself unchanged.

A model's linear layers run on the stream [1, T, D]; only its attention asks a `Layout` which tokens attend to which. What each
layer sees is read off the masks that the model asks transformers for, in one forward pass of a few tokens (`observed`): they are
what its plain self obeys. On the stream no mask is made.

Legend: T tokens of the stream, H heads, K key-value heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from coterie.models.alibi import has_own_attention, replaced_attention

NAME = "coterie_stream"
_OBSERVED = "coterie_observed"  # the same, with masks that say what they are
_UNMASKED = "coterie_unmasked"  # for models whose attention is replaced, with masks that nobody reads


class Layout(Protocol):
    """Says which tokens of a stream attend to which. `attend` maps q, k, v [1, H or K, T, E] to [1, T, H, E]."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor: ...


@dataclass(frozen=True)
class AttentionSettings:
    """What a model calls a layer's attention with. window: how many tokens back it sees. softcap: a limit on its scores.
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
def stream_attention(model: PreTrainedModel, layout: Layout, windows: Windows, name: str = NAME) -> Iterator[None]:
    """Let a layout attend for the model. Outside of this the model is its plain self.

    windows: what `observed` found.
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


@torch.no_grad()
def observed(model: PreTrainedModel) -> dict[int, AttentionSettings]:
    """What each layer's attention is called with. Raises UnservedModelError where one does what no layout knows."""
    observer = _Observer()
    with stream_attention(model, observer, {}, _OBSERVED):
        model.base_model(input_ids=torch.arange(4, device=model.device)[None], use_cache=False)
    if not observer.settings:
        raise UnservedModelError("its attention is its own, not one of transformers' interface")
    return observer.settings


@dataclass(frozen=True)
class _Observer:
    """One sequence that attends to itself, and what each layer is called with."""

    settings: dict[int, AttentionSettings] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
        if layer in self.settings:
            raise UnservedModelError(f"layer {layer} attends more than once")
        self.settings[layer] = settings
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)


@dataclass(frozen=True)
class _Seen:
    """In place of a mask: each token sees those before it, as far back as the window; or why that is not so."""

    window: int | None
    why_not: str = ""


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | _Seen | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer."""
    name = type(module).__name__
    layout, windows = _acting.get()
    for unserved in ("sinks", "position_bias", "head_mask"):
        if others.get(unserved) is not None:
            raise UnservedModelError(f"{name} asks for {unserved}")
    if query.shape[2] != key.shape[2] or not getattr(module, "is_causal", True):
        raise UnservedModelError(f"{name} does not attend to the tokens before")
    layer = int(module.layer_idx)
    if isinstance(attention_mask, _Seen):
        if attention_mask.why_not:
            raise UnservedModelError(f"{name} has a mask that depends on {attention_mask.why_not}")
        window = attention_mask.window
    elif attention_mask is not None:
        raise UnservedModelError(f"{name} has a mask of its own")
    elif isinstance(layout, _Observer):
        raise UnservedModelError(f"{name} is given no mask")
    else:
        window = windows[layer]
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    return layout.attend(layer, query, key, value, AttentionSettings(scaling, window, softcap, s_aux)), None


def _attend_with_slopes(module: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, slopes: Tensor) -> Tensor:
    return _acting.get()[0].attend(module.layer_idx, q, k, v, AttentionSettings(scaling, None, None, slopes=slopes))


def _mask(
    *, mask_function: Callable[..., Any], local_size: int | None = None, use_vmap: bool = False, **others: Any
) -> _Seen:
    """What transformers calls to make a mask. `mask_function(batch, head, query, key)` says whether a token sees another."""
    if not use_vmap and _is_causal(mask_function, local_size):
        return _Seen(local_size)
    return _Seen(None, f"a limit of {local_size} that is no sliding window" if local_size else "more than order")


def _is_causal(mask_function: Callable[..., Any], window: int | None) -> bool:
    """Whether a mask function is that of a sliding window, or of none, tried around its edges."""
    size = window or 8
    queries = torch.tensor([0, 1, size - 1, size, size + 1, 2 * size - 1, 2 * size, 3 * size + 1])
    back = torch.tensor([-1, 0, 1, size - 1, size, size + 1, 2 * size])
    query, key = (x.flatten() for x in (queries[:, None].expand(-1, len(back)), queries[:, None] - back))
    query, key = query[key >= 0], key[key >= 0]
    expected = (key <= query) & (query - key < window if window else True)
    zero = torch.zeros((), dtype=torch.long)
    try:
        return torch.equal(mask_function(zero, zero, query, key).expand_as(expected), expected)
    except (IndexError, RuntimeError, TypeError, AttributeError):
        return False


AttentionInterface.register(NAME, _attention)
AttentionInterface.register(_OBSERVED, _attention)
AttentionMaskInterface.register(_OBSERVED, _mask)
AttentionInterface.register(_UNMASKED, _attention)
AttentionMaskInterface.register(_UNMASKED, lambda **others: torch.zeros(()))
