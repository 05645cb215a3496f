"""Tests of learned state across restarts: policies, placement and ghosts."""

from __future__ import annotations

import asyncio
import json
import os
import zlib
from pathlib import Path

import pytest

from engine import Engine, SamplingParams
from engine.front.async_engine import AsyncEngine
from engine.plugins.tiers.records import MEMORY_NAME
from hybridcache.radix.warm_state import MAGIC, pack, write_memory
from tests.engine.test_hits_change_nothing import MakeEngine, prompts
from tests.waiting import wait_until

ONE = SamplingParams(max_tokens=1, temperature=0)
LEARNING = {
    "kv_tokens": 700,
    "slots": 6,
    "disk_gib": 0.02,
    "eviction": "survival",
    "checkpoints": ("adaptive",),
}


pytestmark = pytest.mark.usefixtures("always_loads")


def serve(engine: Engine, sequence: list[list[int]]) -> list[int]:
    return [engine.generate([prompt], ONE)[0].cached_len for prompt in sequence]


def learned(engine: Engine) -> dict[str, object]:
    """Return the learned state of policies and placement, and the cache's time."""
    body = json.loads(write_memory(engine.cache, engine._manager.placement.rules))
    return {name: body[name] for name in ("now", "num_items", "eviction", "placement")}


def known_prefixes(engine: Engine) -> set[bytes]:
    return {node.tokens.tobytes() for node in engine.cache._tree.nodes()}


def test_a_restarted_engine_has_the_learned_state_of_the_stopped_one(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    first = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    serve(first, prompts(16))
    serve(first, prompts(16))
    first.cache.evict(1 << 30, 1 << 30)
    before, tokens = learned(first), known_prefixes(first)
    assert before["eviction"] and before["placement"]
    first.close()
    again = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    assert learned(again) == before and known_prefixes(again) == tokens
    again.check()
    serve(again, prompts(16))
    again.check()
    again.close()


def test_an_idle_engine_saves_its_learned_state(
    make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.plugins.tiers.plugin.IDLE_EVERY_S", 0.05)
    engine = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    loop = AsyncEngine(engine)

    async def ask() -> None:
        loop.start()
        async for _ in loop.submit(prompts(1)[0], ONE):
            pass

    asyncio.run(ask())
    try:
        wait_until((tmp_path / "state" / MEMORY_NAME).exists)
    finally:
        loop.stop()


@pytest.mark.parametrize("odd", [b"[" * 200_000, {"namespaces": 3}, {"memos": [7]}, None])
def test_an_odd_file_of_the_policies_is_ignored(
    odd: object, make_engine: MakeEngine, tmp_path: Path
) -> None:
    """Its checksum is right, or it is a named pipe."""
    options, file = LEARNING | {"state_dir": str(tmp_path / "state")}, tmp_path / "state/memory"
    engine = make_engine(**options)
    serve(engine, prompts(6))
    engine.close()
    body = zlib.decompress(file.read_bytes().removeprefix(MAGIC))
    file.unlink()
    if isinstance(odd, dict):
        odd = json.dumps(json.loads(body) | odd).encode()
    os.mkfifo(file) if odd is None else file.write_bytes(pack(odd))
    engine = make_engine(**options)
    assert engine.report().folder.errors == 1
    engine.close()
