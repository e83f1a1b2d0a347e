"""From one loss per token to one number: which tokens weigh how much in the optimiser step."""

from collections.abc import Callable

from torch import Tensor

from coterie.types import BatchTotals


def sequence_mean(length: Tensor, totals: BatchTotals) -> Tensor:
    """Mean over each completion, then over completions. Source: DeepSeekMath, arXiv 2402.03300, equation 3."""
    return 1 / (length * totals.num_rows)


def sequence_sum(length: Tensor, totals: BatchTotals) -> Tensor:
    """Sum over each completion, then mean over completions."""
    return (1 / totals.num_rows) * length.new_ones(length.shape)


def token_mean(length: Tensor, totals: BatchTotals) -> Tensor:
    """Mean over all tokens of the step. Source: DAPO, arXiv 2503.14476, equation 8."""
    return (1 / totals.num_tokens) * length.new_ones(length.shape)


def fixed_length(length: Tensor, totals: BatchTotals) -> Tensor:
    """Sum over each completion, divided by the length limit. Source: Dr. GRPO, arXiv 2503.20783, section 3.2."""
    return (1 / (totals.num_rows * totals.max_length)) * length.new_ones(length.shape)


AGGREGATIONS: dict[str, Callable[[Tensor, BatchTotals], Tensor]] = {
    "sequence_mean": sequence_mean,
    "sequence_sum": sequence_sum,
    "token_mean": token_mean,
    "fixed_length": fixed_length,
}


def aggregate(values: Tensor, row: Tensor, row_lengths: Tensor, *, aggregation: str, totals: BatchTotals) -> Tensor:
    """Weigh and sum: values [N], row [N], row_lengths [B] -> scalar.

    The denominators come from `totals`, counted over the whole optimiser step, so that the sum over micro-batches is the
    same however the batch was cut.
    """
    weights = AGGREGATIONS[aggregation](row_lengths[row].to(values.dtype), totals)  # [N]
    return (values * weights).sum()
