"""Memory below the device's on a small real model: no tier changes a bit, and what is on disk is
there after every end."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from engine import Engine, SamplingParams
from engine.command.screen import start_screen
from engine.config import ConfigError
from engine.fleet.reports import summed
from engine.schedule.batch import Batch, Segment
from engine.schedule.exchange import MeasuredExchange
from engine.schedule.plan import Plan, Task
from engine.server.metrics import Metrics
from engine.store.segment import SUFFIX
from engine.store.store import SegmentStore, StoreError
from hybridcache.geometry.model import ModelGeometry
from hybridcache.units import GIB
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
    assert engine.cache.lower is not None
    return engine.cache.lower.copied_rows


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
    first._lower.disk.flush()
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
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(StoreError, match=r"another dtype .*: --dtype\), row bytes \(.*: start"):
        make_engine(state_dir=str(folder), dtype="bfloat16")
    with pytest.raises(StoreError, match="another weights"):
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
    first._lower.disk.flush()
    second = make_engine(exact=True, state_dir=str(tmp_path / "state"), **SMALL)
    assert_same(expected, one_by_one(second, asked))
    assert_same(expected, one_by_one(second, asked))
    assert lower(second)["disk", "device"] > 0 and ("device", "disk") not in lower(second)
    assert_same(expected, one_by_one(first, asked))
    second.close()
    first.close()


@pytest.mark.full("0.3")
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
    again.close()


def test_a_slow_disk_holds_up_nobody_who_runs(
    make_engine: MakeEngine,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept, other = prompts(2)[0] + [1] * 100, [5] * 70
    folder = str(tmp_path / "state")
    first = make_engine(state_dir=folder)
    [before] = first.generate([kept], ONE)
    first.close()
    engine = make_engine(state_dir=folder)
    may_read, read = threading.Event(), SegmentStore.read

    def slow(store: SegmentStore, number: int, out: memoryview) -> bool:
        assert may_read.wait(60)
        return read(store, number, out)

    monkeypatch.setattr(SegmentStore, "read", slow)
    waits = engine.submit(kept, ONE)
    runs = engine.submit(other, SamplingParams(max_tokens=9, temperature=0))
    finished = {}
    while engine.has_work():
        for output in engine.step():
            if output.is_finished:
                finished[output.request_id] = output
        if runs in finished and not may_read.is_set():
            assert waits not in finished, "it did not wait for the disk"
            may_read.set()
    assert list(finished) == [runs, waits] and finished[waits].cached_len > 0
    assert finished[waits].logprobs == before.logprobs
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
    first._lower.disk.flush()
    report = first.report()
    assert report.lower is not None and report.lower.folder is not None
    assert [tier.tier for tier in report.lower.tiers] == ["host", "disk"]
    for tier in report.lower.tiers:
        assert tier.free + tier.cached == tier.total
        assert tier.cached <= tier.taken_in and tier.fetched <= tier.taken_in
    kept = sum(path.stat().st_size for path in (tmp_path / "state").glob(f"*{SUFFIX}"))
    assert report.lower.tiers[0].cached and 0 < report.lower.folder.kept <= kept
    assert any("v below" in line for line in first.outline().splitlines())
    metrics = Metrics().render(report).decode()
    assert f"engine_state_dir_bytes {float(report.lower.folder.kept)}" in metrics
    assert 'engine_tier_bytes{owner="cached",tier="host"}' in metrics
    assert summed([report, report], {}).lower.tiers[0].total == 2 * report.lower.tiers[0].total
    second = make_engine(**settings)
    assert not second.report().lower.folder.is_written
    screen = start_screen(second, "http://here/v1")
    assert "kept of" in screen and "; read only" in screen
    for engine in (second, first):
        engine.close()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"host_gib": 1e-9}, "host_gib 1e-09 is too little for a single state"),
        ({"disk_gib": 1e-9}, "disk_gib 1e-09 is too little for a single state"),
        ({"host_gib": 1e6}, "host_gib 1e.06 is more memory than can be numbered"),
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
