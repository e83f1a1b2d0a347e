"""The forward pass of the Llama family in mixed precision: what stands between two products is bfloat16, and each of the functions here
keeps for its backward pass no more than it can't compute again in a moment: of norms and gates, their inputs.

Legend: T tokens of a stream, D width of the model, H heads, K key-value heads, E width of a head, F width of the gated layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from coterie.fast.body import FastBody, Rotary
from coterie.fast.compiled import rms_norm
from coterie.fast.half import Halves, add_half
from coterie.fast.kernels.calls import Groups, call, rooms
from coterie.fast.stream import StreamLayout
from coterie.models.adapters import parts_of
from coterie.models.attention import AttentionSettings, Layout


class HalfBody(FastBody):
    """`FastBody` in mixed precision. halves: the bfloat16 copies of the model's weights."""

    def __init__(self, model: nn.Module, settings: Mapping[int, AttentionSettings]) -> None:
        super().__init__(model, settings)
        self.halves = Halves()

    @classmethod
    def beside(cls, body: FastBody) -> HalfBody | None:
        """The same model's, where its attention is plain, as the family's is."""
        return cls(body.model, body.settings) if all(one.plain for one in body.settings.values()) else None

    def __call__(self, *arguments: Any) -> Tensor:
        if torch.is_grad_enabled():  # what a sampler reads is old after the step, and takes memory until then
            self.halves.forget_packed(weight for weight in self.model.layers.parameters() if weight.requires_grad)
        return super().__call__(*arguments)

    def keep_halves_alone(self) -> None:
        """Let go of the float32 weights of products, in a model that nobody trains or saves: half of its memory."""
        for layer in self.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            readers = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
            for modules in (*readers, (attention.o_proj,), (mlp.down_proj,)):
                if any(type(module) is not nn.Linear for module in modules):
                    continue
                weights = [module.weight for module in modules]
                parts = self.halves.rounded(*weights).split([len(weight) for weight in weights])
                for weight, part in zip(weights, parts, strict=True):
                    weight.data = part

    def _layer(
        self, index: int, stream: Tensor, rotary: Rotary, layout: Layout, places: Tensor | None = None
    ) -> Tensor:
        layer = self.model.layers[index]
        attention, mlp = layer.self_attn, layer.mlp
        heads = self._read(stream, layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        attended = self._attend(index, heads, rotary, layout)
        if places is not None:
            attended, stream = attended.index_select(0, places), stream.index_select(0, places)
        stream = self._add(stream, attended, attention.o_proj)
        gates = self._read(stream, layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        return self._add(stream, gates, mlp.down_proj, gated=True)

    def _read(self, stream: Tensor, norm: Any, *modules: Any) -> Tensor:
        """The stream, normalised, through layers that read the same: [T, D] -> their outputs side by side, bfloat16. LoRA's matrices
        are in autocast, beside their layer; so is anything but a plain layer."""
        layers, beside = zip(*map(parts_of, modules), strict=True)
        if None in layers:
            inner = rms_norm(stream, norm.weight, norm.variance_epsilon, half=True)
            return torch.cat([module(inner) for module in modules], 1)
        weights = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
        read: Tensor = _Read.apply(stream, norm.weight, norm.variance_epsilon, self.halves, *weights)
        if not any(beside):
            return read
        inner = rms_norm(stream, norm.weight, norm.variance_epsilon, half=True)
        outs = read.split([layer.out_features for layer in layers], 1)
        return torch.cat([low.added_to(out, inner) if low else out for low, out in zip(beside, outs, strict=True)], 1)

    def _add(self, stream: Tensor, x: Tensor, module: Any, *, gated: bool = False) -> Tensor:
        """The stream [T, D], plus what a layer makes of x [T, in], or, gated, of x [T, 2 in]."""
        layer, low = parts_of(module)
        if layer is not None and low is None:
            return _Add.apply(stream, x, layer.weight, layer.bias, self.halves, gated)
        x = _Gate.apply(x) if gated else x
        if layer is None or low is None:
            return stream + module(x)
        return low.added_to(_Add.apply(stream, x, layer.weight, layer.bias, self.halves, False), x)

    def _attend(self, index: int, heads: Tensor, rotary: Rotary, layout: Layout) -> Tensor:
        """Queries, keys and values [T, (H + 2 K) E] -> [T, H E]. Any layout but a whole stream's is of a sampler, without gradients."""
        attention, settings = self.model.layers[index].self_attn, self.settings[index]
        turning = _Turning(attention, rotary)
        if isinstance(layout, StreamLayout):
            groups, norms = layout.groups, turning.norms
            return _Attend.apply(heads, *norms, turning, groups, settings)
        assert not torch.is_grad_enabled()
        q, k, v = (x[None].transpose(1, 2) for x in turning.forward(heads))
        attended = layout.attend(index, q, k, v, settings)
        return attended.reshape(len(heads), -1).to(torch.bfloat16)


class _Turning:
    """Heads with rotary positions, in float32, normalised where the model does so."""

    def __init__(self, attention: Any, rotary: Rotary) -> None:
        modules = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.norms = [norm.weight if norm is not None else None for norm in modules]
        self._epsilons = [float(norm.variance_epsilon) if norm is not None else 0.0 for norm in modules]
        self._angles, self._width = (rotary.cos, rotary.sin), rotary.width
        self._num_kv_heads = attention.k_proj.out_features // rotary.width

    def forward(self, heads: Tensor) -> list[Tensor]:
        """[T, (H + 2 K) E] -> q [T, H, E], k and v [T, K, E]."""
        numbers = self._numbers(heads)
        found = [torch.empty(len(heads), n, self._width) for n in (numbers[1], self._num_kv_heads, self._num_kv_heads)]
        call("half_turn_forward", heads, *self.norms, *self._epsilons, *self._angles, *found, *numbers)
        return found

    def backward(self, grads: Sequence[Tensor], heads: Tensor) -> list[Tensor | None]:
        """The gradients of heads and of both norms' weights."""
        found = [
            torch.empty_like(heads),
            *(torch.empty_like(norm) if norm is not None else None for norm in self.norms),
        ]
        inputs, room = (*grads, heads, *self.norms, *self._epsilons, *self._angles), rooms(grads[0], 2 * self._width)
        call("half_turn_backward", *inputs, *found, room, *self._numbers(heads))
        return found

    def _numbers(self, heads: Tensor) -> tuple[int, int, int, int]:
        num_heads = heads.shape[1] // self._width - 2 * self._num_kv_heads
        return len(heads), num_heads, self._num_kv_heads, self._width


class _Attend(torch.autograd.Function):
    """heads [T, (H + 2 K) E] -> [T, H E], all in bfloat16; computed in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        heads: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        turning: _Turning,
        groups: Groups,
        settings: AttentionSettings,
    ) -> Tensor:
        q, k, v = turning.forward(heads)
        out, normaliser = torch.empty_like(q), q.new_empty(q.shape[:2])
        ctx.about = groups.about(q, k, settings.scaling, settings.window)
        call("attend_forward", ctx.about, q, k, v, out, normaliser)
        rounded = out.view(len(heads), -1).to(torch.bfloat16)
        ctx.save_for_backward(heads, rounded, normaliser)
        ctx.turning, ctx.groups = turning, groups  # `about` has the addresses of what the groups hold
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        heads, rounded, normaliser = ctx.saved_tensors
        q, k, v = ctx.turning.forward(heads)
        found = [torch.empty_like(x) for x in (q, k, v)]
        call("attend_backward", ctx.about, q, k, v, rounded.float(), normaliser, grads[0].float().contiguous(), *found)
        return *ctx.turning.backward(found, heads), None, None, None


class _Read(torch.autograd.Function):
    """x [T, D], a norm's weight [D], then a weight [out, D] and a bias [out], or none, of each layer -> their outputs side by side."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, epsilon: float, halves: Halves, *weights_and_biases: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, norm, *weights_and_biases)
        ctx.epsilon, ctx.halves = epsilon, halves
        inner, _ = _normed(x, norm, epsilon)
        return halves.product(inner, weights_and_biases[::2], weights_and_biases[1::2])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, norm, *weights_and_biases = ctx.saved_tensors
        grad, weights = grads[0].contiguous(), weights_and_biases[::2]
        inner, scale = _normed(x, norm, ctx.epsilon)
        of_weights = _of_weights(grad, inner, weights_and_biases, ctx.needs_input_grad[4:])
        grad_inner = grad @ ctx.halves.rounded(*weights)
        grad_x, grad_norm, room = torch.empty_like(x), torch.empty_like(norm), rooms(x, 2 * len(norm))
        call("half_rms_norm_backward", grad_inner, x, norm, scale, grad_x, grad_norm, room, *x.shape)
        return grad_x, grad_norm, None, None, *of_weights


class _Add(torch.autograd.Function):
    """stream [T, D], x [T, in] or gates [T, 2 in], weight [D, in], bias [D] or none -> [T, D]."""

    @staticmethod
    def forward(
        ctx: Any, stream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, halves: Halves, gated: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.halves, ctx.gated = halves, gated
        added = halves.product(_gate(x) if gated else x, [weight], [bias])
        out = torch.empty_like(stream)
        call("half_add", stream.contiguous(), added, out, out.numel())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias = ctx.saved_tensors
        grad = grads[0].to(torch.bfloat16).contiguous()
        grad_x = grad @ ctx.halves.rounded(weight)
        if ctx.gated:
            gates, x, grad_out = x, torch.empty_like(grad_x), grad_x
            grad_x = torch.empty_like(gates)
            call("half_swiglu_backward", grad_out, gates, x, grad_x, *x.shape)
        of_weights = _of_weights(grad, x, (weight, bias), ctx.needs_input_grad[2:4])
        return grads[0], grad_x, *of_weights, None, None


class _Gate(torch.autograd.Function):
    """gates [T, 2 F], each row a gate and what it lets through -> silu(gate) * up, [T, F]."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor) -> Tensor:
        ctx.save_for_backward(gates)
        return _gate(gates)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (gates,) = ctx.saved_tensors
        found, again = torch.empty_like(gates), torch.empty_like(grads[0])
        call("half_swiglu_backward", grads[0].contiguous(), gates, again, found, *again.shape)
        return found


def _normed(x: Tensor, norm: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm of x [T, D] in bfloat16, and what each row was multiplied with."""
    out, scale = torch.empty_like(x, dtype=torch.bfloat16), x.new_empty(len(x))
    call("half_rms_norm_forward", x, norm, float(epsilon), out, scale, *x.shape)
    return out, scale


def _gate(gates: Tensor) -> Tensor:
    out = gates.new_empty(len(gates), gates.shape[1] // 2)
    call("half_swiglu_forward", gates.contiguous(), out, *out.shape)
    return out


def _of_weights(
    grad: Tensor, x: Tensor, weights_and_biases: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the weights and biases of layers side by side: grad [T, all outputs] and x [T, in], in bfloat16.

    What a weight has from other micro-batches is added to at once, in float32, without an array of its own.
    """
    found: list[Tensor | None] = []
    sizes = [len(weight) for weight in weights_and_biases[::2] if weight is not None]
    products = (_transposed(grad) @ x).split(sizes) if any(needed[::2]) else [grad] * len(sizes)
    for number, (product, of_outputs) in enumerate(zip(products, grad.split(sizes, 1), strict=True)):
        weight = weights_and_biases[2 * number]
        assert weight is not None
        found.append(_added(weight, product) if needed[2 * number] else None)
        found.append(of_outputs.float().sum(0) if needed[2 * number + 1] else None)
    return found


def _transposed(x: Tensor) -> Tensor:
    """[T, out] -> [out, T], copied: torch's product of a matrix that lies the other way takes twice as long."""
    out = x.new_empty(x.shape[1], x.shape[0])
    call("half_transpose", x, out, *x.shape)
    return out


def _added(weight: Tensor, grad: Tensor) -> Tensor | None:
    """A gradient in bfloat16 as autograd takes it; or none, and it is added here."""
    if weight.grad is None:
        return grad.float()
    add_half(weight.grad, grad)
    return None
