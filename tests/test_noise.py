"""Keyed noise: the same keys give the same numbers, whatever the batch is."""

import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.noise import key, mix, permutation, uniform

int64 = st.integers(-(2**63), 2**63 - 1)


def signed(number: int) -> int:
    """A 64-bit pattern as int64 has it."""
    return number - 2**64 if number >= 2**63 else number


def long(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.long)


def test_mixing_is_splitmix64():
    """The published first outputs for seed 0. Each adds the constant once more."""
    constant = 0x9E3779B97F4A7C15
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    states = [signed(constant * number % 2**64) for number in range(4)]
    assert mix(long(*states), long(0)).tolist() == [signed(output) for output in outputs]


@given(state=int64, numbers=st.lists(int64, min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_a_number_does_not_depend_on_its_batch(state, numbers):
    together = mix(long(state), long(*numbers)).tolist()
    assert together == [mix(long(state), long(number)).item() for number in numbers]
    assert mix(long(state), long(*numbers[::-1])).tolist() == together[::-1]


@given(state=int64, numbers=st.lists(int64, min_size=2, max_size=8, unique=True))
@settings(max_examples=100, deadline=None)
def test_different_numbers_in_one_state_never_collide(state, numbers):
    assert len(set(mix(long(state), long(*numbers)).tolist())) == len(numbers)


def test_keys_are_the_same_in_every_run():
    """Written down, so that a change of the noise is noticed: it changes every recorded run."""
    assert key() == 0
    assert key(0) == signed(0xE220A8397B1DCDAF)
    assert key(1, 2, "draw") == key(1, 2, "draw")


def test_keys_differ_by_every_part_and_by_order():
    parts = [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), ("a",), ("b",), (0, "a"), ("a", 0), ("ab",), ("ba",), (-1,)]
    assert len({key(*each) for each in parts}) == len(parts)


def test_keys_of_a_run_do_not_collide():
    """Seeds, steps, prompts and completions that differ in one place."""
    keys = {key(*each) for each in itertools.product(range(3), range(1, 9), range(8), range(8))}
    assert len(keys) == 3 * 8 * 8 * 8


@given(numbers=st.lists(int64, min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_uniform_numbers_are_at_least_0_and_below_1(numbers):
    values = uniform(long(*numbers))
    assert values.dtype == torch.float64
    assert ((values >= 0) & (values < 1)).all()


def test_uniform_ends():
    """The upper 53 bits as a binary fraction: all of them set is the largest double below 1."""
    assert uniform(long(0, 1 << 11, -(2**63), -1)).tolist() == [0.0, 2**-53, 0.5, 1 - 2**-53]


@pytest.mark.parametrize("parts", [(0,), (1, "sample"), (2**31 - 1, 7)])
def test_consecutive_keys_give_even_and_independent_numbers(parts):
    """Chi-squared over 100 cells, and over 10 x 10 of neighbours: 99 degrees of freedom, 160 is one in ten thousand."""
    size = 50_000
    values = uniform(mix(torch.tensor(key(*parts)), torch.arange(size)))
    cells = torch.bincount((values * 100).long(), minlength=100).double()
    assert ((cells - size / 100).square() / (size / 100)).sum() < 160
    pairs = (values[::2] * 10).long() * 10 + (values[1::2] * 10).long()
    cells = torch.bincount(pairs, minlength=100).double()
    assert ((cells - size / 200).square() / (size / 200)).sum() < 160


def test_neighbouring_states_give_unrelated_numbers():
    """The same position under neighbouring keys: the correlation of n pairs is about 1 / sqrt n."""
    first, second = (uniform(mix(torch.tensor(key(seed)), torch.arange(20_000))) for seed in (1, 2))
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 0.03


@given(size=st.integers(0, 200), seed=st.integers(0, 2**31 - 1))
@settings(max_examples=50, deadline=None)
def test_a_permutation_is_one(size, seed):
    assert sorted(permutation(size, seed)) == list(range(size))


def test_a_permutation_depends_on_its_key_only():
    assert permutation(100, 3, "draw", 0) == permutation(100, 3, "draw", 0)
    others = {
        tuple(permutation(100, *parts)) for parts in [(3, "draw", 0), (3, "draw", 1), (4, "draw", 0), (3, "other", 0)]
    }
    assert len(others) == 4


def test_every_permutation_is_as_likely_as_the_others():
    """6 orders of 3 in 3000 shuffles, 500 each: 5 degrees of freedom, 26 is one in ten thousand."""
    counts = Counter(tuple(permutation(3, seed)) for seed in range(3000))
    assert len(counts) == 6
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 26
