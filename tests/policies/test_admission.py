"""Admission policies, compared with plain references, and custom admission policies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.studies.admission import Kind, LinearSteps, MixedLoad, scenario
from hybridcache.lab.runs.closed_loop import LoopRun, SessionTurn, simulate_closed_loop
from hybridcache.policies.admission import (
    DUE_FACTOR,
    DUE_S,
    FLOOR,
    LEAST_LIMIT,
    LOOK_AHEAD,
    TOKENS_A_PASS,
    SessionGate,
    _Limit,
)
from hybridcache.policies.registry import make_admission
from hybridcache.radix.protocol import PromptBoundaries
from hybridcache.scheduling.request import AdmissionPolicy, ServerLoad, WaitingRequest
from hybridcache.scheduling.sessions import Session


@dataclass(eq=False)
class FakeRequest:
    """Request with the fields that policies see."""

    arrival: int
    session: Session
    num_tokens: int = 1000
    cached: int = 0
    arrival_s: float = inf
    num_preemptions: int = 0
    num_passes: int = 0
    is_running: bool = False
    is_prefilling: bool = True
    cached_len: int = 0

    @property
    def lost_len(self) -> int:
        """Evicted tokens: the whole part of the prompt that is not cached."""
        return self.num_tokens - self.cached_len


@dataclass
class FakeLoad:
    """Server load with the fields that policies see."""

    now_s: float = 0.0
    running: Sequence[Any] = ()
    max_running: int = 16
    open_sessions: Sequence[Session] = ()
    idle_sessions: Sequence[Session] = ()
    session_share: float = 0.0
    """Fraction of the memory that each session takes."""

    def cached_len(self, request: FakeRequest) -> int:
        return request.cached

    def footprint(self, session: Session) -> float:
        return self.session_share


def session(number: int, num_requests: int = 2, known_len: int = 1000) -> Session:
    new = Session(number, None, 0.0)
    new.num_requests, new.known_len = num_requests, known_len
    return new


def waiting(
    cached: Iterable[int], passes: Iterable[int] | None = None, num_tokens: int = 1000
) -> list[FakeRequest]:
    lengths = list(cached)
    counts = [0] * len(lengths) if passes is None else list(passes)
    return [
        FakeRequest(i, session(i), num_tokens, length, num_passes=count)
        for i, (length, count) in enumerate(zip(lengths, counts, strict=True))
    ]


def arrivals(ordered: Iterable[WaitingRequest]) -> list[int]:
    return [request.arrival for request in ordered]


queues = st.lists(
    st.tuples(st.integers(0, 900), st.integers(0, 30), st.integers(901, 2000)), max_size=150
)


@given(queues)
def test_ranking_policies_sort_the_oldest_requests_stably(
    queue: list[tuple[int, int, int]],
) -> None:
    requests = [
        FakeRequest(i, session(i), length, cached, num_passes=passes)
        for i, (cached, passes, length) in enumerate(queue)
    ]
    near, far = requests[:LOOK_AHEAD], requests[LOOK_AHEAD:]
    references = {
        "oldest": requests,
        "cached-first": [
            *sorted(near, key=lambda r: r.num_tokens - r.cached - TOKENS_A_PASS * r.num_passes),
            *far,
        ],
        "longest-match": [
            *sorted(near, key=lambda r: -(r.cached + TOKENS_A_PASS * r.num_passes)),
            *far,
        ],
    }
    for name, expected in references.items():
        actual = make_admission(name).order(requests, FakeLoad())
        assert arrivals(actual) == arrivals(expected), name


@pytest.mark.parametrize("name", ["cached-first", "longest-match"])
def test_a_cold_request_is_overtaken_a_bounded_number_of_times(name: str) -> None:
    """Fully cached requests keep arriving, and one is admitted each time."""
    policy, load, length = make_admission(name), FakeLoad(), 4096
    cold = FakeRequest(0, session(0), length)
    queue, num_admitted = [cold], 0
    while cold in queue:
        num_admitted += 1
        assert num_admitted < 1000
        queue.append(FakeRequest(num_admitted, session(num_admitted), length, length - 1))
        first = next(iter(policy.order(queue, load)))
        for older in queue[: queue.index(first)]:
            older.num_passes += 1
        queue.remove(first)
    assert 1 < num_admitted <= length // TOKENS_A_PASS + 2


# --- sessions -------------------------------------------------------------------------------------


def congest(policy: AdmissionPolicy, load: FakeLoad, lost: int = 100_000) -> None:
    """Report constant prompt computation and one large loss to ``policy``."""
    for _ in range(100):
        load.now_s += 1.0
        policy.computed(8000, 1.0, load)
    request = FakeRequest(-1, session(-1, known_len=lost), lost, is_running=True)
    policy.admitted(request, load)
    request.is_running = False
    policy.left(request, load)


def test_other_sessions_enter_one_by_one_after_the_debt_is_repaid() -> None:
    policy, load = make_admission("sessions"), FakeLoad(running=[None])
    congest(policy, load)
    requests = waiting([0, 1000, 0, 600])  # the prefixes of 0 and 2 were evicted
    assert arrivals(policy.order(requests, load)) == [1, 3]
    wakes_at_s = policy.wakes_at_s
    assert wakes_at_s is not None and wakes_at_s > load.now_s
    load.now_s = wakes_at_s - 1e-3
    assert arrivals(policy.order(requests, load)) == [1, 3]
    load.now_s = wakes_at_s + 1e-6
    assert arrivals(policy.order(requests, load)) == [1, 3, 0]
    entering = requests.pop(0)
    entering.is_running = True
    policy.admitted(entering, load)
    assert arrivals(policy.order(requests, load)) == [1, 3], "two prefills entered at the same time"
    entering.is_prefilling = False
    load.now_s += 1000 / FLOOR
    assert arrivals(policy.order(requests, load)) == [1, 2, 3], (
        "the debt is repaid, but the order is not oldest first"
    )


@pytest.mark.parametrize(("pause_s", "withholds"), [(1.0, True), (50.0, False)])
def test_nothing_is_withheld_if_repeating_prompts_answers_more_requests(
    pause_s: float, withholds: bool
) -> None:
    """A session fills 0.4 of the memory for a cycle of a pause. Its prompt takes one second."""
    running = [FakeRequest(-2, session(-2))]
    policy, load = make_admission("sessions"), FakeLoad(running=running, session_share=0.4)
    for number in range(200):
        load.now_s += pause_s
        request = FakeRequest(number, session(number, num_requests=3), 8000)
        request.session.idle_since_s = load.now_s - pause_s
        request.arrival_s = load.now_s
        policy.arrived(request, load)
        policy.computed(8000, 1.0, load)
        policy.admitted(request, load)
        policy.left(request, load)
    congest(policy, load)
    cold = FakeRequest(999, session(999, num_requests=1), 8000)
    assert arrivals(policy.order([cold], load)) == ([] if withholds else [999])
    assert (float(policy.report()["worth"]) > 1) == withholds


@pytest.mark.parametrize(
    ("share", "every_s", "cached_len", "withholds"),
    [(0.2, 0.5, 0, True), (0.1, 0.5, 0, False), (0.2, 4.0, 0, False), (0.2, 0.5, 6000, False),
     (0.2, 0.5, 3500, False), (0.2, 0.5, 2500, True)],
    ids=["crowded", "memory for others", "time for whole prompts", "heads are cached",
         "most of the heads is cached", "less than half"],
)  # fmt: skip
def test_running_requests_that_displace_shared_text_are_fewer_until_it_stays(
    share: float, every_s: float, cached_len: int, withholds: bool
) -> None:
    """Four requests run. Each prompt has 8,000 tokens, one second, of which 6,000 are shared."""
    policy, numbers = make_admission("sessions"), iter(range(1000))
    running = [FakeRequest(-2, session(-2)) for _ in range(4)]
    load = FakeLoad(running=running, session_share=share)

    def serve(cached_len: int) -> None:
        load.now_s += every_s
        one = session(next(numbers), num_requests=1 + (load.now_s < 10), known_len=0)
        one.shared_len, one.idle_since_s = 6000, load.now_s - 10.0
        request = FakeRequest(one.number, one, 8000, cached_len=cached_len, arrival_s=load.now_s)
        policy.arrived(request, load)
        policy.computed(8000, 1.0, load)
        policy.admitted(request, load)
        policy.left(request, load)

    cold = FakeRequest(-1, session(-1, num_requests=1), 8000)
    num_served = 0
    while num_served < 40 and policy.order([cold], load):
        serve(cached_len)
        num_served += 1
    assert (num_served < 40) == withholds
    assert float(policy.report()["memory_limit"]) >= 0.72, "lowered while nothing was admitted"
    assert arrivals(policy.order([cold], replace(load, running=()))) == [-1]
    for _ in range(400):
        serve(6000)
    assert policy.report()["memory_limit"] == 1.0
    assert arrivals(policy.order([cold], load)) == [-1]


def test_a_due_request_precedes_all_that_arrived_after_it() -> None:
    """The debt stays high, and resident sessions always have another request."""
    policy, load = make_admission("sessions"), FakeLoad(running=[None])
    congest(policy, load, lost=10**9)
    begun_s, token_s = load.now_s, 1 / 8000
    new = FakeRequest(0, session(0, num_requests=1), 16_000, arrival_s=begun_s)
    lost = FakeRequest(1, session(1), 8000, arrival_s=begun_s)
    resident, younger = (
        FakeRequest(number, session(number), cached=1000, arrival_s=begun_s + number)
        for number in (2, 3)
    )
    queue = [new, lost, resident]
    assert arrivals(policy.order(queue, load)) == [2]
    assert policy.wakes_at_s == pytest.approx(begun_s + DUE_S)
    load.now_s = begun_s + DUE_S  # Nothing waited at the arrival of request 0.
    assert arrivals(policy.order([*queue, younger], load)) == [0, 2, 3]
    new.is_running = True
    policy.admitted(new, load)
    # Request 1 still counts it: the wait does not end sooner because the queue is served.
    due_s = begun_s + DUE_S + DUE_FACTOR * 16_000 * token_s
    queue = [lost, younger]
    load.now_s = due_s - 0.1
    younger.arrival_s = due_s
    assert arrivals(policy.order(queue, load)) == [3]
    load.now_s = due_s + 1e-6
    assert arrivals(policy.order(queue, load)) == [1, 3]
    late = FakeRequest(4, session(4), cached=1000, arrival_s=begun_s)
    load.now_s = begun_s + 1e4
    assert arrivals(policy.order([lost, younger, late], load)) == [1, 3, 4], "turns wait as well"


def test_a_request_that_waits_for_itself_alone_enters_before_the_first_answer() -> None:
    """The debt is high, and computing the prompt takes an eighth of a second."""
    policy, load = make_admission("sessions"), FakeLoad(session_share=0.6)
    policy.computed(8000, 1.0, load)
    lost = FakeRequest(0, session(0, known_len=10**6), 10**6, is_prefilling=False)
    policy.admitted(lost, load)
    load.running, load.open_sessions = [lost], [lost.session]
    new = FakeRequest(1, session(1, num_requests=1))
    load.now_s = 0.124
    assert arrivals(policy.order([new], load)) == []
    load.now_s = 0.126
    assert arrivals(policy.order([new], load)) == [1]


def test_an_operator_bounds_the_time_until_a_request_is_due() -> None:
    policy, load = make_admission("sessions:5"), FakeLoad(running=[None])
    congest(policy, load, lost=10**9)
    ahead, new = (FakeRequest(n, session(n, 1), 16_000, arrival_s=load.now_s) for n in range(2))
    assert arrivals(policy.order([ahead, new], load)) == []
    assert policy.wakes_at_s == pytest.approx(load.now_s + 5)
    load.now_s += 5.1
    assert arrivals(policy.order([ahead, new], load)) == [0, 1]


def test_prompts_that_share_a_head_delay_others_by_it_once() -> None:
    """A hundred prompts with one long head wait; the head is computed after they arrived."""
    policy, load = make_admission("sessions"), FakeLoad(running=[None])
    congest(policy, load, lost=10**9)
    begun_s = load.now_s
    heads = [FakeRequest(n, session(n, 1), 100_000, arrival_s=begun_s) for n in range(100)]
    last = FakeRequest(100, session(100, 1), arrival_s=begun_s)
    policy.order([*heads, last], load)
    for request in heads:
        request.cached = 99_900
    for _ in range(101):
        policy.order([*heads, last], load)
    load.now_s = begun_s + DUE_S + DUE_FACTOR * 100 * 100 / 8000 + 1e-6
    assert last in policy.order([*heads, last], load)


def test_further_choices_of_an_admitted_prompt_are_not_withheld() -> None:
    policy, load = SessionGate(), FakeLoad(running=[None])
    congest(policy, load, lost=80_000)
    for one in (session(0, num_requests=1, known_len=0), session(1)):
        choices = [FakeRequest(i, one) for i in range(3)]
        assert arrivals(policy.order(choices, load)) == []
        policy.admitted(choices[0], load)
        one.num_admitted = 1
        debt = policy.report()["debt_s"]
        assert arrivals(policy.order(choices[1:], load)) == [1, 2]
        policy.admitted(choices[1], load)
        assert policy.report()["debt_s"] == debt
        assert choices[1] in policy._entered, "a running choice is no resident session"


# --- Fairness on the simulated clock --------------------------------------------------------------


@dataclass(frozen=True)
class Crowd:
    """Endless conversations of ``num_tenants`` tenants, and new ones that arrive next to them."""

    num_conversations: int
    num_tenants: int
    pauses_s: tuple[float, ...] = (0.0,)
    """Pauses before later turns; conversation n has the one of its tenant."""
    is_new: bool = False
    """True if each turn begins another conversation."""
    start_s: float = 60.0
    """Arrival of the first of ``NUM_NEW`` new conversations."""

    def turns(self, number: int) -> Sequence[SessionTurn]:
        """Return the turns of a conversation, of up to 1,500 tokens."""
        tenant = number % self.num_tenants
        pause_s = self.pauses_s[tenant % len(self.pauses_s)]
        text = np.random.default_rng(number).integers(0, 50_000, 2000, np.int32)
        return Turns(text, pause_s, f"tenant {tenant}", self.is_new)


@dataclass(frozen=True)
class Turns(Sequence[SessionTurn]):
    text: np.ndarray
    pause_s: float
    tenant: str
    is_new: bool

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, turn: Any) -> SessionTurn:
        prompt_len = 600 + 10 * (turn % 90)
        text = self.text[: prompt_len + 2]
        if self.is_new:
            text = text + np.int32(turn)
        return SessionTurn(
            text, prompt_len, self.pause_s, self.tenant, PromptBoundaries(), "", "request"
        )


NUM_NEW = 3
CROWDS = {
    "16 of one tenant": Crowd(16, 1),
    "16 of two, one pauses": Crowd(16, 2, (0.0, 5.0)),
    "40 that begin again": Crowd(40, 2, is_new=True),
    "100 of two, one pauses": Crowd(100, 2, (0.0, 5.0), start_s=200.0),
    "100 of eight that pause long": Crowd(100, 8, (10.0,)),
    "400 of two that pause": Crowd(400, 2, (3.0,), start_s=500.0),
    "400 of eight with four pauses": Crowd(400, 8, (0.0, 3.0, 10.0, 40.0), start_s=500.0),
}


class StopsWhenServed(LoopRun):
    """Run in which no further turn comes once all new conversations, the last ones, are served."""

    def _go_on(self, number: int, request: Any) -> None:
        num_old = len(self.sessions) - NUM_NEW
        if sum(one.place >= num_old for one in self.answered) < NUM_NEW:
            super()._go_on(number, request)


def serve_crowd(crowd: Crowd, admission: str) -> list[float]:
    """Return the waits of the new conversations for their first token."""
    tenant = f"tenant {crowd.num_tenants - 1}"
    new = [
        [Turns(np.full(2000, 50_000 + n, np.int32), 0.0, tenant, False)[0]] for n in range(NUM_NEW)
    ]
    cell = replace(
        scenario(MixedLoad(0, 30_000, ()), "crowd", 1, 1.0, admission),
        times=LinearSteps(step_s=0.01, prefill_token_s=0.001, decode_token_s=0.0),
        max_running=4,
        token_budget=256,
    )
    run = StopsWhenServed(cell, [*map(crowd.turns, range(crowd.num_conversations)), *new])
    run.events.clear()
    for number in range(crowd.num_conversations + NUM_NEW):
        late = number - crowd.num_conversations
        run._push(0.01 * number if late < 0 else crowd.start_s * (1 + late / 2), number)
    run.run()
    return [
        one.first_token_s - one.arrival_s
        for one in run.answered
        if one.place >= crowd.num_conversations and one.first_token_s is not None
    ]


@pytest.mark.full("16 of one tenant", "16 of two, one pauses", "40 that begin again")
@pytest.mark.parametrize("crowd", CROWDS.values(), ids=CROWDS)
def test_a_new_conversation_waits_at_most_4_times_as_long_as_oldest_first(crowd: Crowd) -> None:
    oldest_s, waits_s = (serve_crowd(crowd, name) for name in ("oldest", "sessions"))
    assert len(waits_s) == len(oldest_s) == NUM_NEW
    for wait_s, old_s in zip(waits_s, oldest_s, strict=True):
        assert wait_s <= 4 * old_s + 30


LONG_HEADS = Kind((1000, 12_000), (6, 16), (100, 4000), (30, 250), (3.0, 1.2), 8000)
CLAUDE_CODE_LIKE = MixedLoad(16, 120_000, (), (LONG_HEADS,), token_budget=8192)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_wait_is_bounded_by_the_prompts_that_waited_before(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound of ``SessionGate``: 20 s, 3.5 times the work ahead, and prefills that run."""
    ahead_s: dict[Any, float] = {}
    running_s: dict[Any, float] = {}
    order = SessionGate.order

    def watched(policy: SessionGate, queue: Sequence[Any], load: ServerLoad) -> Iterable[Any]:
        before_s = 0.0
        for one in queue:
            ahead_s.setdefault(one, before_s)
            before_s += (one.num_tokens - load.cached_len(one)) / 8000
            if load.now_s >= one.arrival_s + 20 + 2.5 * ahead_s[one]:
                num_left = sum(other.prefill_len - other.computed_len for other in load.running)
                running_s.setdefault(one, num_left / 8000)
        return order(policy, queue, load)

    monkeypatch.setattr(SessionGate, "order", watched)
    cell = scenario(CLAUDE_CODE_LIKE, "agents", seed, 0.1, "sessions")
    cell = replace(cell, policy="lru")  # Learned evictions leave too few waiting requests.
    served = simulate_closed_loop(CLAUDE_CODE_LIKE.trace("agents", seed), cell).answered
    assert len(running_s) >= 5, (
        f"{len(running_s)} requests become due in this load, too few to try the bound: another "
        "placement or eviction hits more, or saves less"
    )
    for one in served:
        assert one.scheduled_s is not None
        at_most_s = 20 + 3.5 * ahead_s.get(one, 0.0) + running_s.get(one, 0.0)
        assert one.scheduled_s - one.arrival_s <= at_most_s + 1.0, f"turn {one.turn} of {one.place}"


# --- Custom policies ------------------------------------------------------------------------------


class NewestFirst(AdmissionPolicy):
    def __init__(self, keep: int = 0) -> None:
        self.keep = keep

    def order(
        self, waiting: Sequence[WaitingRequest], load: ServerLoad
    ) -> Iterable[WaitingRequest]:
        return reversed(waiting[self.keep :])


def test_a_custom_admission_policy_orders_requests() -> None:
    requests = waiting([0, 0, 0])
    for policy, found in ((f"{__name__}:NewestFirst(keep=1)", [2, 1]), (NewestFirst, [2, 1, 0])):
        assert arrivals(make_admission(policy).order(requests, FakeLoad())) == found
    with pytest.raises(ValueError, match="return waiting requests, each at most once"):
        make_admission(type("Own", (NewestFirst,), {"order": lambda *_: [1]})).order(requests, None)


def test_the_limit_moves_once_per_cycle_or_at_once_between_its_bounds() -> None:
    limit, shares = _Limit(), []
    for now_s, factor, step, at_once in (
        (0, 0.5, 0.0, False),
        (9, 0.5, 0.0, False),
        (9, 0.5, 0.0, True),
        (18, 1.0, 0.125, False),
        (19, 1.0, 0.125, False),
        (20, 0.5, 0.0, True),
        (21, 0.5, 0.0, True),
        (31, 1.0, 2.0, False),
    ):
        limit.update(now_s, 10, factor, step, at_once)
        shares.append(limit.share)
    assert shares == [0.5, 0.5, 0.25, 0.25, 0.375, 0.1875, LEAST_LIMIT, 1.0]
