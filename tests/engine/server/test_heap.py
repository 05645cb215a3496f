"""Memory that nobody uses goes back to the system while the server runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.server import serve

from .conftest import Live

MIB = 2**20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(serve._malloc_trim is None, reason="there is no glibc")
def test_pages_that_are_free_between_others_go_back() -> None:
    blocks = [bytes(4000) for _ in range(64 * MIB // 4000)]
    before = resident()
    kept = blocks[::64]
    del blocks
    asyncio.run(serve.trim())
    assert before - resident() > 48 * MIB
    assert len(kept) > 200


def test_a_server_does_it_now_and_then(say: Callable[[str], Live]) -> None:
    config = say("x").server.config
    assert config.callback_notify is serve.trim
    assert config.timeout_notify == serve.TRIM_S
