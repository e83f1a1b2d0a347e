"""Every moment of a step belongs to one section."""

import pytest

from coterie import sections
from coterie.sections import Stopwatch, section, timing


@pytest.fixture
def now(monkeypatch):
    """A clock that the test moves: now(5) lets 5 ns pass."""
    passed = [0]
    monkeypatch.setattr(sections.time, "perf_counter_ns", lambda: passed[0])

    def move(nanoseconds):
        passed[0] += nanoseconds

    return move


def test_a_section_has_its_time_and_not_that_of_what_refines_it(now):
    with timing(Stopwatch()) as stopwatch:
        now(1)
        for _ in range(2):
            with section("sample"):
                now(10)
                with section("sample/draw"):
                    now(100)
                now(10)
        now(1000)
    now(5000)
    assert stopwatch.nanoseconds == {"other": 1001, "sample": 40, "sample/draw": 200}
    assert stopwatch.calls == {"sample": 2, "sample/draw": 2}


def test_what_another_section_uses_is_that_sections_own(now):
    @section("score")
    def score():
        now(10)
        return 3

    with timing(Stopwatch()) as stopwatch, section("evaluate"):
        with section("sample"), section("sample/draw"):
            now(100)
        assert score() == 3
        now(1)
    assert stopwatch.nanoseconds == {"other": 0, "evaluate": 111}
    assert stopwatch.calls == {"evaluate": 1}


def test_a_section_that_fails_is_left(now):
    @section("score")
    def fail():
        now(1)
        raise ValueError("no")

    with timing(Stopwatch()) as stopwatch:
        with pytest.raises(ValueError, match="no"):
            fail()
        now(2)
    assert stopwatch.nanoseconds == {"other": 2, "score": 1}
    with section("score"):  # nothing is timed any more
        now(3)
    assert stopwatch.nanoseconds == {"other": 2, "score": 1}


def test_each_turn_is_told_before_the_clock_is_read(now):
    turns = []

    def catch_up(begins):
        turns.append(begins)
        now(7)  # what the section that ends still has to wait for

    with timing(Stopwatch(catch_up)) as stopwatch, section("train/forward"):
        now(1)
    assert turns == ["other", "train/forward", "other", "other"]
    assert stopwatch.nanoseconds == {"other": 14, "train/forward": 8}
