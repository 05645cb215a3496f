"""Sixteen behaviours of SGLang's tree for hybrid models (0.5.23), and ours beside each. Read from
its code and its tests.

| # | behaviour | SGLang | here | | |---|---|---|---|---| | 1 | an empty tree | hits nothing | the
same | equal | | 2 | a state at 3, then at 7 of one path | the longer prompt hits 7, the shorter 3 |
the same | equal | | 3 | the same prompt again, state at its end only | 0: one token must be
computed, and only its end has a state | the same; the
      default placement also saves a state before the end | equal |
| 4 | a prompt that leaves inside a node | the state stays at the node's end, the fork hits nothing
| the same, and the fork's
      tokens are named: never checkpointed | equal |
| 5 | ... but a match splits the node | the tree changes with every look | a match changes nothing |
better | | 6 | where to save a state for a fork | floor(shared / grid) * grid | the placement word
``branch``, the same position | equal | | 7 | the same state twice | the first stays, the caller
keeps its own | the same | equal | | 8 | an inner state is evicted | its KV stays, the state below
still hits | the same | equal | | 9 | a tombstone's state comes again | it is refilled | the same |
equal | | 10 | the last state of a leaf is evicted | leaf and KV go, KV above that nothing can use
may stay | that goes too | better | | 11 | a locked node | neither its state nor KV above it goes;
asking for more frees what can go | the same | equal | | 12 | whose recency counts | the state that
was resumed from, not the path's | the same | equal | | 13 | two states on a path, one slot is
wanted, then a fork | the oldest use goes, the leaf with its KV: a fork at 8 hits 8, the
      whole path 8 | the superseded state goes first: the fork hits 0, the whole path 12.
      ``demote_superseded=False``: 8 and 8 | mixed |
| 14 | most states on a path | ``--mamba-max-states-per-path`` | a placement's ``cap:N``; the tree
has none, so more hits for
      more slots | other |
| 15 | KV is evicted leaf by leaf | least recently used first; a whole leaf | the same | equal | |
16 | a state off the grid | is kept where the request ended | is refused: kernels resume on the grid
alone, which is what makes
      a hit exact | other |

13 stays as it is: no order was found that keeps the fork and costs no hit. Without the tier
(``demote_superseded=False``) chats lose a fifth where memory is short (``chat`` at 4 GiB, LRU:
298,944 tokens hit instead of 372,864), since there the deepest state is the one that is asked for;
sessions of agents gain 1 to 2 %. A fork that was published is superseded no more, and one that was
seen gets a state of its own by the word ``branch``.
"""

from __future__ import annotations

import numpy as np

from hybridcache import CacheConfig, build_prefix_cache, parse_placement
from hybridcache.policies.protocol import Prefill
from tests.cache.serving import hybrid, ids, publish, serve

PATH = ids(range(1, 13))


def hit(cache, *tokens):
    """As SGLang counts: with a token more, since the last one of a prompt is always computed."""
    return cache.match(ids(*tokens, [99])).cached_len


def test_1_an_empty_tree_hits_nothing():
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


def test_4_and_5_a_fork_inside_a_node_finds_no_state_and_a_look_changes_nothing():
    cache = hybrid()
    publish(cache, PATH, [12])
    before = cache.render()
    match = cache.match(ids(PATH[:8], [50, 51]))
    assert (match.cached_len, match.kv_match_len) == (0, 8)
    assert match.losses.never_checkpointed == 8
    assert cache.render() == before and cache.num_nodes == 1
    publish(cache, ids(PATH[:8], [50, 51]))
    assert hit(cache, PATH) == 12, "the state stayed at the end of its node"
    assert cache.num_nodes == 3


def test_6_the_state_for_a_fork_is_on_the_grid_below_it():
    for grid, shared, expected in ((3, 4, 3), (6, 9, 6), (4, 3, None), (64, 256 + 1, 256)):
        prefill = Prefill(300, 0, shared, shared, (), grid)
        places = parse_placement("branch").plan(prefill)
        floored = [place.position // grid * grid for place in places]
        assert [position for position in floored if position] == ([expected] if expected else [])


def test_6_three_requests_with_one_beginning_hit_nothing_nothing_256():
    cache = hybrid(2000, 10, grid=64)
    found = []
    for tail in range(3):
        tokens = ids(range(257), [1000 + tail] * 40)
        branch = cache.match(tokens).seen_len // 64 * 64
        found.append(serve(cache, tokens, [branch] if branch else []).cached_len)
    assert found == [0, 0, 256]


def test_7_a_second_state_at_one_place_stays_the_callers():
    cache = hybrid()
    publish(cache, PATH[:8], [8])
    first = cache.match(PATH).checkpoint
    slot = cache.allocate_slot()
    rows = cache.allocate_kv(8)
    result = cache.insert(PATH[:8], rows, [(8, slot)])
    assert result.rejected_slots == (slot,) and result.duplicates.tolist() == rows.tolist()
    assert cache.match(PATH).checkpoint == first


def test_8_and_9_an_inner_state_leaves_a_tombstone_that_can_be_filled_again():
    cache = hybrid()
    publish(cache, PATH[:8], [8])
    publish(cache, PATH, [12])
    assert cache.evict(num_slots=1) == (0, 1)
    assert (hit(cache, PATH[:8]), hit(cache, PATH)) == (0, 12)
    publish(cache, PATH[:8], [8])
    assert (hit(cache, PATH[:8]), hit(cache, PATH)) == (8, 12)


def test_10_kv_that_nothing_can_resume_from_goes_with_the_last_state():
    cache = hybrid()
    publish(cache, PATH[:8], [8])
    publish(cache, PATH, [12])
    freed = [tuple(cache.evict(num_slots=1)) for _ in range(2)]
    assert [slots for _, slots in freed] == [1, 1]
    assert cache.cached_tokens == 0


def test_11_what_is_locked_stays_and_the_rest_goes():
    cache = hybrid()
    publish(cache, PATH[:8], [8])
    publish(cache, PATH, [12])
    publish(cache, ids([70, 71, 72]), [3])
    receipt = cache.lock(cache.match(PATH).node)
    evicted = cache.evict(num_tokens=1000, num_slots=10)
    assert hit(cache, PATH[:8]) == 8 and hit(cache, [70, 71, 72]) == 0
    assert evicted.num_tokens == 3 + 4 and evicted.num_slots == 2
    cache.unlock(receipt)
    cache.evict(num_tokens=1000, num_slots=10)
    assert cache.cached_tokens == 0


def test_12_only_the_state_that_was_resumed_from_is_young_again():
    cache = hybrid(demote_superseded=False)
    publish(cache, PATH[:4], [4])
    cache.touch(cache.match(ids([1])))
    publish(cache, PATH[:8], [8])
    cache.touch(cache.match(ids([1])))
    publish(cache, ids([70, 71, 72]), [3])
    cache.touch(cache.match(ids(PATH[:8], [99])))
    cache.evict(num_slots=1)
    assert (hit(cache, PATH[:4]), hit(cache, PATH[:8]), hit(cache, [70, 71, 72])) == (0, 8, 3)


def test_13_a_superseded_state_goes_first_unless_told_otherwise():
    hits = {}
    for demotes in (True, False):
        cache = hybrid(demote_superseded=demotes)
        serve(cache, PATH[:8], [8])
        serve(cache, PATH, [12])
        serve(cache, ids(PATH[:8], [60]), [])
        cache.evict(num_slots=1)
        hits[demotes] = hit(cache, PATH[:8], [50]), hit(cache, PATH)
    fresh = {}
    for demotes in (True, False):
        cache = hybrid(demote_superseded=demotes)
        publish(cache, PATH[:8], [8])
        publish(cache, PATH, [12])
        cache.touch(cache.match(ids(PATH[:8], [60])))
        cache.evict(num_slots=1)
        fresh[demotes] = hit(cache, PATH[:8], [50]), hit(cache, PATH)
    assert fresh == {True: (0, 12), False: (8, 8)}
    assert hits[True][0] == 8, "a fork that was published is no superseded state any more"


def test_14_a_cap_of_states_is_the_placements_and_not_the_trees():
    cache = hybrid()
    publish(cache, PATH, [3, 6, 9, 12])
    assert cache.num_checkpoints == 4
    prefill = Prefill(12, 0, 0, 0, (3, 6, 9), grid=1)
    assert len(list(parse_placement("cap:1,boundary,end").plan(prefill))) == 1


def test_15_kv_goes_a_leaf_at_a_time_the_oldest_use_first():
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
    receipt = cache.lock(match.node)
    result = cache.insert(tokens, rows[: len(tokens)], owned_from=match.cached_len)
    cache.free_kv(result.duplicates)
    cache.unlock(receipt)


def test_16_a_state_off_the_grid_is_refused():
    cache = hybrid(grid=4, page_size=2)
    tokens = ids(range(22))
    rows, slot = cache.allocate_kv(22), cache.allocate_slot()
    assert cache.insert(tokens, rows, [(22, slot)]).rejected_slots == (slot,)
    assert cache.match(ids(range(30))).losses.below_grid == 2
