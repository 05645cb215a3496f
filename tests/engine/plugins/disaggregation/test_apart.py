"""Tests of prefill and decode in two processes: the same bits as one engine, even if the prefill
engine dies."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import asdict

import pytest

from engine import Engine
from engine.plugins.disaggregation.prefix_load import PeerLoad
from engine.plugins.disaggregation.wire import PrefixBuffer
from tests.engine.plugins.disaggregation.pair import (
    GREEDY,
    assert_same,
    decode_engine,
    plain_engine,
    prefill_process,
    text,
)


@pytest.fixture(scope="module")
def prefill() -> Iterator[tuple[int, int]]:
    """Yield (process id, port) of a prefill engine."""
    with prefill_process() as (process, port):
        yield process.pid, port


@pytest.fixture(scope="module")
def plain() -> Engine:
    return plain_engine()


def test_two_processes_give_the_bits_of_one_engine(prefill: tuple[int, int], plain: Engine) -> None:
    """Check that only missing parts are sent: not cached KV, and after an answer only the rest."""
    engine = decode_engine(prefill[1])
    first, second = text(0, 700), text(0, 300) + text(1, 250)
    assert_same(plain, engine, [first, second])
    transferred = engine.plugins["disaggregation"].counts
    counts = asdict(transferred)
    buffer = PrefixBuffer(engine.runner)
    row, state = buffer.row_bytes, buffer.state_bytes
    assert (counts["prefixes"], counts["failed"]) == (2, 0)
    assert counts["tokens"] == 640 + 512 - 300
    assert counts["needed_bytes"] == counts["tokens"] * row + 2 * state
    assert counts["needed_bytes"] < counts["wire_bytes"] <= 1.05 * counts["needed_bytes"]
    assert_same(plain, engine, [first, second, text(0, 290) + text(2, 30)])
    before, longer = asdict(transferred), first + text(3, 400)
    assert_same(plain, engine, [longer])
    sent = {name: count - before[name] for name, count in asdict(transferred).items()}
    assert sent["tokens"] == (len(longer) - 1) // 64 * 64 - len(first)
    engine.check()


@pytest.mark.full
def test_a_prefill_engine_killed_during_a_transfer_loses_no_token(
    prefill: tuple[int, int], plain: Engine, monkeypatch: pytest.MonkeyPatch, caplog: object
) -> None:
    """Run last in this file, because it kills the process of ``prefill``."""
    engine = decode_engine(prefill[1])
    write, num_messages = PeerLoad._write, 0

    def kill_at_third_message(self: PeerLoad, data: memoryview) -> None:
        nonlocal num_messages
        num_messages += 1
        if num_messages == 3:
            os.kill(prefill[0], signal.SIGKILL)
        write(self, data)

    monkeypatch.setattr(PeerLoad, "_write", kill_at_third_message)
    prompts = [text(10, 900), text(11, 200)]
    with caplog.at_level(logging.WARNING):  # type: ignore[attr-defined]
        assert_same(plain, engine, prompts)
    transferred = engine.plugins["disaggregation"].counts
    assert transferred.failed >= 1 and num_messages >= 3
    assert "computed here" in caplog.text  # type: ignore[attr-defined]
    engine.check()
    assert_same(plain, engine, [prompts[0] + text(12, 300)])  # The prefill engine is gone.
    assert [out.cached_len for out in engine.generate([prompts[0]], GREEDY)] == [896]
