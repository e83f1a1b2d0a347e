"""Activation checkpointing: a layer's inputs are kept for the backward pass, and the rest of it is computed again there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

Setting = Callable[[], AbstractContextManager[None]]  # the surroundings of a forward pass


def recomputable_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that transformers marks as whole steps of the forward pass."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recomputed(setting: Setting) -> Callable[..., Any]:
    """A way to call a function of tensors of which only the inputs are kept; `setting()` surrounds it when it runs again."""
    return partial(_checkpointed, setting)


@contextmanager
def recomputed_layers(model: PreTrainedModel, setting: Setting) -> Iterator[None]:
    """Let the model's own forward pass run each layer so.

    transformers' own switch acts in training mode alone, where dropout acts too. And it would compute a layer again outside
    of what surrounded it: with another attention, and another adapter.
    """
    layers = recomputable_layers(model)
    for layer in layers:
        layer.forward = partial(_checkpointed, setting, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own is there again


def _checkpointed(setting: Setting, forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    return checkpoint(
        forward,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing in a layer is random
        context_fn=lambda: (nullcontext(), setting()),
        **keywords,
    )
