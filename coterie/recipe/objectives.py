"""The section `loss`: a class for each objective, with the settings that act in it.

The functions of tensors are in `coterie/algorithms/objectives.py`, under the same names, and take these settings as keywords.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from coterie.recipe.kinds import OneOf, Settings
from coterie.recipe.settings import NonNegative, Number, Positive


class Loss(Settings):
    """The objective, how its terms are summed, and the weight of the KL to the reference.

    needs_reference: it compares the policy with the reference. by_advantage: a completion whose advantage is 0 has no gradient.
    """

    needs_reference: ClassVar[bool] = False
    by_advantage: ClassVar[bool] = True

    objective: str
    aggregation: Literal["sequence_mean", "sequence_sum", "token_mean", "fixed_length"] = Field(
        "sequence_mean",
        description="how tokens are summed: mean or sum in each completion, mean of all tokens, or sum over the length limit",
    )
    kl_weight: NonNegative = Field(0.0, description="of the KL to the reference; 0 for none")

    @property
    def keywords(self) -> dict[str, Any]:
        """The settings of this objective alone: what its function takes."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in Loss.model_fields}


class _WithRatio(Loss):
    ratio: Literal["token", "sequence", "sequence_mean", "sequence_mean_token"] = Field(
        "token", description="pi_theta / pi_old, now to before the update: of each token, or of a whole completion"
    )


class _Bounded(Loss):
    clip_low: Annotated[Number, Field(gt=0, le=1)] = Field(0.2, description="how far below 1 a ratio counts")
    clip_high: Positive = Field(0.2, description="how far above 1 a ratio counts")


class _Clipped(_Bounded, _WithRatio):
    clip_bounds: Literal["fixed", "dynamic"] = Field("fixed", description="dynamic: wider for rare tokens (DCPO)")


class _Ceiling(Loss):
    clip_ceiling: Annotated[Number, Field(gt=1, allow_inf_nan=False)] = Field(3.0, description="of the loss of a token")


class _Gated(Loss):
    gate_positive: Positive = Field(1.0, description="how steep the gate is where the advantage is positive")
    gate_negative: Positive = Field(1.05, description="the same where it is negative")


class _WithAnchor(Loss):
    anchor_alpha: Annotated[Number, Field(ge=0, lt=1)] = Field(0.5, description="the policy's share of the anchor")
    anchor_beta: Positive = 1.0
    anchor_level: Literal["token", "sequence"] = "token"
    anchor_weight: Literal["advantage", "reward"] = "advantage"


class Clip(_Clipped):
    objective: Literal["clip"] = "clip"


class DualClip(_Ceiling, _Clipped):
    objective: Literal["dual_clip"] = "dual_clip"


class Cispo(_Bounded, _WithRatio):
    objective: Literal["cispo"] = "cispo"


class Sapo(_Gated, _WithRatio):
    objective: Literal["sapo"] = "sapo"


class Gmpo(_Bounded):
    objective: Literal["gmpo"] = "gmpo"


class PolicyGradient(_WithRatio):
    objective: Literal["policy_gradient"] = "policy_gradient"


class Anchored(_WithAnchor):
    needs_reference = True
    by_advantage = False
    objective: Literal["anchored"] = "anchored"


class OwnObjective(_WithAnchor, _Gated, _Ceiling, _Clipped):
    """A function of the user's own, file.py:function, which may take any of the settings."""

    by_advantage = False


LOSSES = OneOf(
    "loss.objective", Clip, DualClip, Cispo, Sapo, Gmpo, PolicyGradient, Anchored, own=OwnObjective
)  # fmt: skip
