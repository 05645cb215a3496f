"""Custom policies: they work wherever a policy name does, and errors in them are explained."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest

from engine import Engine, EngineConfig, SamplingParams
from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.lab.cli import main
from hybridcache.lab.leaderboard import Split, leaderboard
from hybridcache.lab.simulation.closed_loop import closed_loop
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
    EVICTION,
    PLACEMENT_NAMES,
    make_eviction,
    parse_placement,
)
from hybridcache.tiers import TieredRadixCache
from tests.cache.serving import ids, serve, traffic
from tests.cache.twins import VictimLog
from tests.oracle import OracleRunner, OracleSampler
from tests.policies.items import FakeItem, offer

MODULE = """
from typing import NamedTuple

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


class Word(ScorePolicy):
    def score(self, item):
        return "high"


class Words(SampledPolicy):
    def score(self, item):
        return (1.0, item.label)


class Pair(NamedTuple):
    uses: int
    last_used: int


class Named(ScorePolicy):
    def score(self, item):
        return Pair(item.uses, item.last_used)


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
def user_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "user_policies.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("class X(:")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("user_policies", "broken"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "name",
    [f"user_policies:{name}" for name in ("CheapestFirst", "InTiers", "Dice", "Named")],
)
def test_a_custom_eviction_policy_runs_wherever_a_name_does(name: str) -> None:
    result = simulate("short?head=60", gib=1, policy=["lru", name], bound=False)
    assert [run.label for run in result.runs] == ["lru", name]
    assert make_eviction(name)().orders_classes is not name.endswith("InTiers")


def test_a_custom_placement_runs_wherever_a_name_does() -> None:
    spec = "user_policies:Thirds,boundary,cap:3"
    result = simulate("short?head=60", gib=1, checkpoints=spec, bound=False)
    assert result.runs[0].checkpoints_made
    with pytest.raises(ValueError, match="has no class 'thirds'"):
        parse_placement("user_policies:thirds")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoScore", "it does not implement EvictionPolicy: it lacks score"),
        ("Inherits", "it does not implement EvictionPolicy: it lacks victim"),
        (
            "Raises",
            "score raised AttributeError: .* has no attribute 'nothing' .user_policies.py, line 30",
        ),
        ("NaN", r"NaN.score returned \(1.0, nan\) for a checkpoint item: a number or a tuple"),
        ("Nothing", "Nothing.score returned None for a checkpoint item"),
        ("Word", "Word.score returned 'high' for a checkpoint item: a number or a tuple of"),
        ("Words", r"Words.score returned \(1.0, '\w+'\) for a checkpoint item"),
        ("Arguments(weight=x)", r"Class\(alpha=2\).* \(x is not a number, string or list\)"),
        ("Arguments", r"it cannot be created .*'weight'.*give them defaults"),
        ("NoSuper", r"the __init__ of NoSuper must call super\(\).__init__\(\)"),
        ("Foreign", "victim.* returned .* which is not a candidate of that kind"),
        ("Missing", "user_policies has no class 'Missing'"),
    ],
)
def test_an_error_in_a_custom_policy_is_one_line(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        simulate("short?head=60", gib=0.5, policy=f"user_policies:{name}", bound=False)
    command = ["simulate", "--trace", "short?head=60", "--gib", "0.5", "--no-bound"]
    assert main([*command, "--policy", f"user_policies:{name}"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("hybridcache: ") and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Bare", r"plan returned \d+; return Placed\(position, label\)"),
        ("Half", r"plan returned Placed\(position=\d+.\d+, label='half'\); return Placed"),
        ("Lost", "plan raised RuntimeError: no idea .user_policies.py, line"),
        (
            "Often",
            "decode_interval returned 'often'; return the number of tokens between checkpoints, or",
        ),
    ],
)
def test_an_error_in_a_custom_placement_is_explained(name: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        simulate("short?head=60", gib=1, checkpoints=f"user_policies:{name}", bound=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken:X", "no module 'broken' can be imported .invalid syntax"),
        ("nowhere:X", "no module 'nowhere' can be imported"),
        ("user_policies.py:NaN", "leave out .py"),
        ("user_policies:MODULE", "user_policies has no class 'MODULE'"),
    ],
)
def test_a_module_that_cannot_be_imported_raises_an_explanation(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_eviction(name)


def test_the_guard_of_a_custom_policy_forwards_all_calls() -> None:
    policy: EvictionPolicy = make_eviction("user_policies:CheapestFirst")()
    cheap, costly = FakeItem("cheap", span=1), FakeItem("costly", span=9)
    policy.on_ghost_hit(cheap)
    assert offer(policy, costly, cheap) == ["cheap", "costly"]
    assert policy.victim(None) is None


class Deepest(ScorePolicy):
    def score(self, item: object) -> float:
        return -float(item.position)  # type: ignore[attr-defined]


class Within(PlacementPolicy):
    offset = 0

    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        yield Placed(self.offset + prefill.prompt_len, "custom")


class Spaced(PlacementPolicy):
    def __init__(self, interval: int) -> None:
        self.interval = interval

    def plan(self, prefill: Prefill) -> Iterable[Placed]:
        for position in range(prefill.prompt_len, 0, -1):
            if position % self.interval == 0:
                yield Placed(position, "custom")


def test_a_class_and_its_name_give_the_same_results(tmp_path: Path) -> None:
    runs = simulate("short?head=60", gib=0.3, policy=[Deepest], checkpoints=Within).runs
    by_name = simulate(
        "short?head=60",
        gib=0.3,
        policy=f"{__name__}:Deepest",
        checkpoints=f"{__name__}:Within",
        resume_from=tmp_path / "runs.jsonl",
    ).runs
    assert runs[0].label == f"{__name__}:Deepest @ {__name__}:Within" == by_name[0].label
    assert runs[0].cached_tokens == by_name[0].cached_tokens > 0


class Weighted(ScorePolicy):
    """Policy that evicts the deepest item first if ``weight`` is negative."""

    instances: ClassVar[list[Weighted]] = []

    def __init__(self, weight: float = -1.0) -> None:
        super().__init__()
        self.weight = weight
        Weighted.instances.append(self)

    def score(self, item: Item) -> float:
        return self.weight * item.position


class InTiers(Weighted):
    orders_classes = False


@pytest.mark.parametrize(("policy", "number"), [(Weighted, 1), (InTiers, 3)])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_policy_is_created_once_per_cache_or_once_per_class(
    policy: type[Weighted], number: int, by_name: bool
) -> None:
    Weighted.instances.clear()
    eviction = f"{__name__}:{policy.__name__}" if by_name else policy
    build_prefix_cache(
        CacheConfig(num_kv_tokens=100, num_slots=2, state_bytes=9, eviction=eviction)
    )
    assert len(Weighted.instances) == number


def test_a_custom_policy_sees_unreachable_and_superseded_items() -> None:
    Weighted.instances.clear()
    config = CacheConfig(num_kv_tokens=1000, num_slots=9, state_bytes=9, grid=1, eviction=Weighted)
    cache = build_prefix_cache(config)
    serve(cache, ids("one"), [2, 3])
    serve(cache, ids("two"))
    [policy] = Weighted.instances
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
    existing = list(Weighted.instances)
    cache = build_prefix_cache(
        CacheConfig(num_kv_tokens=100, num_slots=2, state_bytes=9, eviction=policy)
    )
    created = cache.policy._policy
    assert created.weight == 2.5 and created not in existing, "the instance is shared by caches"
    runs = simulate("short?head=60", gib=(0.3, 0.5), policy=["lru", policy], bound=False).runs
    by_name = simulate(
        "short?head=60", gib=(0.3, 0.5), policy=f"{__name__}:Weighted(weight=2.5)", bound=False
    ).runs
    assert [run.cached_tokens for run in runs[2:]] == [run.cached_tokens for run in by_name]
    assert "Weighted" in runs[2].label or "lambda" in runs[2].label


def test_the_command_line_accepts_two_policies_with_parameters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = f"{__name__}:Weighted(weight=2),{__name__}:Weighted(weight=-2)"
    command = ["simulate", "--trace", "short?head=9", "--gib", "1", "--no-bound"]
    assert main([*command, "--policy", names]) == 0
    out = capsys.readouterr().out
    assert f"{__name__}:Weighted(weight=2) " in out and "Weighted(weight=-2)" in out


@pytest.mark.parametrize("policy", [FIFO, EVICTION["sieve"], LRU])
def test_a_built_in_class_and_its_name_give_the_same_results(policy: type[EvictionPolicy]) -> None:
    [name] = [name for name, found in EVICTION.items() if found is policy]
    by_class = simulate("short?head=60", gib=0.3, policy=policy, bound=False).runs[0]
    by_name = simulate("short?head=60", gib=0.3, policy=name, bound=False).runs[0]
    assert by_class.cached_tokens == by_name.cached_tokens


def same(policy: type[object]) -> type[object]:
    """Return a subclass of a built-in policy that changes nothing."""
    return type(f"Same{policy.__name__}", (policy,), {"__module__": __name__})


def outcomes(trace: Trace, **options: object) -> list[dict[str, object]]:
    """Return all results of a simulation except CPU time."""
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
def test_a_subclass_of_any_policy_gives_the_same_simulation(cell: str) -> None:
    spec, options = PRESSURED[cell]
    trace, names = open_trace(spec).kept(), sorted(EVICTION)
    checkpoints = "branch,boundary,backoff:2,end"
    expected = outcomes(trace, policy=names, checkpoints=checkpoints, **options)
    actual = outcomes(
        trace, policy=[same(EVICTION[name]) for name in names], checkpoints=checkpoints, **options
    )
    assert dict(zip(names, actual, strict=True)) == dict(zip(names, expected, strict=True))
    assert (cell == "ample") == (not any(run["evicted_checkpoints"] for run in expected))


class ItemLog(VictimLog):
    """Listener that records the attributes of every victim."""

    def __init__(self) -> None:
        super().__init__()
        self.items: list[tuple[object, ...]] = []

    def chosen(self, item: Item) -> None:
        self.items.append((item.kind, item.position, item.serial, item.uses, item.last_used))


@pytest.mark.full(
    "hybrid-clock",
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
    """Compare the victims item by item, with locked nodes in between."""
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
        log, cache = ItemLog(), build_prefix_cache(config)
        cache.subscribe(log)
        for number, tokens in enumerate(traffic(3, 60)):
            whole = len(tokens) // 4 * 4
            positions = sorted({whole, whole // 2 // 4 * 4} - {0}) if kind == "hybrid" else ()
            match = cache.match(tokens)
            handle = cache.lock(match.node)
            serve(cache, tokens, positions, number % 2)
            cache.unlock(handle)
        found.append(log.items)
    assert found[0] == found[1] and found[0]


PLACEMENTS = [
    f"{name}:{rule.example}" if rule.example else name for name, rule in PLACEMENT_NAMES.items()
]


@pytest.mark.full("host")
@pytest.mark.parametrize("cell", ["searches", "host", "ample"])
def test_a_subclass_of_any_placement_gives_the_same_simulation(cell: str) -> None:
    spec, options = PRESSURED[cell]
    trace = open_trace(spec).kept()

    def subclass(spec: str) -> Callable[[], PlacementPolicy]:
        name, _, number = spec.partition(":")
        derived = same(PLACEMENT_NAMES[name].make)
        return partial(derived, int(number)) if number else derived  # type: ignore[return-value]

    expected = outcomes(trace, checkpoints=PLACEMENTS, policy="survival", **options)
    actual = outcomes(
        trace, checkpoints=[subclass(spec) for spec in PLACEMENTS], policy="survival", **options
    )
    assert dict(zip(PLACEMENTS, actual, strict=True)) == dict(
        zip(PLACEMENTS, expected, strict=True)
    )


class Shared(Weighted):
    """Policy with one instance per priority class, each of which has an instance per tier."""

    orders_classes = False
    ghost_hits: ClassVar[list[tuple[str, int]]] = []

    def on_ghost_hit(self, item: Item) -> None:
        self.ghost_hits.append(("deepest", item.position))

    def on_ghost_hit_above(self, item: Item) -> None:
        self.ghost_hits.append(("above", item.position))

    def for_tier(self) -> Shared:
        return Shared()


def test_all_priority_classes_get_ghost_hits_and_are_shared_with_tiers() -> None:
    Shared.ghost_hits.clear()
    config = CacheConfig(
        num_kv_tokens=100, num_slots=9, state_bytes=9, host_bytes=12, grid=1, eviction=Shared
    )
    cache = build_prefix_cache(config)
    assert isinstance(cache, TieredRadixCache)
    assert all(tier.is_shared for tier in cache.offload.tiers)
    serve(cache, ids("abcdefgh"), [2, 4, 6])
    cache.evict(num_tokens=100)
    serve(cache, ids("abcdefgh"))
    expected = [("deepest", 6), ("above", 4), ("above", 2)]
    assert sorted(Shared.ghost_hits) == sorted(expected * 2), "one per class of checkpoints"


@pytest.mark.parametrize("name", sorted(EVICTION))
def test_a_copied_policy_gives_the_same_order(name: str) -> None:
    instance = make_eviction(name)()
    orders = []
    for policy in (copy.deepcopy(instance), instance):
        items = [FakeItem(f"{n}", last_used=n, created=n, span=9 - n) for n in range(4)]
        orders.append(offer(policy, *items))
    assert orders[0] == orders[1] and len(orders[0]) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user_policies:CheapestFirst(", "write module:Class.alpha=2."),
        ("user_policies:CheapestFirst(open('x'))", "write module:Class.alpha=2."),
        ("user_policies:CheapestFirst(3)", "it cannot be created .TypeError"),
    ],
)
def test_invalid_policy_parameters_raise_an_explanation(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate("short?head=9", gib=1, policy=name, bound=False)


def test_a_placement_takes_parameters() -> None:
    for placement in (Spaced(128), lambda: Spaced(128), f"{__name__}:Spaced(128)"):
        actual = simulate("short?head=60", gib=1, checkpoints=placement, bound=False).runs[0]
        expected = simulate("short?head=60", gib=1, checkpoints="every:128", bound=False).runs[0]
        assert actual.cached_tokens == expected.cached_tokens > 0


def test_a_local_class_cannot_be_saved_or_sent_to_a_process(tmp_path: Path) -> None:
    class Local(Deepest):
        pass

    assert "Local" in simulate("short?head=9", gib=1, policy=Local, bound=False).runs[0].label
    path = tmp_path / "runs.jsonl"
    with pytest.raises(ValueError, match="name the policy as in 'mine:Policy"):
        simulate("short?head=9", gib=1, policy=Local, resume_from=path)
    with pytest.raises(ValueError, match="cannot be sent to another process"):
        simulate("short?head=9", gib=(1, 2), policy=Local, processes=2)


def test_a_class_without_a_source_file_runs_but_cannot_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Classes of a notebook have a module without source text."""
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


class SeesSeconds(FIFO):
    seen: ClassVar[list[float]] = []

    def add(self, item: Item) -> None:
        SeesSeconds.seen.append(self.clock())
        super().add(item)


@pytest.mark.parametrize("orders_classes", [True, False])
def test_policies_see_the_seconds_of_the_simulated_machine(
    orders_classes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SeesSeconds, "orders_classes", orders_classes)
    for run, last_s in (
        (lambda: simulate("chat?head=40", gib=2, policy=SeesSeconds, bound=False), None),
        (lambda: closed_loop("chat?head=40", gib=2, rate=1, seeds=1, policy=SeesSeconds), 5.0),
    ):
        SeesSeconds.seen.clear()
        run()
        times = [request.timestamp_s for request in open_trace("chat?head=40")]
        if last_s is None:
            assert set(SeesSeconds.seen) <= set(times) and len(set(SeesSeconds.seen)) > 20
        else:
            assert len(set(SeesSeconds.seen)) > 20 and max(SeesSeconds.seen) > last_s
    assert FIFO().clock() == pytest.approx(time.monotonic(), abs=5)


def _generate() -> None:
    config = EngineConfig(eviction=f"{__name__}:Stingy")
    engine = Engine(config, runner=OracleRunner(200, 4), sampler=OracleSampler())
    prompts = [list(range(start, start + 90)) for start in range(0, 230, 10)]
    engine.generate(prompts, SamplingParams(max_tokens=4))


@pytest.mark.parametrize(
    "run",
    [
        lambda: simulate("short?head=60", gib=0.3, policy=Stingy, bound=False),
        lambda: closed_loop("chat?head=40", gib=1, rate=1, admission="oldest", policy=Stingy),
        lambda: leaderboard(
            [f"{__name__}:Stingy"], Split.load(None).head(1, "agent"), built_in=("lru",)
        ),
        _generate,
    ],
)
def test_a_policy_that_never_gives_a_victim_ends_with_one_sentence(
    run: Callable[[], object],
) -> None:
    """Memory is never freed, so requests would wait for ever."""
    with pytest.raises(PolicyError, match=r"Stingy'?: victim returned None 50 times although"):
        run()


def test_an_error_for_an_unknown_name_suggests_a_similar_one() -> None:
    for name, near in (("lur", "lru"), ("LRU", "lru"), ("Survival", "survival")):
        with pytest.raises(ValueError, match=f"{name!r}, did you mean {near!r}"):
            make_eviction(name)
    with pytest.raises(ValueError, match="did you mean 'adaptive'"):
        parse_placement("branch,adaptiv")
    with pytest.raises(ValueError, match="unknown eviction policy 'xyzzy'; known: lru"):
        make_eviction("xyzzy")
