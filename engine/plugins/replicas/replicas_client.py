"""Client for several replicas, with the interface of ``AsyncEngine``."""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from typing import Any

from engine.async_engine import NoSingleEngine, Question, RequestStream, ServedEngine
from engine.build import load_tokenizer_of
from engine.config import EngineConfig
from engine.errors import DuplicateId, EngineStopped, QueueFull, RequestError, StepFailed, WireError
from engine.plugins.replicas.fleet import Fleet
from engine.plugins.replicas.replica_output import Order, ReplicaAnswer, ReplicaFacts
from engine.requests.grammar import Grammar
from engine.requests.request import Intake
from engine.requests.spec import Prompt, RequestSpec
from engine.schedule.report import CacheReport, OffloadReport, PoolReport, TierReport
from engine.text.bounded_memory import BoundedMemory
from engine.text.outputs import FinishReason, RequestOutput
from engine.text.tokenizer import Tokenizer
from hybridcache.routing.outbox import EventsLost
from hybridcache.routing.protocol import RouteRequest
from hybridcache.scheduling.planner import AdmissionReport


def summed(reports: Sequence[CacheReport], gone: Mapping[str, int]) -> CacheReport:
    """Return one report with sums of sizes and counts, and with rates of the sums.

    Settings are those of the first report. ``gone`` has the ``usage`` of replicas that have ended,
    so that counters never fall. Raises ValueError if there is no report.
    """
    if not reports:
        raise ValueError("no replica is up")
    usage = {
        name: gone.get(name, 0) + sum(each.usage[name] for each in reports)
        for name in reports[0].usage
    }
    return replace(
        reports[0],
        bytes=_pool([each.bytes for each in reports]),
        kv=_pool([each.kv for each in reports]),
        slots=_pool([each.slots for each in reports]),
        num_running=sum(each.num_running for each in reports),
        num_waiting=sum(each.num_waiting for each in reports),
        queue=_queue([each.queue for each in reports]),
        token_hit_rate=_rate(usage["cached_tokens"], usage["prompt_tokens"]),
        request_hit_rate=_rate(usage["hits"], usage["requests"]),
        usage=usage,
        offload=_offload([each.offload for each in reports if each.offload is not None]),
        draft_index_bytes=sum(each.draft_index_bytes for each in reports),
    )


def _queue(reports: Sequence[AdmissionReport]) -> AdmissionReport:
    """Add up sessions and take the longest wait; the figures of the policy are those of the
    first."""
    return AdmissionReport(
        sum(each.live_sessions for each in reports),
        sum(each.waiting_sessions for each in reports),
        max(each.oldest_wait_s for each in reports),
        reports[0].figures,
    )


def _pool(pools: Sequence[PoolReport]) -> PoolReport:
    names = [field.name for field in fields(PoolReport)]
    return PoolReport(**{name: sum(getattr(pool, name) for pool in pools) for name in names})


def _offload(reports: Sequence[OffloadReport]) -> OffloadReport | None:
    """Add up the tiers. The folder is shared by the replicas of one machine: the report of the
    first replica with a problem is used, or the first report."""
    if not reports:
        return None
    names = [field.name for field in fields(TierReport) if field.name != "tier"]
    tiers = tuple(
        replace(same[0], **{name: sum(getattr(tier, name) for tier in same) for name in names})
        for same in zip(*(report.tiers for report in reports), strict=True)
    )
    folders = [report.folder for report in reports if report.folder is not None]
    folders.sort(key=lambda folder: folder.problem is None)
    return OffloadReport(tiers, folders[0] if folders else None)


def _rate(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


CALL_S = 30.0
"""Maximum seconds that a replica may take to report."""
RETRY_S = 0.2
FIRST_CHOICES_BYTES = 1 << 20
"""Maximum bytes of ids of first choices, about 7,000 pairs."""
MAX_DEATHS = 3
"""Number of replicas that one request may lose before its first token: the request itself may be
the reason that they die."""
logger = logging.getLogger(__name__)


class FleetEngine(ServedEngine):
    """Several engines. ``submit``, ``drain`` and the coroutines belong to one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        handle: Any,
        fleet: Fleet,
        facts: ReplicaFacts,
        model_name: str,
        shut_down: Callable[[], None],
        is_death: Callable[[Exception], bool],
    ) -> None:
        """``handle`` is Ray Serve's, of ``EngineReplica``. ``is_death`` returns True for an error
        that means that a replica is gone, and False for an error of the replica itself."""
        self.config = config
        self.facts = facts
        self.max_model_len = facts.max_model_len
        self.model_name = model_name
        self.tokenizer: Tokenizer | None = load_tokenizer_of(config, facts.vocab_size)
        self._handle, self._fleet = handle, fleet
        self._shut_down, self._is_death = shut_down, is_death
        self._intake = Intake(
            config,
            self.tokenizer,
            vocab_size=facts.vocab_size,
            max_model_len=facts.max_model_len,
        )
        self.sampling_defaults = self._intake.sampling_defaults
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._numbers = itertools.count()
        self._first_choices = BoundedMemory[str, str](FIRST_CHOICES_BYTES)
        """Id given by the client -> id at the replicas, for first choices, also ended ones."""
        self._waiting: set[str] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self._reports: dict[str, CacheReport] = {}
        self._gone: Counter[str] = Counter()
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_open = True

    @property
    def is_alive(self) -> bool:
        """True if at least one replica is up."""
        return self._is_open and bool(self._fleet.members)

    def start(self) -> None:
        """Start to follow the events of all current and later replicas."""
        self._loop = asyncio.get_running_loop()
        self._fleet.on_change = self._members_changed
        self._follow_members()

    def _members_changed(self) -> None:
        """React to replicas that joined or left. May be called from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._follow_members)

    def _follow_members(self) -> None:
        """Follow the events of each replica while it is up, and stop following those that are
        not."""
        members = self._fleet.members
        for replica in members if self._is_open else ():
            if replica not in self._followers:
                self._followers[replica] = asyncio.ensure_future(self._follow(replica))
        for replica, follower in self._followers.items():
            if replica not in members:
                follower.cancel()

    async def _follow(self, replica: str) -> None:
        due = 0
        try:
            while replica in self._fleet.members:
                follow = self._handle.options(method_name="events", stream=True)
                batches = follow.remote(Order(replica=replica, sequence=due))
                try:
                    async for batch in batches:
                        self._fleet.on_events(replica, batch)
                        due = batch.sequence + 1
                except EventsLost:
                    batches.cancel()
                    due = 0  # A mirror that is inconsistent starts again.
                except asyncio.CancelledError:
                    batches.cancel()
                    raise
                except Exception as error:  # Ray raises errors of many types while a replica ends.
                    logger.info("the events of replica %s ended: %s", replica, error)
                    await asyncio.sleep(RETRY_S)
        finally:
            del self._followers[replica]

    def compile(self, grammar: Grammar) -> None:
        """See ``Engine.compile``. Replicas compile the grammar again when they receive it."""
        self._intake.grammars.compile(grammar)

    def submit(self, prompt: Prompt | RequestSpec) -> RequestStream:
        """See ``AsyncEngine.submit``."""
        if not self._is_open:
            raise EngineStopped("The engine is stopping and takes no more requests.")
        asked = RequestSpec.of(prompt, None, {})
        request = self._intake.prepare(asked)
        if len(self._waiting) >= self.config.max_queue:
            raise QueueFull(self.config.max_queue)
        request_id = request.request_id
        if request_id in self._tasks:
            raise DuplicateId(request_id)
        first = request.report()
        tokens = first.prompt_token_ids.copy()
        # A replica may still end an earlier request of this id.
        unique_id = f"{request_id}#{next(self._numbers)}"
        spec = replace(
            asked,
            prompt=tokens,
            sampling=replace(request.params, seed=request.seed),
            boundaries=request.boundaries,
            request_id=unique_id,
            choice_of=self._first_choice(asked),
        )
        route = RouteRequest(
            unique_id, tuple(tokens.tolist()), spec.namespace, boundaries=tuple(spec.boundaries)
        )
        order, answer = Order(unique_id, spec, route), ReplicaAnswer(request_id, tokens)
        stream = RequestStream(request_id, partial(self._abort, order))
        if asked.choice_of is None:
            num_bytes = sys.getsizeof(request_id) + sys.getsizeof(unique_id)
            self._first_choices.put(request_id, unique_id, num_bytes)
        self._waiting.add(unique_id)
        task = asyncio.ensure_future(self._follow_answer(order, answer, stream))
        self._tasks[request_id] = task
        task.add_done_callback(
            lambda task: self._settle(task, order, answer.aborted(first), stream)
        )
        return stream

    def _first_choice(self, asked: RequestSpec) -> str | None:
        """Return the id at the replicas of the first choice of an answer, or None if ``asked`` is
        the first one."""
        if asked.choice_of is None:
            return None
        return self._first_choices.get(asked.choice_of) or asked.choice_of

    def _abort(self, order: Order, request_id: str, reason: FinishReason) -> None:
        """End the request of ``order``. Unless the client left, its replica ends it, so that both
        count the same ``reason`` and its last output is sent."""
        task = self._tasks.get(request_id)
        if task is None:
            return
        if reason == "abort":
            task.cancel()
            return
        ending = asyncio.ensure_future(self._end_early(replace(order, spec=None, reason=reason)))
        self._endings.add(ending)
        ending.add_done_callback(lambda ending: self._ended_early(ending, task))

    async def _end_early(self, order: Order) -> None:
        # Its route leads to the replica that has the request.
        await asyncio.wait_for(self._handle.options(method_name="end").remote(order), CALL_S)

    def _ended_early(self, ending: asyncio.Task[None], task: asyncio.Task[None]) -> None:
        self._endings.discard(ending)
        if ending.cancelled() or ending.exception() is not None:
            task.cancel()

    async def _follow_answer(
        self, order: Order, answer: ReplicaAnswer, stream: RequestStream
    ) -> None:
        """Pass the outputs of one request to ``stream``. If its replica dies before the first
        token, the request starts again on another one."""
        generate = self._handle.options(method_name="generate", stream=True)
        num_deaths = 0
        while True:
            self._fleet.expect(order.request_id)
            outputs = generate.remote(order)
            try:
                async for output in outputs:
                    if isinstance(output, WireError):
                        self._end(order, stream, RequestError.from_wire(output))
                        return
                    if not answer.num_tokens and output.new_token_ids:
                        self._waiting.discard(order.request_id)
                        self._fleet.prefilled(order.request_id)
                    whole = answer.add(output)
                    if not whole.is_finished:
                        stream.put(whole)
                    else:
                        self._end(order, stream, whole)
                return
            except asyncio.CancelledError:
                outputs.cancel()
                raise
            except Exception as error:
                if not self._is_death(error):
                    self._end(order, stream, StepFailed(_cause(error)))
                    return
                num_deaths += 1
                if answer.num_tokens or num_deaths == MAX_DEATHS:
                    self._end(order, stream, StepFailed(answer.broken_off))
                    return
                logger.warning("request %s lost its replica and starts again", stream.request_id)
                self._fleet.ended(order.request_id)

    def _settle(
        self, task: asyncio.Task[None], order: Order, aborted: RequestOutput, stream: RequestStream
    ) -> None:
        """End a request that its ``task`` did not end, because it was cancelled or failed."""
        if self._tasks.get(stream.request_id) is not task:
            return
        last: RequestOutput | RequestError = aborted
        if not task.cancelled():
            last = StepFailed("its replica ended before the answer was done")
            if task.exception() is not None:
                logger.error("A request failed.", exc_info=task.exception())
        elif not self._is_open:
            last = EngineStopped("The engine stopped before the answer was done.")
        self._end(order, stream, last)

    def _end(self, order: Order, stream: RequestStream, last: RequestOutput | RequestError) -> None:
        """Send the last output of a request, and release its id."""
        del self._tasks[stream.request_id]
        self._fleet.ended(order.request_id)
        self._waiting.discard(order.request_id)
        stream.put(last)

    async def _each(self, method: str) -> dict[str, Any]:
        """Return the results of a method, for each replica that is up and responds."""
        asked = {
            replica: self._handle.options(method_name=method).remote(Order(replica=replica))
            for replica in self._fleet.members
        }
        found = {}
        for replica, response in asked.items():
            try:
                found[replica] = await asyncio.wait_for(response, CALL_S)
            except Exception as error:  # Ray raises errors of many types while a replica ends.
                logger.info("replica %s did not answer %s: %s", replica, method, error)
        if not found:
            raise EngineStopped("No replica answers.")
        return found

    async def ask(self, what: Question, *arguments: Any) -> Any:
        """Query every replica and return the sum. Raises EngineStopped if none responds, and
        NoSingleEngine for a view of a tree.

        Counts of ended replicas are kept. ``end_session`` has no effect: only the last request of a
        session declares its end. Nor has ``stop_accepting``, because replicas have no role.
        """
        match what:
            case "report":
                found = await self._each("report")
                members = self._fleet.members
                for replica in [each for each in self._reports if each not in members]:
                    self._gone.update(self._reports.pop(replica).usage)
                self._reports |= {each: one for each, one in found.items() if each in members}
                return summed(list(found.values()), self._gone)
            case "cache_view":
                replicas = await self._each("view")
                return (await self.report()).as_dict() | {"replicas": replicas}
            case "reset_prefix_cache":
                await self._each("reset")
            case "watch":
                raise NoSingleEngine(
                    "This page shows the cache of one engine. With replicas it shows only sums; "
                    "/v1/cache shows each replica."
                )

    async def drain(self) -> None:
        """Refuse new requests, finish the running ones and end the replicas."""
        self._is_open = False
        while self._tasks:
            await asyncio.wait(tuple(self._tasks.values()))
        for follower in tuple(self._followers.values()):
            follower.cancel()
        await asyncio.to_thread(self._shut_down)

    def stop(self) -> None:
        """Fail unfinished requests with EngineStopped. May be called from any thread."""
        self._is_open = False
        if self._loop is not None and not self._loop.is_closed():
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._cancel_all)

    def _cancel_all(self) -> None:
        for task in tuple(self._tasks.values()):
            task.cancel()


def _cause(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return str(cause).splitlines()[0] if str(cause) else type(cause).__name__
