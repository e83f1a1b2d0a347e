"""Sampling from a model of the Llama family in compiled loops: what `FastBody` does for a stream, for the next token of each row.

The rows are split over the threads, and each thread takes its rows through all layers, token after token, until they end; what
is shared, weights and prompts, is only read. Products are those of the BLAS that torch brings.

Legend: R rows, D width, H heads, K key-value heads, E width of a head, S longest prompt, C columns of the cache, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coterie.fast.body import FastBody, Rotary, count_of
from coterie.fast.grid import Grid
from coterie.fast.half import Halves, half_gemms
from coterie.fast.kernels.build import library, matrix_product
from coterie.fast.kernels.calls import run
from coterie.fast.kernels.structs import Decoding, LayerCache, LayerWeights, Linear
from coterie.fast.tiles import plain_head
from coterie.models.adapters import parts_of
from coterie.models.attention import AttentionSettings
from coterie.models.policy import Policy
from coterie.recipe.settings import Sampling
from coterie.rollouts.engine import SampledTokens

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone


class Decoder:
    """A model's weights, ready to decode sequences of at most `longest` tokens."""

    def __init__(
        self,
        model: Any,
        head: nn.Linear,
        settings: Mapping[int, AttentionSettings],
        longest: int,
        halves: Halves | None = None,
    ) -> None:
        self._dtype, kept = head.weight.dtype, list[Tensor]()

        def read(weight: Tensor) -> Tensor:
            kept.append(halves.packed(weight) if halves is not None else weight.detach().to(self._dtype))
            return kept[-1]

        layers = (_layer(one, settings[i], read) for i, one in enumerate(model.layers))
        self._layers = (LayerWeights * len(settings))(*layers)
        self._matrices = [head.weight, *model.layers.parameters()]
        parts = [parts_of(module) for layer in model.layers for module in _projections(layer)]
        low = next((low for _, low in parts if low is not None), None)
        gemm, head_gemm = half_gemms() if halves is not None else [matrix_product(self._dtype)] * 2
        rotary = Rotary(*model.rotary_emb(head.weight[:1, None], torch.arange(longest)[None]))
        self._rotary = rotary.cos.to(self._dtype), rotary.sin.to(self._dtype)
        self._kept = kept  # the loops have their addresses
        self._model = {
            "num_layers": len(settings),
            "width": head.weight.shape[1],
            "heads": model.layers[0].self_attn.q_proj.out_features // rotary.width,
            "head_width": rotary.width,
            "mlp_width": model.layers[0].mlp.gate_proj.out_features,
            "vocabulary": head.weight.shape[0],
            "positions": longest,
            "rank": low.a.shape[0] if low is not None else 0,
            "lora_scaling": low.scaling if low is not None else 0.0,
            "epsilon": model.norm.variance_epsilon,
            "embeddings": _at(model.embed_tokens.weight),
            "final_norm": _at(model.norm.weight),
            "head": _at(read(head.weight)),
            "head_bias": _at(head.bias),
            "cosine": _at(self._rotary[0]),
            "sine": _at(self._rotary[1]),
            "gemm": gemm,
            "head_gemm": head_gemm,
        }

    @classmethod
    def of(cls, policy: Policy, longest: int) -> Decoder | None:
        """None where the compiled loops do not serve: another architecture, device or precision."""
        head, body = plain_head(policy), policy.body
        if not isinstance(body, FastBody) or policy.device.type != "cpu" or head is None:
            return None
        model: Any = policy.model.base_model
        plain = all(parts_of(module)[0] is not None for layer in model.layers for module in _projections(layer))
        plain &= type(model.embed_tokens) is nn.Embedding and model.rotary_emb.rope_type in _FIXED_ROTARY
        plain &= all(settings.plain for settings in body.settings.values())
        if not plain or matrix_product(head.weight.dtype) is None:
            return None
        with policy.acting():
            return cls(model, head, body.settings, longest, getattr(body, "halves", None))

    def draw(
        self, grid: Grid, keys: Tensor, sampling: Sampling, ends: Tensor, num_steps: int
    ) -> tuple[Tensor, Tensor, SampledTokens]:
        """Up to `num_steps` tokens for each live row, without truncation or stop strings: as `sample_tokens`, time after time.

        keys [R]: what seeds each row's noise. The grid has room for the steps. Rows that end are no longer live in it.
        Returns, for each step and row, [n, R]: whether the rest means something, whether an end token ended it, what was drawn.
        """
        shape = (num_steps, grid.num_slots)
        live, ended = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
        tokens = torch.zeros(shape, dtype=torch.long)
        logprobs, entropies = grid.logits.new_zeros(shape), grid.logits.new_zeros(shape)
        self._run(
            grid,
            num_steps,
            tokens,
            draws=1,
            greedy=int(sampling.temperature == 0),
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            num_ends=len(ends),
            keys=_at(keys),
            ends=_at(ends),
            logprobs=_at(logprobs),
            entropies=_at(entropies),
            was_live=_at(live),
            ended=_at(ended),
        )
        count_of(self._matrices, int(live.sum()))
        return live, ended, SampledTokens(tokens, logprobs, entropies)

    def feed(self, grid: Grid, tokens: Tensor) -> None:
        """Run one given token of each live row, [R], and leave the logits that follow in the grid."""
        self._run(grid, 1, tokens, draws=0)

    def _run(self, grid: Grid, num_steps: int, tokens: Tensor, **how: float | None) -> None:
        own, prompts = grid.own_kv, grid.prompt_kv
        caches = (LayerCache * len(own))(
            *(LayerCache(*map(_at, (*own[i], *prompts.get(i, (None, None))))) for i in range(len(own)))
        )
        step = Decoding(
            **self._model,
            **how,
            rows=grid.num_slots,
            kv_heads=own[0][1].shape[1],
            columns=grid.num_columns,
            now=grid.now,
            slots=grid.width,
            longest_prompt=grid.longest_prompt,
            num_steps=num_steps,
            firsts=_at(grid.firsts),
            starts=_at(grid.starts),
            prompts=_at(grid.prompt_lengths),
            live=_at(grid.live),
            logits=_at(grid.logits),
            tokens=_at(tokens),
        )
        compiled = library(self._dtype)
        assert compiled is not None
        run(compiled.decode, ctypes.byref(step), self._layers, caches)


def _layer(layer: Any, settings: Any, read: Callable[[Tensor], Tensor]) -> LayerWeights:
    """read: from a product's weight to what the loops are given of it."""
    attention = layer.self_attn
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return LayerWeights(
        *(_at(norm.weight) if norm is not None else None for norm in norms),
        *(_linear(module, read) for module in _projections(layer)),
        *(norm.variance_epsilon if norm is not None else 0.0 for norm in norms),
        settings.scaling,
        settings.window or 0,
    )


def _linear(module: Any, read: Callable[[Tensor], Tensor]) -> Linear:
    layer, low = parts_of(module)
    assert layer is not None
    matrices = [_at(read(matrix)) for matrix in (low.a, low.b)] if low is not None else []
    return Linear(_at(read(layer.weight)), _at(layer.bias), *matrices)


def _projections(layer: Any) -> Sequence[Any]:
    return [getattr(layer.self_attn if name[0] in "qkvo" else layer.mlp, name) for name in _PROJECTIONS]


def _at(x: Tensor | None) -> int | None:
    if x is None:
        return None
    assert x.is_contiguous()
    return x.data_ptr()
