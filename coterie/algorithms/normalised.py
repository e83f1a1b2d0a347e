"""Advantages of several rewards, each normalised by itself.

Legend: P prompts, G completions per prompt.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from coterie.algorithms.advantages import check_choice, group_advantages


def normalised_then_summed(
    parts: Sequence[Tensor], weights: Sequence[float], *, baseline: str, scale: str, epsilon: float = 1e-6
) -> Tensor:
    """Each reward's own advantages, weighted, summed, and scaled over the batch: parts [P, G] each -> [P, G].

    With one sum for all rewards a group can have equal sums and different parts, and the reward with the largest spread
    drowns the others; here each speaks with its weight alone. The sum is divided by its sample std over the batch, so that
    its size does not grow with the number of rewards. A part that abstains (NaN) says nothing of that completion.
    Raises ValueError for a baseline that is not the group's: the sum would have a mean of its own.
    Source: GDPO, arXiv 2601.05242, equations 4 to 6.
    """
    check_choice("baseline", baseline, ("group", "leave_one_out"))
    total = sum(
        weight * group_advantages(part.double(), baseline=baseline, scale=scale, epsilon=epsilon)
        for part, weight in zip(parts, weights, strict=True)
    )
    assert isinstance(total, Tensor)
    spoke = torch.stack([~part.isnan() for part in parts]).any(0)
    std = total[spoke].std() if spoke.sum() > 1 else 0.0
    dtype = parts[0].dtype if parts[0].is_floating_point() else torch.get_default_dtype()
    return torch.where(spoke, total / (std + epsilon), 0.0).to(dtype)
