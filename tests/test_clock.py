"""Phases of a run: they add up, also where one interrupts another, and block by block."""

from __future__ import annotations

from itertools import count

import pytest

from bitwright import clock
from bitwright.clock import Clock


@pytest.fixture(autouse=True)
def ticking(monkeypatch):
    """One second passes at each look."""
    ticks = count()
    monkeypatch.setattr(clock, "perf_counter", lambda: float(next(ticks)))


def test_a_phase_inside_another_is_its_own():
    timer = Clock()
    with timer.phase("forward"):
        with timer.phase("read"):
            pass
        with timer.phase("solve"), timer.phase("read"):
            pass
    assert timer.seconds == {"forward": 3.0, "read": 2.0, "solve": 2.0}


def test_a_phase_that_fails_ends_all_the_same():
    timer = Clock()
    with pytest.raises(ValueError, match="no"), timer.phase("solve"):
        raise ValueError("no")
    with timer.phase("forward"):
        pass
    assert timer.seconds == {"solve": 1.0, "forward": 1.0}


def test_blocks_are_what_was_spent_between_their_ends():
    timer = Clock()
    with timer.phase("forward"):
        pass
    for _ in range(2):
        timer.mark()
        with timer.phase("forward"), timer.phase("statistics"):
            pass
        timer.keep()
    assert timer.blocks == [{"forward": 2.0, "statistics": 1.0}] * 2
    assert timer.seconds["forward"] == 5.0


def test_shares_add_up_to_one():
    seconds = {"forward": 5.0, "statistics": 2.0, "read": 1.0, "write": 1.0, "total": 10.0}
    told = clock.shares(seconds)
    assert told == {
        "forward": 0.5,
        "statistics": 0.2,
        "solve": 0.0,
        "I/O": 0.2,
        "rest": pytest.approx(0.1),
    }
    assert clock.shares({}) == {"forward": 0.0, "statistics": 0.0, "solve": 0.0, "I/O": 0.0}
