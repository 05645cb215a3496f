"""Tests of host and disk tiers on a small real model: no tier changes a bit, and the disk's
contents survive every end."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import Engine, SamplingParams
from engine.plugins.tiers.disk import RETRY_S
from engine.plugins.tiers.fingerprint import StoreError
from engine.plugins.tiers.records import SUFFIX
from hybridcache.geometry.units import GIB
from tests.engine.test_hits_change_nothing import (
    REPORT,
    MakeEngine,
    always_loads,  # noqa: F401
    assert_same,
    make_engine,  # noqa: F401
    prompts,
)

SMALL = {"kv_tokens": 700, "slots": 6}
ONE = SamplingParams(max_tokens=1, temperature=0, logprobs=5)


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
    ("tiers", "dtype"),
    [("host", "float32"), ("disk", "float32"), ("host and disk", "bfloat16")],
)
def test_hits_through_any_tier_equal_cold_runs_bit_for_bit(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    tiers: str,
    dtype: str,
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
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
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
        again.close()


def test_a_different_engine_is_refused_and_the_folder_is_unchanged(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = tmp_path / "state"
    first = make_engine(state_dir=str(folder))
    generate_in_turn(first, prompts(2))
    first.close()
    first.close()  # Does nothing: the disk's thread has ended, and its descriptors may be reused.
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(StoreError, match=r"--dtype\), computed bits, row bytes \(.*: use"):
        make_engine(state_dir=str(folder), dtype="bfloat16")
    with pytest.raises(StoreError, match="differs in weights"):
        make_engine(state_dir=str(folder), seed=1)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("always_loads")
def test_a_damaged_record_loses_only_its_own_prefix(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Check that prefixes of unreadable records are computed again, and that other records stay."""
    damaged, other = prompts(2)[0] + [1] * 100, [5] * 200
    first = make_engine(state_dir=str(tmp_path / "state"))
    before = generate_in_turn(first, [damaged])
    first.plugins["tiers"].disk.flush()
    paths = set((tmp_path / "state").glob(f"*{SUFFIX}"))
    generate_in_turn(first, [other])
    first.close()
    again = make_engine(state_dir=str(tmp_path / "state"))
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    [hit] = generate_in_turn(again, [other])
    assert hit.cached_len > 0 and copied_rows(again)["disk", "device"] > 0
    assert_same(before, generate_in_turn(again, [damaged]))
    assert "is damaged" in caplog.text and "The cache restarts" not in caplog.text
    assert generate_in_turn(again, [other])[0].cached_len == hit.cached_len
    again.check()
    again.plugins["tiers"].disk.check()
    again.close()


class Faults:
    """Faults of system calls in the disk's thread, and their end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.call, self.number, self.count = "", 0, 0
        self.now_s = 0.0
        self.responds = threading.Event()
        self.responds.set()
        for name in ("open", "writev", "rename", "unlink", "preadv"):
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def _wrapped(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            if threading.current_thread().name == "disk":
                assert self.responds.wait(60)
                if name == self.call:
                    self.count += 1
                    raise OSError(self.number, os.strerror(self.number))
            return real(*args, **options)

        return call

    def heal(self) -> None:
        self.call = ""
        self.responds.set()
        self.now_s += RETRY_S


@pytest.mark.full
@pytest.mark.usefixtures("always_loads")
def test_the_engine_serves_despite_errors_of_the_file_system(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Use one engine with a folder that is always full, and one fault after another."""
    cold = make_engine(prefix_cache="none")
    rounds, expected = itertools.count(1), dict[int, list[object]]()

    def generate(engine: Engine, shift: int) -> list[object]:
        """Generate for some prompts, which differ for each ``shift``."""
        texts = [[(token + shift) % 160 for token in prompt[:150]] for prompt in prompts(4)]
        if shift not in expected:
            expected[shift] = [cold.generate([prompt], ONE)[0] for prompt in texts]
        answers = [engine.generate([prompt], ONE)[0] for prompt in texts]
        assert_same(expected[shift], answers)
        return answers

    settings = {
        "state_dir": str(tmp_path / "state"),
        "disk_gib": 3e-4,
        "kv_tokens": 400,
        "slots": 4,
        # In each round, the same prompts are offloaded and loaded: no learned policies.
        "eviction": "lru",
        "checkpoints": ("branch", "boundary", "backoff", "end"),
    }
    faults = Faults(monkeypatch)
    engine = make_engine(**settings)
    disk = engine.plugins["tiers"].disk
    disk._clock = lambda: faults.now_s

    def serve_round() -> None:
        shift = next(rounds)
        for each in (shift, shift - 1, shift):
            generate(engine, each)
            disk.flush()
        engine.check()
        disk.check()
        folder = tmp_path / "state"
        if folder.exists():
            kept = sum(path.stat().st_blocks for path in folder.glob(f"*{SUFFIX}")) * 512
            assert kept <= engine.report().offload.folder.total

    for _ in range(3):
        serve_round()
    assert disk.num_bytes > 0.7 * disk.max_bytes and copied_rows(engine)["disk", "device"] > 0
    for call, number in (
        ("writev", errno.ENOSPC),
        ("open", errno.EMFILE),
        ("rename", errno.EIO),
        ("unlink", errno.EIO),
        ("preadv", errno.EIO),
        ("open", errno.EACCES),
    ):
        errors = engine.report().offload.folder.errors
        faults.call, faults.number, faults.count = call, number, 0
        serve_round()
        folder = engine.report().offload.folder
        assert folder.errors == errors + faults.count > errors, call
        assert folder.is_written == (call == "preadv")
        if call != "preadv":
            assert os.strerror(number) in folder.problem
        faults.heal()
        serve_round()
        folder = engine.report().offload.folder
        assert folder.is_written and folder.problem is None, call
    monkeypatch.setattr("engine.plugins.tiers.disk.DEADLINE_S", 0.05)
    faults.responds.clear()
    written = next(rounds) - 1
    while not disk.is_off:
        generate(engine, next(rounds))
    assert "has not responded" in engine.report().offload.folder.problem
    assert engine.report().offload.tiers[-1].cached == 0, "unreadable records are still in the tree"
    engine.check()
    monkeypatch.setattr("engine.plugins.tiers.disk.DEADLINE_S", 60)
    faults.heal()
    disk.flush()
    serve_round()
    assert "has not responded" in engine.report().offload.folder.problem
    engine.close()
    again = make_engine(**settings)
    generate(again, written)
    assert copied_rows(again)["disk", "device"] > 0
    shutil.rmtree(tmp_path / "state")
    for _ in range(2):
        generate(again, next(rounds))
        again.plugins["tiers"].disk.flush()
    generate(again, 0)
    again.check()
    again.plugins["tiers"].disk.check()
    assert not again.report().offload.folder.is_written and not (tmp_path / "state").exists()
    again.close()
    last = make_engine(**settings)
    generate(last, 0)
    last.close()
