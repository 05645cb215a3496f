"""Closed-loop simulation: sessions arrive by themselves, then each waits for its answers.

A session's first request comes at a drawn time, each further one when the previous answer is
complete and the trace's own pause is over. Requests are scheduled by ``StepPlanner``, as in the
engine, on the same leases and cache. The clock moves by ``StepTimes`` from step to step; runs of
steps in which requests only decode are taken at once, with the same result. A trace in blocks is
expanded to tokens: prompts that share n blocks share the tokens of n blocks, and no more.

Rebuilt systems have no lease and no planner (``PeerLoop``): their requests are admitted in the
order of arrival, as soon as the system has memory for the whole prompt.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hybridcache.config import build_prefix_cache
from hybridcache.geometry.units import counted
from hybridcache.lab.results.figures import closed_loop_figure
from hybridcache.lab.results.report import LOOP_METRICS, uncharged_notes
from hybridcache.lab.results.result import ClosedLoopRun, Plain, Runs, text_table
from hybridcache.lab.rivals.protocol import PeerSession, begin
from hybridcache.lab.runs.grid import RunFailed, run_grid
from hybridcache.lab.runs.summary import describe_times, identify
from hybridcache.lab.runs.target import BaselineTarget
from hybridcache.lab.scenario import (
    CLOSED_LOOP_GIB,
    REPLAY_ONLY,
    Scenario,
    named_policies,
    seeds_of,
)
from hybridcache.lab.traces.intervals import paired
from hybridcache.lab.traces.progress import Progress
from hybridcache.lab.traces.sizes import sizes
from hybridcache.lab.traces.trace import Trace, TraceRequest, by_session
from hybridcache.policies.admission import KEPT_S
from hybridcache.policies.registry import make_admission
from hybridcache.radix.protocol import PromptBoundaries
from hybridcache.radix.tokens import Tokens
from hybridcache.radix.tree import SESSION_END
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.planner import StepPlanner
from hybridcache.scheduling.request import ScheduledRequest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class SessionTurn:
    """One request of a session."""

    text: Tokens
    prompt_len: int
    pause_s: float
    """From the end of the previous answer until this request; 0 for the first."""
    namespace: Hashable
    boundaries: PromptBoundaries
    stop_reason: str
    request_id: str
    returns_within_s: float | None = None
    ends_session: bool = False
    session: str = ""
    choice_of: str | None = None
    save_at: tuple[int, ...] = ()


class SimulatedRequest(ScheduledRequest):
    """A request with a fixed answer, its session's number ``place``, and its times."""

    def __init__(
        self, spec: SessionTurn, place: int, turn: int, *, arrival: int, arrival_s: float
    ) -> None:
        text = spec.text
        prompt = text[: spec.prompt_len]
        super().__init__(spec, prompt, arrival=arrival, arrival_s=arrival_s, max_len=len(text))
        self.buffer, self._stop_reason = text, spec.stop_reason
        self.place, self.turn = place, turn
        self.first_token_s: float | None = None
        self.finished_s = 0.0

    def answer(self, tokens: Tokens, stop_reason: str) -> None:
        """Set the ids of the answer, which were not known at its arrival."""
        self.buffer[self.prompt_len :], self._stop_reason = tokens, stop_reason

    @property
    def stop_reason(self) -> str:
        """See ``ScheduledRequest``; otherwise the reason that the trace names."""
        return super().stop_reason or self._stop_reason

    @property
    def num_quiet_steps(self) -> int:
        """Steps from now on in which it decodes and nothing else happens for it."""
        assert self.lease is not None
        at = self.computed_len
        return min(self.lease.num_quiet_tokens(at), self.max_len - 2 - at)


def simulate_closed_loop(trace: Trace, cell: Scenario) -> LoopRun:
    """Serve the sessions of ``trace``, expanded to tokens, in the order of their first requests,
    with the one cache, admission, rate and seed of ``cell``."""
    return (PeerLoop if cell.baseline else LoopRun)(cell, sessions_of(trace)).run()


def sessions_of(trace: Trace) -> list[list[SessionTurn]]:
    """Return the turns of each session of ``trace``, in the order of the first requests."""
    return [[*_turns(n, requests, trace.unit)] for n, requests in enumerate(by_session(trace))]


def _turns(session: int, requests: Sequence[TraceRequest], unit: int) -> Iterator[SessionTurn]:
    free_s = requests[0].timestamp_s
    for request in requests:
        prompt_len, answer_len = request.num_tokens(unit), request.num_answer_tokens(unit)
        text = np.concatenate((request.tokens, request.output))
        if unit > 1:
            expanded = np.zeros((len(text), unit), np.int32)
            expanded[:, 0] = text
            text = expanded.reshape(-1)
        total = prompt_len + max(1, answer_len)
        if len(text) < total:
            text = np.concatenate((text, np.zeros(total - len(text), np.int32)))
        yield SessionTurn(
            text[:total],
            prompt_len,
            max(0.0, request.timestamp_s - free_s),
            request.namespace,
            PromptBoundaries(
                tuple(position * unit for position in request.boundaries), request.answer_survives
            ),
            request.stop_reason,
            f"request-{session}",
            request.returns_within_s,
            session=str(request.session),
        )
        free_s = request.timestamp_s + (request.service_s or 0.0)


class LoopRun:
    """One run: an event loop around a planner. Times are in seconds."""

    def __init__(self, cell: Scenario, sessions: Sequence[Sequence[SessionTurn]]) -> None:
        self.answered: list[SimulatedRequest | PeerRequest] = []
        """Requests in the order of their last tokens."""
        self.num_refused = 0
        self.now_s = 0.0
        """Time; at the end, that of the last answer."""
        self.live_s = 0.0
        """Integral of the live sessions over time."""
        self.num_live = self.max_live = 0
        self.max_running = cell.max_running
        self.token_budget = cell.token_budget
        self.priority_classes: bool | None = None
        """True if the cache evicts unreachable KV and superseded checkpoints first."""
        self._build(cell)
        self.tells_ends, self.times = cell.tells_ends, cell.step_times(cell.geometry())
        [rate], [seed] = sizes(cell.rate, "rate"), seeds_of(cell)
        self.events: list[tuple[float, int, int]] = []
        """(time, order, session) of the next request of each session that has one."""
        self.num_events = self.num_asked = 0
        self.sessions, self.next_turns = sessions, [0] * len(sessions)
        rng = np.random.default_rng(seed)
        times = cell.starts_at(rate).times(rng)
        for number in range(len(sessions)):
            self._push(next(times), number)

    def _build(self, cell: Scenario) -> None:
        """Build the cache and the planner of ``cell``."""
        geometry = cell.geometry()
        cache = build_prefix_cache(cell.cache_config(geometry, unit=1))
        self.manager = CacheManager(
            cache,
            cell.placement(unit=1),
            num_rows=self.max_running,
            stateful=bool(geometry.num_linear_layers),
            owns_states=geometry.checkpoint_bytes is not None,
        )
        cache.policy.set_clock(lambda: self.now_s)
        self.planner: StepPlanner[SimulatedRequest] = StepPlanner(
            self.manager,
            max_running=self.max_running,
            token_budget=self.token_budget,
            admission=make_admission(cell.admission),  # type: ignore[arg-type]
            clock=lambda: self.now_s,
        )
        self.priority_classes = cache.policy.has_priority_classes

    def turn(self, number: int, place: int) -> SessionTurn:
        """Return a request of session ``number``, which is due."""
        return self.sessions[number][place]

    def pause_s(self, number: int, place: int) -> float | None:
        """Return the pause before a request of session ``number``, or None if there is none."""
        turns = self.sessions[number]
        return turns[place].pause_s if place < len(turns) else None

    def has_work(self) -> bool:
        """Return whether a request waits or runs."""
        return self.planner.has_work()

    def run(self) -> LoopRun:
        """Serve all sessions."""
        events = self.events
        while events or self.has_work():
            while events and events[0][0] <= self.now_s:
                when_s, _, number = heapq.heappop(events)
                self._ask(when_s, number)
            if self.has_work():
                self._step()
            elif events:
                # The clock is set, not advanced: a sum may round to a time before the event.
                self.live_s += self.num_live * (events[0][0] - self.now_s)
                self.now_s = events[0][0]
        return self

    def _push(self, when_s: float, session: int) -> None:
        self.num_events += 1
        heapq.heappush(self.events, (when_s, self.num_events, session))

    def _ask(self, when_s: float, number: int) -> None:
        """Submit the next request of session ``number``, which was due at ``when_s``."""
        place = self.next_turns[number]
        turn = self.turn(number, place)
        self.num_live += place == 0
        self.max_live = max(self.max_live, self.num_live)
        self._submit(turn, number, place, when_s)

    def _submit(self, turn: SessionTurn, number: int, place: int, when_s: float) -> None:
        """Queue a request, or refuse it if it is longer than the memory."""
        if len(turn.text) > self.manager.memory.max_request_len:
            self._refuse(number)
            return
        request = SimulatedRequest(turn, number, place, arrival=self.num_asked, arrival_s=when_s)
        self.num_asked += 1
        self.planner.add(request)

    def _refuse(self, number: int) -> None:
        self.num_refused += 1
        self._go_on(number)

    def _go_on(self, number: int, ended_id: str | None = None) -> None:
        """Schedule the next request of session ``number``, after its pause, if there is one.
        ``ended_id`` is that of the session in the planner."""
        self.next_turns[number] += 1
        pause_s = self.pause_s(number, self.next_turns[number])
        if pause_s is not None:
            self._push(self.now_s + pause_s, number)
            return
        self.num_live -= 1
        if self.tells_ends and ended_id is not None:
            self.planner.sessions.end(ended_id)

    def _step(self) -> None:
        planner, manager = self.planner, self.manager
        ends = planner.choose()
        order = sorted(ends.items(), key=lambda item: item[0].scheduled_len < item[0].prefill_len)
        is_calm = not manager.has_moves
        tasks = [
            (request, end)
            for request, end in order
            if planner.take_checkpoint_slots(request, end) is not None
        ]
        makes_room = manager.has_moves
        manager.take_step()
        manager.step.done()
        if not tasks:
            # After a step that only emptied slabs, the next one can take slots at once.
            if not makes_room:
                self._idle()
            return
        prefills, num_decodes, context = [], 0, 0
        for request, end in tasks:
            if request.scheduled_len < request.prefill_len:
                prefills.append((request.scheduled_len, end))
            else:
                num_decodes += 1
                context += end
        self._pass(self.times.step_seconds(prefills, num_decodes, context))
        is_calm &= not prefills and len(tasks) == len(planner.running)
        for request, end in tasks:
            planner.advance(request, end)
            if end == request.num_tokens:
                is_calm &= self._sample(request)
        if is_calm and planner.is_stuck:
            self._coast([request for request, _ in tasks], context)

    def _sample(self, request: SimulatedRequest) -> bool:
        """Commit the next token of ``request``. Returns False if it was the last one."""
        request.num_tokens += 1
        if request.first_token_s is None:
            request.first_token_s = self.now_s
        if request.num_tokens < request.max_len:
            return True
        self.planner.leave(request)
        request.finished_s = self.now_s
        self.answered.append(request)
        self._go_on(request.place, request.session.newest_id)
        return False

    def _coast(self, requests: Sequence[SimulatedRequest], context: int) -> None:
        """Take the steps in which ``requests`` decode and nothing else happens."""
        num_steps = min(request.num_quiet_steps for request in requests)
        until_s = self.planner.wakes_at_s if self.planner.waiting else None
        if self.events:
            until_s = min(self.events[0][0], until_s or self.events[0][0])
        count, num_decodes, step_seconds = 0, len(requests), self.times.step_seconds
        while count < num_steps and (until_s is None or self.now_s < until_s):
            count += 1
            context += num_decodes
            self._pass(step_seconds((), num_decodes, context))
        for request in requests:
            request.num_tokens += count
            request.computed_len += count
            request.scheduled_len += count

    def _idle(self) -> None:
        """Move the clock to the next event, because nothing can be computed."""
        times = (self.planner.wakes_at_s, self.events[0][0] if self.events else None)
        later = [time_s for time_s in times if time_s and time_s > self.now_s]
        if later:
            self._pass(min(later) - self.now_s)

    def _pass(self, seconds: float) -> None:
        self.now_s += seconds
        self.live_s += self.num_live * seconds


@dataclass(slots=True, eq=False)
class PeerRequest:
    """One request of a rebuilt system, and its times."""

    turn: SessionTurn
    place: int
    arrival_s: float
    served: PeerSession | None = None
    cached_len: int = 0
    computed_len: int = 0
    scheduled_s: float | None = None
    first_token_s: float | None = None
    losses: ClassVar[None] = None

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return self.turn.prompt_len

    @property
    def is_decoding(self) -> bool:
        """True if the whole prompt is computed."""
        return self.computed_len >= self.turn.prompt_len

    @property
    def num_left(self) -> int:
        """Tokens of the answer that are still to be decoded, after the first one."""
        return len(self.turn.text) - 1 - self.computed_len


class PeerLoop(LoopRun):
    """A run of a rebuilt system. Steps are those of the engine: a token of each decoding request,
    and prefills with the rest of ``token_budget``. A system matches and publishes a prompt when it
    is admitted, and its answer at the end."""

    def _build(self, cell: Scenario) -> None:
        self.peer = BaselineTarget(cell, unit=1).baseline
        self.waiting: deque[PeerRequest] = deque()
        self.running: list[PeerRequest] = []

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def _submit(self, turn: SessionTurn, number: int, place: int, when_s: float) -> None:
        self.waiting.append(PeerRequest(turn, number, when_s))

    def _admit(self) -> None:
        """Begin waiting requests in order. One that does not fit on its own is refused."""
        while self.waiting and len(self.running) < self.max_running:
            request = self.waiting[0]
            turn, place = request.turn, request.place
            prompt = turn.text[: turn.prompt_len]
            facts: dict[str, Any] = {"boundaries": turn.boundaries.positions, "session": place}
            is_told = self.tells_ends and self.pause_s(place, self.next_turns[place] + 1) is None
            facts["stop_reason"] = SESSION_END if is_told else turn.stop_reason
            facts["clock"] = lambda: self.now_s
            request.served = begin(self.peer, prompt, turn.namespace, **facts)
            if request.served is None and self.running:
                return
            self.waiting.popleft()
            if request.served is None:
                self._refuse(request.place)
                continue
            request.cached_len = request.computed_len = request.served.cached_len
            request.scheduled_s = self.now_s
            self.running.append(request)

    def _step(self) -> None:
        self._admit()
        decoding = [request for request in self.running if request.is_decoding]
        prefills: list[tuple[PeerRequest, int]] = []
        room = self.token_budget - len(decoding)
        for request in self.running:
            if not request.is_decoding and room > 0:
                end = min(request.prompt_len, request.computed_len + room)
                room -= end - request.computed_len
                prefills.append((request, end))
        count = 1
        if not prefills and decoding:  # until an answer ends or a session asks
            count = max(1, min(request.num_left for request in decoding))
        ranges = [(request.computed_len, end) for request, end in prefills]
        context = sum(request.computed_len for request in decoding)
        num_steps = 0
        while num_steps < count and (prefills or decoding):
            num_steps += 1
            context += len(decoding)
            self._pass(self.times.step_seconds(ranges, len(decoding), context))
            if self.events and self.events[0][0] <= self.now_s:
                break
        for request, end in prefills:
            request.computed_len = end
            if request.is_decoding:
                request.first_token_s = self.now_s
        for request in decoding:
            request.computed_len += num_steps
        for request in [one for one in self.running if one.is_decoding and one.num_left <= 0]:
            assert request.served is not None
            request.served.finish(request.turn.text[request.prompt_len :])
            self.running.remove(request)
            self.answered.append(request)
            self._go_on(request.place)


def run_closed_loop(trace: Trace, cell: Scenario) -> ClosedLoopRun:
    """Serve ``trace`` with the one cache, admission policy, rate and seed of ``cell``, and return
    the figures. ValueError if no request fits."""
    return figures_of(simulate_closed_loop(trace, cell), trace, cell)


def _describe_steps(cell: Scenario) -> str:
    """Describe the source of the times of steps in one line."""
    return describe_times(cell.step_times(cell.geometry())).replace("a prefill", "a step")


def figures_of(served: LoopRun, trace: Trace, cell: Scenario) -> ClosedLoopRun:
    """Return the figures of a finished run. RunFailed if no request fitted."""
    if not (answered := served.answered):
        num_tried = served.num_refused
        does_not_fit = f"no request fits in the memory ({num_tried} tried)"
        raise RunFailed(f"{trace.name}: {does_not_fit if num_tried else trace.is_empty_because}")
    [rate], [seed], limit_s = sizes(cell.rate, "rate"), seeds_of(cell), cell.ttft_limit_s
    asked_s, admitted_s, first_s = np.array(
        [(one.arrival_s, one.scheduled_s, one.first_token_s) for one in answered], np.float64
    ).T
    ttft_s = first_s - asked_s
    lost = [one.losses.kv_evicted + one.losses.checkpoint_evicted for one in answered if one.losses]
    p50_s, p99_s = np.percentile(ttft_s, (50, 99)).tolist()
    return ClosedLoopRun(
        trace_name=trace.name,
        admission=str(cell.admission),
        rate=rate,
        seed=seed,
        num_requests=len(ttft_s),
        num_refused=served.num_refused,
        prompt_tokens=sum(one.prompt_len for one in answered),
        cached_tokens=sum(one.cached_len for one in answered),
        lost_tokens=None if cell.baseline else sum(lost),
        ttft_mean_s=float(ttft_s.mean()),
        ttft_p50_s=p50_s,
        ttft_p99_s=p99_s,
        oldest_wait_s=float((admitted_s - asked_s).max()),
        limit_s=limit_s,
        goodput=float((ttft_s <= limit_s).sum()) / served.now_s,
        makespan_s=served.now_s,
        live_mean=served.live_s / served.now_s,
        live_most=served.max_live,
        token_budget=cell.token_budget,
        tells_ends=cell.tells_ends,
        config=identify(cell, trace.full_name, served.priority_classes)
        | {"starts": cell.starts, "max_running": cell.max_running, "times": _describe_steps(cell)},
    )


@dataclass(frozen=True, slots=True, repr=False)
class ClosedLoopResult(Runs):
    """All runs in closed loop over one trace: by cache, size, admission, rate and seed."""

    trace: str
    runs: tuple[ClosedLoopRun, ...]
    times: str
    failures: tuple[str, ...] = ()
    trace_notes: Sequence[str] = ()

    def __repr__(self) -> str:
        """Return one line: trace and number of runs."""
        return f"{type(self).__name__}({self.trace}: {len(self.runs)} runs)"

    def table(self) -> str:
        """Return a table per cache: a row per admission policy and rate, averaged over seeds."""
        tables = []
        for label, gib in dict.fromkeys((run.label, run.gib) for run in self.runs):
            chosen = [run for run in self.runs if (run.label, run.gib) == (label, gib)]
            first, rows = chosen[0], []
            figures, equal = dict[object, str](), dict[str, list[str]]()
            for admission, rate in dict.fromkeys((run.admission, run.rate) for run in chosen):
                same = [run for run in chosen if (run.admission, run.rate) == (admission, rate)]
                name = f"{admission}, {rate:g}"
                rows.append([name, *(metric.text(*same) for metric in LOOP_METRICS)])
                values = rate, *(metric.value(run) for metric in LOOP_METRICS for run in same)
                if (other := figures.setdefault(values, admission)) != admission:
                    equal.setdefault(f"{other} and {admission}", []).append(f"{rate:g}")
            requests = counted(first.num_requests, "request")
            model = first.config["model"]
            title = (
                f"{first.trace_name}, {model}, {gib:.3g} GiB, {label}: {requests} in closed loop"
            )
            notes = [f"goodput: requests a second with a TTFT of at most {first.limit_s:g} s"]
            notes += [
                f"equal, with one order of admission: {names} at {', '.join(rates)} sessions/s"
                for names, rates in equal.items()
            ]
            if any(run.admission.startswith("live:") and not run.tells_ends for run in chosen):
                kept = f"live:N: an ended session keeps its place for {KEPT_S:g} s"
                notes.append(f"{kept}, because clients do not tell its end (--tells-ends)")
            refused = max(run.num_refused for run in chosen)
            if refused:
                notes.append(f"left out: {counted(refused, 'request')} longer than the memory")
            notes.append(f"step times: {self.times}")
            seeds = len({run.seed for run in chosen})
            if seeds > 1:
                notes.append(
                    f"means of {seeds} seeds, which draw arrivals of the same sessions; most and "
                    "oldest wait: the largest"
                )
            header = ["admission, sessions/s", *(metric.title for metric in LOOP_METRICS)]
            tables.append("\n".join([title, text_table(header, rows), *notes]))
        notes = [*self._differences(), *uncharged_notes(self.runs)]
        return "\n".join(["\n\n".join(tables), *notes, *self.trace_notes, *self.failures])

    def _differences(self) -> list[str]:
        """Return a sentence per size, rate and admission policy of several seeds: the cache with
        the most hits, and its differences to the others, paired by seed, but to equal ones. Then a
        sentence per size, rate and cache on admission policies."""
        said, cells = list[str](), dict[tuple[str, float, float], dict[str, list[float]]]()
        for place, run in product((0, 1), self.runs):
            names = run.admission, run.label
            of_cell = cells.setdefault((names[place], run.gib, run.rate), {})
            of_cell.setdefault(names[1 - place], []).append(100 * run.token_hit_rate)
        for (same, gib, rate), rates in cells.items():
            first, *others = sorted(rates, key=lambda label: -fmean(rates[label]))
            others = [one for one in others if rates[one] != rates[first]]
            if others and {*map(len, rates.values())} == {len(rates[first])} != {1}:  # None failed.
                less = (
                    f"{paired(rates[first], rates[one])} points more than {one}" for one in others
                )
                said.append(f"{same}, {rate:g} at {gib:.3g} GiB: {first} hits {', '.join(less)}")
        return said

    def figure(
        self,
        path: str | Path | None = None,
        *,
        size: tuple[float, float] | None = None,
        title: bool | str = True,
        legend: bool = True,
    ) -> Figure:
        """Draw hits, times to first token and makespan over the rate, a line per cache.
        The figure is also written to ``path`` (PNG, SVG or PDF), if there is one. ``size``: width
        and height in inches; ``title=False`` leaves out title and notes; a text
        replaces the title; ``legend=False`` leaves out the legend."""
        return closed_loop_figure(self.runs, path, size, title, legend)


def closed_loop(
    trace: Scenario | str | Trace,
    *,
    processes: int = 1,
    ray: str | None = None,
    resume_from: str | Path | None = None,
    progress: Progress = None,
    **settings: object,
) -> ClosedLoopResult:
    """Serve the sessions of a trace with every cache, admission policy, rate and seed.

    Sessions arrive at a rate, and each request follows the answer and the pause before it. Requests
    are scheduled as in the engine. Arguments are those of ``simulate``. ``settings`` are fields of
    ``Scenario``: ``rate``, ``admission``, ``seeds``, ``token_budget`` and others; 16 GiB and 16
    running requests are the defaults. O(requests + steps) per run.

    >>> from hybridcache import closed_loop
    >>> result = closed_loop("short?head=20", gib=1, rate=4, admission="oldest")
    >>> [row["admission"] for row in result.to_dicts()]
    ['oldest']
    """
    asked = Scenario.of(trace, settings)
    asked.refuse(REPLAY_ONLY, "is of replays alone: leave it out in closed loop")
    opened, times = asked.opened(), _describe_steps(asked)
    admissions = named_policies(asked.admission, split=True)
    if not admissions:
        raise ValueError("nothing to simulate: no admission policy")
    for policy in admissions:
        make_admission(policy)
    points, _ = asked.points(opened, asked.page_size, CLOSED_LOOP_GIB)
    cells = [
        replace(cell, admission=policy, rate=rate, seeds=(seed,))
        for cell in replace(asked, trace=opened.full_name).cells(points)
        for policy in (["arrival"] if cell.baseline else admissions)
        for rate in sizes(asked.rate, "rate")
        for seed in seeds_of(asked)
    ]
    place: Plain = {"processes": processes, "ray": ray, "resume_from": resume_from}
    place |= {"kind": ClosedLoopRun, "progress": progress}
    runs, failures = run_grid(opened, cells, run_closed_loop, **place)
    return ClosedLoopResult(opened.name, runs, times, failures, opened.notes)
