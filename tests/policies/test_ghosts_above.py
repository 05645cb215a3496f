"""Which ghosts a request tells of, against a dictionary of all prefixes that were ever saved."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcache.policies.eviction.lru import LRU
from hybridcache.policies.protocol import Item
from tests.cache.serving import hybrid, ids, serve

PROMPTS = st.lists(
    st.tuples(st.text("ab", min_size=1, max_size=8), st.sets(st.integers(1, 8), max_size=3)),
    min_size=1,
    max_size=25,
)


class Told(LRU):
    """LRU over all items that notes the positions of the ghosts that it is told of."""

    orders_classes = True

    def __init__(self) -> None:
        super().__init__()
        TOLD.clear()

    def on_ghost_hit(self, item: Item) -> None:
        TOLD.append(item.position)

    def on_ghost_hit_above(self, item: Item) -> None:
        TOLD.append(item.position)


TOLD: list[int] = []


@settings(max_examples=150, deadline=None)
@given(PROMPTS, st.integers(4, 7))
def test_all_evicted_prefixes_past_where_it_resumes_speak_the_deepest_first(
    asked: list[tuple[str, set[int]]], num_slots: int
) -> None:
    cache = hybrid(num_slots=num_slots, ghost_bytes=1 << 20, eviction=Told)
    saved: set[str] = set()
    for words, where in asked:
        TOLD.clear()
        match = serve(cache, ids(words), sorted(p for p in where if p <= len(words)))
        past = range(len(words) - 1, match.cached_len, -1)
        assert [length for length in past if words[:length] in saved] == TOLD
        saved |= {words[:p] for p in where if p <= len(words)}


def test_one_that_is_there_ends_the_line() -> None:
    cache = hybrid(ghost_bytes=1 << 20, demote_superseded=False, eviction=Told)
    serve(cache, ids("abcdefgh"), [2, 4, 6])
    serve(cache, ids("abcdx"))
    cache.evict(num_slots=2)
    assert serve(cache, ids("abcdefgh")).cached_len == 4
    assert TOLD == [6], "2 is gone too, and 4 would have served"
    cache.evict(num_slots=1)
    serve(cache, ids("abcdefgh"))
    assert TOLD == [6, 6, 4, 2]
