"""Attention with linear biases, of architectures that compute it by themselves: BLOOM and MPT.

Each head adds to a score its slope times how far the key stands before the query. That is all that their attention does beside what
others do, so on a stream their own forward pass of it is replaced by one that hands a layout the slopes.
Source: arXiv 2108.12409.

Legend: T tokens of the stream, H heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# Queries, keys and values [1, H, T, E], a scaling, and slopes [H], of a layer -> [1, T, H, E]
Attend = Callable[[Any, Tensor, Tensor, Tensor, float, Tensor], Tensor]


def has_own_attention(model: PreTrainedModel) -> bool:
    """Whether its attention is one of those that are replaced."""
    return model.config.model_type in _FORWARD


@contextmanager
def replaced_attention(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Let a layout attend for such a model; nothing happens to others."""
    name, forward = _FORWARD.get(model.config.model_type, ("", None))
    modules = [module for module in model.modules() if type(module).__name__ == name] if forward else []
    for module in modules:
        module.forward = partial(forward, attend, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's own is there again


def _bloom(attend: Attend, module: Any, hidden: Tensor, residual: Tensor, **others: Any) -> tuple[Tensor, None]:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    biases = build_alibi_tensor(torch.ones(1, 2, device=hidden.device), module.num_heads, torch.float32)  # [H, 1, 2]
    q, k, v = module._reshape(module.query_key_value(hidden))
    attended = attend(module, q, k, v, module.inv_norm_factor, biases[:, 0, 1] - biases[:, 0, 0])
    return residual + module.dense(attended.flatten(2)), None


def _mpt(attend: Attend, module: Any, hidden: Tensor, **others: Any) -> tuple[Tensor, None]:
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    biases = build_mpt_alibi_tensor(module.n_heads, 2, device=hidden.device)  # [H, 1, 2]
    mixed = module.Wqkv(hidden)
    mixed = mixed.clamp(-module.clip_qkv, module.clip_qkv) if module.clip_qkv else mixed
    q, k, v = (x.unflatten(2, (module.n_heads, -1)).transpose(1, 2) for x in mixed.chunk(3, dim=2))
    attended = attend(module, q, k, v, module.softmax_scale, biases[:, 0, 1] - biases[:, 0, 0])
    return module.out_proj(attended.flatten(2)), None


_FORWARD: dict[str, tuple[str, Any]] = {"bloom": ("BloomAttention", _bloom), "mpt": ("MptAttention", _mpt)}
