"""Probability ratios pi_theta / pi_old, of the policy now to what it was before the update: per token or per sequence."""

from collections.abc import Callable

import torch
from torch import Tensor

MAX_LOG_RATIO = 60.0  # beyond it a ratio is held, without gradient: exp would overflow, and 0 * inf is no gradient


def token_ratio(log_ratio: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """pi_theta / pi_old of each token: log_ratio [N] -> [N]. Source: DeepSeekMath, arXiv 2402.03300."""
    return capped_exp(log_ratio)


def sequence_ratio(log_ratio: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """pi_theta / pi_old of the whole completion, the plain product, for each of its tokens: [N] -> [N]."""
    return capped_exp(row_sum(log_ratio, row, num_rows))[row]


def sequence_mean_ratio(log_ratio: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """The geometric mean of the token ratios of a completion: [N] -> [N]. Source: GSPO, arXiv 2507.18071, equation 7."""
    return capped_exp(row_mean(log_ratio, row, num_rows))[row]


def sequence_mean_token_ratio(log_ratio: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """The value of `sequence_mean_ratio` with each token's own gradient: [N] -> [N].

    It differs from it where advantages differ inside a completion. Source: GSPO-token, arXiv 2507.18071, equation 14.
    """
    value = row_mean(log_ratio, row, num_rows)[row].detach()
    return capped_exp(value + (log_ratio - log_ratio.detach()))


def capped_exp(log_ratio: Tensor) -> Tensor:
    """exp, held at `MAX_LOG_RATIO`."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def row_sum(values: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Sum over the tokens of each row: [N] -> [B]."""
    return values.new_zeros(num_rows).index_add(0, row, values)


def row_mean(values: Tensor, row: Tensor, num_rows: int) -> Tensor:
    """Mean over the tokens of each row: [N] -> [B]; 0 for a row without tokens."""
    return row_sum(values, row, num_rows) / torch.bincount(row, minlength=num_rows).clamp(min=1)


RATIOS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "token": token_ratio,
    "sequence": sequence_ratio,
    "sequence_mean": sequence_mean_ratio,
    "sequence_mean_token": sequence_mean_token_ratio,
}
