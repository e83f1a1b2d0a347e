"""Probability ratios: per token, per sequence as the product, per sequence length-normalised."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.algorithms.ratios import RATIOS

ROW = torch.tensor([0, 0, 1, 2, 2, 2])
# Ratios 2 and 1/2; 3; and 2, 2, 2.
LOG_RATIO = torch.tensor([2.0, 0.5, 3.0, 2.0, 2.0, 2.0], dtype=torch.float64).log()

completions = st.lists(
    st.lists(st.floats(-1, 1), min_size=1, max_size=5),
    min_size=1,
    max_size=5,
)


def ratios(name: str, log_ratio: torch.Tensor = LOG_RATIO, row: torch.Tensor = ROW, num_rows: int = 3) -> torch.Tensor:
    return RATIOS[name](log_ratio, row, num_rows)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token", [2, 0.5, 3, 2, 2, 2]),
        ("sequence", [1, 1, 3, 8, 8, 8]),
        ("sequence_mean", [1, 1, 3, 2, 2, 2]),
    ],
)
def test_ratios_worked_by_hand(name, expected):
    assert ratios(name).tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("name", RATIOS)
def test_equal_policies_have_the_ratio_one_exactly(name):
    assert ratios(name, torch.zeros(6)).tolist() == [1.0] * 6


@given(values=st.lists(st.floats(-5, 5), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_completions_of_one_token_make_all_three_equal(values):
    log_ratio, row = torch.tensor(values, dtype=torch.float64), torch.arange(len(values))
    token, sequence, mean = (
        RATIOS[name](log_ratio, row, len(values)) for name in ("token", "sequence", "sequence_mean")
    )
    assert torch.equal(token, sequence)
    assert torch.equal(token, mean)


@given(rows=completions)
@settings(max_examples=50, deadline=None)
def test_the_product_is_the_normalised_ratio_to_the_length(rows):
    log_ratio = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
    row = torch.tensor([number for number, values in enumerate(rows) for _ in values])
    length = torch.tensor([len(values) for values in rows])[row]
    product = RATIOS["sequence"](log_ratio, row, len(rows))
    torch.testing.assert_close(RATIOS["sequence_mean"](log_ratio, row, len(rows)) ** length, product)
    by_hand = [math.prod(math.exp(v) for v in values) for values in rows for _ in values]
    torch.testing.assert_close(product, torch.tensor(by_hand, dtype=torch.float64))


@pytest.mark.parametrize("name", RATIOS)
def test_other_rows_do_not_matter(name):
    alone = ratios(name, LOG_RATIO[3:], torch.zeros(3, dtype=torch.long), 1)
    torch.testing.assert_close(ratios(name)[3:], alone)


@pytest.mark.parametrize("name", RATIOS)
def test_a_row_without_tokens_changes_nothing(name):
    moved = torch.tensor([1, 1, 3, 4, 4, 4])
    assert torch.equal(ratios(name, row=moved, num_rows=6), ratios(name))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # The derivative of the sum over tokens of the ratio, by each token's log-ratio.
        ("token", [2, 0.5, 3, 2, 2, 2]),
        ("sequence", [2, 2, 3, 24, 24, 24]),  # each of n tokens moves n equal products
        ("sequence_mean", [1, 1, 3, 2, 2, 2]),  # n products, each moved by 1/n
    ],
)
def test_gradients_worked_by_hand(name, expected):
    log_ratio = LOG_RATIO.clone().requires_grad_()
    ratios(name, log_ratio).sum().backward()
    assert log_ratio.grad.tolist() == pytest.approx(expected, rel=1e-14)
    assert torch.autograd.gradcheck(lambda values: ratios(name, values), log_ratio)


def test_the_normalised_ratio_is_finite_where_the_product_is_not():
    log_ratio, row = torch.full((2000,), 0.1), torch.zeros(2000, dtype=torch.long)
    assert torch.allclose(
        ratios("sequence", log_ratio, row, 1), torch.full((2000,), math.exp(60))
    )  # held, and not infinite
    torch.testing.assert_close(ratios("sequence_mean", log_ratio, row, 1), torch.full((2000,), math.exp(0.1)))
