"""Tests of the prefix tree inside SGLang: SGLang's caches and ours with the same calls.

``make sglang`` installs SGLang and runs them. The cases follow SGLang's unit tests of its radix
cache. All ``CORES`` run the same steps; tests of intended differences have names with "our".
"""

from __future__ import annotations

from array import array

import pytest

from tests.sglang.caller import CORES, PATH, Caller

# isort: split

import torch
from sglang.srt.mem_cache.radix_cache import RadixKey


@pytest.fixture(params=CORES)
def caller(request):
    caller = Caller(request.param)
    yield caller
    caller.check()


def test_each_prompt_hits_the_deepest_state_on_its_path(caller):
    caller.insert(PATH[:3])
    caller.insert(PATH[:7])
    assert [caller.hit(PATH[:n]) for n in (2, 3, 6, 7, 9)] == [0, 3, 3, 7, 7]


def test_shared_prefix_split_keeps_the_state_below(caller):
    caller.insert(PATH)
    assert caller.hit(PATH[:8], [50, 51]) == 0
    caller.insert([*PATH[:8], 50, 51])
    assert caller.hit(PATH) == 12 and caller.hit(PATH[:8], [50, 51]) == 10
    assert caller.hit(PATH[:8]) == 0


def test_prev_prefix_len_keeps_the_rows_of_the_tree(caller):
    caller.insert(PATH[:6])
    lock = caller.cache.lock(caller.match(PATH[:6])[1])
    before = caller.cache.path_device_indices(lock.node)
    caller.insert(PATH, owned=6)
    caller.cache.unlock(lock)
    after = caller.cache.path_device_indices(caller.match(PATH)[1])
    assert after[:6].tolist() == before.tolist() and caller.rows.available_size() == 88


def test_evict_respects_lru_order(caller):
    for first in (20, 40, 60):
        caller.insert(range(first, first + 10))
    caller.hit(range(20, 30))
    assert caller.evict(1) == (10, 1)
    assert [caller.hit(range(first, first + 10)) for first in (20, 40, 60)] == [10, 0, 10]


def test_only_the_used_state_is_refreshed(caller):
    caller.insert(PATH[:6])
    caller.insert(PATH)
    caller.insert([70, 71])
    caller.hit(PATH)
    assert caller.evict(0, 1) == (0, 1)
    assert (caller.hit(PATH[:6]), caller.hit(PATH), caller.hit([70, 71])) == (0, 12, 2)


def test_mamba_internal_tombstone_evict_and_refill(caller):
    caller.insert(PATH[:8])
    caller.insert(PATH)
    assert caller.evict(0, 1) == (0, 1), "the KV of an inner state must stay"
    assert (caller.hit(PATH[:8]), caller.hit(PATH)) == (0, 12)
    assert not caller.insert(PATH[:8]).mamba_exist
    assert caller.hit(PATH[:8]) == 8


def test_evict_respects_lock_ref(caller):
    caller.insert(PATH)
    caller.insert([70, 71])
    lock = caller.cache.lock(caller.match(PATH)[1])
    assert caller.cache.full_protected_size() == 12
    assert caller.cache.mamba_protected_size() == 1
    assert caller.evict(1000, 1000) == (2, 1)
    caller.cache.unlock(lock)
    assert caller.cache.full_protected_size() == 0
    assert caller.evict(1000, 1000) == (12, 1)


def test_lock_survives_a_split_above_it(caller):
    caller.insert(PATH)
    lock = caller.cache.lock(caller.match(PATH)[1])
    caller.insert([*PATH[:5], 50])
    caller.evict(1000, 1000)
    assert caller.hit(PATH) == 12
    caller.cache.unlock(lock)
    caller.evict(1000, 1000)
    assert caller.cache.total_size()[0] == 0


def test_inc_and_dec_lock_ref_replay_a_receipt(caller):
    caller.insert(PATH)
    node = caller.match(PATH)[1]
    receipt = caller.cache.inc_lock_ref(node).to_dec_params()
    assert caller.evict(1000, 1000) == (0, 0)
    caller.cache.dec_lock_ref(node, receipt)
    assert caller.evict(1000, 1000) == (12, 1)


def test_different_extra_keys_share_nothing(caller):
    caller.insert(PATH, extra_key="a")
    assert caller.match(PATH)[0] == 0 and caller.match(PATH, "b")[0] == 0
    assert caller.match(PATH, "a")[0] == 12


def test_different_salts_share_nothing(caller):
    caller.insert(PATH[:7], salt="a")
    caller.insert(PATH, extra_key="a", salt="a")
    names = [(None, None), ("a", None), (None, "b"), (None, "a"), ("a", "a")]
    names = [dict(zip(("extra_key", "salt"), pair, strict=True)) for pair in names]
    assert [caller.match(PATH, **pair)[0] for pair in names] == [0, 0, 0, 7, 12]


def test_random_calls_give_the_only_correct_hits(caller):
    """Without evictions the hits are fully determined."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda high: int(torch.randint(high, (1,), generator=generator))  # noqa: E731
    caller = Caller(caller.core, 5000, 200)
    published: set[tuple[int, ...]] = set()
    for _ in range(120):
        tokens = [draw(3) for _ in range(1 + draw(12))]
        best = max((n for n in range(len(tokens) + 1) if tuple(tokens[:n]) in published), default=0)
        assert caller.hit(tokens) == best
        caller.insert(tokens)
        published.add(tuple(tokens))
    caller.check()


def test_our_match_changes_nothing_but_sglangs_splits_nodes():
    caller = Caller("hybridcache")
    caller.insert(PATH)
    before = caller.cache.tree.render()
    caller.hit(PATH[:8], [50])
    assert caller.cache.tree.render() == before


def test_prefix_of_a_waiting_request_can_be_refreshed():
    caller = Caller("hybridcache")
    for salt in ("a", "b", None):
        caller.insert(PATH, salt=salt)
    caller.hit([99])
    caller.cache.touch_prefix(RadixKey(array("q", [*PATH, 50]), cache_salt="a"))
    caller.evict(14)
    assert [caller.match(PATH, salt=salt)[0] for salt in ("a", "b", None)] == [12, 0, 0]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("num_slots", [0, 8])
def test_only_whole_pages_are_cached(core, num_slots):
    caller = Caller(core, num_slots=num_slots, page_size=4, extra_buffer=True)
    caller.insert(PATH)
    assert caller.hit(PATH, [50]) == 12 and caller.hit([1, 2, 3]) == 0
    caller.insert([*PATH[:4], 5, 6, 90, 91])
    assert caller.hit(PATH) == 12 and caller.hit(PATH[:4], [5, 6, 90, 91]) == 8
    caller.check()
    freed = caller.evict(1000, 1000)
    assert freed[0] == 16 and caller.rows.available_size() == 100
