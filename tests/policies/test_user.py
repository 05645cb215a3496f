"""Custom policies: they work wherever a policy name does, and errors in them are explained."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import ClassVar

import pytest

from engine import Engine, EngineConfig, SamplingParams
from hybridcache.lab.cli import main
from hybridcache.lab.rivals.evictions import LAB_NAMES
from hybridcache.lab.runs.closed_loop import closed_loop
from hybridcache.lab.runs.simulate import simulate
from hybridcache.lab.traces import open_trace
from hybridcache.policies.eviction.fifo import FIFO
from hybridcache.policies.eviction.scored import ScorePolicy
from hybridcache.policies.registry import EVICTION_NAMES, SIMULATED, make_eviction, parse_placement
from hybridcache.radix.protocol import Item, Placed, PolicyError, Prefill
from hybridcache.scheduling.request import AdmissionPolicy, ServerLoad, WaitingRequest
from tests.oracle import OracleRunner, OracleSampler
from tests.radix.serving import hybrid, serve, traffic
from tests.radix.twins import VictimLog
from tests.refused import refused

MODULE = """
import itertools
import random
from typing import NamedTuple

from hybridcache.radix.protocol import EvictionPolicy, Placed, PlacementPolicy
from hybridcache.scheduling.request import AdmissionPolicy, ServerLoad, WaitingRequest
from hybridcache.policies.eviction.scored import SampledPolicy, ScorePolicy


class NoScore(ScorePolicy):
    pass


class Inherits(EvictionPolicy):
    def add(self, item): ...
    def discard(self, item, evicted): ...


class Foreign(Inherits):
    def add(self, item):
        self.item = item

    def victim(self, kind):
        return self.item


class ListOfVictims(Inherits):
    def victim(self, kind):
        return [kind]


class Pair(NamedTuple):
    uses: int
    last_used: int
"""
SCORES = {
    "CheapestFirst(ScorePolicy)": "item.span / item.size_bytes",
    "Dice(ScorePolicy)": "random.random()",
    "Named(ScorePolicy)": "Pair(item.uses, item.last_used)",
    "Raises(ScorePolicy)": "1 / item.nothing",
    "NaN(ScorePolicy)": "(1.0, float('nan'))",
    "Nothing(SampledPolicy)": "None",
    "Word(ScorePolicy)": "'high'",
    "Words(SampledPolicy)": "(1.0, item.label)",
}
"""Scores that custom policies return."""
PLANS = {
    "Bare": "[prefill.prompt_len]",
    "Half": "[Placed(prefill.prompt_len / 2, 'half')]",
    "NoPlan": "None",
    "Lost": "[][0]",
    "Endless": "(Placed(0, 'again') for _ in itertools.count())",
}
"""Plans that custom placements return."""
CLASSES = {head: f"def score(self, item): return {score}" for head, score in SCORES.items()}
CLASSES |= {
    f"{name}(PlacementPolicy)": f"def plan(self, prefill): return {plan}"
    for name, plan in PLANS.items()
}
CLASSES |= {
    "InTiers(CheapestFirst)": "orders_classes = False",
    "Arguments(CheapestFirst)": "def __init__(self, weight): super().__init__()",
    "NoSuper(CheapestFirst)": "def __init__(self): pass",
    "Often(Bare)": "decode_interval, plan = lambda _: 'often', lambda _, prefill: []",
}
MODULE += "".join(f"\n\nclass {head}:\n    {body}\n" for head, body in CLASSES.items())


@pytest.fixture(autouse=True)
def user_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "user_policies.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("user_policies", None)


@pytest.mark.parametrize(
    "name", [f"user_policies:{name}" for name in ("CheapestFirst", "InTiers", "Dice", "Named")]
)
def test_a_custom_eviction_policy_runs_wherever_a_name_does(name: str) -> None:
    result = simulate("short?head=60", gib=1, policy=["lru", name], bound=False)
    assert [run.label for run in result.runs] == ["lru", name]
    assert make_eviction(name)().orders_classes is not name.endswith("InTiers")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoScore", "it cannot be created .* abstract class NoScore .*score"),
        ("Raises", r"score raised AttributeError: .* 'nothing' .user_policies.py, line \d+"),
        ("NaN", r"NaN.score returned \(1.0, nan\) for a"),
        ("Nothing", "Nothing.score returned None for a checkpoint item"),
        ("Word", "Word.score returned 'high' for a checkpoint item: a number or a tuple of"),
        ("Words", r"Words.score returned \(1.0, '\w+'\) for a checkpoint item"),
        ("Arguments(weight=x)", r"write module:Class\(alpha=2\), with numbers, lists, and strings"),
        ("Arguments", r"it cannot be created .*'weight'.*; define .*, give arguments defaults"),
        ("Foreign", r"victim\(kind='checkpoint'\) returned .*, no candidate"),
        ("ListOfVictims", "result of victim .* unhashable type: 'list'"),
        ("NoSuper", r"'now'; its __init__ must call super\(\).__init__\(\)"),
        ("Missing", "user_policies has no class 'Missing'"),
        ("Bare", r"the result of plan are wrong: TypeError: each of a plan must be Placed"),
        ("Half", r"result of plan .* each position of a plan must be an integer .got \d+\."),
        ("NoPlan", "result of plan .* 'NoneType' object is not iterable"),
        ("Lost", r"plan raised IndexError: .* .user_policies.py, line \d+"),
        ("Often", "result of decode_interval .* the interval must be an integer"),
    ],
)
def test_an_error_in_a_custom_policy_is_one_line(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = "checkpoints" if name in (*PLANS, "Often") else "policy"
    with pytest.raises(ValueError, match=message):
        simulate("short?head=60", gib=0.5, bound=False, **{kind: f"user_policies:{name}"})
    command = ["simulate", "--trace", "short?head=60", "--gib", "0.5", "--no-bound"]
    assert main([*command, f"--{kind}", f"user_policies:{name}"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("hybridcache: ") and printed.count("\n") == 1


def test_an_object_that_is_no_policy_is_named() -> None:
    with pytest.raises(ValueError, match="it does not implement PlacementPolicy: give a name"):
        parse_placement(5)  # type: ignore[arg-type]
    refused("'every' needs a whole number of at least 1", parse_placement, "every:1.5")
    for pair in ("lru@backoff", "user_policies:CheapestFirst@adaptive", "mine:Dice(2)@adaptive"):
        refused(r"here checkpoints \(--checkpoints\) names the", make_eviction, pair)
    refused("unknown eviction policy 'LRU', did you mean 'lru'", make_eviction, "LRU")
    assert set(SIMULATED) == set(LAB_NAMES)
    for name in SIMULATED:
        refused(f"'{name}' is for simulations only; known: lru", make_eviction, name)


def test_an_endless_plan_ends_with_the_prompt() -> None:
    prefill = Prefill(100, 64, 64, 64, (), 64)
    assert parse_placement("user_policies:Endless").plan(prefill) == []
    assert prefill.on_grid(repeat(Placed(70, ""))) == []


class Weighted(ScorePolicy):
    """Policy that evicts the deepest item first if ``weight`` is negative."""

    instances: ClassVar[list[Weighted]] = []

    def __init__(self, weight: float = -1.0) -> None:
        super().__init__()
        self.weight = weight
        Weighted.instances.append(self)

    def score(self, item: Item) -> float:
        return self.weight * item.position


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
    cache = hybrid(100, 2, state_bytes=9, eviction=policy)
    created = cache.policy._policy
    assert created.weight == 2.5 and created not in existing
    runs = simulate("short?head=60", gib=(0.3, 0.5), policy=["lru", policy], bound=False).runs
    by_name = simulate(
        "short?head=60", gib=(0.3, 0.5), policy=f"{__name__}:Weighted(weight=2.5)", bound=False
    ).runs
    assert [run.cached_tokens for run in runs[2:]] == [run.cached_tokens for run in by_name]
    assert "Weighted" in runs[2].label or "lambda" in runs[2].label
    if not callable(policy):
        assert runs[2].label in (policy, f"{__name__}:Weighted(weight=2.5)")


def same(policy: type[object]) -> type[object]:
    """Return a subclass of a built-in policy that changes nothing."""
    return type(f"Same{policy.__name__}", (policy,), {"__module__": __name__})


class ItemLog(VictimLog):
    """Attributes of every victim."""

    def chosen(self, item: Item) -> None:
        facts = (item.kind, item.position, item.serial, item.uses, item.last_used)
        self.chosen_items.append(facts)


@pytest.mark.full("hybrid-lru", "hybrid-marconi", "hybrid-survival")
@pytest.mark.parametrize("name", sorted(EVICTION_NAMES))
@pytest.mark.parametrize("kind", ["hybrid", "radix"])
def test_a_subclass_of_any_policy_gives_the_same_victims(name: str, kind: str) -> None:
    """Compare the victims item by item, with locked nodes in between."""
    found: list[list[tuple[object, ...]]] = []
    make = EVICTION_NAMES[name].make
    own = partial(same(make.func), *make.args) if isinstance(make, partial) else same(make)
    for eviction in (name, own):
        sizes = {"kv_bytes_per_token": 3, "state_bytes": 60, "grid": 4}
        cache = hybrid(300, 6, prefix_cache=kind, eviction=eviction, **sizes)
        log = ItemLog(cache)
        for number, tokens in enumerate(traffic(3, 60)):
            whole = len(tokens) // 4 * 4
            positions = sorted({whole, whole // 2 // 4 * 4} - {0}) if kind == "hybrid" else ()
            match = cache.match(tokens)
            handle = cache.lock(match.node)
            serve(cache, tokens, positions, number % 2)
            cache.unlock(handle)
        found.append(log.chosen_items)
    assert found[0] == found[1] and found[0]


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
    assert time.monotonic() <= FIFO().clock() <= time.monotonic()


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
        _generate,
    ],
)
def test_a_policy_that_never_gives_a_victim_ends_with_one_sentence(
    run: Callable[[], object],
) -> None:
    """Memory is never freed, so requests would wait for ever."""
    refused(r"Stingy.* returned None, no candidate", run, kind=PolicyError)


# --- Admission policies that raise ----------------------------------------------------------------


class Raises(AdmissionPolicy):
    """Oldest first. The ``number``-th call of one method raises, or each later call too."""

    def __init__(self, method: str, number: int = 3, again: bool = False) -> None:
        self.method, self.again, self.num_left = method, again, number

    def order(
        self, waiting: Sequence[WaitingRequest], load: ServerLoad
    ) -> Sequence[WaitingRequest]:
        self.fail("order")
        return waiting

    def arrived(self, request: WaitingRequest, load: ServerLoad) -> None:
        self.fail("arrived")

    def admitted(self, request: WaitingRequest, load: ServerLoad) -> None:
        self.fail("admitted")

    def computed(self, num_tokens: int, seconds: float, load: ServerLoad) -> None:
        self.fail("computed")

    def left(self, request: WaitingRequest, load: ServerLoad) -> None:
        self.fail("left")

    def report(self) -> dict[str, float | str]:
        self.fail("report")
        return {}

    def fail(self, method: str) -> None:
        if method == self.method:
            self.num_left -= 1
            if not self.num_left or (self.again and self.num_left < 0):
                raise ZeroDivisionError("no reason")


RAISING = [
    f"{__name__}:Raises({method!r}, again={again})"
    for method in ("arrived", "order", "admitted", "computed", "left", "report")
    for again in (False, True)
]


@pytest.mark.parametrize("policy", RAISING)
def test_a_request_is_refused_or_served_if_an_admission_policy_raises(policy: str) -> None:
    config = EngineConfig(admission=policy, max_running=2, check=True)
    engine = Engine(config, runner=OracleRunner(2000, 8), sampler=OracleSampler())
    refused, served, num_failed = [], [], 0
    for number in range(8):
        try:
            request_id = str(number)
            prompt = list(range(number, number + 40))
            engine.submit(prompt, SamplingParams(max_tokens=3), request_id=request_id)
        except PolicyError as error:
            assert "Raises" in str(error) and "raised ZeroDivisionError: no reason" in str(error)
            refused.append(request_id)
    while engine.has_work():
        try:
            served += [one.request_id for one in engine.step() if one.is_finished]
        except PolicyError as error:
            num_failed += 1
            assert "raised ZeroDivisionError: no reason" in str(error)
    assert sorted(refused + served) == [str(number) for number in range(8)]
    refuses = "arrived" in policy
    assert len(refused) == (refuses and (6 if "True" in policy else 1))
    assert num_failed == (not refuses and "report" not in policy), "the failure is told once"
    for _ in range(3):
        queue = engine.report().queue
    if num_failed:
        assert str(queue.figures["reason"]).startswith("oldest first, because a policy failed: ")
    if not refuses:
        assert len(engine.generate([[1, 2, 3]], SamplingParams(max_tokens=3))[0].token_ids) == 3
    engine.check()
    engine.close()


def test_a_simulation_ends_with_the_failure_of_its_admission_policy() -> None:
    for method in ("arrived", "admitted"):
        with pytest.raises(PolicyError, match="raised ZeroDivisionError: no reason"):
            closed_loop("chat?head=40", gib=1, rate=1, admission=partial(Raises, method))
