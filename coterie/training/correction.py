"""A correction for the sampler, where it is another engine than the trainer, or an older policy.

Legend: N completion tokens of a stream.
"""

from __future__ import annotations

from torch import Tensor

from coterie.algorithms.clip import TokenTerms
from coterie.algorithms.correction import importance_weights
from coterie.recipe import GRPO, Sampled
from coterie.recipe.settings import Correction
from coterie.training.metrics import Tally
from coterie.types import Stream


def correction_of(recipe: Sampled) -> Correction | None:
    """How the samples are weighed for another sampler, if they are."""
    return recipe.correction if isinstance(recipe, GRPO) and recipe.correction.acts else None


def corrected(per_token: Tensor, terms: TokenTerms, stream: Stream, correction: Correction, tally: Tally) -> Tensor:
    """Losses [N], each weighed by how much likelier pi_old makes its token, or its row, than the sampler did."""
    importance = importance_weights(
        terms.old_logprobs,
        stream.sampler_logprobs,
        terms.row,
        terms.num_rows,
        level=correction.level,
        kind=correction.kind,
        limit=correction.limit,
    )
    tally.add_values("policy/correction_mean", importance)
    tally.add_values("policy/correction_cut_share", (importance == 0) | (importance >= correction.limit))
    return importance * per_token
