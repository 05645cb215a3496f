"""Return of unused memory to the system while the server runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.server import serve

from .conftest import Live

MIB = 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(serve._malloc_trim is None, reason="glibc is not in use")
def test_trim_returns_free_pages_between_used_ones() -> None:
    blocks = [bytes(4000) for _ in range(64 * MIB // 4000)]
    before = resident_bytes()
    used = blocks[::64]
    del blocks
    asyncio.run(serve.trim())
    assert before - resident_bytes() > 48 * MIB
    assert len(used) > 200


def test_server_trims_periodically(serve_answer: Callable[[str], Live]) -> None:
    config = serve_answer("x").server.config
    assert config.callback_notify is serve.trim
    assert config.timeout_notify == serve.TRIM_S
