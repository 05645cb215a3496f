"""Exchange through shared memory, with threads as ranks.

The library releases the interpreter's lock, so threads run in parallel like processes.
"""

from __future__ import annotations

import mmap
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import exchange
from kernels.exchange import CAPACITY_BYTES, Exchange, shared_bytes
from kernels.recording import record

pytestmark = pytest.mark.skipif(not exchange.is_available(), reason="no C++ compiler")

BUFFER_LEN = CAPACITY_BYTES // 4
"""Number of float32 values that fill a buffer."""


def run_ranks(count: int, work: Callable[[int, Exchange], Any], **options: Any) -> list[Any]:
    memory = mmap.mmap(-1, shared_bytes(count))
    with ThreadPoolExecutor(count) as pool:
        jobs = [
            pool.submit(work, number, Exchange(memory, number, count, timeout_s=120, **options))
            for number in range(count)
        ]
        return [job.result() for job in jobs]


@pytest.mark.parametrize("spin_s", [0.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sum_adds_in_the_order_of_ranks(count, dtype, spin_s) -> None:
    """Sums are in float32 and rounded once, also over several rounds."""
    for size in (1, 1000, 2 * BUFFER_LEN + 3):
        parts = (torch.randn(count, size) * 10.0 ** torch.randint(-3, 3, (count, 1))).to(dtype)
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()

        def add(number: int, ours: Exchange, parts=parts) -> torch.Tensor:
            out = torch.full_like(parts[0], torch.nan)
            ours.sum(parts[number], out)
            return out

        for out in run_ranks(count, add, spin_s=spin_s):
            assert torch.equal(out, total.to(dtype))


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(0, 5), st.integers(1, 40), st.booleans())
def test_join_of_unequal_parts(count, rows, columns, is_wide) -> None:
    """A row that is wider than a buffer takes several rounds."""
    columns = columns + (CAPACITY_BYTES if is_wide else 0)
    whole = torch.randint(0, 250, (rows, columns), dtype=torch.uint8)
    borders = [number * columns // count for number in range(count + 1)]

    def join(number: int, ours: Exchange) -> torch.Tensor:
        out = torch.full_like(whole, 255)
        ours.join(whole[:, borders[number] : borders[number + 1]].contiguous(), out)
        return out

    for out in run_ranks(count, join):
        assert torch.equal(out, whole)


@pytest.mark.full("0.0")
@pytest.mark.parametrize("spin_s", [0.0, 1e-3])
def test_buffers_are_not_overwritten_while_read(spin_s) -> None:
    """Ranks are delayed at random over many rounds."""

    def work(number: int, ours: Exchange) -> None:
        rng = random.Random(number)
        x, out = torch.empty(BUFFER_LEN // 4), torch.empty(BUFFER_LEN // 4)
        for turn in range(400):
            if rng.random() < 0.05:
                time.sleep(rng.random() * 2e-3)
            ours.sum(x.fill_(turn + number), out)
            assert out[[0, -1]].tolist() == [3 * turn + 3] * 2
            assert torch.equal(out, out[:1].expand_as(out))

    run_ranks(3, work, spin_s=spin_s)


def test_exchange_can_be_recorded() -> None:
    def work(number: int, ours: Exchange) -> list[float]:
        x, total, whole = torch.empty(1, 4), torch.empty(1, 4), torch.empty(1, 8)

        def step() -> None:
            ours.sum(x, total)
            ours.join(total, whole)

        seen = []
        x.fill_(number)
        replay = record(step)
        for value in (1.0, 2.0):
            x.fill_(value + number)
            replay()
            seen += [whole.unique().item()]
        return seen

    assert run_ranks(2, work) == [[3.0, 5.0]] * 2


def test_missing_rank_is_named_and_later_calls_fail_at_once() -> None:
    memory = mmap.mmap(-1, shared_bytes(3))
    ours = Exchange(memory, 1, 3, timeout_s=0.05)
    Exchange(memory, 0, 3, timeout_s=0.05).sum(torch.ones(4), torch.empty(4))
    out = torch.full((4,), 7.0)
    ours.sum(torch.ones(4), out)
    assert ours.failure == "rank 2 did not answer in time"
    ours.set_timeout(10_000)
    ours.join(torch.ones(1, 1), torch.empty(1, 4))
    assert out.tolist() == [7.0] * 4


def test_ended_process_is_detected_before_the_timeout() -> None:
    memory = mmap.mmap(-1, shared_bytes(2))
    here, there = socket.socketpair()
    ours = Exchange(memory, 0, 2, lines=[here.fileno()], timeout_s=10_000)
    there.close()
    ours.sum(torch.ones(4), torch.empty(4))
    assert ours.failure == "rank 1 did not answer, and a process has gone"
    here.close()


def test_message_on_a_line_is_not_its_end() -> None:
    memory = mmap.mmap(-1, shared_bytes(2))
    here, there = socket.socketpair()
    ours = Exchange(memory, 0, 2, lines=[here.fileno()], timeout_s=0.1)
    there.send(b"a message")
    ours.sum(torch.ones(4), torch.empty(4))
    assert ours.failure == "rank 1 did not answer in time"
    here.close(), there.close()
