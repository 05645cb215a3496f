"""Every eviction policy on a worked example: small enough to follow with a pencil."""

from __future__ import annotations

import pytest

from hybridcache.policies.eviction.arc import ARC
from hybridcache.policies.eviction.class_age import ClassAge
from hybridcache.policies.eviction.lhd import LHD
from hybridcache.policies.eviction.marconi import Marconi, SegLen
from hybridcache.policies.eviction.queues import SLRU, Clock, Sieve, TwoQueue
from hybridcache.policies.eviction.s3_fifo import S3Fifo
from hybridcache.policies.eviction.scored import (
    FIFO,
    GDSF,
    LFU,
    TTL,
    Coverage,
    HitsPerToken,
    Hyperbolic,
    Random,
    SampledPolicy,
    ScorePolicy,
    TailLRU,
)
from hybridcache.policies.eviction.w_tiny_lfu import WTinyLFU
from hybridcache.policies.protocol import Item
from hybridcache.policies.registry import EVICTION, LRU, make_eviction
from tests.policies.items import FakeItem, Shelf, offer


def test_lru_loses_the_one_used_longest_ago() -> None:
    assert Shelf(LRU(), 3).ask("abcade").gone == "bc"


def test_fifo_does_not_care_for_uses() -> None:
    assert Shelf(FIFO(), 3).ask("abcaade").gone == "ab"


def test_lfu_keeps_the_often_used_until_its_fame_has_faded() -> None:
    # a stands at 3; newcomers start at 1 + the last victim's score: b 1, c 2, d 3, and then a is
    # the elder of equals
    shelf = Shelf(LFU(), 2).ask("aaab")
    assert shelf.ask("cd").gone == "bc"
    assert shelf.ask("e").gone == "bca"


def test_slru_protects_what_was_used() -> None:
    # a was used and is protected; all others pass through probation (LRU would lose a at the
    # fourth)
    assert Shelf(SLRU(), 4).ask("abcdaefgh").gone == "bcde"
    # protection for one of four: when b is used, a goes back on probation, behind c and d
    assert Shelf(SLRU(protected=0.25), 4).ask("abcdabefg").gone == "cda"


def test_two_queue_promotes_only_what_a_ghost_asks_back() -> None:
    # a is used while recent: no promotion, FIFO takes it. Asked back, it is frequent, and survives
    # the scan d e f.
    shelf = Shelf(TwoQueue(), 3).ask("aabcd")
    assert shelf.gone == "a"
    assert shelf.ask("a").gone == "ab"
    assert shelf.ask("efg").gone == "abcde"
    assert "a" in shelf.items


def test_clock_gives_a_second_chance() -> None:
    # the hand passes a (used, moved behind it) and takes b; then c, used never
    assert Shelf(Clock(), 3).ask("abcade").gone == "bc"
    # all used: everyone loses the bit in turn, the first comes up again
    assert Shelf(Clock(), 3).ask("abcabcd").gone == "a"


def test_sieve_leaves_survivors_in_place() -> None:
    # queue a b c, a used. d: the hand clears a, takes b. e: the hand stands at c, takes it:
    # newcomers are sifted.
    assert Shelf(Sieve(), 3).ask("abcade").gone == "bc"
    # f: the hand goes on to d, although a is older and has no bit any more
    assert Shelf(Sieve(), 3).ask("abcadef").gone == "bcd"


def test_s3_fifo_filters_in_the_small_queue() -> None:
    # a was used twice: it goes to main when its turn comes. b, used once, goes.
    shelf = Shelf(S3Fifo(), 3).ask("aaabbcd")
    assert shelf.gone == "b"
    # b comes back as a ghost: straight to main, and outlives c, d
    assert shelf.ask("bef").gone == "bcde"
    assert set(shelf.items) == {"a", "b", "f"}


def test_arc_lets_ghosts_move_the_border() -> None:
    policy = ARC()
    shelf = Shelf(policy, 2).ask("abc")
    assert shelf.gone == "a"
    lists = policy._policies["checkpoint"]
    assert lists.target_bytes == 0
    shelf.ask("a")
    assert lists.target_bytes == 1, "a ghost of the recent list asks for one item's bytes more"
    assert [item.name for _, item in lists.frequent] == ["a"]


def test_arc_hears_only_ghosts_of_its_own() -> None:
    """Tiers pass a ghost to all of their instances; one that never held it must not move its
    border."""
    policy, other = ARC(), ARC()
    shelf = Shelf(other, 2).ask("abc")
    policy.add(FakeItem("z"))
    policy.on_ghost_hit(shelf.ghosts["a"])
    assert policy._policies["checkpoint"].target_bytes == 0


def test_a_ghost_is_asked_back_soon_or_not_at_all() -> None:
    """A position is no path: a checkpoint that comes there much later is another one."""

    def survivor(created: int) -> str:
        policy = TwoQueue()
        ghost = FakeItem("ghost", position=640)
        policy.add(ghost)
        assert policy.victim(None) is ghost
        policy.discard(ghost, evicted=True)
        policy.on_ghost_hit(ghost)
        back = FakeItem("back", position=640, created=created, last_used=created)
        fresh = FakeItem("fresh", position=64, created=created, last_used=created)
        return offer(policy, back, fresh)[-1]

    assert survivor(created=2) == "back"
    assert survivor(created=200) == "fresh"


def test_the_age_of_lfu_never_falls_where_kinds_are_evicted_apart() -> None:
    """A checkpoint of worth 10 goes, then KV of worth 1: what comes next still starts at 10."""
    policy = LFU()
    famous, known = FakeItem("famous", uses=9), FakeItem("known", uses=7)
    cold = FakeItem("cold", kind="kv")
    for item in (known, famous, cold):
        policy.add(item)
    policy.discard(known, evicted=False)
    for kind, expected in (("checkpoint", famous), ("kv", cold)):
        assert policy.victim(kind) is expected  # type: ignore[arg-type]
        policy.discard(expected, evicted=True)
    assert policy.age == 10
    policy.add(known)
    assert offer(policy, FakeItem("new")) == ["known", "new"]


def test_w_tiny_lfu_admits_only_the_more_frequent() -> None:
    # at the first eviction all wait in the window: the oldest, a, moves nowhere: no incumbent, it
    # goes
    shelf = Shelf(WTinyLFU(), 3).ask("abc")
    shelf.ask("bbcd")
    assert shelf.gone == "a"
    # window d(0), b(2), c(1) by use: d goes next, though it came last; used ones stay
    shelf.ask("bce")
    assert shelf.gone == "ad"


def test_gdsf_weighs_cost_uses_and_size() -> None:
    mib = 1 << 20
    used = FakeItem("used", span=10, size_bytes=mib, uses=3)
    cheap = FakeItem("cheap", span=10, size_bytes=mib)
    large = FakeItem("large", span=100, size_bytes=20 * mib)
    # worths: 4*10/1, 1*10/1, 1*100/20
    assert offer(GDSF(), used, cheap, large) == ["large", "cheap", "used"]
    # the age is the last victim's worth: a newcomer of 10 starts at 5 + 10, behind cheap's 10 but
    # before used's 40
    policy = GDSF()
    assert offer(policy, FakeItem("first", span=5, size_bytes=mib)) == ["first"]
    again = FakeItem("again", span=36, size_bytes=mib)
    policy.add(again)
    old = FakeItem("old", span=40, size_bytes=mib, memo=(0, 0.0))
    assert offer(policy, old) == ["old", "again"]


def test_either_kind_goes_by_the_older_use() -> None:
    kv, checkpoint = FakeItem("kv", kind="kv", last_used=3), FakeItem("checkpoint", last_used=2)
    assert offer(Clock(), kv, checkpoint) == ["checkpoint", "kv"]


def test_hyperbolic_divides_by_time_in_the_cache() -> None:
    old = FakeItem("old", created=0, uses=3, last_used=100)
    young = FakeItem("young", created=99, uses=0, last_used=99)
    # at 100: 4 / 101 against 1 / 2
    assert offer(Hyperbolic(), old, young) == ["old", "young"]


def test_hits_per_token_is_per_byte() -> None:
    small = FakeItem("small", uses=1, size_bytes=10)
    large = FakeItem("large", uses=3, size_bytes=100)
    unused = FakeItem("unused", size_bytes=1)
    assert offer(HitsPerToken(), small, large, unused) == ["unused", "large", "small"]


def test_tail_lru_first_gives_up_what_the_target_allows() -> None:
    short_old = FakeItem("short_old", span=100, last_used=1)
    short_new = FakeItem("short_new", span=100, last_used=9)
    long_old = FakeItem("long_old", span=9000, last_used=2)
    assert offer(TailLRU(1024), long_old, short_new, short_old) == [
        "short_old",
        "short_new",
        "long_old",
    ]


def turns() -> list[FakeItem]:
    """Three turns of 600 tokens of one conversation, and another conversation's 900; the third turn
    was used longest ago."""
    first = FakeItem("first", position=600, span=600, last_used=3)
    second = FakeItem("second", position=1200, span=600, last_used=2, above=first)
    third = FakeItem("third", position=1800, span=600, last_used=1, above=second)
    return [first, second, third, FakeItem("other", position=900, span=900, last_used=4)]


def test_tail_lru_adds_up_what_a_path_has_lost() -> None:
    # the third turn is within the target of 1,024; with it gone the second would cost 1,200
    assert offer(TailLRU(1024), *turns()) == ["third", "first", "other", "second"]
    # a use of the second turn begins a new tail: what was lost below it is history
    policy, (first, second, third, other) = TailLRU(1024), turns()
    for item in (first, second, third, other):
        policy.add(item)
    assert policy.victim(None) is third
    policy.discard(third, evicted=True)
    second.uses, second.last_used = 1, 2
    policy.touch(second)
    assert policy.victim(None) is second


def test_ttl_goes_by_expiry() -> None:
    answer = FakeItem("answer", label="decode", last_used=50)
    fork = FakeItem("fork", label="branch", last_used=10)
    plain = FakeItem("plain", last_used=40)
    # expiry: 50 + 20, 10 + 4 * 20, 40 + 20
    assert offer(TTL(20), answer, fork, plain) == ["plain", "answer", "fork"]


def test_coverage_thins_where_checkpoints_stand_close() -> None:
    near = FakeItem("near", position=1000, span=50)
    far = FakeItem("far", position=950, span=950)
    assert offer(Coverage(), far, near) == ["near", "far"]


def test_random_is_seeded_and_takes_everyone_in_time() -> None:
    names = "abcdefgh"
    orders = [offer(Random(seed=3), *(FakeItem(name) for name in names)) for _ in range(2)]
    assert sorted(orders[0]) == list(names)
    assert orders[0] == orders[1] != offer(Random(seed=4), *(FakeItem(name) for name in names))


def test_random_draws_both_kinds_from_one_urn() -> None:
    def first(seed: int) -> str:
        items = [FakeItem(f"k{n}", kind="kv") for n in range(9)] + [FakeItem("c")]
        return offer(Random(seed), *items)[0]

    drawn = [first(seed) for seed in range(400)]
    assert 20 <= drawn.count("c") <= 60, "one in ten"


def test_lhd_learns_at_what_age_uses_come() -> None:
    # one class is used every 2 requests, the other never: after a recomputation the idle one goes
    # first, although both kinds started alike
    policy = LHD()
    hot = FakeItem("hot", kind="checkpoint")
    policy.add(hot)
    for now in range(2, 1200, 2):
        hot.last_used, hot.uses = now, hot.uses + 1
        policy.touch(hot)
        idle = FakeItem(f"idle{now}", created=now - 40, last_used=now - 40, kind="kv")
        policy.add(idle)
        assert policy.victim("kv") is idle
        policy.discard(idle, evicted=True)
    fresh = FakeItem("fresh", kind="kv", created=1198, last_used=1198)
    policy.add(fresh)
    assert policy.victim(None) is fresh


def test_lhd_is_per_byte() -> None:
    small, large = FakeItem("small", size_bytes=1), FakeItem("large", size_bytes=9)
    assert offer(LHD(), small, large) == ["large", "small"]


def test_class_age_learns_which_label_comes_back_and_hears_ghosts() -> None:
    policy = ClassAge()
    for number in range(20):
        good = FakeItem("good", label="end", created=number, last_used=number)
        policy.add(good)
        policy.discard(good, evicted=True)
        policy.on_ghost_hit(good)
        bad = FakeItem("bad", label="branch", created=number, last_used=number)
        policy.add(bad)
        policy.discard(bad, evicted=True)
    good, bad = (FakeItem(label, label=label, last_used=20) for label in ("end", "branch"))
    assert offer(policy, good, bad) == ["branch", "end"]


def test_marconi_trades_recency_for_flops_per_byte() -> None:
    def items() -> list[FakeItem]:
        return [
            FakeItem("old_rich", last_used=1, span=1000, position=1000),
            FakeItem("middle", last_used=5, span=500, position=500),
            FakeItem("new_poor", last_used=9, span=10, position=10),
        ]

    assert offer(Marconi(0.0), *items()) == ["old_rich", "middle", "new_poor"]
    # alpha 2: 0 + 2, 0.5 + about 1, 1 + 0; then of the two left 0 + 2 against 1 + 0
    assert offer(Marconi(2.0), *items())[0] == "new_poor"


def test_marconi_sees_what_an_eviction_made_worth_more() -> None:
    policy = Marconi(2.0)
    items = [FakeItem(name, span=span) for name, span in (("a", 10), ("b", 20), ("c", 500))]
    for item in items:
        policy.add(item)
    items[0].span = 400  # the checkpoint above it went
    assert policy.victim(None) is items[1]


def test_seglen_keeps_what_is_long_to_replay() -> None:
    def items() -> list[FakeItem]:
        return [
            FakeItem("old_long", last_used=1, span=1000),
            FakeItem("middle", last_used=5, span=500),
            FakeItem("new_short", last_used=9, span=100),
        ]

    assert offer(SegLen(0.0), *items()) == ["old_long", "middle", "new_short"]
    # 0.85 * (1, 4/9, 0) + 0.15 * (0, 1/2, 1) = 0.85, 0.45, 0.15; of two, 0.85 against 0.15
    assert offer(SegLen(), *items()) == ["new_short", "middle", "old_long"]
    # as little as this beside 0.9 of recency: 0.1, 0.49, 0.9
    assert offer(SegLen(0.1), *items())[0] == "old_long"
    with pytest.raises(
        ValueError, match=r"weight of the replay length must be in \[0, 1\) \(got 1\)"
    ):
        SegLen(1)


def test_seglen_sees_what_an_eviction_made_longer() -> None:
    policy = SegLen()
    items = [FakeItem(name, span=span) for name, span in (("a", 10), ("b", 20), ("c", 500))]
    for item in items:
        policy.add(item)
    items[0].span = 400  # the checkpoint above it went
    assert policy.victim(None) is items[1]


def test_dead_kv_goes_before_all_that_is_alive() -> None:
    for make in (EVICTION["marconi"], EVICTION["seglen"], EVICTION["survival"]):
        dead = FakeItem("dead", kind="kv", dead=True, last_used=100)
        alive = FakeItem("alive", last_used=1)
        assert offer(make(), alive, dead) == ["dead", "alive"]


@pytest.mark.parametrize("word", [*sorted(EVICTION), "ttl:64", "tail-lru:512", "marconi:0.5"])
def test_every_word_empties_the_cache_kind_by_kind(word: str) -> None:
    policy = make_eviction(word)()
    items = [FakeItem(f"c{n}", last_used=n, created=n) for n in range(5)]
    items += [FakeItem(f"k{n}", kind="kv", last_used=n, created=n) for n in range(5)]
    for item in items:
        policy.add(item)
    for kind in ("kv", "checkpoint"):
        for _ in range(5):
            victim = policy.victim(kind)
            assert victim is not None and victim.kind == kind
            policy.discard(victim, evicted=True)
        assert policy.victim(kind) is None
    assert policy.victim(None) is None


@pytest.mark.parametrize("word", sorted(EVICTION))
def test_a_locked_item_comes_back_as_a_candidate(word: str) -> None:
    policy = make_eviction(word)()
    first, second = FakeItem("first"), FakeItem("second", last_used=1, created=1)
    policy.add(first)
    policy.add(second)
    policy.discard(first, evicted=False)
    assert policy.victim(None) is second
    first.last_used, first.uses = 5, 1
    policy.add(first)
    policy.discard(second, evicted=False)
    assert policy.victim(None) is first


def test_a_stranger_writes_a_policy() -> None:
    class ShallowLast(ScorePolicy):
        def score(self, item: Item) -> float:
            return -item.position

    class Newest(SampledPolicy):
        def score(self, item: Item) -> float:
            return self.now - item.last_used

    items = [FakeItem(str(n), position=64 * n, last_used=n) for n in (1, 3, 2)]
    assert offer(ShallowLast(), *items) == ["3", "2", "1"]
    assert offer(Newest(), *items) == ["3", "2", "1"]


def test_a_score_that_grew_meanwhile_is_met_at_the_top() -> None:
    policy = Coverage()
    lone, neighbour = FakeItem("lone", span=50), FakeItem("neighbour", span=80)
    policy.add(lone)
    policy.add(neighbour)
    lone.span = 500
    assert policy.victim(None) is neighbour


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        (
            "nonsense",
            "unknown eviction policy 'nonsense'; known: lru, .*, ttl:N, .* or module:Class",
        ),
        ("fifo:3", "'fifo' takes no number, got 'fifo:3'"),
        ("lru:", "'lru' takes no number"),
        ("ttl:", r"'ttl' needs a whole number of at least 1 .requests., got 'ttl:'"),
        ("ttl:soon", "'ttl' needs a whole number"),
        ("ttl:1e3", "'ttl' needs a whole number"),
        ("ttl:0.5", "'ttl' needs a whole number"),
        ("ttl:0", "'ttl' needs a whole number"),
        ("tail-lru:0.5", "'tail-lru' needs a whole number"),
        ("marconi:-1", "'marconi' needs a number of at least 0 .alpha., got 'marconi:-1'"),
        ("marconi:nan", "'marconi' needs a number of at least 0"),
    ],
)
def test_an_unknown_word_is_one_sentence(word: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_eviction(word)
