"""The weights of KL and entropy: as a recipe gives them, or moved from step to step so that a target is held."""

from __future__ import annotations

import math
from collections.abc import Mapping

from coterie.algorithms.controllers import adapted_entropy_weight, adapted_kl_weight
from coterie.recipe import Sampled


def first_loss_weights(recipe: Sampled) -> dict[str, float]:
    """Those that a run begins with."""
    return {"kl_weight": recipe.loss.kl_weight, "entropy_weight": recipe.entropy.weight}


def adapt(loss_weights: dict[str, float], recipe: Sampled, metrics: Mapping[str, float]) -> None:
    """Move the weights that hold a target, for the next step."""
    if recipe.kl.target is not None and math.isfinite(metrics.get("policy/kl", math.nan)):
        loss_weights["kl_weight"] = adapted_kl_weight(
            loss_weights["kl_weight"], metrics["policy/kl"], target=recipe.kl.target, rate=recipe.kl.adapt_rate
        )
    if recipe.entropy.target is not None and math.isfinite(metrics["policy/entropy"]):
        loss_weights["entropy_weight"] = adapted_entropy_weight(
            loss_weights["entropy_weight"],
            metrics["policy/entropy"],
            target=recipe.entropy.target,
            rate=recipe.entropy.adapt_rate,
        )


def controlled(recipe: Sampled, loss_weights: Mapping[str, float], learning_rate: float) -> dict[str, float]:
    """The learning rate of this step, and those of its weights that a controller moves, as metrics."""
    targets = {"kl_weight": recipe.kl.target, "entropy_weight": recipe.entropy.target}
    moved = {f"loss/{name}": loss_weights[name] for name, target in targets.items() if target is not None}
    return {"optimiser/learning_rate": learning_rate, **moved}
