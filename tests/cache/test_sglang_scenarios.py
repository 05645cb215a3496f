"""Sixteen behaviours of SGLang's tree for hybrid models (0.5.23), compared with this cache.

They were read from its code and its tests. "Same" means that both behave alike.

1. An empty tree has no hits. Same.
2. A path has states at 3 and 7: the longer prompt hits 7, the shorter one 3. Same.
3. A repeated prompt with a state only at its end hits 0, because one token must be computed. Same;
   the default placement policy also saves a state before the end.
4. A prompt forks inside a node: the state stays at the end of the node and the fork has no hit.
   Same; here the tokens of the fork are reported as never checkpointed.
5. SGLang splits the node when it matches. Here a match changes nothing.
6. The state for a fork is saved at floor(shared / grid) * grid. Same, by the placement ``branch``.
7. A second state at one position: the first stays, the caller keeps the second. Same.
8. An inner state is evicted: its KV stays, and the deeper state can still be hit. Same.
9. A tombstone gets a new state when one is inserted there. Same.
10. The last state of a leaf is evicted: the leaf goes with its KV. In SGLang, unreachable KV above
    it may stay; here it is evicted too.
11. Neither the state nor the KV of locked nodes is evicted; a larger demand frees the rest. Same.
12. Only the resumed state counts as used, not the other states on its path. Same.
13. A path has two states, and one slot is needed, then a prompt forks. SGLang evicts the least
    recently used state, and with a leaf its KV: a fork at 8 hits 8, the whole path 8. Here the
    superseded state is evicted first: the fork hits 0, the whole path 12. With
    ``demote_superseded=False``, both hit 8.
14. SGLang limits the states of a path with ``--mamba-max-states-per-path``. Here the placement
    policy does so (``cap:N``); the tree has no limit.
15. KV is evicted by whole leaves, least recently used first. Same.
16. SGLang keeps a state off the grid, at the end of a request. Here it is rejected: kernels resume
    only on the grid, so that hits are exact.

Case 13 stays as it is: no order was found that keeps the fork and loses no hits. Without the
demotion, chats lose a fifth of their hits if memory is short (``chat`` at 4 GiB, LRU: 298,944
tokens hit instead of 372,864), because the deepest state is the one that is needed. Agent sessions
gain 1 to 2 %. A published fork is no longer superseded, and ``branch`` saves a state for it.
"""

from __future__ import annotations

import numpy as np

from hybridcache import CacheConfig, build_prefix_cache, parse_placement
from hybridcache.policies.protocol import Prefill
from tests.cache.serving import hybrid, ids, publish, serve

PATH = ids(range(1, 13))


def hit(cache, *tokens):
    """Return the hit length with one more token, because the last one is always computed."""
    return cache.match(ids(*tokens, [99])).cached_len


def test_1_an_empty_tree_has_no_hits():
    assert hit(hybrid(), range(5)) == 0


def test_2_each_prompt_hits_the_deepest_state_on_its_path():
    cache = hybrid()
    publish(cache, PATH[:3], [3])
    publish(cache, PATH[:7], [7])
    assert [hit(cache, PATH[:n]) for n in (2, 3, 6, 7, 9)] == [0, 3, 3, 7, 7]


def test_3_the_same_prompt_again_needs_a_state_before_its_end():
    cache = hybrid()
    publish(cache, PATH, [12])
    assert cache.match(PATH).cached_len == 0
    publish(cache, PATH, [11])
    assert cache.match(PATH).cached_len == 11
    placed = parse_placement("branch,boundary,backoff,end").plan(Prefill(12, 0, 0, 0, (), grid=1))
    assert 11 in {place.position for place in placed}


def test_4_and_5_a_fork_inside_a_node_has_no_hit_and_changes_nothing():
    cache = hybrid()
    publish(cache, PATH, [12])
    before = cache.render()
    match = cache.match(ids(PATH[:8], [50, 51]))
    assert (match.cached_len, match.kv_match_len) == (0, 8)
    assert match.losses.never_checkpointed == 8
    assert cache.render() == before and cache.num_nodes == 1
    publish(cache, ids(PATH[:8], [50, 51]))
    assert hit(cache, PATH) == 12, "the state is no longer at the end of its node"
    assert cache.num_nodes == 3


def test_6_branch_saves_a_state_at_the_grid_position_before_a_fork():
    for grid, shared, expected in ((3, 4, 3), (6, 9, 6), (4, 3, None), (64, 256 + 1, 256)):
        prefill = Prefill(300, 0, shared, shared, (), grid)
        places = parse_placement("branch").plan(prefill)
        floored = [place.position // grid * grid for place in places]
        assert [position for position in floored if position] == ([expected] if expected else [])


def test_6_the_third_request_with_a_common_prefix_hits():
    cache = hybrid(2000, 10, grid=64)
    found = []
    for tail in range(3):
        tokens = ids(range(257), [1000 + tail] * 40)
        branch = cache.match(tokens).seen_len // 64 * 64
        found.append(serve(cache, tokens, [branch] if branch else []).cached_len)
    assert found == [0, 0, 256]


def test_7_a_second_state_at_one_position_is_rejected():
    cache = hybrid()
    publish(cache, PATH[:8], [8])
    first = cache.match(PATH).checkpoint
    slot = cache.allocate_slot()
    rows = cache.allocate_kv(8)
    result = cache.insert(PATH[:8], rows, [(8, slot)])
    assert result.rejected_slots == (slot,) and result.duplicates.tolist() == rows.tolist()
    assert cache.match(PATH).checkpoint == first


def test_8_and_9_a_tombstone_can_get_a_new_state():
    cache = hybrid()
    publish(cache, PATH[:8], [8])
    publish(cache, PATH, [12])
    assert cache.evict(num_slots=1) == (0, 1)
    assert (hit(cache, PATH[:8]), hit(cache, PATH)) == (0, 12)
    publish(cache, PATH[:8], [8])
    assert (hit(cache, PATH[:8]), hit(cache, PATH)) == (8, 12)


def test_10_unreachable_kv_is_evicted_with_the_last_state():
    cache = hybrid()
    publish(cache, PATH[:8], [8])
    publish(cache, PATH, [12])
    freed = [tuple(cache.evict(num_slots=1)) for _ in range(2)]
    assert [slots for _, slots in freed] == [1, 1]
    assert cache.cached_tokens == 0


def test_11_locked_nodes_stay_and_the_rest_is_evicted():
    cache = hybrid()
    publish(cache, PATH[:8], [8])
    publish(cache, PATH, [12])
    publish(cache, ids([70, 71, 72]), [3])
    handle = cache.lock(cache.match(PATH).node)
    evicted = cache.evict(num_tokens=1000, num_slots=10)
    assert hit(cache, PATH[:8]) == 8 and hit(cache, [70, 71, 72]) == 0
    assert evicted.num_tokens == 3 + 4 and evicted.num_slots == 2
    cache.unlock(handle)
    cache.evict(num_tokens=1000, num_slots=10)
    assert cache.cached_tokens == 0


def test_12_only_the_resumed_state_counts_as_used():
    cache = hybrid(demote_superseded=False)
    publish(cache, PATH[:4], [4])
    cache.touch(cache.match(ids([1])))
    publish(cache, PATH[:8], [8])
    cache.touch(cache.match(ids([1])))
    publish(cache, ids([70, 71, 72]), [3])
    cache.touch(cache.match(ids(PATH[:8], [99])))
    cache.evict(num_slots=1)
    assert (hit(cache, PATH[:4]), hit(cache, PATH[:8]), hit(cache, [70, 71, 72])) == (0, 8, 3)


def test_13_superseded_states_are_evicted_first_if_demoted():
    hits = {}
    for demotes in (True, False):
        cache = hybrid(demote_superseded=demotes)
        serve(cache, PATH[:8], [8])
        serve(cache, PATH, [12])
        serve(cache, ids(PATH[:8], [60]), [])
        cache.evict(num_slots=1)
        hits[demotes] = hit(cache, PATH[:8], [50]), hit(cache, PATH)
    after_publish = {}
    for demotes in (True, False):
        cache = hybrid(demote_superseded=demotes)
        publish(cache, PATH[:8], [8])
        publish(cache, PATH, [12])
        cache.touch(cache.match(ids(PATH[:8], [60])))
        cache.evict(num_slots=1)
        after_publish[demotes] = hit(cache, PATH[:8], [50]), hit(cache, PATH)
    assert after_publish == {True: (0, 12), False: (8, 8)}
    assert hits[True][0] == 8, "a published fork is still superseded"


def test_14_the_number_of_states_is_capped_by_the_placement_policy():
    cache = hybrid()
    publish(cache, PATH, [3, 6, 9, 12])
    assert cache.num_checkpoints == 4
    prefill = Prefill(12, 0, 0, 0, (3, 6, 9), grid=1)
    assert len(list(parse_placement("cap:1,boundary,end").plan(prefill))) == 1


def test_15_kv_is_evicted_by_leaf_in_lru_order():
    cache = build_prefix_cache(CacheConfig(prefix_cache="radix", num_kv_tokens=100, grid=1))
    for number, tokens in enumerate((PATH[:4], ids(PATH[:4], [20, 21]), ids(PATH[:4], [30, 31]))):
        serve_radix(cache, tokens, number)
    cache.touch(cache.match(ids(PATH[:4], [20, 21, 99])))
    assert cache.evict(num_tokens=1).num_tokens == 2
    assert hit(cache, PATH[:4], [20, 21]) == 6 and hit(cache, PATH[:4], [30, 31]) == 4


def serve_radix(cache, tokens, number):
    match = cache.match(tokens)
    cache.touch(match)
    rows = np.concatenate(
        [cache.gather(match.node), cache.allocate_kv(len(tokens) - match.cached_len)]
    )
    handle = cache.lock(match.node)
    result = cache.insert(tokens, rows[: len(tokens)], owned_from=match.cached_len)
    cache.free_kv(result.duplicates)
    cache.unlock(handle)


def test_16_a_state_off_the_grid_is_rejected():
    cache = hybrid(grid=4, page_size=2)
    tokens = ids(range(22))
    rows, slot = cache.allocate_kv(22), cache.allocate_slot()
    assert cache.insert(tokens, rows, [(22, slot)]).rejected_slots == (slot,)
    assert cache.match(ids(range(30))).losses.below_grid == 2
