"""What an engine has learnt is there after a restart, beside what it holds."""

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
from engine.plugins.tiers.staging import MeasuredExchange
from hybridcache.export.warm_state import unpack, write_memory
from tests.engine.test_hits_change_nothing import (
    MakeEngine,
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


@pytest.fixture(autouse=True)
def always_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    """No clock decides."""

    def saved(_: object, cached_len: int, position: int, *__: object) -> float:
        return position - cached_len

    monkeypatch.setattr(MeasuredExchange, "seconds_saved", saved)


def serve(engine: Engine, asked: list[list[int]]) -> list[int]:
    return [engine.generate([prompt], ONE)[0].cached_len for prompt in asked]


def learnt(engine: Engine) -> dict[str, object]:
    """All that policies and placement know, and when it is."""
    body = json.loads(write_memory(engine.cache, engine._manager.placement.rules))
    for policy in body["policies"].values():
        del policy["fields"]["_stale"]  # names items that are gone, which decide nothing
    return {name: body[name] for name in ("now", "num_items", "policies", "placement")}


def known(engine: Engine) -> set[bytes]:
    return {node.tokens.tobytes() for node in engine.cache._tree.nodes()}


def test_a_restarted_engine_has_learnt_what_the_stopped_one_had(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
) -> None:
    first = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    serve(first, prompts(16))
    serve(first, prompts(16))
    first.cache.evict(1 << 30, 1 << 30)
    before, tokens = learnt(first), known(first)
    assert before["policies"] and before["placement"]
    first.close()
    again = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    assert learnt(again) == before and known(again) == tokens
    again.check()
    serve(again, prompts(16))
    again.check()
    again.close()


def test_a_killed_engine_forgets_only_what_it_learnt_since(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
) -> None:
    first = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    serve(first, prompts(12))
    first.plugins["tiers"].remembering.save()
    first.plugins["tiers"].disk.flush()
    shutil.copytree(tmp_path / "state", tmp_path / "killed")
    serve(first, prompts(16)[12:])
    first.plugins["tiers"].disk.flush()
    for path in (tmp_path / "state").iterdir():  # records of later, the memory of then
        if path.name != NAME:
            shutil.copy(path, tmp_path / "killed")
    first.close()
    again = make_engine(state_dir=str(tmp_path / "killed"), **LEARNING)
    assert again.cache._residency.now == 12
    again.check()
    assert sum(serve(again, prompts(16)[12:])) > 0, "what came later was adopted all the same"
    again.check()
    again.close()


def test_other_words_leave_it_out_and_say_so_once(
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
    [said] = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert "(device, disk, placement) in" in said
    again.check()
    again.close()


@pytest.mark.full("30")
@pytest.mark.parametrize("cut", [0, 10, 30, -1])
def test_a_file_that_is_not_whole_is_left_out(
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
    assert "it is damaged" in caplog.text or "its head is damaged" in caplog.text
    assert serve(again, prompts(8)) == hits, "what is kept is another matter"
    again.check()
    again.close()


def test_reset_forgets_what_was_learnt(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
) -> None:
    engine = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    serve(engine, prompts(4))
    engine.plugins["tiers"].remembering.save()
    engine.reset_prefix_cache()
    engine.plugins["tiers"].disk.flush()
    assert not (tmp_path / "state" / NAME).exists()
    engine.close()


def test_too_little_room_for_it_is_said_and_the_engine_goes_on(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    engine.plugins["tiers"].remembering._max_bytes = 100
    serve(engine, prompts(4))
    engine.close()
    assert "is not written" in caplog.text and not (tmp_path / "state" / NAME).exists()


def test_a_file_system_that_refuses_it_is_reported_once_and_the_engine_goes_on(
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
        engine.plugins["tiers"].remembering.save()
        engine.plugins["tiers"].disk.flush()
        assert engine.report().lower.folder.errors == number + 1
    assert caplog.text.count(os.strerror(errno.EDQUOT)) == 1
    engine.check()
    engine.close()


def test_it_is_written_when_there_is_nothing_to_compute_and_seldom_else(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
) -> None:
    engine = make_engine(state_dir=str(tmp_path / "state"), **LEARNING)
    remembering, now = engine.plugins["tiers"].remembering, 0.0
    remembering._clock = lambda: now
    remembering._saved_at = remembering._took_s = 0.0
    assert remembering.rest(is_idle=True) is None, "nothing is new"
    serve(engine, prompts(2))
    now = 0.25
    assert remembering.rest(is_idle=True) == 0.75
    now = 20.0
    assert remembering.rest(is_idle=False) == 10.0
    assert remembering.rest(is_idle=True) is None
    remembering._took_s = 1.0
    serve(engine, prompts(3)[2:])
    assert remembering.rest(is_idle=True) == 200.0, "a save of a second may come every 200"
    engine.plugins["tiers"].disk.flush()
    assert unpack((tmp_path / "state" / NAME).read_bytes())._plain["now"] == 2
    engine.close()


def test_an_engine_that_waits_for_requests_writes_it(
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
        raise AssertionError("it waits for a request, and wrote nothing")
    finally:
        loop.stop()
