"""A forward pass of our own for the Llama family: the model's modules and weights, fewer and larger operations around them.

Beside its products a layer of transformers spends as much time again on norms, rotary positions, gates and the calls between:
many small operations, whose results are all kept for the backward pass. Here the heads of a token stay side by side,
[T, H * E], and each step is one autograd function. A model's own forward pass stays in use wherever this one does not compute
the same: `models/gate.py` compares them.

Legend: T tokens of a stream, H heads, E width of a head, D width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.fast.compiled import rms_norm, rope, swiglu
from coterie.fast.kernels.calls import rope_fits, served
from coterie.models.attention import AttentionSettings, Layout
from coterie.sections import count_products

_PARTS = {
    "model": {"embed_tokens", "layers", "norm", "rotary_emb"},
    "layer": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}


class FastBody:
    """A model below its head, run layer by layer: norm, attention, sum, norm, gated MLP, sum.

    settings: what the model calls each layer's attention with.
    """

    def __init__(self, model: nn.Module, settings: Mapping[int, AttentionSettings]) -> None:
        self.settings = dict(settings)
        self.model: Any = model

    @classmethod
    def of(cls, model: nn.Module, settings: Mapping[int, AttentionSettings]) -> FastBody | None:
        """The pass of a model that has these parts and no other, of a type that there are compiled loops for, else None.

        In half precision the norms of transformers compute in float32, and so keep more than ours would.
        """
        if not served(next(model.parameters())):
            return None
        known = _parts(model) == _PARTS["model"] and all(map(_is_known, model.layers)) and _is_norm(model.norm)
        known = known and rope_fits(2 * len(getattr(model.rotary_emb, "inv_freq", ())))
        return cls(model, settings) if known and len(settings) == len(model.layers) else None

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        layout: Layout,
        places: Tensor | None,
        recompute: Callable[..., Tensor] | None,
    ) -> Tensor:
        """tokens [T], positions [T] -> [T, D], or of some places of the stream, [M]: [M, D]. Of the rest the last layer computes
        what they read, and no more. `recompute(function, *arguments)` calls a layer, and again for its gradient."""
        model = self.model
        count_of(model.layers.parameters(), len(tokens))
        stream = model.embed_tokens(tokens)  # [T, D]
        rotary = Rotary(*model.rotary_emb(stream[None], positions[None]))
        for index in range(len(model.layers)):
            arguments = (index, stream, rotary, layout, places if index == len(model.layers) - 1 else None)
            stream = self._layer(*arguments) if recompute is None else recompute(self._layer, *arguments)
        return _norm(stream, model.norm)

    def _layer(
        self, index: int, stream: Tensor, rotary: Rotary, layout: Layout, places: Tensor | None = None
    ) -> Tensor:
        """[T, D] -> [T, D], or [M, D]."""
        layer = self.model.layers[index]
        attention, mlp = layer.self_attn, layer.mlp
        inner = _norm(stream, layer.input_layernorm)
        q, k, v = (_linear(inner, module) for module in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = (rotary.rope(x, getattr(attention, name, None)) for x, name in ((q, "q_norm"), (k, "k_norm")))
        q, k, v = (x.view(1, len(x), -1, rotary.width).transpose(1, 2) for x in (q, k, v))  # [1, H, T, E]
        attended = layout.attend(index, q, k, v, self.settings[index]).reshape(len(stream), -1)
        if places is not None:
            attended, stream = attended.index_select(0, places), stream.index_select(0, places)
        stream = stream + _linear(attended, attention.o_proj)
        inner = _norm(stream, layer.post_attention_layernorm)
        return stream + _linear(swiglu(_linear(inner, mlp.gate_proj), _linear(inner, mlp.up_proj)), mlp.down_proj)


def _parts(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _is_known(layer: nn.Module) -> bool:
    if _parts(layer) != _PARTS["layer"]:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    norms_of_heads = _parts(attention) - _PARTS["attention"]
    return (
        _parts(attention) >= _PARTS["attention"]
        and norms_of_heads in (set(), {"q_norm", "k_norm"})
        and _parts(mlp) == _PARTS["mlp"]
        and type(mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        and all(map(_is_norm, (layer.input_layernorm, layer.post_attention_layernorm)))
        and all(_is_norm(getattr(attention, name), attention.head_dim) for name in norms_of_heads)
    )


def _is_norm(module: nn.Module, width: int | None = None) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or width not in (None, len(weight)):
        return False
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _norm(x: Tensor, norm: Any) -> Tensor:
    return rms_norm(x, norm.weight, norm.variance_epsilon)


def _linear(x: Tensor, module: Any) -> Tensor:
    """A plain layer's product without the detour through its call; anything else, an adapter say, is called."""
    return F.linear(x, module.weight, module.bias) if type(module) is nn.Linear else module(x)


def count_of(weights: Iterable[Tensor], tokens: int) -> None:
    """Count the products of some tokens with weights, those that are matrices, and of their gradients where there are any."""
    matrices, learns = [weight for weight in weights if weight.dim() == 2], torch.is_grad_enabled()
    forward = 2.0 * tokens * sum(weight.numel() for weight in matrices)
    own = 2.0 * tokens * sum(weight.numel() for weight in matrices if weight.requires_grad)
    count_products(forward, forward + own if learns else 0.0)


class Rotary:
    """Rotary positions for all layers: x * cos + (halves of each head swapped) * sin, negative in the first halves."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        self.width = cos.shape[2]
        half = self.width // 2
        self.cos, self.sin = cos[0].contiguous(), torch.cat([-sin[0, :, :half], sin[0, :, half:]], 1)  # [T, E]

    def rope(self, x: Tensor, norm: Any) -> Tensor:
        """[T, H * E] -> the same, each head normalised where the model does so, and turned by its token's position."""
        weight, epsilon = (norm.weight, norm.variance_epsilon) if norm is not None else (None, 0.0)
        return rope(x, weight, epsilon, self.cos.to(x.dtype), self.sin.to(x.dtype))
