"""Processes that serve one caller at a time: lent, replaced, and killed with what they start."""

import subprocess
import sys
import threading
import time

import pytest

from coterie.processes import Crew, Server

WAITS = [sys.executable, "-c", "input()"]


class Waiting(Server):
    """A process that ends when its input does."""

    def __init__(self, command=WAITS):
        super().__init__(command, stdin=subprocess.PIPE)
        self.closed = False

    def close(self):
        self.closed = True
        self._process.stdin.close()
        super().close()


def test_a_server_has_one_caller_and_is_kept_for_the_next():
    crew = Crew(Waiting, 2)
    with crew.server() as one, crew.server() as two:
        assert one is not two
    with crew.server() as again:
        assert again is one  # which was given back last
    assert crew.servers == [one, two]
    crew.close()
    assert one.closed
    assert two.closed


def test_one_that_failed_or_died_is_replaced():
    crew = Crew(Waiting, 1)
    with pytest.raises(KeyError), crew.server() as one:
        raise KeyError
    assert one.closed
    with crew.server() as two:
        assert two is not one
    two.kill()
    with crew.server() as three:
        assert three is not two
        assert two.closed
    crew.close()


def test_one_that_can_not_be_started_leaves_its_place():
    crew = Crew(lambda: Waiting(["/no/such/program"]), 1)
    for _ in range(2):
        with pytest.raises(OSError, match="no/such/program"), crew.server():
            pass


def test_one_in_use_when_all_are_closed_is_ended_by_its_caller():
    crew = Crew(Waiting, 1)
    with crew.server() as one:
        crew.close()
        assert not one.closed
    assert one.closed


def test_a_status_is_waited_for_and_what_does_not_end_is_killed():
    assert Waiting([sys.executable, "-c", "raise SystemExit(3)"]).kill(patience=20) == 3
    server = Waiting()
    assert server.kill(patience=0.1) == -9
    assert server.kill() == -9


def test_a_server_outlives_the_thread_that_asked_for_it():
    made = []
    thread = threading.Thread(target=lambda: made.append(Waiting()))
    thread.start()
    thread.join()
    time.sleep(0.1)
    assert made[0].idle
    made[0].close()
    assert not made[0].idle
