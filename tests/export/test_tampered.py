"""Tests of manipulated snapshots: a file is either rejected without any change of the cache, or
loaded completely and consistently, within the memory limit."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from experiments.system.attack.snapshots import attack
from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.export import snapshot_file
from hybridcache.export.snapshot import load_snapshot, save_snapshot
from tests.cache.serving import hybrid, ids, serve
from tests.export.test_snapshot import damaged, put, saved  # noqa: F401


@pytest.mark.full("0")
@pytest.mark.parametrize("seed", range(8))
def test_changed_files_are_rejected_or_load_correctly(seed):
    outcomes = attack(1000 * seed, num_caches=3, num_files=30)
    assert outcomes["refused"] > 30 and sum(outcomes.values()) == 90


def put_header(**fields):
    return lambda header, arrays: header.update(fields)


def lose_a_state_twice(header, arrays):
    at = int(np.flatnonzero(arrays["checkpoint"][:, 0] >= 0)[0])
    arrays["lost"][at] = arrays["checkpoint"][at]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, _: header.pop("now"), "now"),
        (put_header(now="soon"), "now is soon"),
        (put_header(now=True), "now is True"),
        (put_header(now=0), "a time in the future"),
        (put_header(num_items=10**30), "num_items is 1000"),
        (put_header(page_size=0), "page_size is 0"),
        (put_header(grid=10**30), "grid is 1000"),
        (lambda header, _: header["labels"].__setitem__(0, 5), "labels are not texts"),
        (lambda header, _: header["lost_labels"].__setitem__(0, []), "lost_labels are not texts"),
        (lambda header, _: header["namespaces"].__setitem__(0, "1e999"), "expected a namespace"),
        (
            lambda header, _: header["namespaces"].__setitem__(0, "-" * 10**5 + "1"),
            "expected a namespace",
        ),
        (lambda header, _: header["namespaces"].__setitem__(0, "[1]"), "expected a namespace"),
        (lambda header, _: header["namespaces"].__setitem__(0, " 'x'"), "expected a namespace"),
        (put("tokens", 0, -1), "tokens are not all from 0"),
        (put("end", 0, -(2**62)), "end are not all from 0"),
        (put("kv", (0, 3), -1), "number of uses"),
        (put("kv", (0, 2), 10**6), "a time in the future"),
        (lose_a_state_twice, "a checkpoint and a tombstone"),
        (lambda _, a: a.update(tokens=a["tokens"].astype(np.int64) + 2**32), "tokens are not all"),
    ],
)
def test_values_that_no_cache_writes_are_rejected(saved, change, message):  # noqa: F811
    loaded = hybrid(page_size=2, ghost_bytes=10_000)
    with pytest.raises(ValueError, match=message):
        load_snapshot(loaded, damaged(saved, change))
    assert loaded.num_nodes == 0 and loaded._residency.now == 0
    loaded.check(held_tokens=0, held_slots=0)


def archive_with(saved, path, **members):  # noqa: F811
    """Write a copy of ``saved`` with members (raw bytes of .npy files) replaced or added."""
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in {*old.namelist(), *members}:
            new.writestr(name, members.get(name) or old.read(name))


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_decompression_bomb_is_rejected_before_it_is_unpacked(saved, monkeypatch):  # noqa: F811
    path = saved.parent / "bomb"
    archive_with(saved, path, **{"tokens.npy": npy(np.zeros(1 << 20, np.int64))})
    monkeypatch.setattr(snapshot_file, "MAX_BYTES", 1 << 20)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("the file was unpacked"))
    with pytest.raises(ValueError, match="unpacks to more than 1,048,576 bytes"):
        snapshot_file.read_snapshot(path, 1 << 20)


def test_unknown_array_is_rejected(saved):  # noqa: F811
    path = saved.parent / "more"
    archive_with(saved, path, **{"more.npy": npy(np.zeros(8))})
    with pytest.raises(ValueError, match="is not a cache snapshot"):
        load_snapshot(hybrid(page_size=2), path)


def test_array_with_a_false_length_is_not_allocated(saved):  # noqa: F811
    raw = npy(np.zeros(8, np.int64)).replace(b"(8,), }", b"(8" + b"0" * 9 + b",), }")
    raw = raw.replace(b" " * 9 + b"\n", b"\n")
    path = saved.parent / "long"
    archive_with(saved, path, **{"end.npy": raw})
    with pytest.raises(ValueError, match="is not a cache snapshot"):
        load_snapshot(hybrid(page_size=2), path)


@pytest.mark.parametrize("eviction", ["arc", "survival", "lhd", "w-tinylfu", "s3-fifo"])
def test_loaded_tombstone_can_be_missed_with_any_policy(tmp_path, eviction):
    """The policy has not seen the tombstone before, so it has no ``memo``."""

    def make():
        config = CacheConfig(
            num_kv_tokens=100, num_slots=1, grid=4, state_bytes=2, eviction=eviction
        )
        return build_prefix_cache(config)

    cache, prompt = make(), ids(range(10))
    cache.insert(prompt, cache.allocate_kv(10), [(8, cache.allocate_slot())])
    cache.insert(ids(range(50, 60)), cache.allocate_kv(10), [(8, cache.allocate_slot())])
    save_snapshot(cache, tmp_path / "saved")
    loaded = make()
    load_snapshot(loaded, tmp_path / "saved")
    match = loaded.match(prompt)
    assert match.missed is not None
    loaded.touch(match)
    loaded.check()


def test_caches_without_tree_and_negative_tokens_cannot_be_saved(tmp_path):
    cache = build_prefix_cache(CacheConfig(prefix_cache="none", num_kv_tokens=100))
    for function in (save_snapshot, load_snapshot):
        with pytest.raises(ValueError, match="NullCache has no tree"):
            function(cache, tmp_path / "saved")
    negative = hybrid()
    serve(negative, ids([-1, 5, 6]), [3])
    with pytest.raises(ValueError, match="a token below 0"):
        save_snapshot(negative, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
