"""A stranger's policies: those of the README run everywhere, and what is wrong with one is one
sentence."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.lab.cli import main
from hybridcache.lab.simulation.simulate import simulate
from hybridcache.lab.trace import Trace
from hybridcache.lab.traces import open_trace
from hybridcache.policies.eviction.lru import LRU
from hybridcache.policies.eviction.scored import FIFO, ScorePolicy
from hybridcache.policies.protocol import (
    EvictionPolicy,
    Item,
    Placed,
    PlacementPolicy,
    PolicyError,
    Prefill,
)
from hybridcache.policies.registry import (
    DEFAULT_EVICTION,
    DEFAULT_PLACEMENT,
    EVICTION,
    PLACEMENT_NAMES,
    eviction_names,
    make_eviction,
    parse_placement,
    placement_names,
)
from hybridcache.policies.user import MAX_OUTSIDE
from hybridcache.variants import TieredRadixCache
from tests.cache.serving import ids, serve, traffic
from tests.cache.twins import VictimLog
from tests.policies.items import FakeItem, offer

MODULE = """
from hybridcache.policies.protocol import EvictionPolicy, Placed, PlacementPolicy
from hybridcache.policies.eviction.scored import SampledPolicy, ScorePolicy


class CheapestFirst(ScorePolicy):
    def score(self, item):
        return item.span / item.size_bytes


class InTiers(CheapestFirst):
    orders_classes = False


class Dice(ScorePolicy):
    def score(self, item):
        import random

        return random.random()


class NoScore(ScorePolicy):
    pass


class Raises(ScorePolicy):
    def score(self, item):
        return 1 / item.nothing


class NaN(ScorePolicy):
    def score(self, item):
        return (1.0, float("nan"))


class Nothing(SampledPolicy):
    def score(self, item):
        pass


class Arguments(CheapestFirst):
    def __init__(self, weight):
        super().__init__()


class NoSuper(CheapestFirst):
    def __init__(self):
        self.weight = 1


class Inherits(EvictionPolicy):
    def add(self, item): ...
    def discard(self, item, evicted): ...


class Foreign(Inherits):
    def add(self, item):
        self.item = item

    def victim(self, kind):
        return self.item


class Thirds(PlacementPolicy):
    def plan(self, prefill):
        for part in (3, 2, 1):
            yield Placed(prefill.prompt_len * part // 3, "third")


class Bare(Thirds):
    def plan(self, prefill):
        return [prefill.prompt_len]


class Half(Thirds):
    def plan(self, prefill):
        yield Placed(prefill.prompt_len / 2, "half")


class Lost(Thirds):
    def plan(self, prefill):
        raise RuntimeError("no idea")


class Often(Thirds):
    def decode_interval(self):
        return "often"
"""


@pytest.fixture(autouse=True)
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "strangers.py").write_text(MODULE)
    (tmp_path / "torn.py").write_text("class X(:")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("strangers", "torn"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("word", ["strangers:CheapestFirst", "strangers:InTiers", "strangers:Dice"])
def test_a_policy_runs_wherever_a_word_does(word: str) -> None:
    result = simulate("short?head=60", gib=1, policy=["lru", word], bound=False)
    assert [run.label for run in result.runs] == ["lru", word]
    assert make_eviction(word)().orders_classes is not word.endswith("InTiers")


def test_method_names_of_the_last_release_still_work_with_a_warning() -> None:
    heard: list[Item] = []
    with pytest.warns(
        DeprecationWarning, match=r"Former\.missed is deprecated: rename it to on_gh"
    ):

        class Former(LRU):
            def missed(self, item: Item) -> None:
                heard.append(item)

    policy: EvictionPolicy = Former()
    ghost = FakeItem("ghost")
    policy.on_ghost_hit(ghost)
    assert heard == [ghost]


def test_former_names_select_the_same_policies() -> None:
    assert make_eviction("regret") is make_eviction("survival") is make_eviction(DEFAULT_EVICTION)
    former, present = parse_placement("regret,cap:2"), parse_placement(f"{DEFAULT_PLACEMENT},cap:2")
    assert [type(rule) for rule in former.rules] == [type(rule) for rule in present.rules]
    assert "regret" not in (*eviction_names(), *placement_names())


def test_a_placement_runs_wherever_a_word_does() -> None:
    words = "strangers:Thirds,boundary,cap:3"
    result = simulate("short?head=60", gib=1, checkpoints=words, bound=False)
    assert result.runs[0].checkpoints_made
    with pytest.raises(ValueError, match="has no class 'thirds'"):
        parse_placement("strangers:thirds")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("NoScore", "it does not implement EvictionPolicy: it lacks score"),
        ("Inherits", "it does not implement EvictionPolicy: it lacks victim"),
        (
            "Raises",
            "add raised AttributeError: .* has no attribute 'nothing' .strangers.py, line 28",
        ),
        ("NaN", r"NaN.score returned \(1.0, nan\) for a checkpoint item: a number or a tuple"),
        ("Nothing", "Nothing.score returned None for a checkpoint item"),
        ("Arguments", r"it cannot be created .*'weight'.*give them defaults"),
        ("NoSuper", r"the __init__ of NoSuper must call super\(\).__init__\(\)"),
        ("Foreign", "victim.* returned .* which is not a candidate of that kind"),
        ("Missing", "strangers has no class 'Missing'"),
    ],
)
def test_what_is_wrong_with_a_policy_is_one_sentence(
    word: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=sentence):
        simulate("short?head=60", gib=0.5, policy=f"strangers:{word}", bound=False)
    command = ["simulate", "--trace", "short?head=60", "--gib", "0.5", "--no-bound"]
    assert main([*command, "--policy", f"strangers:{word}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("hybridcache: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("Bare", r"plan returned \d+; return Placed\(position, label\)"),
        ("Half", r"plan returned Placed\(position=\d+.\d+, label='half'\); return Placed"),
        ("Lost", "plan raised RuntimeError: no idea .strangers.py, line"),
        (
            "Often",
            "decode_interval returned 'often'; return the number of tokens between checkpoints, or",
        ),
    ],
)
def test_what_is_wrong_with_a_placement_is_one_sentence(word: str, sentence: str) -> None:
    with pytest.raises(PolicyError, match=sentence):
        simulate("short?head=60", gib=1, checkpoints=f"strangers:{word}", bound=False)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("torn:X", "no module 'torn' can be imported .invalid syntax"),
        ("nowhere:X", "no module 'nowhere' can be imported"),
        ("strangers.py:NaN", "leave out .py"),
        ("strangers:MODULE", "strangers has no class 'MODULE'"),
    ],
)
def test_a_module_that_can_not_be_read_is_one_sentence(word: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_eviction(word)


def test_a_guard_passes_everything_on() -> None:
    policy: EvictionPolicy = make_eviction("strangers:CheapestFirst")()
    cheap, dear = FakeItem("cheap", span=1), FakeItem("dear", span=9)
    policy.on_ghost_hit(cheap)
    assert offer(policy, dear, cheap) == ["cheap", "dear"]
    assert policy.victim(None) is None


class Deepest(ScorePolicy):
    def score(self, item: object) -> float:
        return -float(item.position)  # type: ignore[attr-defined]


class Within(PlacementPolicy):
    offset = 0

    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        yield Placed(self.offset + prefill.prompt_len, "mine")


class Beyond(Within):
    offset = 64


class Spaced(PlacementPolicy):
    def __init__(self, interval: int) -> None:
        self.interval = interval

    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        for position in range(prefill.prompt_len, 0, -1):
            if position % self.interval == 0:
                yield Placed(position, "mine")


def test_a_class_itself_is_as_good_as_its_word(tmp_path: Path) -> None:
    runs = simulate("short?head=60", gib=0.3, policy=[Deepest], checkpoints=Within).runs
    words = simulate(
        "short?head=60",
        gib=0.3,
        policy=f"{__name__}:Deepest",
        checkpoints=f"{__name__}:Within",
        resume_from=tmp_path / "runs.jsonl",
    ).runs
    assert runs[0].label == f"{__name__}:Deepest @ {__name__}:Within" == words[0].label
    assert runs[0].cached_tokens == words[0].cached_tokens > 0


class Weighted(ScorePolicy):
    """Deepest first where ``weight`` is negative."""

    made: ClassVar[list[Weighted]] = []

    def __init__(self, weight: float = -1.0) -> None:
        super().__init__()
        self.weight = weight
        Weighted.made.append(self)

    def score(self, item: Item) -> float:
        return self.weight * item.position


class InTiers(Weighted):
    orders_classes = False


@pytest.mark.parametrize(("policy", "number"), [(Weighted, 1), (InTiers, 3)])
@pytest.mark.parametrize("is_word", [True, False])
def test_a_policy_is_made_once_for_a_cache_or_once_a_tier(
    policy: type[Weighted], number: int, is_word: bool
) -> None:
    Weighted.made.clear()
    eviction = f"{__name__}:{policy.__name__}" if is_word else policy
    build_prefix_cache(
        CacheConfig(num_kv_tokens=100, num_slots=2, state_bytes=9, eviction=eviction)
    )
    assert len(Weighted.made) == number


def test_a_policy_of_ones_own_sees_dead_and_superseded_items_too() -> None:
    Weighted.made.clear()
    config = CacheConfig(num_kv_tokens=1000, num_slots=9, state_bytes=9, grid=1, eviction=Weighted)
    cache = build_prefix_cache(config)
    serve(cache, ids("one"), [2, 3])
    serve(cache, ids("two"))
    [policy] = Weighted.made
    items = list(policy.candidates())
    assert any(item.dead for item in items) and any(item.superseded for item in items)


@pytest.mark.parametrize(
    "policy",
    [
        f"{__name__}:Weighted(2.5)",
        f"{__name__}:Weighted(weight=2.5)",
        Weighted(2.5),
        lambda: Weighted(2.5),
        partial(Weighted, weight=2.5),
    ],
)
def test_a_policy_takes_parameters(policy: object) -> None:
    given = list(Weighted.made)
    cache = build_prefix_cache(
        CacheConfig(num_kv_tokens=100, num_slots=2, state_bytes=9, eviction=policy)
    )
    made = cache._residency.policy._policy
    assert made.weight == 2.5 and made not in given, "every cache gets one of its own"
    runs = simulate("short?head=60", gib=(0.3, 0.5), policy=["lru", policy], bound=False).runs
    words = simulate(
        "short?head=60", gib=(0.3, 0.5), policy=f"{__name__}:Weighted(weight=2.5)", bound=False
    ).runs
    assert [run.cached_tokens for run in runs[2:]] == [run.cached_tokens for run in words]
    assert "Weighted" in runs[2].label or "lambda" in runs[2].label


def test_two_words_of_the_command_line_with_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{__name__}:Weighted(weight=2),{__name__}:Weighted(weight=-2)"
    command = ["simulate", "--trace", "short?head=9", "--gib", "1", "--no-bound"]
    assert main([*command, "--policy", words]) == 0
    out = capsys.readouterr().out
    assert f"{__name__}:Weighted(weight=2) " in out and "Weighted(weight=-2)" in out


@pytest.mark.parametrize("policy", [FIFO, EVICTION["sieve"], LRU])
def test_a_class_of_ours_is_as_good_as_its_word(policy: type[EvictionPolicy]) -> None:
    [word] = [word for word, found in EVICTION.items() if found is policy]
    mine = simulate("short?head=60", gib=0.3, policy=policy, bound=False).runs[0]
    theirs = simulate("short?head=60", gib=0.3, policy=word, bound=False).runs[0]
    assert mine.cached_tokens == theirs.cached_tokens


def same(found: type[object]) -> type[object]:
    """A policy of the user's own that changes nothing of ours."""
    return type(f"Same{found.__name__}", (found,), {"__module__": __name__})


def outcomes(trace: Trace, **options: object) -> list[dict[str, object]]:
    """All that a simulation measures but the processor's time."""
    records = []
    for run in simulate(trace, bound=False, **options).runs:
        record = run.as_record()
        records.append({name: record[name] for name in record if name not in RUN_IDENTITY})
    return records


RUN_IDENTITY = ("config", "control_us")
PRESSURED = {
    "short": ("short?head=60", {"gib": 0.3}),
    "searches": ("tree-search?head=80", {"gib": 0.35}),
    "host": ("few-shot?head=60", {"gib": 0.35, "host_gib": 0.4}),
    "pools": ("short?head=60", {"gib": 0.5, "memory": "pools", "kv_share": 0.5}),
    "ample": ("chat?head=25", {"gib": 12}),
}


@pytest.mark.full("host", "short")
@pytest.mark.parametrize("cell", list(PRESSURED))
def test_a_subclass_of_any_policy_evicts_as_the_policy_does(cell: str) -> None:
    spec, options = PRESSURED[cell]
    trace, names = open_trace(spec).kept(), sorted(EVICTION)
    checkpoints = "branch,boundary,backoff:2,end"
    theirs = outcomes(trace, policy=names, checkpoints=checkpoints, **options)
    mine = outcomes(
        trace, policy=[same(EVICTION[name]) for name in names], checkpoints=checkpoints, **options
    )
    assert dict(zip(names, mine, strict=True)) == dict(zip(names, theirs, strict=True))
    assert (cell == "ample") == (not any(run["evicted_checkpoints"] for run in theirs))


class Chosen(VictimLog):
    """A listener that notes every victim."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[tuple[object, ...]] = []

    def chosen(self, item: Item) -> None:
        self.items.append((item.kind, item.position, item.serial, item.uses, item.last_used))


@pytest.mark.full(
    "hybrid-2q",
    "hybrid-lfu",
    "hybrid-lru",
    "hybrid-marconi",
    "hybrid-s3-fifo",
    "hybrid-survival",
    "hybrid-w-tinylfu",
    "radix-arc",
)
@pytest.mark.parametrize("name", sorted(EVICTION))
@pytest.mark.parametrize("kind", ["hybrid", "radix"])
def test_a_subclass_of_any_policy_gives_the_same_victims(name: str, kind: str) -> None:
    """Item by item, with locks that stand in the way."""
    found: list[list[tuple[object, ...]]] = []
    for eviction in (name, same(EVICTION[name])):
        config = CacheConfig(
            prefix_cache=kind,
            num_kv_tokens=300,
            num_slots=6,
            kv_bytes_per_token=3,
            state_bytes=60,
            grid=4,
            eviction=eviction,
        )
        log, cache = Chosen(), build_prefix_cache(config)
        cache.subscribe(log)
        for number, tokens in enumerate(traffic(3, 60)):
            whole = len(tokens) // 4 * 4
            positions = sorted({whole, whole // 2 // 4 * 4} - {0}) if kind == "hybrid" else ()
            match = cache.match(tokens)
            receipt = cache.lock(match.node)
            serve(cache, tokens, positions, number % 2)
            cache.unlock(receipt)
        found.append(log.items)
    assert found[0] == found[1] and found[0]


PLACEMENTS = [
    f"{name}:{word.example}" if word.example else name for name, word in PLACEMENT_NAMES.items()
]


@pytest.mark.full("host")
@pytest.mark.parametrize("cell", ["searches", "host", "ample"])
def test_a_subclass_of_any_placement_saves_as_the_placement_does(cell: str) -> None:
    spec, options = PRESSURED[cell]
    trace = open_trace(spec).kept()

    def subclass(words: str) -> Callable[[], PlacementPolicy]:
        name, _, number = words.partition(":")
        made = same(PLACEMENT_NAMES[name].make)
        return partial(made, int(number)) if number else made  # type: ignore[return-value]

    theirs = outcomes(trace, checkpoints=PLACEMENTS, policy="survival", **options)
    mine = outcomes(
        trace, checkpoints=[subclass(words) for words in PLACEMENTS], policy="survival", **options
    )
    assert dict(zip(PLACEMENTS, mine, strict=True)) == dict(zip(PLACEMENTS, theirs, strict=True))


class Shared(Weighted):
    """A policy of three classes, each of which shares what it learns with its like below."""

    orders_classes = False
    heard: ClassVar[list[tuple[str, int]]] = []

    def on_ghost_hit(self, item: Item) -> None:
        self.heard.append(("deepest", item.position))

    def on_ghost_hit_above(self, item: Item) -> None:
        self.heard.append(("above", item.position))

    def for_tier(self) -> Shared:
        return Shared()


def test_all_classes_of_a_policy_hear_of_ghosts_and_are_asked_below() -> None:
    Shared.heard.clear()
    config = CacheConfig(
        num_kv_tokens=100, num_slots=9, state_bytes=9, host_bytes=12, grid=1, eviction=Shared
    )
    cache = build_prefix_cache(config)
    assert isinstance(cache, TieredRadixCache)
    assert all(tier.is_shared for tier in cache.offload.tiers)
    serve(cache, ids("abcdefgh"), [2, 4, 6])
    cache.evict(num_tokens=100)
    serve(cache, ids("abcdefgh"))
    told = [("deepest", 6), ("above", 4), ("above", 2)]
    assert sorted(Shared.heard) == sorted(told * 2), "the superseded ones, and the rest"


@pytest.mark.parametrize("word", sorted(EVICTION))
def test_an_instance_of_ours_can_be_copied_and_orders_as_before(word: str) -> None:
    instance = make_eviction(word)()
    orders = []
    for policy in (copy.deepcopy(instance), instance):
        items = [FakeItem(f"{n}", last_used=n, created=n, span=9 - n) for n in range(4)]
        orders.append(offer(policy, *items))
    assert orders[0] == orders[1] and len(orders[0]) == 4


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("strangers:CheapestFirst(", "write module:Class.alpha=2."),
        ("strangers:CheapestFirst(open('x'))", "write module:Class.alpha=2."),
        ("strangers:CheapestFirst(3)", "it cannot be created .TypeError"),
    ],
)
def test_what_is_wrong_with_parameters_is_one_sentence(word: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        simulate("short?head=9", gib=1, policy=word, bound=False)


def test_a_placement_takes_parameters_too() -> None:
    for placement in (Spaced(128), lambda: Spaced(128), f"{__name__}:Spaced(128)"):
        mine = simulate("short?head=60", gib=1, checkpoints=placement, bound=False).runs[0]
        theirs = simulate("short?head=60", gib=1, checkpoints="every:128", bound=False).runs[0]
        assert mine.cached_tokens == theirs.cached_tokens > 0


def test_a_policy_that_has_no_word_is_not_kept_and_not_sent(tmp_path: Path) -> None:
    class Local(Deepest):
        pass

    assert "Local" in simulate("short?head=9", gib=1, policy=Local, bound=False).runs[0].label
    kept = tmp_path / "runs.jsonl"
    with pytest.raises(ValueError, match="name the policy as in 'mine:Policy"):
        simulate("short?head=9", gib=1, policy=Local, resume_from=kept)
    with pytest.raises(ValueError, match="cannot be sent to another process"):
        simulate("short?head=9", gib=(1, 2), policy=Local, processes=2)


def test_a_class_without_a_file_runs_but_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a notebook's are: their module is there, its text is not."""
    cell = ModuleType("cell")
    exec(MODULE, cell.__dict__)
    monkeypatch.setitem(sys.modules, "cell", cell)
    own = cell.__dict__["CheapestFirst"]
    assert simulate("short?head=9", gib=1, policy=own).runs[0].label == "cell:CheapestFirst"
    with pytest.raises(ValueError, match="its source cannot be read"):
        simulate("short?head=9", gib=1, policy=own, resume_from=tmp_path / "runs.jsonl")


class Stingy(FIFO):
    def victim(self, kind: str | None) -> Item | None:
        return None


class Misspelled(LRU):
    orders_class = False

    def on_ghost_hits(self, item: Item) -> None:
        pass


def test_a_policy_that_evicts_nothing_and_names_without_effect_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="victim returned None 50 times although") as told:
        simulate("short?head=60", gib=0.3, policy=Stingy, bound=False)
    assert len({str(one.message) for one in told}) == 1
    with pytest.warns(UserWarning, match="which has no effect") as told:
        simulate("short?head=9", gib=1, policy=Misspelled, bound=False)
    said = {str(one.message).partition("has an attribute ")[2] for one in told}
    assert said == {
        "'orders_class', which has no effect; did you mean 'orders_classes'?",
        "'on_ghost_hits', which has no effect; did you mean 'on_ghost_hit'?",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate("short?head=60", gib=0.3, policy=[Deepest, Weighted, InTiers], bound=False)


def test_an_unknown_name_is_told_the_most_similar_one() -> None:
    for name, near in (("lur", "lru"), ("LRU", "lru"), ("Survival", "survival")):
        with pytest.raises(ValueError, match=f"{name!r}, did you mean {near!r}"):
            make_eviction(name)
    with pytest.raises(ValueError, match="did you mean 'adaptive'"):
        parse_placement("branch,adaptiv")
    with pytest.raises(ValueError, match="unknown eviction policy 'xyzzy'; known: lru"):
        make_eviction("xyzzy")


def test_a_placement_that_never_lies_in_a_prompt_is_warned_of_once() -> None:
    with pytest.warns(UserWarning, match="none of its first 50 positions can be saved at") as told:
        simulate("short", gib=1, checkpoints=Beyond, bound=False)
    assert len(told) == 1 and MAX_OUTSIDE == 50
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        simulate("short", gib=1, checkpoints=Within, bound=False)
