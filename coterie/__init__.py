"""coterie: group-relative policy optimisation (GRPO) for language models.

Importing the package is cheap; torch is loaded when one of the names below is first used.
"""

from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "train": "coterie.training.train",
    "update": "coterie.training.update",
    "NativeEngine": "coterie.fast.native",
    "Sampling": "coterie.recipe.settings",
    "Policy": "coterie.fast.serve",
    "load_recipe": "coterie.recipe",
}
__all__ = ["NativeEngine", "Policy", "Sampling", "load_recipe", "train", "update"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'coterie' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
