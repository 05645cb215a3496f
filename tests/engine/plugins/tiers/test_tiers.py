"""Tests of host and disk tiers on a small real model: no tier changes a bit, and the disk's
contents survive every end."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

from engine import Engine
from engine.plugins.tiers.records import StoreError
from engine.weights.model_config import ModelError
from hybridcache.geometry.units import GIB
from tests.engine.plugins.tiers.test_disk import FailingSystem
from tests.engine.test_hits_change_nothing import REPORT, MakeEngine, assert_same, prompts
from tests.refused import refused

SMALL = {"kv_tokens": 700, "slots": 6}


def copied_rows(engine: Engine) -> dict[tuple[str, str], int]:
    assert engine.cache.offload is not None
    return engine.cache.offload.copied_rows


def generate_in_turn(engine: Engine, sequence: list[list[int]]) -> list[object]:
    return [engine.generate([prompt], REPORT)[0] for prompt in sequence]


def host_gib(engine: Engine, tokens: int) -> float:
    return tokens * engine.runner.memory.row_bytes / GIB


@pytest.mark.full("host and disk-bfloat16")
@pytest.mark.usefixtures("always_loads")
@pytest.mark.parametrize(
    ("tiers", "dtype"), [("host", "float32"), ("disk", "float32"), ("host and disk", "bfloat16")]
)
def test_hits_through_any_tier_equal_cold_runs_bit_for_bit(
    make_engine: MakeEngine, tmp_path: Path, tiers: str, dtype: str
) -> None:
    texts = prompts(16)
    cold = make_engine(prefix_cache="none", dtype=dtype)
    expected = generate_in_turn(cold, texts)
    settings: dict[str, object] = {"dtype": dtype, "exact": True, **SMALL}
    if "host" in tiers:
        settings["host_gib"] = host_gib(cold, 150 if "disk" in tiers else 4000)
    if "disk" in tiers:
        settings["state_dir"] = str(tmp_path / "state")
    warm = make_engine(**settings)
    assert_same(expected, generate_in_turn(warm, texts))
    assert_same(expected, generate_in_turn(warm, texts))
    last = tiers.split()[-1]
    assert copied_rows(warm)[last, "device"] > 0, "nothing was loaded"
    assert_same(expected, warm.generate(texts, REPORT))
    warm.close()


@pytest.mark.full
@pytest.mark.usefixtures("always_loads")
def test_a_restarted_engine_reads_its_folder_or_a_copy(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    texts = prompts(12)
    expected = generate_in_turn(make_engine(prefix_cache="none"), texts)
    folder = tmp_path / "state"
    first = make_engine(exact=True, state_dir=str(folder))
    generate_in_turn(first, texts)
    num_cached = sum(output.cached_len for output in generate_in_turn(first, texts))
    first.plugins["tiers"].disk.flush()
    shutil.copytree(folder, tmp_path / "killed")  # as after a SIGKILL
    first.close()
    for name in ("state", "killed"):
        again = make_engine(exact=True, state_dir=str(tmp_path / name))
        outputs = generate_in_turn(again, texts)
        assert_same(expected, outputs)
        assert sum(output.cached_len for output in outputs) == num_cached
        assert not any(output.losses.kv_evicted for output in outputs), "nothing was evicted"
        again.close()


def test_a_different_engine_is_refused_and_the_folder_is_unchanged(
    make_engine: MakeEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A start that fails after the folder was opened releases it too."""

    def refuse(*_: object) -> None:
        raise ModelError("no host memory")

    folder = tmp_path / "state"
    first = make_engine(state_dir=str(folder))
    generate_in_turn(first, prompts(2))
    first.close()
    first.close()  # Does nothing: the disk's thread has ended, and its descriptors may be reused.
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(ModelError, match="no host memory"):
        patch.setattr("engine.plugins.tiers.tier_copies.allocate", refuse)
        make_engine(state_dir=str(folder))
    with pytest.raises(
        StoreError,
        match=r"differs in .*dtype.*: configure both.*set state_dir_mismatch='empty', which",
    ):
        make_engine(state_dir=str(folder), dtype="bfloat16")
    refused("differs in weights", make_engine, state_dir=str(folder), seed=1, kind=StoreError)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "fingerprint.json").write_bytes(b"{")
    damaged = "fingerprint.json is missing or damaged: restore it"
    refused(damaged, make_engine, state_dir=str(folder), kind=StoreError)
    (folder / "fingerprint.json").write_bytes(before["fingerprint.json"])
    caplog.clear()
    make_engine(state_dir=str(folder), seed=1, state_dir_mismatch="empty").close()
    assert re.search(r"differs in weights, .*: its entries are deleted", caplog.text)
    left = {path.name for path in folder.iterdir()}
    assert not any(name.endswith(".record") for name in left) and "fingerprint.json" in left


@pytest.mark.full
@pytest.mark.usefixtures("always_loads")
def test_the_engine_serves_despite_an_error_of_the_file_system(
    make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers stay exact, without the disk tier.

    ``store/test_disk.py`` tests other errors, and a file system that hangs.
    """
    cold = make_engine(prefix_cache="none")
    engine = make_engine(exact=True, state_dir=str(tmp_path), eviction="lru", **SMALL)
    disk = engine.plugins["tiers"].disk
    system = FailingSystem(monkeypatch, "open")
    for shift in range(2):
        texts = [[(token + shift) % 160 for token in prompt] for prompt in prompts()]
        expected = generate_in_turn(cold, texts)
        for _ in range(2):
            assert_same(expected, generate_in_turn(engine, texts))
            disk.flush()
        engine.check()
        disk.check()
        folder, system.number = engine.report().folder, errno.EIO
        if not shift:
            assert folder.problem is None and copied_rows(engine)["disk", "device"] > 0
    assert folder.errors == 1 and os.strerror(errno.EIO) in folder.problem
    assert engine.report().tiers[0].cached == 0
    engine.close()
