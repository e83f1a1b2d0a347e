"""Probability ratios between the policy and the sampler, per token or per sequence."""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_LOG_RATIO = 60.0  # beyond it a ratio is held, without gradient: exp would overflow, and 0 * inf is no gradient


def token_ratio(log_ratio: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """pi_theta / pi_old of each token: log_ratio [N] -> [N]. Source: DeepSeekMath, arXiv 2402.03300."""
    return _exp(log_ratio)


def sequence_ratio(log_ratio: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """pi_theta / pi_old of the whole completion, the plain product, for each of its tokens: [N] -> [N]."""
    return _exp(_row_sum(log_ratio, row, num_rows))[row]


def sequence_mean_ratio(log_ratio: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """The geometric mean of the token ratios of a completion: [N] -> [N]. Source: GSPO, arXiv 2507.18071, equation 7."""
    length = torch.bincount(row, minlength=num_rows).clamp(min=1)
    return _exp(_row_sum(log_ratio, row, num_rows) / length)[row]


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def _row_sum(values: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Sum over the tokens of each row: [N] -> [B]."""
    return values.new_zeros(num_rows).index_add(0, row, values)


RATIOS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "token": token_ratio,
    "sequence": sequence_ratio,
    "sequence_mean": sequence_mean_ratio,
}
