"""LoRA: matrices of low rank beside a model's linear layers are trained, and its own weights stay as they are.

The layers are `peft`'s, put into the transformers model, which is otherwise what it was. A model may hold several sets of
matrices, by name: the policy's, a moving reference's, a value model's. Which of them acts is switched for the length of a
forward pass, so that all of them share one copy of the model's weights. Source: arXiv 2106.09685.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coterie.errors import UserError
from coterie.noise import key
from coterie.settings import ALL_LINEAR, Lora

POLICY = "policy"  # the set that acts unless another is asked for


@dataclass(frozen=True)
class Adapter:
    """One set of LoRA matrices in a model; without a name, the model's own weights alone.

    layers: peft's layers, by the name of the linear layer that they stand in for.
    """

    model: PreTrainedModel
    settings: Lora
    seed: int
    layers: dict[str, Any]
    name: str | None

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Let this set act, and no other.

        peft's own switch is not used: it also turns gradients on and off, and a backward pass comes later than the forward
        pass that it belongs to.
        """
        first = next(iter(self.layers.values()))
        before, wanted = (first._active_adapter, first._disable_adapters), ([self.name or POLICY], self.name is None)
        if before == wanted:
            yield
            return
        try:
            self._switch(*wanted)
            yield
        finally:
            self._switch(*before)

    def _switch(self, active: list[str], disabled: bool) -> None:
        for layer in self.layers.values():
            layer._active_adapter, layer._disable_adapters = active, disabled

    def off(self) -> Adapter:
        """The model's own weights alone."""
        return replace(self, name=None)

    def added(self, name: str, *, trained: bool = True) -> Adapter:
        """A further set in the same model, of the same rank at the same layers. It starts without effect, as every set does."""
        _inject(self.model, self.settings, name, self.seed, list(self.layers))
        adapter = replace(self, name=name)
        for _, parameter in adapter.named_parameters():
            parameter.requires_grad_(trained)
        self._switch([POLICY], False)
        return adapter

    def copied(self, name: str) -> Adapter:
        """A further set, without gradients, that is now what this one is."""
        adapter = self.added(name, trained=False)
        with torch.no_grad():
            for (_, copy), (_, own) in zip(adapter.named_parameters(), self.named_parameters(), strict=True):
                copy.copy_(own)
        return adapter

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The matrices A [rank, in] and B [out, rank] of each layer; none without a name."""
        if self.name is None:
            return
        for place, layer in self.layers.items():
            yield f"{place}.lora_A", layer.lora_A[self.name].weight
            yield f"{place}.lora_B", layer.lora_B[self.name].weight

    def merge(self) -> None:
        """Add B A * alpha / rank to the model's own weights, and take every set out: the model is a plain one again."""
        for place, layer in self.layers.items():
            if self.name is not None:
                layer.merge(adapter_names=[self.name])
            parent, _, child = place.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer.get_base_layer())
        self.model.requires_grad_(True)


def add_adapter(model: PreTrainedModel, settings: Lora, seed: int) -> Adapter:
    """Put the policy's set into a plain model, and freeze the model's own weights.

    A is random, by the seed, and B is zero: the model computes what it did before, to the bit. Both are float32, whatever
    the model's own weights are, so that small updates are not rounded away.
    """
    places = target_layers(model, settings)
    model.requires_grad_(False)
    _inject(model, settings, POLICY, seed, places)
    layers = {place: model.get_submodule(place) for place in places}
    return Adapter(model, settings, seed, layers, POLICY)


def check_lora(config: PretrainedConfig, settings: Lora) -> None:
    """Raises UserError where peft is missing, or a target names nothing in such a model. No weights are read or made."""
    if find_spec("peft") is None:
        raise UserError("lora: needs the package peft: pip install 'coterie[lora]'")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        target_layers(AutoModelForCausalLM.from_config(config), settings)


def target_layers(model: PreTrainedModel, settings: Lora) -> list[str]:
    """The names of the linear layers that a recipe means, in the model's order. UserError for a target that matches none.

    The head is not among them: it is often the embedding too, which must not change behind a layer's back.
    """
    body = model.base_model
    prefix = next((f"{name}." for name, module in model.named_modules() if module is body and name), "")
    linear = [f"{prefix}{name}" for name, module in body.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    if settings.targets == (ALL_LINEAR,):
        chosen = {ALL_LINEAR: linear}
    else:
        chosen = {target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in settings.targets}
    for target, places in chosen.items():
        if not places:
            kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear)) or "none"
            raise UserError(
                f"lora.targets: {target!r} matches no linear layer of {type(model).__name__} below its head; there are: "
                f"{kinds}; {ALL_LINEAR} takes all of them"
            )
    wanted = {place for places in chosen.values() for place in places}
    return [name for name in linear if name in wanted]


def _inject(model: PreTrainedModel, settings: Lora, name: str, seed: int, places: list[str]) -> None:
    """Add a fresh set of matrices, with gradients, at these layers; everything else keeps the gradients that it had."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=places, lora_dropout=0.0)
    with_gradient = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft sees by itself that GPT-2's layers are transposed, and says so for each
        torch.manual_seed(key(seed, "adapter", name) % 2**63)
        try:
            inject_adapter_in_model(config, model, adapter_name=name)
        except ValueError as error:
            raise UserError(f"lora: peft refuses {type(model).__name__}: {error}") from error
    del model.peft_config  # the model's configuration stays what it was
    for place in places:
        layer = model.get_submodule(place)
        for matrix in (layer.lora_A[name], layer.lora_B[name]):
            matrix.float().requires_grad_(True)
    for parameter, before in with_gradient.items():
        parameter.requires_grad_(before)
