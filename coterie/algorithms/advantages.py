"""Advantages: how much better a completion did than the others of its group."""

import torch
from torch import Tensor

SCALES = ("sample", "population", "none", "batch")


def group_advantages(rewards: Tensor, *, scale: str = "sample", epsilon: float = 1e-6) -> Tensor:
    """How much better each completion did than its siblings: rewards [P, G] -> advantages [P, G].

    `scale` divides the difference from the group's mean by the group's sample std ("sample", G - 1), its population std
    ("population", G), nothing ("none"), or the sample std of the rewards of the whole batch ("batch").

    NaN marks a completion that abstains: it leaves the mean and the std, and gets 0. A group with equal rewards, or with
    fewer than two of them, gets exactly 0: rounding would otherwise leave a residue that a small epsilon blows up.

    Raises ValueError for an unknown scale, a shape that is not [P, G], or an infinite reward.
    Source: DeepSeekMath, arXiv 2402.03300, section 4.1; scale="none" is Dr. GRPO's, arXiv 2503.20783.
    """
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}; allowed: {', '.join(SCALES)}")
    if rewards.ndim != 2:
        raise ValueError(f"rewards have the shape {tuple(rewards.shape)}; [prompts, completions] is needed")
    if rewards.isinf().any():
        raise ValueError("rewards hold an infinite value")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    rewards = rewards.double()
    valid = ~rewards.isnan()
    num_valid = valid.sum(1, keepdim=True)  # [P, 1]
    difference = _difference_from_mean(rewards, valid, num_valid)
    if scale == "none":
        advantages = difference
    elif scale == "batch":
        everything = difference.new_zeros(()) if num_valid.sum() < 2 else rewards[valid].std()
        advantages = difference / (everything + epsilon)
    else:
        divisor = num_valid - 1 if scale == "sample" else num_valid
        std = _root_mean_square(difference, divisor.clamp(min=1))
        advantages = difference / (std + epsilon)
    return torch.where(has_signal(rewards)[:, None] & valid, advantages, 0.0).to(dtype)


def has_signal(rewards: Tensor) -> Tensor:
    """Which groups tell their completions apart: rewards [P, G], NaN where one abstains -> bool [P]."""
    low = rewards.nan_to_num(nan=torch.inf).min(1).values
    high = rewards.nan_to_num(nan=-torch.inf).max(1).values
    return high > low


def _difference_from_mean(rewards: Tensor, valid: Tensor, num_valid: Tensor) -> Tensor:
    """Rewards [P, G] less their group's mean; 0 where abstained. Shares are summed, so that the sum cannot overflow."""
    share = torch.where(valid, rewards, 0.0) / num_valid.clamp(min=1)
    return torch.where(valid, rewards - share.sum(1, keepdim=True), 0.0)


def _root_mean_square(difference: Tensor, divisor: Tensor) -> Tensor:
    """sqrt(sum of squares / divisor) over each group [P, 1], scaled so that no square over- or underflows."""
    largest = difference.abs().amax(1, keepdim=True)
    scaled = difference / torch.where(largest > 0, largest, 1.0)
    return largest * (scaled.square().sum(1, keepdim=True) / divisor).sqrt()
