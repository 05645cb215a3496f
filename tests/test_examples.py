"""The scripts under ``examples/`` run, verify themselves, and print what their pages show."""

from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hybridcache import CacheConfig, Lease, LeaseRequest, build_prefix_cache, simulate
from hybridcache.lab.traces import open_trace
from hybridcache.policies.registry import parse_placement

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

MINIMAL_ENGINE = """\
two pools
  request 1: 0 of 24 tokens reused, computed: {'never_seen': 24}
  request 1: generated [36, 17, 3, 37, 29]
  request 2: 16 of 24 tokens reused, computed: {'never_seen': 8}
  request 2: generated [18, 11, 21, 31, 17]
  request 1 again: 16 of 24 tokens reused
  every KV row and state was the right one; {'moves': 0, 'offloads': 0, 'loads': 0}
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Make the examples importable, and forget them afterwards."""
    before = set(sys.modules)
    for name in ("policies", "traces", "."):
        monkeypatch.syspath_prepend(EXAMPLES / name)
    yield monkeypatch
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_the_minimal_engine_prints_what_its_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "minimal_engine.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert shown.startswith(MINIMAL_ENGINE)
    _, arena, tiers = (part.split("\n")[0] for part in shown.split("every KV row and ")[1:])
    assert "'moves': 0" not in arena, "no slab moved: the example shows nothing"
    assert "'loads': 0" not in tiers and "'offloads': 0" not in tiers


@pytest.mark.parametrize("kind", ["two pools", "arena", "host tier"])
@pytest.mark.parametrize("wrong", ["kv", "state"])
def test_the_minimal_engine_notices_wrong_bytes(
    folder: pytest.MonkeyPatch, kind: str, wrong: str
) -> None:
    example = importlib.import_module("minimal_engine")
    config = {
        "two pools": {"num_kv_tokens": 96, "num_slots": 6},
        "arena": {"memory": "arena", "total_bytes": 8 * 144},
        "host tier": {"memory": "arena", "total_bytes": 8 * 144, "host_bytes": 8 * 400},
    }[kind]
    engine = example.MinimalEngine(CacheConfig(**config, **example.GRID))
    one = engine.begin(list(range(24)), num_new=2, boundary=16)
    engine.step()
    if wrong == "kv":
        engine.kv[one.lease.kv_indices[3]] += 1
    else:
        engine.states[one.lease.state_slot] += 1
    with pytest.raises(AssertionError, match=f"wrong {'KV' if wrong == 'kv' else 'state'}"):
        engine.step()


@pytest.mark.parametrize("name", ["tokens_per_byte:TokensPerByte", "second_chance:SecondChance"])
def test_an_eviction_policy_of_the_examples_keeps_every_invariant(
    folder: pytest.MonkeyPatch, name: str
) -> None:
    result = simulate("short?head=150", gib=0.5, policy=["lru", name], bound=False)
    assert [run.label for run in result.runs] == ["lru", name]
    assert all(run.evicted_checkpoints for run in result.runs)
    assert len({run.cached_tokens for run in result.runs}) == 2, "it evicts as LRU does"
    module, _, cls = name.partition(":")
    policy = getattr(importlib.import_module(module), cls)
    cache = build_prefix_cache(
        CacheConfig(
            num_kv_tokens=120, num_slots=5, grid=4, state_bytes=64, kv_bytes_per_token=4,
            eviction=policy,
        )
    )  # fmt: skip
    rng, placement = np.random.default_rng(1), parse_placement("boundary,end")
    for _ in range(60):
        prompt = np.repeat(rng.integers(0, 3, 6, dtype=np.int32), 4)
        lease = Lease.begin(cache, placement, LeaseRequest(prompt, boundaries=(12,)))
        assert lease is not None and lease.extend(len(prompt))
        lease.take_checkpoint_slots(lease.cached_len, len(prompt))
        lease.finish(prompt, len(prompt))
        cache.check(held_tokens=0, held_slots=0)
    assert cache.stats.evictions > 10


def test_a_placement_policy_of_the_examples_learns(folder: pytest.MonkeyPatch) -> None:
    cls = importlib.import_module("popular_length").PopularLength
    placement = cls()
    cache = build_prefix_cache(CacheConfig(num_kv_tokens=4000, num_slots=40, grid=8))

    def serve(prompt: np.ndarray) -> int:
        lease = Lease.begin(cache, placement, LeaseRequest(prompt))
        assert lease is not None and lease.extend(len(prompt))
        cached_len = lease.cached_len
        lease.take_checkpoint_slots(cached_len, len(prompt))
        lease.publish(prompt, len(prompt))
        lease.abort()
        return cached_len

    rng = np.random.default_rng(0)
    template = rng.integers(0, 99, 32, dtype=np.int32)
    serve(template)
    for _ in range(3):
        assert serve(np.concatenate((template, rng.integers(0, 99, 9, dtype=np.int32)))) == 32
    assert placement.resumed == {32: 3} and placement.num_saved == 4
    other = rng.integers(100, 199, 64, dtype=np.int32)
    serve(other)
    assert serve(np.concatenate((other[:32], template))) == 32, "no checkpoint at a popular length"
    words = "branch,end,popular_length:PopularLength"
    [run] = simulate("short?head=40", gib=1, checkpoints=words, bound=False).runs
    assert run.checkpoints_made


def test_a_csv_file_becomes_a_trace(
    folder: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "requests.csv", tmp_path / "requests.jsonl"
    source.write_text(
        "seconds,user,prompt,answer\n"
        '9,ada,"be brief. who, then, are you",a cache\n'
        "4.5,bob,be brief. who goes there,\n"
    )
    folder.setattr(sys, "argv", ["from_csv.py", str(source), str(target)])
    runpy.run_path(str(EXAMPLES / "traces" / "from_csv.py"), run_name="__main__")
    assert "2 requests" in capsys.readouterr().out
    first, second = open_trace(str(target))
    assert (first.session, first.timestamp_s, len(first.output)) == ("bob", 4.5, 0)
    assert (second.session, second.timestamp_s, len(second.tokens)) == ("ada", 9.0, 6)
    assert len(second.output) == 2
    assert second.tokens[:2].tolist() == first.tokens[:2].tolist()
    assert second.tokens[2] != first.tokens[2], "'who,' and 'who' are different words"
