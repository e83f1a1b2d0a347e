"""In which numbers a run's products are computed where its recipe leaves that open."""

from __future__ import annotations

from collections.abc import Callable

import torch

from coterie.fast.half import has_half_products
from coterie.models.load import choose_device, load_config
from coterie.recipe import Recipe

SMALLEST_WIDTH = 256  # of a model that gains: narrower ones spend their time between products
_FAMILY = ("llama", "mistral", "qwen2", "qwen3")  # what runs through compiled loops on a CPU


def with_precision(recipe: Recipe, tell: Callable[[str], None]) -> Recipe:
    """The recipe with `precision: auto` replaced by what it comes to here, of which `tell` is told with the reason.

    It reads the model's configuration, and no weights. Raises UserError as `load_config`.
    """
    if recipe.precision != "auto":
        return recipe
    config = load_config(recipe).get_text_config()
    width, device = getattr(config, "hidden_size", None) or 0, choose_device(recipe.device)
    chosen = "mixed"
    if width < SMALLEST_WIDTH:
        chosen, why = "float32", f"a model {width} wide is too small to gain from bfloat16"
    elif device.type == "cuda":
        gains = torch.cuda.is_bf16_supported(including_emulation=False)
        chosen, why = ("mixed", "the GPU has bfloat16") if gains else ("float32", "the GPU has no bfloat16")
    elif not has_half_products():
        chosen, why = "float32", "this processor has no products of bfloat16 numbers that are used here"
    elif config.model_type not in _FAMILY:
        chosen, why = "float32", f"on a CPU {config.model_type} has no compiled loops"
    else:
        why = "the processor has products of bfloat16 numbers"
    tell(f"precision: auto is {chosen} here: {why}")
    return recipe.model_copy(update={"precision": chosen})
