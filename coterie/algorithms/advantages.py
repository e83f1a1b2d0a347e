"""Advantages: how much better a completion did than the others of its group."""

from collections.abc import Sequence

import torch
from torch import Tensor

BASELINES = ("group", "leave_one_out", "batch", "none")
SCALES = ("sample", "population", "none", "batch", "batch_differences")


def group_advantages(
    rewards: Tensor, *, baseline: str = "group", scale: str = "sample", epsilon: float = 1e-6
) -> Tensor:
    """How much better each completion did than its siblings: rewards [P, G] -> advantages [P, G].

    `baseline` is subtracted: the group's mean ("group"), the mean of the others of the group ("leave_one_out"), the mean of
    the whole batch ("batch"), or nothing ("none"). `scale` divides the difference by the group's sample std ("sample",
    G - 1), its population std ("population", G), nothing ("none"), the sample std of the rewards of the whole batch
    ("batch"), or that of the differences of the whole batch ("batch_differences").

    NaN marks a completion that abstains: it leaves every mean and std, and gets 0. Where the baseline is the group's, a
    group with equal rewards, or with fewer than two of them, gets exactly 0: rounding would otherwise leave a residue that a
    small epsilon blows up. For the same reason a batch whose values are all equal gets exactly 0 from the batch's own std.

    Raises ValueError for an unknown baseline or scale, two that don't go together (a group's std with another baseline: it
    is 0 for a flat group, whose difference from that baseline is not), a shape that is not [P, G], or an infinite reward.
    Source: DeepSeekMath, arXiv 2402.03300, section 4.1; scale="none" is Dr. GRPO's, arXiv 2503.20783; "leave_one_out" is
    RLOO's, arXiv 2402.14740; "batch" and "batch_differences" are REINFORCE++'s without and with a group baseline,
    arXiv 2501.03262.
    """
    check_choice("baseline", baseline, BASELINES)
    check_choice("scale", scale, SCALES)
    if baseline in ("batch", "none") and scale in ("sample", "population"):
        raise ValueError(
            f"scale {scale!r} divides by the group's own std, so the baseline has to be its own too, not {baseline!r}"
        )
    if rewards.ndim != 2:
        raise ValueError(f"rewards have the shape {tuple(rewards.shape)}; [prompts, completions] is needed")
    if rewards.isinf().any():
        raise ValueError("rewards hold an infinite value")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.get_default_dtype()
    rewards = rewards.double()
    valid = ~rewards.isnan()
    num_valid = valid.sum(1, keepdim=True)  # [P, 1]
    from_mean = _difference_from_mean(rewards, valid, num_valid)
    difference = _less_baseline(rewards, valid, from_mean, baseline)
    if scale == "none":
        advantages = difference
    elif scale in ("batch", "batch_differences"):
        values = (rewards if scale == "batch" else difference)[valid]
        std = values.std() if len(values) > 1 else torch.zeros((), dtype=torch.float64)
        advantages = difference / (std + epsilon) if std > 0 else torch.zeros_like(difference)
    else:
        divisor = num_valid - 1 if scale == "sample" else num_valid
        advantages = difference / (_root_mean_square(from_mean, divisor.clamp(min=1)) + epsilon)
    counts = valid if baseline in ("batch", "none") else has_signal(rewards)[:, None] & valid
    return torch.where(counts, advantages, 0.0).to(dtype)


def check_choice(name: str, given: str, allowed: Sequence[str]) -> None:
    """ValueError where a choice is not among those that are allowed."""
    if given not in allowed:
        raise ValueError(f"{name} is {given!r}; allowed: {', '.join(allowed)}")


def _less_baseline(rewards: Tensor, valid: Tensor, from_mean: Tensor, baseline: str) -> Tensor:
    """Rewards [P, G] less the baseline; 0 where abstained."""
    if baseline == "group":
        return from_mean
    num_valid = valid.sum(1, keepdim=True)
    if baseline == "leave_one_out":  # r - mean of the others = n / (n - 1) * (r - mean of all)
        return from_mean * (num_valid.double() / (num_valid - 1).clamp(min=1))
    if baseline == "none" or not valid.any():
        return torch.where(valid, rewards, 0.0)
    of_batch = rewards[valid]
    if of_batch.min() == of_batch.max():
        return torch.zeros_like(rewards)
    return torch.where(valid, rewards - (of_batch / len(of_batch)).sum(), 0.0)


def has_signal(rewards: Tensor) -> Tensor:
    """Which groups tell their completions apart: rewards [P, G], NaN where one abstains -> bool [P]."""
    low = rewards.nan_to_num(nan=torch.inf).min(1).values
    high = rewards.nan_to_num(nan=-torch.inf).max(1).values
    return high > low


def group_std(rewards: Tensor) -> Tensor:
    """How far apart the rewards of a group lie: rewards [P, G], NaN where one abstains -> sample std [P].

    NaN where fewer than two of a group have a reward; exactly 0 where they are equal.
    """
    valid = ~rewards.isnan()
    num_valid = valid.sum(1, keepdim=True)  # [P, 1]
    difference = _difference_from_mean(rewards, valid, num_valid)
    std = _root_mean_square(difference, (num_valid - 1).clamp(min=1))[:, 0]
    return torch.where(has_signal(rewards), std, 0.0).masked_fill(num_valid[:, 0] < 2, torch.nan)


def _difference_from_mean(rewards: Tensor, valid: Tensor, num_valid: Tensor) -> Tensor:
    """Rewards [P, G] less their group's mean; 0 where abstained. Shares are summed, so that the sum cannot overflow."""
    share = torch.where(valid, rewards, 0.0) / num_valid.clamp(min=1)
    return torch.where(valid, rewards - share.sum(1, keepdim=True), 0.0)


def _root_mean_square(difference: Tensor, divisor: Tensor) -> Tensor:
    """sqrt(sum of squares / divisor) over each group [P, 1], scaled so that no square over- or underflows."""
    largest = difference.abs().amax(1, keepdim=True)
    scaled = difference / torch.where(largest > 0, largest, 1.0)
    return largest * (scaled.square().sum(1, keepdim=True) / divisor).sqrt()
