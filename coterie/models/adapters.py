"""LoRA: matrices of low rank beside a model's linear layers are trained, and its own weights stay as they are.

The layers are `peft`'s, put into the transformers model, which is otherwise what it was. A model may hold several sets of
matrices, by name: the policy's, a moving reference's, a value model's. Which of them acts is switched for the length of a
forward pass, so that all of them share one copy of the model's weights. Where layers share a weight (Zamba's), they share the
matrices beside it. Source: arXiv 2106.09685.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from coterie.errors import UserError
from coterie.models.quantised import FORMS, Quantised
from coterie.noise import key
from coterie.recipe.settings import ALL_LINEAR, Lora

POLICY = "policy"  # the set that acts unless another is asked for


@dataclass(frozen=True)
class Adapter:
    """One set of LoRA matrices in a model; without a name, the model's own weights alone.

    layers: peft's layers, by the name of the linear layer that they stand in for; of those with one weight, the first one's.
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
        _wrapped(self.model, self.settings, name, self.seed, self.layers)
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
        """Add B A * alpha / rank to the model's own weights, and take every set out: the model is a plain one again.

        Weights that were kept in few bits are floats then, and the model is on the CPU, where there is room for them.
        """
        if any(isinstance(layer.base_layer, Quantised) for layer in self.layers.values()):
            self.model.cpu()
        for layer in self.layers.values():
            if isinstance(layer.base_layer, Quantised):
                layer.base_layer = layer.base_layer.plain()
            if self.name is not None:
                layer.merge(adapter_names=[self.name])
        _put(self.model, {layer: layer.get_base_layer() for layer in self.layers.values()})
        dequantise(self.model)
        self.model.requires_grad_(True)


def add_adapter(model: PreTrainedModel, settings: Lora, seed: int) -> Adapter:
    """Put the policy's set into a plain model, and freeze the model's own weights.

    A is random, by the seed, and B is zero: the model computes what it did before, to the bit. Both are float32, whatever
    the model's own weights are, so that small updates are not rounded away.
    """
    quantise(model, settings.base)
    targets = target_layers(model, settings)
    model.requires_grad_(False)
    plain = {place: modules[0] for place, modules in targets.items()}
    layers = _wrapped(model, settings, POLICY, seed, plain)
    _put(model, {module: layers[place] for place, modules in targets.items() for module in modules})
    return Adapter(model, settings, seed, layers, POLICY)


@torch.no_grad()
def quantise(model: PreTrainedModel, base: str) -> None:
    """Keep the weights of all linear layers below the head in this form, if they are not yet. Whatever else has weights, embeddings, norms,
    the head, stays as it is. The model can't be trained then but through an adapter."""
    if base == "float32" or any(isinstance(module, Quantised) for module in model.modules()):
        return
    targets = target_layers(model, Lora())
    while targets:  # a layer's floats go before the next one is packed
        _, modules = targets.popitem()
        if isinstance(modules[0], nn.Linear):
            _put(model, dict.fromkeys(modules, FORMS[base](modules[0])))


def dequantise(model: PreTrainedModel) -> None:
    """Let a model that `quantise` has packed have float weights throughout, on the CPU."""
    packed = [module for module in model.modules() if isinstance(module, Quantised)]
    if packed:
        model.cpu()
        _put(model, {module: module.plain() for module in packed})


@dataclass(frozen=True)
class LowRank:
    """The matrices that act beside a linear layer: A [rank, in], B [out, rank], and what their product is scaled by."""

    a: Tensor
    b: Tensor
    scaling: float

    def added_to(self, y: Tensor, x: Tensor) -> Tensor:
        """What the layer makes of x [T, in] by its own weight, y [T, out], and what the matrices make of it."""
        return y + F.linear(F.linear(x, self.a) * self.scaling, self.b)


def parts_of(module: Any) -> tuple[nn.Linear | None, LowRank | None]:
    """A plain linear layer, and the matrices that act beside it, if any do; neither, where a module is something else."""
    layer = module.base_layer if hasattr(module, "lora_A") else module
    if type(layer) is not nn.Linear:
        return None, None
    if layer is module or module._disable_adapters:
        return layer, None
    (name,) = module._active_adapter
    return layer, LowRank(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])


def num_in_experts(model: PreTrainedModel) -> int:
    """The number of weights in stacks of experts, which are no linear layers and get no matrices."""
    stacks = {
        parameter
        for name, module in model.base_model.named_modules()
        for parameter in module.parameters(recurse=False)
        if parameter.dim() > 2
        and not isinstance(module, Quantised)
        and "expert" in f"{name} {type(module).__name__}".lower()
    }
    return sum(stack.numel() for stack in stacks)


def check_lora(config: PretrainedConfig, settings: Lora) -> None:
    """Raises UserError where peft is missing, or a target names nothing in such a model. No weights are read or made."""
    if find_spec("peft") is None:
        raise UserError("lora: needs the package peft: pip install 'coterie[lora]'")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        target_layers(model, settings)
    layers = target_layers(model, Lora()).values()
    if settings.base != "float32" and not any(isinstance(modules[0], nn.Linear) for modules in layers):
        raise UserError(f"lora.base: {type(model).__name__} has no linear layers that can be kept in {settings.base}")


def target_layers(model: PreTrainedModel, settings: Lora) -> dict[str, list[nn.Module]]:
    """The linear layers that a recipe means: their names in the model's order, and of each the modules that have its weight.

    UserError for a target that matches none. The head is not among them: it is often the embedding too, which must not change
    behind a layer's back.
    """
    linear = _linear_layers(model)
    if settings.targets == (ALL_LINEAR,):
        chosen = {ALL_LINEAR: list(linear)}
    else:
        chosen = {target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in settings.targets}
    for target, places in chosen.items():
        if not places:
            kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear)) or "none"
            raise UserError(
                f"lora.targets: {target!r} matches no linear layer of {type(model).__name__} below its head; there are: "
                f"{kinds}; {ALL_LINEAR} takes all of them"
            )
    # One weight in several layers is one weight more to train, not several
    of_weight: dict[nn.Parameter, list[str]] = {}
    for name, module in linear.items():
        of_weight.setdefault(_weight(module), []).append(name)
    wanted = {place for places in chosen.values() for place in places}
    groups = [names for names in of_weight.values() if not wanted.isdisjoint(names)]
    return {names[0]: [linear[name] for name in names] for names in groups}


def _linear_layers(model: PreTrainedModel) -> dict[str, Any]:
    """The linear layers below the head, by name: what is called, gives the product and no more, and shares no weight with others."""
    body = model.base_model
    prefix = next((f"{name}." for name, module in model.named_modules() if module is body and name), "")
    linear = {name: module for name, module in body.named_modules() if _is_linear(module)}
    own = set(linear.values()) - _read_directly(model, set(linear.values()))
    elsewhere = {p for module in model.modules() if module not in own for p in module.parameters(recurse=False)}
    biases: dict[nn.Parameter, set[nn.Parameter | None]] = {}
    for module in own:
        biases.setdefault(_weight(module), set()).add(module.bias)
    return {
        f"{prefix}{name}": module
        for name, module in linear.items()
        if module in own and _weight(module) not in elsewhere and len(biases[_weight(module)]) == 1
    }


def _weight(module: Any) -> nn.Parameter:
    """What holds a linear layer's weight, as floats or packed: one and the same where layers share it."""
    held: nn.Parameter = module.codes if isinstance(module, Quantised) else module.weight
    return held


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer, or gives just what one gives. A router that derives from one gives more, as its choices."""
    if type(module) in (nn.Linear, Conv1D, *FORMS.values()):
        return True
    if not isinstance(module, nn.Linear):
        return False
    x = torch.linspace(-1, 1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)[None]
    try:
        given = module(x)
    except Exception:  # broad: a model's own code, which takes something else than x
        return False
    wanted = F.linear(x, module.weight, module.bias)
    if not isinstance(given, Tensor) or given.shape != wanted.shape or given.dtype != wanted.dtype:
        return False
    return given.is_meta or torch.allclose(given, wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())


@torch.no_grad()
def _read_directly(model: PreTrainedModel, linear: set[Any]) -> set[Any]:
    """Linear layers whose weight the model reads around them, as Mamba does, so that matrices beside them would do nothing. By a trial."""
    if model.device.type == "meta":
        return set()
    watched: dict[nn.Parameter, set[nn.Module]] = {}  # layers that share a weight are any of them
    for module in linear:
        watched.setdefault(_weight(module), set()).add(module)
    inside: list[nn.Module] = []
    found: set[Any] = set()

    class Reads(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = func(*args, **(kwargs or {}))
            if isinstance(given, Tensor):
                for x in args:
                    if isinstance(x, nn.Parameter) and watched.get(x, set()).isdisjoint(inside):
                        found.update(watched.get(x, ()))
            return given

    def leave(*_: object) -> None:
        inside.pop()

    handles = [module.register_forward_pre_hook(lambda module, _: inside.append(module)) for module in linear]
    handles += [module.register_forward_hook(leave) for module in linear]
    tokens = torch.arange(4, device=model.device) % model.get_input_embeddings().weight.shape[0]
    try:
        with Reads():
            model(input_ids=tokens[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _wrapped(
    model: PreTrainedModel, settings: Lora, name: str, seed: int, layers: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """peft's layers around these, with a fresh set of matrices; of layers that are peft's already, with one set more.

    Everything else keeps the gradients that it had. peft sees the layers and not the model: of some models it would take other
    layers than those that are meant, and rewrite their experts' weights.
    """
    from peft import LoraConfig, inject_adapter_in_model

    shelf = nn.ModuleDict({f"layer_{number}": layer for number, layer in enumerate(layers.values())})
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=list(shelf), lora_dropout=0.0)
    with_gradient = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft sees by itself that GPT-2's layers are transposed, and says so for each
        torch.manual_seed(key(seed, "adapter", name) % 2**63)
        inject_adapter_in_model(config, shelf, adapter_name=name)
    found = dict(zip(layers, shelf.values(), strict=True))
    for layer in found.values():
        for matrix in (layer.lora_A[name], layer.lora_B[name]):
            matrix.float().requires_grad_(True)
    for parameter, before in with_gradient.items():
        parameter.requires_grad_(before)
    return found


def _put(model: nn.Module, others: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of some, wherever in the model these stand."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in others:
                setattr(parent, name, others[child])
