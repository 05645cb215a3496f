"""Ghost hits of a request, compared with the set of all prefixes with a saved checkpoint."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcache.policies.eviction.lru import LRU
from hybridcache.radix.protocol import Item
from tests.radix.serving import hybrid, ids, serve

PROMPTS = st.lists(
    st.tuples(st.text("ab", min_size=1, max_size=8), st.sets(st.integers(1, 8), max_size=3)),
    min_size=1,
    max_size=25,
)


class RecordingLRU(LRU):
    """LRU over all items that records the positions of ghost hits."""

    orders_classes = True

    def __init__(self) -> None:
        super().__init__()
        GHOST_HITS.clear()

    def on_ghost_hit(self, item: Item) -> None:
        GHOST_HITS.append(item.position)

    def on_ghost_hit_above(self, item: Item) -> None:
        GHOST_HITS.append(item.position)


GHOST_HITS: list[int] = []


@settings(max_examples=150, deadline=None)
@given(PROMPTS, st.integers(4, 7))
def test_ghosts_past_the_resumed_position_are_reported_deepest_first(
    prompts: list[tuple[str, set[int]]], num_slots: int
) -> None:
    cache = hybrid(num_slots=num_slots, ghost_bytes=1 << 20, eviction=RecordingLRU)
    saved: set[str] = set()
    for text, positions in prompts:
        GHOST_HITS.clear()
        match = serve(cache, ids(text), sorted(p for p in positions if p <= len(text)))
        past = range(len(text) - 1, match.cached_len, -1)
        assert [length for length in past if text[:length] in saved] == GHOST_HITS
        saved |= {text[:p] for p in positions if p <= len(text)}


def test_a_present_checkpoint_ends_the_ghost_hits() -> None:
    cache = hybrid(ghost_bytes=1 << 20, eviction=RecordingLRU)
    serve(cache, ids("abcdefgh"), [2, 4, 6])
    serve(cache, ids("abcdx"))
    cache.evict(num_slots=2)
    assert serve(cache, ids("abcdefgh")).cached_len == 4
    assert GHOST_HITS == [6], "2 was evicted too, but 4 is present"
    cache.evict(num_slots=1)
    serve(cache, ids("abcdefgh"))
    assert GHOST_HITS == [6, 6, 4, 2]
