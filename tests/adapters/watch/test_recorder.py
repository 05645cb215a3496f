"""Recorder: its records describe the tree to early and late subscribers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hybridcache.adapters.watch.recorder import MAX_CELLS, Recorder, slabs_record
from tests.adapters.watch.follower import follow, truth
from tests.radix.serving import hybrid, ids, serve, traffic


def test_records_reproduce_the_tree() -> None:
    cache = hybrid(num_kv_tokens=500)
    recorder = Recorder()
    cache.subscribe(recorder)
    nodes: dict[int, dict[str, Any]] = {}
    for number, tokens in enumerate(traffic(3, 160)):
        namespace = (None, "tenant", ("a", 1))[number % 3]
        n = len(tokens)
        serve(cache, tokens, sorted({n, n // 2} - {0}), namespace=namespace)
        if number % 20 == 19:
            follow(nodes, recorder.take())
            assert nodes == truth(cache)
    assert cache.stats.evicted_tokens and cache.stats.evicted_slots
    assert recorder.nodes.keys() == nodes.keys() and not recorder.take()
    late = Recorder()
    cache.subscribe(late)
    whole: dict[int, dict[str, Any]] = {}
    follow(whole, late.take())
    assert whole == nodes
    cache.reset()
    follow(nodes, recorder.take())
    assert nodes == {} == truth(cache)


def test_records_go_on_after_the_cache_was_rebuilt() -> None:
    cache, nodes = hybrid(num_kv_tokens=500), dict[int, dict[str, Any]]()
    recorder = Recorder()
    cache.subscribe(recorder)
    for tokens in traffic(3, 40):
        serve(cache, tokens, [len(tokens)])
    follow(nodes, recorder.take())
    old, cache = cache, cache.rebuilt()
    follow(nodes, recorder.take())
    assert nodes == {} == truth(cache) and cache.stats.rebuilds == 1
    assert len(recorder.nodes) == 0 and old.cached_tokens > 0 == cache.cached_tokens
    serve(cache, ids([1, 2, 3]), [3])
    serve(old, ids([1, 2, 4]), [3])
    follow(nodes, recorder.take())
    assert nodes == truth(cache) != {}


def test_keys_distinguish_siblings_and_survive_splits() -> None:
    """The page uses the key to find out that the tokens of a ghost were cached again."""
    cache = hybrid(num_kv_tokens=500)
    recorder = Recorder()
    cache.subscribe(recorder)
    first, second = [1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9, 9]
    for tokens in (first, second):
        serve(cache, ids(tokens), [len(tokens)])
    stored = [record for record in recorder.take() if record[0] in ("kv", "split")]
    keys = {record[1]: record[-1] if record[0] == "split" else record[6] for record in stored}
    cache.evict(num_tokens=3)
    assert [record[0] for record in recorder.take()][-1] == "kv-gone"
    serve(cache, ids(first), [len(first)])
    again = [record for record in recorder.take() if record[0] == "kv"]
    assert all(record[6] in keys.values() for record in again) and again
    assert len(set(keys.values())) == len(keys)


@pytest.mark.parametrize("num_slabs", [0, 3, 2048, 5000])
def test_cells_show_the_whole_arena(num_slabs: int) -> None:
    """Each cell has the share of its slabs that is in use, however many there are."""
    taken = [at for at in range(num_slabs) if at % 100 == 99]
    rows = np.zeros(num_slabs, int)
    rows[:3] = (4, 1, 0)[:num_slabs]
    arena: Any = SimpleNamespace(
        num_slabs=num_slabs,
        slab_rows=4,
        slots=SimpleNamespace(taken=set(taken)),
        occupancy=lambda: rows,
    )
    name, percent, states, each = slabs_record(arena)
    assert name == "slabs" and each == {5000: 3}.get(num_slabs, 1)
    assert len(percent) == -(-num_slabs // each) <= MAX_CELLS
    assert states == [at // each for at in taken]
    assert percent[:3] == {0: [], 5000: [42, 0, 0]}.get(num_slabs, [100, 25, 0])
    in_use = 1.25 * bool(num_slabs) + len(taken)
    assert sum(percent) * each / 100 == pytest.approx(in_use, abs=len(taken) * each / 100 + 0.02)
