"""Snapshots: a loaded cache is the saved one, and goes on like it."""

from __future__ import annotations

import pytest

from hybridcache.snapshot import load_snapshot, save_snapshot
from tests.cache_serving import hybrid, ids, serve, traffic


def fill(cache, seed, num_requests, step):
    for tokens in traffic(seed, num_requests):
        n = len(tokens)
        serve(cache, tokens, sorted({n // step * step, (n - 1) // step * step} - {0}), ("t", seed))


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_loaded_cache_goes_on_exactly_like_the_saved_one(tmp_path, page_size):
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


def test_an_empty_cache_can_be_saved(tmp_path):
    save_snapshot(hybrid(), tmp_path / "cache.npz")
    loaded = hybrid()
    load_snapshot(loaded, tmp_path / "cache.npz")
    loaded.check(held_tokens=0, held_slots=0)
    assert loaded.num_nodes == 0


def test_what_does_not_fit_is_refused(tmp_path):
    cache = hybrid()
    serve(cache, ids("hello"), [5])
    save_snapshot(cache, tmp_path / "cache.npz")
    with pytest.raises(ValueError, match="empty cache"):
        load_snapshot(cache, tmp_path / "cache.npz")
    with pytest.raises(ValueError, match="page size 1 and grid 1"):
        load_snapshot(hybrid(grid=64), tmp_path / "cache.npz")
    with pytest.raises(ValueError, match="rows asked for"):
        load_snapshot(hybrid(num_kv_tokens=3), tmp_path / "cache.npz")
    serve(cache, ids("hello"), [5], namespace=object())
    with pytest.raises(ValueError, match="can not be written"):
        save_snapshot(cache, tmp_path / "cache.npz")
