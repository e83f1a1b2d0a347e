"""Packing: the shift by one, and cutting by tokens."""

import pytest
import torch

from coterie.rollouts.pack import Row, make_stream, pack, split_by_tokens
from coterie.types import Completion, Group, Prompt, Scored


def row(*tokens, advantage=0.0):
    return Row(list(tokens), torch.full((len(tokens),), -1.0), advantage)


def test_a_stream_by_hand():
    stream = make_stream([([10, 11], [row(1, 2, 3), row(4)]), ([20], [row(5, 6)])])
    assert stream.tokens.tolist() == [10, 11, 1, 2, 3, 4, 20, 5, 6]
    assert stream.positions.tolist() == [0, 1, 2, 3, 4, 2, 0, 1, 2]
    assert stream.targets.tolist() == [1, 2, 3, 4, 5, 6]
    assert stream.predictors.tolist() == [
        1,
        2,
        3,
        1,
        6,
        7,
    ]  # the first token of each row is predicted by its prompt's last
    assert stream.row.tolist() == [0, 0, 0, 1, 2, 2]
    assert stream.row_lengths.tolist() == [3, 1, 2]
    assert stream.segments == [(2, [3, 1]), (1, [2])]


@pytest.mark.parametrize("max_tokens", [1, 4, 7, 12, 1000])
def test_cutting_keeps_every_row_once_and_in_order(max_tokens):
    groups = [([1, 2], [row(3), row(4, 5), row(6, 7, 8)]), ([9] * 6, [row(10), row(11)]), ([12], [])]
    parts = split_by_tokens(groups, max_tokens)
    rows = [tuple(r.tokens) for part in parts for _, of_prompt in part for r in of_prompt]
    assert rows == [(3,), (4, 5), (6, 7, 8), (10,), (11,)]
    for part in parts:
        size = sum(len(prompt) + sum(len(r.tokens) for r in of_prompt) for prompt, of_prompt in part)
        num_rows = sum(len(of_prompt) for _, of_prompt in part)
        assert size <= max_tokens or num_rows == 1


def scored_by_hand(rewards):
    completions = [Completion([7] * (c + 1), torch.full((c + 1,), -0.5), torch.ones(c + 1), "stop") for c in range(3)]
    groups = [Group(Prompt(p, "q", [1, 2]), completions) for p in range(len(rewards))]
    return Scored(groups, torch.tensor(rewards), {}, [])


def test_silent_rows_are_counted_and_left_out():
    scored = scored_by_hand([[1.0, 0.0, float("nan")], [1.0, 1.0, 1.0]])
    advantages = torch.tensor([[0.7, -0.7, 0.0], [0.0, 0.0, 0.0]])
    streams, totals = pack(scored, advantages, max_length=9, micro_batch_tokens=100, drop_silent=True)
    assert (totals.num_rows, totals.num_tokens, totals.max_length) == (5, 1 + 2 + 1 + 2 + 3, 9)
    assert [s.row_lengths.tolist() for s in streams] == [[1, 2]]
    kept, same = pack(scored, advantages, max_length=9, micro_batch_tokens=100, drop_silent=False)
    assert [s.row_lengths.tolist() for s in kept] == [[1, 2, 1, 2, 3]]
    assert same == totals


def test_a_batch_without_signal_packs_to_nothing():
    streams, totals = pack(
        scored_by_hand([[1.0, 1.0, 1.0]]), torch.zeros(1, 3), max_length=9, micro_batch_tokens=9, drop_silent=True
    )
    assert streams == []
    assert totals.num_rows == 3
