"""Tests of learned state across restarts: policies, placement and ghosts."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest

from engine import Engine, SamplingParams
from engine.async_engine import AsyncEngine
from engine.plugins.tiers.plugin import NAME
from hybridcache.export.warm_state import unpack, write_memory
from tests.engine.test_hits_change_nothing import (
    MakeEngine,
    always_loads,  # noqa: F401
    make_engine,  # noqa: F401
    prompts,
)

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
    for policy in body["policies"].values():
        del policy["stale"]  # Names of evicted items do not affect decisions.
    return {name: body[name] for name in ("now", "num_items", "policies", "placement")}


def known_prefixes(engine: Engine) -> set[bytes]:
    return {node.tokens.tobytes() for node in engine.cache._tree.nodes()}


def test_a_restarted_engine_has_the_learned_state_of_the_stopped_one(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
) -> None:
    first = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    serve(first, prompts(16))
    serve(first, prompts(16))
    first.cache.evict(1 << 30, 1 << 30)
    before, tokens = learned(first), known_prefixes(first)
    assert before["policies"] and before["placement"]
    first.close()
    again = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    assert learned(again) == before and known_prefixes(again) == tokens
    again.check()
    serve(again, prompts(16))
    again.check()
    again.close()


def test_a_killed_engine_loses_only_the_state_learned_since_its_save(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
) -> None:
    first = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    serve(first, prompts(12))
    first.plugins["tiers"].policy_state.save()
    first.plugins["tiers"].disk.flush()
    shutil.copytree(tmp_path / "state", tmp_path / "killed")
    serve(first, prompts(16)[12:])
    first.plugins["tiers"].disk.flush()
    for path in (tmp_path / "state").iterdir():  # later records, but the earlier learned state
        if path.name != NAME:
            shutil.copy(path, tmp_path / "killed")
    first.close()
    again = make_engine(state_dir=str(tmp_path / "killed"), **LEARNING)
    assert again.cache.now == 12
    again.check()
    assert sum(serve(again, prompts(16)[12:])) > 0, "later records were not adopted"
    again.check()
    again.close()


def test_learned_state_of_other_policies_is_skipped_with_one_warning(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    serve(first, prompts(8))
    first.close()
    caplog.clear()
    plain = {**LEARNING, "eviction": "lru", "checkpoints": ("branch", "end")}
    again = make_engine(state_dir=str(tmp_path / "state"), **plain)
    [warning] = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "(device, disk, placement) in" in warning
    again.check()
    again.close()


@pytest.mark.full("30")
@pytest.mark.parametrize("cut", [0, 10, 30, -1])
def test_a_truncated_file_is_skipped(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    cut: int,
) -> None:
    first = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    hits = serve(first, prompts(8)) and serve(first, prompts(8))
    first.close()
    path = tmp_path / "state" / NAME
    path.write_bytes(path.read_bytes()[:cut])
    caplog.clear()
    again = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    assert "the warm state is damaged" in caplog.text
    assert serve(again, prompts(8)) == hits, "the records do not depend on the learned state"
    again.check()
    again.close()


def test_reset_removes_the_learned_state(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
) -> None:
    engine = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    serve(engine, prompts(4))
    engine.plugins["tiers"].policy_state.save()
    engine.reset_prefix_cache()
    engine.plugins["tiers"].disk.flush()
    assert not (tmp_path / "state" / NAME).exists()
    engine.close()


def test_learned_state_that_is_too_large_is_reported_and_not_written(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    engine.plugins["tiers"].policy_state._max_bytes = 100
    serve(engine, prompts(4))
    engine.close()
    assert "is not written" in caplog.text and not (tmp_path / "state" / NAME).exists()


def test_write_errors_are_reported_once_and_the_engine_goes_on(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    engine = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    monkeypatch.setattr("engine.plugins.tiers.disk.write_atomically", refuse)
    for number in range(2):
        serve(engine, prompts(3)[number:])
        engine.plugins["tiers"].policy_state.save()
        engine.plugins["tiers"].disk.flush()
        assert engine.report().offload.folder.errors == number + 1
    assert caplog.text.count(os.strerror(errno.EDQUOT)) == 1
    engine.check()
    engine.close()


def test_learned_state_is_saved_when_idle_and_rarely_otherwise(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
) -> None:
    engine = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    policy_state, now = engine.plugins["tiers"].policy_state, 0.0
    policy_state._clock = lambda: now
    policy_state._saved_at = policy_state._took_s = 0.0
    assert policy_state.rest(is_idle=True) is None, "nothing new to save"
    serve(engine, prompts(2))
    now = 0.25
    assert policy_state.rest(is_idle=True) == 0.75
    now = 20.0
    assert policy_state.rest(is_idle=False) == 10.0
    assert policy_state.rest(is_idle=True) is None
    policy_state._took_s = 1.0
    serve(engine, prompts(3)[2:])
    assert policy_state.rest(is_idle=True) == 200.0, "a save that takes 1 s may run every 200 s"
    engine.plugins["tiers"].disk.flush()
    assert unpack((tmp_path / "state" / NAME).read_bytes())._plain["now"] == 2
    engine.close()


def test_an_idle_engine_saves_its_learned_state(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.plugins.tiers.plugin.IDLE_EVERY_S", 0.05)
    engine = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    loop = AsyncEngine(engine)
    loop.start()

    async def ask() -> None:
        async for _ in loop.submit(prompts(1)[0], ONE):
            pass

    asyncio.run(ask())
    try:
        for _ in range(400):
            if (tmp_path / "state" / NAME).exists():
                return
            time.sleep(0.05)
        raise AssertionError("the idle engine wrote nothing")
    finally:
        loop.stop()
