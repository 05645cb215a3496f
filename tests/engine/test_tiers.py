"""Memory below the device's on a small real model: no tier changes a bit, and what is on disk is
there after every end."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from engine import Engine, SamplingParams, engine_config
from engine.config import ConfigError
from engine.plugins.replicas.replicas_client import summed
from engine.plugins.tiers.disk import RETRY_S
from engine.plugins.tiers.fingerprint import StoreError
from engine.plugins.tiers.records import SUFFIX, RecordStore
from engine.plugins.tiers.staging import MAX_READS, MeasuredExchange
from engine.schedule.batch import Batch, Plan, Segment, Task
from engine.server.metrics import Metrics
from engine.worker.screen import start_screen
from experiments.system.served import serving
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import GIB
from tests.engine.test_hits_change_nothing import (
    REPORT,
    MakeEngine,
    assert_same,
    make_engine,  # noqa: F401
    prompts,
)

SMALL = {"kv_tokens": 700, "slots": 6}
ONE = SamplingParams(max_tokens=1, temperature=0, logprobs=5)


@pytest.fixture
def always_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    """These prompts are computed so quickly that a busy disk is not worth it."""

    def saved(_: object, cached_len: int, position: int, *__: object) -> float:
        return position - cached_len

    monkeypatch.setattr(MeasuredExchange, "seconds_saved", saved)


def lower(engine: Engine) -> dict[tuple[str, str], int]:
    assert engine.cache.offload is not None
    return engine.cache.offload.copied_rows


def one_by_one(engine: Engine, asked: list[list[int]]) -> list[object]:
    return [engine.generate([prompt], REPORT)[0] for prompt in asked]


def host_gib(engine: Engine, tokens: int) -> float:
    return tokens * engine.runner.memory.row_bytes / GIB


@pytest.mark.full("host and disk-bfloat16")
@pytest.mark.usefixtures("always_fetches")
@pytest.mark.parametrize(
    ("tiers", "dtype"),
    [("host", "float32"), ("disk", "float32"), ("host and disk", "bfloat16")],
)
def test_a_hit_through_any_tier_is_a_cold_run_bit_for_bit(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    tiers: str,
    dtype: str,
) -> None:
    asked = prompts(16)
    cold = make_engine(prefix_cache="none", dtype=dtype)
    expected = one_by_one(cold, asked)
    settings: dict[str, object] = {"dtype": dtype, "exact": True, **SMALL}
    if "host" in tiers:
        settings["host_gib"] = host_gib(cold, 150 if "disk" in tiers else 4000)
    if "disk" in tiers:
        settings["state_dir"] = str(tmp_path / "state")
    warm = make_engine(**settings)
    assert_same(expected, one_by_one(warm, asked))
    assert_same(expected, one_by_one(warm, asked))
    last = tiers.split()[-1]
    assert lower(warm)[last, "device"] > 0, "nothing was fetched"
    assert_same(expected, warm.generate(asked, REPORT))
    warm.close()


@pytest.mark.full
@pytest.mark.usefixtures("always_fetches")
def test_the_next_start_has_it_wherever_the_folder_is(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
) -> None:
    asked = prompts(12)
    expected = one_by_one(make_engine(prefix_cache="none"), asked)
    folder = tmp_path / "state"
    first = make_engine(exact=True, state_dir=str(folder))
    one_by_one(first, asked)
    known = sum(output.cached_len for output in one_by_one(first, asked))
    first.plugins["tiers"].disk.flush()
    shutil.copytree(folder, tmp_path / "killed")  # as it is found after a SIGKILL now
    first.close()
    for name in ("state", "killed"):
        again = make_engine(exact=True, state_dir=str(tmp_path / name))
        outputs = one_by_one(again, asked)
        assert_same(expected, outputs)
        assert sum(output.cached_len for output in outputs) == known
        again.close()


def test_another_engine_is_refused_in_a_sentence_and_nothing_is_touched(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
) -> None:
    folder = tmp_path / "state"
    first = make_engine(state_dir=str(folder))
    one_by_one(first, prompts(2))
    first.close()
    first.close()  # does nothing: the disk's thread has ended, its descriptors belong to others
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(StoreError, match=r"differs in dtype .*: --dtype\), row bytes \(.*: use"):
        make_engine(state_dir=str(folder), dtype="bfloat16")
    with pytest.raises(StoreError, match="differs in weights"):
        make_engine(state_dir=str(folder), seed=1)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.full
@pytest.mark.usefixtures("always_fetches")
def test_a_second_engine_reads_what_the_first_has_kept(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
) -> None:
    asked = prompts(12)
    first = make_engine(exact=True, state_dir=str(tmp_path / "state"))
    expected = one_by_one(first, asked)
    first.plugins["tiers"].disk.flush()
    second = make_engine(exact=True, state_dir=str(tmp_path / "state"), **SMALL)
    assert_same(expected, one_by_one(second, asked))
    assert_same(expected, one_by_one(second, asked))
    assert lower(second)["disk", "device"] > 0 and ("device", "disk") not in lower(second)
    assert_same(expected, one_by_one(first, asked))
    second.close()
    first.close()


@pytest.mark.full
@pytest.mark.usefixtures("always_fetches")
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_damaged_records_are_computed_again(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    share: float,
) -> None:
    """Every byte behind that share of each file is another."""
    asked = prompts(8)
    expected = one_by_one(make_engine(prefix_cache="none"), asked)
    first = make_engine(exact=True, state_dir=str(tmp_path / "state"))
    one_by_one(first, asked)
    first.close()
    again = make_engine(exact=True, state_dir=str(tmp_path / "state"), **SMALL)
    for path in (tmp_path / "state").glob(f"*{SUFFIX}"):
        raw = bytearray(path.read_bytes())
        for place in range(int(len(raw) * share), len(raw), 97):
            raw[place] ^= 255
        path.write_bytes(raw)
    assert_same(expected, one_by_one(again, asked))
    again.check()
    again.plugins["tiers"].disk.check()
    again.close()


@pytest.mark.usefixtures("always_fetches")
def test_a_damaged_record_costs_what_it_held_and_nothing_else(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A request waits for its records. If they cannot be read it computes them again, and the rest
    of the cache stays."""
    damaged, other = prompts(2)[0] + [1] * 100, [5] * 200
    first = make_engine(state_dir=str(tmp_path / "state"))
    before = one_by_one(first, [damaged])
    first.plugins["tiers"].disk.flush()
    paths = set((tmp_path / "state").glob(f"*{SUFFIX}"))
    one_by_one(first, [other])
    first.close()
    again = make_engine(state_dir=str(tmp_path / "state"))
    for path in paths:
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    [hit] = one_by_one(again, [other])
    assert hit.cached_len > 0 and lower(again)["disk", "device"] > 0
    assert_same(before, one_by_one(again, [damaged]))
    assert "is damaged" in caplog.text and "The cache restarts" not in caplog.text
    assert one_by_one(again, [other])[0].cached_len == hit.cached_len
    again.check()
    again.plugins["tiers"].disk.check()
    again.close()


class Faults:
    """Lets calls of the system fail in the thread of the disk, and heals them."""

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
@pytest.mark.usefixtures("always_fetches")
def test_whatever_the_file_system_refuses_the_engine_serves_on(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One engine with a folder that is always full, and one fault after the other."""
    cold = make_engine(prefix_cache="none")
    rounds, expected = itertools.count(1), dict[int, list[object]]()

    def ask(engine: Engine, shift: int) -> list[object]:
        """Some prompts, others for another ``shift``."""
        asked = [[(token + shift) % 160 for token in prompt[:150]] for prompt in prompts(4)]
        if shift not in expected:
            expected[shift] = [cold.generate([prompt], ONE)[0] for prompt in asked]
        answers = [engine.generate([prompt], ONE)[0] for prompt in asked]
        assert_same(expected[shift], answers)
        return answers

    settings = {
        "state_dir": str(tmp_path / "state"),
        "disk_gib": 3e-4,
        "kv_tokens": 400,
        "slots": 4,
        # The same prompts go to the disk and come back in each round, whatever was learnt before.
        "eviction": "lru",
        "checkpoints": ("branch", "boundary", "backoff", "end"),
    }
    faults = Faults(monkeypatch)
    engine = make_engine(**settings)
    disk = engine.plugins["tiers"].disk
    disk._clock = lambda: faults.now_s

    def serves() -> None:
        shift = next(rounds)
        for each in (shift, shift - 1, shift):
            ask(engine, each)
            disk.flush()
        engine.check()
        disk.check()
        folder = tmp_path / "state"
        if folder.exists():
            kept = sum(path.stat().st_blocks for path in folder.glob(f"*{SUFFIX}")) * 512
            assert kept <= engine.report().lower.folder.total

    for _ in range(3):
        serves()
    assert disk.num_bytes > 0.7 * disk.max_bytes and lower(engine)["disk", "device"] > 0
    for call, number in (
        ("writev", errno.ENOSPC),
        ("open", errno.EMFILE),
        ("rename", errno.EIO),
        ("unlink", errno.EIO),
        ("preadv", errno.EIO),
        ("open", errno.EACCES),
    ):
        errors = engine.report().lower.folder.errors
        faults.call, faults.number, faults.count = call, number, 0
        serves()
        folder = engine.report().lower.folder
        assert folder.errors == errors + faults.count > errors, call
        assert folder.is_written == (call == "preadv")
        if call != "preadv":
            assert os.strerror(number) in folder.problem
        faults.heal()
        serves()
        folder = engine.report().lower.folder
        assert folder.is_written and folder.problem is None, call
    monkeypatch.setattr("engine.plugins.tiers.disk.DEADLINE_S", 0.05)
    faults.responds.clear()
    while not disk.is_detached:
        ask(engine, next(rounds))
    assert "has not responded" in engine.report().lower.folder.problem
    assert engine.report().lower.tiers[-1].cached == 0, "what cannot be read is in no tree"
    engine.check()
    monkeypatch.setattr("engine.plugins.tiers.disk.DEADLINE_S", 60)
    faults.heal()
    disk.flush()
    serves()
    assert engine.report().lower.folder.problem is None and not disk.is_detached
    engine.close()
    again = make_engine(**settings)
    ask(again, next(rounds) - 1)
    assert lower(again)["disk", "device"] > 0
    shutil.rmtree(tmp_path / "state")
    for _ in range(2):
        ask(again, next(rounds))
        again.plugins["tiers"].disk.flush()
    ask(again, 0)
    again.check()
    again.plugins["tiers"].disk.check()
    assert not again.report().lower.folder.is_written and not (tmp_path / "state").exists()
    again.close()
    last = make_engine(**settings)
    ask(last, 0)
    last.close()


@pytest.mark.usefixtures("always_fetches")
def test_health_tells_of_a_disk_that_does_not_respond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(monkeypatch)
    engine = Engine(engine_config(cache_gib=0.02, state_dir=str(tmp_path / "state")))
    with serving(engine) as (_, port):

        def health() -> dict[str, str]:
            answer = httpx.get(f"http://127.0.0.1:{port}/health", timeout=60)
            assert answer.status_code == 200
            return answer.json()

        def ask() -> None:
            body = {"model": engine.model_name, "prompt": [7] * 70, "max_tokens": 2}
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200

        ask()
        assert health() == {"status": "ok"}
        monkeypatch.setattr("engine.plugins.tiers.disk.DEADLINE_S", 0.05)
        faults.responds.clear()
        while (found := health())["status"] == "ok":
            engine.plugins["tiers"].disk.remove_file("nothing")
        assert found["status"] == "degraded" and "has not responded" in found["state_dir"]
        ask()
        monkeypatch.setattr("engine.plugins.tiers.disk.DEADLINE_S", 60)
        faults.heal()
        while health()["status"] != "ok":
            pass
        ask()


@pytest.mark.usefixtures("always_fetches")
@pytest.mark.parametrize("num_kept", [1, MAX_READS + 2], ids=["one read", "more than may read"])
def test_a_slow_disk_holds_up_nobody_who_reads_nothing(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_kept: int,
) -> None:
    kept, other = [[100 + number] * 170 for number in range(num_kept)], [5] * 70
    folder = str(tmp_path / "state")
    first = make_engine(state_dir=folder)
    before = first.generate(kept, ONE)
    first.close()
    engine = make_engine(state_dir=folder)
    may_read, read = threading.Event(), RecordStore.read

    def slow(store: RecordStore, number: int, out: memoryview) -> bool:
        assert may_read.wait(60)
        return read(store, number, out)

    monkeypatch.setattr(RecordStore, "read", slow)
    waiting = [engine.submit(prompt, ONE) for prompt in kept]
    runs = engine.submit(other, SamplingParams(max_tokens=9, temperature=0))
    finished = {}
    while engine.has_work():
        for output in engine.step():
            if output.is_finished:
                finished[output.request_id] = output
        if runs in finished and not may_read.is_set():
            assert list(finished) == [runs], "one did not wait for the disk"
            may_read.set()
    assert finished.keys() == {runs, *waiting}
    for name, cold in zip(waiting, before, strict=True):
        assert finished[name].cached_len > 0 and finished[name].logprobs == cold.logprobs
    engine.close()


def test_what_is_computed_sooner_than_copied_is_not_fetched() -> None:
    rates: dict[str, float | None] = {"host": None, "disk": None}
    geometry = ModelGeometry.preset("qwen3-next")
    exchange = MeasuredExchange(geometry, lambda: rates)
    state = {"host": geometry.state_bytes, "disk": 0}
    assert exchange.seconds_saved(0, 640, 1000, state) > 0, "nothing is known: it is tried"
    for num_tokens in (1024, 512, 2048):
        task = Task(None, None, 0, num_tokens, False, True, False, None)  # type: ignore[arg-type]
        segment = Segment(0, 0, np.zeros(num_tokens, np.int32), 0, False)
        exchange.learn(Plan(Batch((segment,)), (task,)), 5.0 + num_tokens / 1000)
    rates["host"] = 1e9
    saved = exchange.seconds_saved(0, 640, 1000, state)
    assert 0.4 < saved < 0.6, "640 tokens take about 0.6 s beside what a step costs, 74 MiB 0.08"
    rates["host"] = 1e8
    assert exchange.seconds_saved(0, 640, 1000, state) < 0
    rates["disk"], on_disk = 1.0, {"host": 0, "disk": geometry.state_bytes}
    assert exchange.seconds_saved(0, 640, 1000, on_disk) < 0
    assert exchange.after_reading.seconds_saved(0, 640, 1000, on_disk) > 0, "it was read"


def test_reset_forgets_what_is_kept(make_engine: MakeEngine, tmp_path: Path) -> None:  # noqa: F811
    asked = prompts(4)
    for _ in range(2):
        engine = make_engine(state_dir=str(tmp_path / "state"))
        assert one_by_one(engine, asked)[0].cached_len == 0
        engine.reset_prefix_cache()
        engine.close()


@pytest.mark.usefixtures("always_fetches")
def test_the_report_the_metrics_and_the_screen_say_what_lies_where(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
) -> None:
    settings = {"state_dir": str(tmp_path / "state"), "host_gib": 2e-4, **SMALL}
    first = make_engine(**settings)
    one_by_one(first, prompts(12))
    one_by_one(first, prompts(12))
    first.plugins["tiers"].disk.flush()
    report = first.report()
    assert report.lower is not None and report.lower.folder is not None
    assert [tier.tier for tier in report.lower.tiers] == ["host", "disk"]
    for tier in report.lower.tiers:
        assert tier.free + tier.cached == tier.total
        assert tier.cached <= tier.taken_in and tier.fetched <= tier.taken_in
    kept = sum(path.stat().st_size for path in (tmp_path / "state").glob(f"*{SUFFIX}"))
    folder = report.lower.folder
    assert report.lower.tiers[0].cached and 0 < kept <= folder.kept <= folder.total
    assert folder.errors == 0 and folder.problem is None
    assert any("v below" in line for line in first.outline().splitlines())
    metrics = Metrics().render(report).decode()
    assert f"engine_state_dir_bytes {float(report.lower.folder.kept)}" in metrics
    assert 'engine_tier_bytes{owner="cached",tier="host"}' in metrics
    assert summed([report, report], {}).lower.tiers[0].total == 2 * report.lower.tiers[0].total
    broken = replace(folder, problem="No space left on device")
    other = replace(report, lower=replace(report.lower, folder=broken))
    assert summed([report, other], {}).lower.folder == broken, "one replica's problem is told"
    second = make_engine(**settings)
    assert not second.report().lower.folder.is_written
    screen = start_screen(second, "http://here/v1")
    assert "kept of" in screen and "; read only" in screen
    for engine in (second, first):
        engine.close()


def test_a_folder_larger_than_its_disk_is_warned_of(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    free_gib = shutil.disk_usage(tmp_path).free / 2**30
    for disk_gib, is_warned in ((0.01, False), (2 * free_gib, True)):
        caplog.clear()
        settings = {"state_dir": str(tmp_path / str(disk_gib)), "disk_gib": disk_gib, **SMALL}
        make_engine(**settings).close()
        assert ("--disk-gib allows" in caplog.text) == is_warned


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"host_gib": 1e-9}, "host_gib 1e-09 is too small for a single state"),
        ({"disk_gib": 1e-9}, "disk_gib 1e-09 is too small for a single state"),
        ({"host_gib": 1e6}, "host_gib 1e.06 is more memory than row numbers can"),
    ],
)
def test_sizes_that_make_no_tier_are_refused_by_the_name_of_the_flag(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    settings: dict[str, object],
    sentence: str,
) -> None:
    folder = {"state_dir": str(tmp_path / "state")} if "disk_gib" in settings else {}
    with pytest.raises(ConfigError, match=sentence):
        make_engine(**settings, **folder)
