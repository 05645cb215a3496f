"""Tests of simulated time: requests wait for servers, memory and their session."""

from __future__ import annotations

import numpy as np

from hybridcache.lab.trace import TraceRequest
from tests.lab.test_simulate import GEOMETRY, one_cell, served


class Seconds:
    """Compute time of 10 s for any tokens."""

    def seconds(self, start: int, end: int) -> float:
        return 10.0


def test_next_turn_starts_after_the_answer_of_the_previous_one() -> None:
    tokens = np.arange(70, dtype=np.int32)
    answer = tokens[:50]
    requests = [
        TraceRequest(when, session, None, tokens, answer)
        for when, session in ((0.0, "a"), (1.0, "a"), (2.0, "b"), (100.0, "a"))
    ]
    cell = one_cell(1 << 30, GEOMETRY, times=Seconds())
    log = served(cell, requests, max_running=3, tpot_s=0.5)
    # Starts: first of a at 0, b at 10, second of a at 35 (the first is answered), last at 100.
    assert list(log.arrival_s) == [0.0, 2.0, 1.0, 100.0]
    assert list(log.ttft_s) == [10.0, 18.0, 10.0, 10.0]


def test_queueing_times_match_hand_computed_ones() -> None:
    tokens = np.arange(5, dtype=np.int32)
    requests = [
        TraceRequest(when, when, None, tokens + 9 * int(when), tokens) for when in (0.0, 1.0, 2.0)
    ]

    def ttft(servers: int) -> list[float]:
        cell = one_cell(1 << 30, GEOMETRY, times=Seconds())
        return list(served(cell, requests, servers=servers).ttft_s)

    assert ttft(1) == [10.0, 19.0, 28.0]
    assert ttft(2) == [10.0, 10.0, 18.0]
