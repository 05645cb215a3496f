"""Tests of snapshots: a loaded cache equals the saved one and continues in the same way."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.export.events import EventStream
from hybridcache.export.mirror import Mirror, segments_of
from hybridcache.export.snapshot import load_snapshot, save_snapshot
from tests.cache.serving import (
    hybrid,
    ids,
    serve,
    traffic,
)


def fill(cache, seed, num_requests, step):
    for tokens in traffic(seed, num_requests):
        n = len(tokens)
        serve(cache, tokens, sorted({n // step * step, (n - 1) // step * step} - {0}), ("t", seed))


@pytest.mark.parametrize("page_size", [1, 16])
def test_loaded_cache_continues_exactly_as_the_saved_one(tmp_path, page_size):
    options = {"num_kv_tokens": 800, "page_size": page_size, "ghost_bytes": 20_000}
    cache, loaded = hybrid(**options), hybrid(**options)
    fill(cache, 1, 80, page_size)
    save_snapshot(cache, tmp_path / "cache.npz")
    load_snapshot(loaded, tmp_path / "cache.npz")
    loaded.check(held_tokens=0, held_slots=0)
    assert loaded.render() == cache.render()
    for tokens in traffic(1, 80):
        found, again = cache.match(tokens, ("t", 1)), loaded.match(tokens, ("t", 1))
        assert found.losses == again.losses and found.checkpoint == again.checkpoint
        assert cache.gather(found.node).tolist() == loaded.gather(again.node).tolist()
    fill(cache, 1, 200, page_size)
    fill(loaded, 1, 200, page_size)
    assert sorted(loaded.render().splitlines()) == sorted(cache.render().splitlines())


def test_empty_cache_can_be_saved(tmp_path):
    save_snapshot(hybrid(), tmp_path / "cache.npz")
    loaded = hybrid()
    load_snapshot(loaded, tmp_path / "cache.npz")
    loaded.check(held_tokens=0, held_slots=0)
    assert loaded.num_nodes == 0


def test_snapshot_that_does_not_fit_is_rejected(tmp_path):
    cache = hybrid()
    serve(cache, ids("hello"), [5])
    save_snapshot(cache, tmp_path / "cache.npz")
    with pytest.raises(ValueError, match="empty cache"):
        load_snapshot(cache, tmp_path / "cache.npz")
    with pytest.raises(ValueError, match="page size 1 and grid 1"):
        load_snapshot(hybrid(grid=64), tmp_path / "cache.npz")
    with pytest.raises(ValueError, match="rows asked for"):
        load_snapshot(hybrid(num_kv_tokens=3), tmp_path / "cache.npz")
    serve(cache, ids("hello"), [5], namespace=np.str_("tenant"))
    with pytest.raises(ValueError, match="cannot be written"):
        save_snapshot(cache, tmp_path / "cache.npz")


@pytest.fixture
def saved(tmp_path):
    """Path of a snapshot with several namespaces, a fork, a tombstone and ghosts."""
    cache = hybrid(page_size=2, ghost_bytes=10_000)
    serve(cache, ids("system", "hello!"), [6, 12])
    serve(cache, ids("system", "world!"), [12])
    serve(cache, ids("gone"), [4], "tenant")
    cache.evict(num_slots=1)
    serve(cache, ids("there!"), [4, 6], "tenant")
    serve(cache, ids("again!"), [6], ("tenant", 2))
    save_snapshot(cache, tmp_path / "saved")
    return tmp_path / "saved"


def test_snapshot_path_is_used_without_a_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache, loaded = hybrid(), hybrid()
    serve(cache, ids("hello"), [5])
    for path in ("plain", "with.dots", "cache.npz"):
        save_snapshot(cache, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache.npz", "plain", "with.dots"]
    load_snapshot(loaded, "plain")
    assert loaded.render() == cache.render()


def test_subscriber_receives_events_of_a_load(saved):
    loaded = hybrid(page_size=2, ghost_bytes=10_000)
    mirror = Mirror(page_size=2)
    loaded.subscribe(EventStream(mirror.apply))
    load_snapshot(loaded, saved)
    assert mirror.segments() == segments_of(loaded._tree.nodes()) != set()
    for tokens in (ids("system", "world!?"), ids("system", "hello!?")):
        match = loaded.match(tokens)
        assert mirror.match(tokens) == (match.cached_len, match.kv_match_len)
    serve(loaded, ids("system", "another"), [6])
    assert mirror.segments() == segments_of(loaded._tree.nodes())
    loaded.reset()
    assert mirror.segments() == set()


def test_insertions_minus_evictions_equal_contents_after_a_load(saved):
    loaded = hybrid(page_size=2, ghost_bytes=10_000)
    load_snapshot(loaded, saved)
    for _ in range(2):
        stats = loaded.stats
        assert stats.inserted_tokens - stats.evicted_tokens == loaded.cached_tokens
        assert stats.inserted_slots - stats.evicted_slots == loaded.num_checkpoints
        loaded.evict(num_tokens=4, num_slots=1)
    assert loaded.num_checkpoints > 0


def test_serials_and_times_continue_after_reset_and_load(saved):
    loaded = hybrid(page_size=2, ghost_bytes=10_000)
    events, mirror = [], Mirror(page_size=2)
    loaded.subscribe(EventStream(lambda event: (events.append(event), mirror.apply(event))))
    serve(loaded, ids("before"), [6])
    loaded.reset()
    before = {event.id for event in events}
    now = loaded._residency.now
    load_snapshot(loaded, saved)
    loaded.check(held_tokens=0, held_slots=0)
    assert before.isdisjoint(node.kv.serial for node in loaded._tree.nodes() if node.kv)
    assert loaded._residency.now > now
    assert all(item.last_used >= now for item in loaded._residency.candidates())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 2}, "does not fit into this cache: 6 slots"),
        (
            {"num_kv_tokens": 20},
            r"does not fit into this cache: \d+ rows asked for, 20 are free",
        ),
        ({"prefix_cache": "radix"}, "which this cache cannot store"),
    ],
)
def test_rejected_load_allocates_nothing(saved, options, message):
    config = {"num_kv_tokens": 1000, "num_slots": 10, "grid": 1, "page_size": 2}
    loaded = build_prefix_cache(CacheConfig(**(config | options)))
    mirror = Mirror(page_size=2)
    loaded.subscribe(EventStream(mirror.apply))
    free = loaded.free_tokens, loaded.free_slots
    with pytest.raises(ValueError, match=message):
        load_snapshot(loaded, saved)
    assert (loaded.free_tokens, loaded.free_slots) == free
    assert loaded.num_nodes == loaded.cached_tokens == 0 and mirror.segments() == set()
    loaded.check(held_tokens=0, held_slots=0)


def test_file_that_is_not_a_snapshot_is_rejected(tmp_path, saved):
    text, array, archive, cut = (tmp_path / name for name in ("text", "a.npy", "b.npz", "cut"))
    text.write_text("a shopping list")
    np.save(array, np.arange(3))
    np.savez(archive, rows=np.arange(3))
    cut.write_bytes(saved.read_bytes()[:-200])
    for path in (text, array, archive, cut):
        with pytest.raises(ValueError, match="is not a cache snapshot, or it was truncated"):
            load_snapshot(hybrid(page_size=2), path)
    with pytest.raises(FileNotFoundError):
        load_snapshot(hybrid(page_size=2), tmp_path / "nowhere")


def damaged(saved, change):
    """Write a copy of the snapshot after ``change(header, arrays)``, and return its path."""
    with np.load(saved) as archive:
        arrays = {name: archive[name].copy() for name in archive.files}
    header = json.loads(str(arrays["header"]))
    change(header, arrays)
    arrays["header"] = np.array(json.dumps(header))
    path = saved.parent / "damaged.npz"
    np.savez(path, **arrays)
    return path


def put(name, index, value):
    """Return a change for ``damaged`` that sets an item of an array."""
    return lambda header, arrays: arrays[name].__setitem__(index, value)


@pytest.mark.parametrize("name", ["parent", "end", "tokens", "rows", "kv", "slot", "lost", "ghost"])
def test_snapshot_with_an_incomplete_array_is_rejected(saved, name):
    with pytest.raises(ValueError, match=f"damaged snapshot: it lacks {name}"):
        load_snapshot(hybrid(page_size=2), damaged(saved, lambda _, arrays: arrays.pop(name)))
    shorter = damaged(saved, lambda _, arrays: arrays.update({name: arrays[name][:-1]}))
    with pytest.raises(ValueError, match="is a damaged snapshot"):
        load_snapshot(hybrid(page_size=2), shorter)
    floats = damaged(saved, lambda _, arrays: arrays.update({name: arrays[name] * 1.0}))
    with pytest.raises(ValueError, match=f"{name} must be an integer array"):
        load_snapshot(hybrid(page_size=2), floats)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, _: header.update(form="another"), "of this version"),
        (lambda header, _: header.pop("labels"), "labels"),
        (lambda header, _: header["labels"].append(""), "labels for"),
        (lambda header, _: header["namespaces"].append("'more'"), "has no nodes"),
        (lambda header, _: header["namespaces"].__setitem__(0, "1 +"), "damaged"),
        (lambda header, _: header["namespaces"].__setitem__(0, "'tenant'"), "occurs twice"),
        (lambda header, _: header.update(num_items=1), "share a serial"),
        (put("parent", 0, 5), "before its parent"),
        (put("parent", 0, -9), "before its parent"),
        (put("end", 0, 1), "not a multiple of the page size"),
        (put("rows", 0, 999), "rows are not whole pages"),
        (put("slot", 0, -1), "match one to one"),
        (put("checkpoint", (0, 0), -1), "match one to one"),
        (put("ghost", slice(None), -1), "missing or repeated"),
    ],
)
def test_inconsistent_snapshot_is_rejected(saved, change, message):
    loaded = hybrid(page_size=2, ghost_bytes=10_000)
    with pytest.raises(ValueError, match=message):
        load_snapshot(loaded, damaged(saved, change))
    assert loaded.num_nodes == 0
    loaded.check(held_tokens=0, held_slots=0)


def test_children_with_equal_first_tokens_are_rejected(saved):
    def change(_, arrays):
        arrays["tokens"][:] = 7

    with pytest.raises(ValueError, match="two children begin with equal tokens"):
        load_snapshot(hybrid(page_size=2), damaged(saved, change))
