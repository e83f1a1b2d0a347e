"""The settings that a model calls its layers' attention with, read off one forward pass of a few tokens.

It is asked for masks that say what they are: what each layer sees there is what the model's plain self obeys.

Legend: T tokens, H heads, K key-value heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from coterie.models.attention import AttentionSettings, UnservedModelError, attend, stream_attention

_OBSERVED = "coterie_observed"


@torch.no_grad()
def observed(model: PreTrainedModel) -> dict[int, AttentionSettings]:
    """The settings of each layer's attention. Raises UnservedModelError where one does what no layout knows."""
    observer = _Observer()
    with stream_attention(model, observer, {}, _OBSERVED):
        model.base_model(input_ids=torch.arange(4, device=model.device)[None], use_cache=False)
    if not observer.settings:
        raise UnservedModelError("its attention is its own, not one of transformers' interface")
    return observer.settings


@dataclass(frozen=True)
class _Observer:
    """A layout of one sequence that attends to itself. settings: what each layer was called with."""

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
    """The attention of a layer, called by transformers."""
    name = type(module).__name__
    for unserved in ("sinks", "position_bias", "head_mask"):
        if others.get(unserved) is not None:
            raise UnservedModelError(f"{name} asks for {unserved}")
    if query.shape[2] != key.shape[2] or not getattr(module, "is_causal", True):
        raise UnservedModelError(f"{name} does not attend to the tokens before")
    if not isinstance(attention_mask, _Seen):
        raise UnservedModelError(f"{name} {'is given no mask' if attention_mask is None else 'has a mask of its own'}")
    if attention_mask.why_not:
        raise UnservedModelError(f"{name} has a mask that depends on {attention_mask.why_not}")
    return attend(module, query, key, value, scaling, attention_mask.window, softcap, s_aux), None


def _mask(
    *, mask_function: Callable[..., Any], local_size: int | None = None, use_vmap: bool = False, **others: Any
) -> _Seen:
    """A mask, asked for by transformers. `mask_function(batch, head, query, key)` says whether a token sees another."""
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


AttentionInterface.register(_OBSERVED, _attention)
AttentionMaskInterface.register(_OBSERVED, _mask)
