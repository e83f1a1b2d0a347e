"""Aggregation of per-token losses: four denominators, and the same sum however the batch is cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.algorithms.aggregate import AGGREGATIONS, aggregate
from coterie.types import BatchTotals

# Three completions: 1, 2, 3; then 10; then 4, 8.
VALUES = torch.tensor([1.0, 2.0, 3.0, 10.0, 4.0, 8.0], dtype=torch.float64)
ROW = torch.tensor([0, 0, 0, 1, 2, 2])
LENGTHS = torch.tensor([3, 1, 2])
TOTALS = BatchTotals(num_rows=3, num_tokens=6, max_length=8)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sequence_mean", (2 + 10 + 6) / 3),
        ("sequence_sum", (6 + 10 + 12) / 3),
        ("token_mean", 28 / 6),
        ("fixed_length", 28 / (3 * 8)),
    ],
)
def test_the_four_aggregations_by_hand(aggregation, expected):
    got = aggregate(VALUES, ROW, LENGTHS, aggregation=aggregation, totals=TOTALS)
    assert got.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        ("sequence_mean", [1 / 9] * 3 + [1 / 3] + [1 / 6] * 2),
        ("sequence_sum", [1 / 3] * 6),
        ("token_mean", [1 / 6] * 6),
        ("fixed_length", [1 / 24] * 6),
    ],
)
def test_the_gradient_of_a_token_is_its_weight(aggregation, weights):
    values = VALUES.clone().requires_grad_()
    aggregate(values, ROW, LENGTHS, aggregation=aggregation, totals=TOTALS).backward()
    assert values.grad.tolist() == pytest.approx(weights, rel=1e-14)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_completions_that_were_counted_and_left_out_still_weigh(aggregation):
    """A completion without signal is not in the stream, but in the totals: its loss counts as zero."""
    silent = torch.cat([VALUES[:4], torch.zeros(2, dtype=torch.float64)])
    everything = aggregate(silent, ROW, LENGTHS, aggregation=aggregation, totals=TOTALS)
    without = aggregate(VALUES[:4], ROW[:4], LENGTHS[:2], aggregation=aggregation, totals=TOTALS)
    assert without.item() == pytest.approx(everything.item(), rel=1e-14)


def test_sequence_mean_and_token_mean_agree_for_equal_lengths():
    row, lengths = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([2, 2, 2])
    by_sequence, by_token = (
        aggregate(VALUES, row, lengths, aggregation=name, totals=TOTALS) for name in ("sequence_mean", "token_mean")
    )
    assert by_sequence.item() == pytest.approx(by_token.item(), rel=1e-14)


def test_fixed_length_gives_long_completions_no_smaller_step():
    """Per token the weight is the same in a long completion and in a short one; with sequence_mean it is not."""
    values = torch.ones(5, dtype=torch.float64, requires_grad=True)
    row, lengths = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([4, 1])
    totals = BatchTotals(num_rows=2, num_tokens=5, max_length=10)
    for name, share in {"fixed_length": 1.0, "sequence_mean": 0.25}.items():
        loss = aggregate(values, row, lengths, aggregation=name, totals=totals)
        (weights,) = torch.autograd.grad(loss, values)
        assert (weights[0] / weights[4]).item() == pytest.approx(share)


batches = st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=5), min_size=1, max_size=8)


@given(batch=batches, data=st.data(), name=st.sampled_from(sorted(AGGREGATIONS)))
@settings(max_examples=100, deadline=None)
def test_any_split_into_micro_batches_gives_the_same_sum(batch, data, name):
    totals = BatchTotals(len(batch), sum(map(len, batch)), max_length=7)

    def share_of(rows: list[list[float]]) -> torch.Tensor:
        values = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
        row = torch.tensor([number for number, of_row in enumerate(rows) for _ in of_row])
        lengths = torch.tensor([len(of_row) for of_row in rows])
        return aggregate(values, row, lengths, aggregation=name, totals=totals)

    micro_batch_of = data.draw(st.lists(st.integers(0, 3), min_size=len(batch), max_size=len(batch)))
    parts = [[row for row, part in zip(batch, micro_batch_of, strict=True) if part == number] for number in range(4)]
    total = sum(share_of(part).item() for part in parts if part)
    assert total == pytest.approx(share_of(batch).item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_the_sum_is_taken_in_the_type_of_the_values(aggregation):
    got = aggregate(VALUES.float(), ROW, LENGTHS, aggregation=aggregation, totals=TOTALS)
    assert got.dtype == torch.float32
    exact = aggregate(VALUES, ROW, LENGTHS, aggregation=aggregation, totals=TOTALS)
    assert got.item() == pytest.approx(exact.item(), rel=1e-6)
