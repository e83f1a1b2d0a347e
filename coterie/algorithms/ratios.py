"""Probability ratios between the policy and the sampler, per token or per sequence."""

from collections.abc import Callable

import torch
from torch import Tensor


def token_ratio(log_ratio: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """pi_theta / pi_old of each token: log_ratio [N] -> [N]. Source: DeepSeekMath, arXiv 2402.03300."""
    return log_ratio.exp()


def sequence_ratio(log_ratio: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """pi_theta / pi_old of the whole completion, the plain product, for each of its tokens: [N] -> [N]."""
    return _row_sum(log_ratio, row, num_rows).exp()[row]


def sequence_mean_ratio(log_ratio: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """The geometric mean of the token ratios of a completion: [N] -> [N]. Source: GSPO, arXiv 2507.18071, equation 7."""
    length = torch.bincount(row, minlength=num_rows).clamp(min=1)
    return (_row_sum(log_ratio, row, num_rows) / length).exp()[row]


def _row_sum(values: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Sum over the tokens of each row: [N] -> [B]."""
    return values.new_zeros(num_rows).index_add(0, row, values)


RATIOS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "token": token_ratio,
    "sequence": sequence_ratio,
    "sequence_mean": sequence_mean_ratio,
}
