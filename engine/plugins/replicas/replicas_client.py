"""Connection of a front end to several replicas."""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

from msgspec import structs

from engine.async_engine import AsyncEngine, EngineChannel
from engine.config import EngineConfig
from engine.engine import grammar_rules, load_tokenizer_of
from engine.errors import STOPPED, EngineStopped, RequestError, StepFailed
from engine.messages import (
    Abort,
    AskCacheView,
    AskReport,
    AskView,
    Compile,
    EndEngine,
    OpenView,
    Outputs,
    Question,
    Reply,
    ResetCache,
    ToEngine,
)
from engine.plugins.replicas.fleet import Fleet, Order, ReplicaFacts
from engine.requests.request import RequestSpec
from engine.schedule.report import CacheReport
from engine.text.bounded_memory import BoundedMemory
from engine.text.outputs import RequestOutput
from hybridcache.export.events import EventsLost
from hybridcache.geometry.units import counted


def summed(reports: Sequence[CacheReport], gone: Mapping[str, int]) -> CacheReport:
    """Return one report with sums of sizes and counts, and with rates of the sums.

    Settings are those of the first report. ``gone`` has the ``usage`` of replicas that have ended,
    so that counters never fall. Raises ValueError if there is no report.
    """
    if not reports:
        raise ValueError("no replica is up")
    total = cast("CacheReport", _sum(reports))
    total.usage.update((name, total.usage[name] + gone.get(name, 0)) for name in total.usage)
    usage, first = total.usage, reports[0]
    return replace(
        total,
        grid=first.grid,
        page_size=first.page_size,
        queue=replace(
            total.queue,
            oldest_wait_s=max(each.queue.oldest_wait_s for each in reports),
            figures=first.queue.figures,
        ),
        token_hit_rate=_rate(usage["cached_tokens"], usage["prompt_tokens"]),
        request_hit_rate=_rate(usage["hits"], usage["requests"]),
    )


def _sum(values: Sequence[Any]) -> Any:
    """Add up numbers, also inside of other values; take the first of anything else."""
    first, kind = values[0], cast("Any", type(values[0]))
    if isinstance(first, int | float):
        return sum(values)
    if isinstance(first, dict):
        return {name: _sum([each[name] for each in values]) for name in first}
    if is_dataclass(first):
        columns = [[getattr(each, field.name) for each in values] for field in fields(first)]
        return kind(*map(_sum, columns))
    if isinstance(first, tuple) and first and is_dataclass(first[0]):
        return tuple(_sum(same) for same in zip(*values, strict=True))
    return first


def _rate(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


CALL_S = 30.0
"""Maximum seconds that a replica may take to report."""
RETRY_S = 0.2
FIRST_CHOICES_BYTES = 1 << 20
"""Maximum bytes of ids of first choices, about 7,000 pairs."""
MAX_DEATHS = 3
"""Number of replicas that one request may lose: the request itself may be the reason that they
die."""
logger = logging.getLogger(__name__)


class Progress:
    """The outputs of one request so far, as its replica sent them.

    A request whose replica died is computed again, with the same seed. The part that was sent
    already is compared and left out.
    """

    def __init__(self, request_id: str) -> None:
        """``request_id`` replaces the id in the outputs."""
        self.request_id = request_id
        self._tokens: list[int] = []
        self._num_chars = 0
        self._at_token = self._at_char = 0
        """Tokens and characters that the present replica has sent."""
        self._last = RequestOutput(request_id)

    @property
    def has_begun(self) -> bool:
        """True if the present replica has sent a token."""
        return self._at_token > 0

    def restart(self) -> None:
        """Expect the answer from its beginning."""
        self._at_token = self._at_char = 0

    def add(self, delta: RequestOutput) -> RequestOutput | None:
        """Return the new part of the next output, with the id of the front end, or None if a
        repeated token is another one. O(new tokens)."""
        tokens, text = delta.new_token_ids, delta.new_text
        repeated = self._tokens[self._at_token : self._at_token + len(tokens)]
        if repeated != list(tokens[: len(repeated)]):
            return None
        num_chars = min(len(text), self._num_chars - self._at_char)
        self._at_token += len(tokens)
        self._at_char += len(text)
        new = tokens[len(repeated) :]
        self._tokens += new
        self._num_chars = max(self._num_chars, self._at_char)
        self._last = structs.replace(
            delta,
            request_id=self.request_id,
            new_token_ids=new,
            new_text=text[num_chars:],
            new_logprobs=delta.new_logprobs[len(repeated) :],
            num_tokens=len(self._tokens),
            num_chars=self._num_chars,
        )
        return self._last

    @property
    def broken_off(self) -> str:
        """Message for a client after the replica of its request died."""
        return (
            f"the replica that computed it died after {counted(len(self._tokens), 'token')} of the "
            "answer; send the request again"
        )

    def aborted(self) -> RequestOutput:
        """Return the last output of an aborted answer."""
        return structs.replace(
            self._last, new_token_ids=(), new_text="", new_logprobs=(), finish_reason="abort"
        )


class FleetChannel(EngineChannel):
    """Connection to several engines. Belongs to one event loop, except ``stop`` and messages to
    compile."""

    def __init__(
        self,
        config: EngineConfig,
        handle: Any,
        fleet: Fleet,
        facts: ReplicaFacts,
        shut_down: Callable[[], None],
        is_death: Callable[[Exception], bool],
    ) -> None:
        """``handle`` is Ray Serve's, of ``EngineReplica``. ``is_death`` returns True for an error
        that means that a replica is gone, and False for an error of the replica itself."""
        self.config, size = config, facts.engine.vocab_size
        self.tokenizer = load_tokenizer_of(config, size)
        self.facts = facts.engine
        self._compile = grammar_rules(self.tokenizer, size)
        self._compiling = asyncio.Lock()
        """Held while a grammar is compiled, so that an equal one that waits is remembered."""
        self._handle, self._fleet = handle, fleet
        self._tell_replica = handle.options(method_name="tell")
        self._shut_down, self._is_death = shut_down, is_death
        self._orders: dict[str, tuple[Order, asyncio.Task[None]]] = {}
        """Order and task of each request in progress, by the front end's id."""
        self._numbers = itertools.count()
        self._first_choices = BoundedMemory[str, str](FIRST_CHOICES_BYTES)
        """Id given by the client -> id at the replicas, for first choices, also ended ones."""
        self._waiting: set[str] = set()
        self._errands: set[asyncio.Task[None]] = set()
        """Questions and early ends in progress."""
        self._views: dict[int, tuple[str, int]] = {}
        """Number of each open view -> replica, and number of the view there."""
        self._reports: dict[str, CacheReport] = {}
        self._gone: Counter[str] = Counter()
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_open = True
        self._num_up = 0

    @property
    def is_alive(self) -> bool:
        """True if at least one replica is up."""
        return self._is_open and bool(self._fleet.members)

    @property
    def pid(self) -> None:
        return None

    @property
    def num_queued(self) -> int:
        return len(self._waiting)

    def connect(self, front: AsyncEngine) -> None:
        self._front = front

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
        """Follow the events of each replica while it is up."""
        members = self._fleet.members
        if not self._is_open:
            members = ()
        for replica in members:
            if replica not in self._followers:
                self._followers[replica] = asyncio.ensure_future(self._follow(replica))
        for replica, follower in self._followers.items():
            if replica not in members:
                follower.cancel()
        num_up = len(members)
        if self._is_open and self._num_up not in (0, num_up):
            change = "ended, and Ray starts another" if num_up < self._num_up else "joined"
            logger.warning("A replica %s; replicas that are up: %d.", change, num_up)
        self._num_up = num_up

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

    def send(self, message: ToEngine) -> None:
        match message:
            case RequestSpec():
                self._submit(message)
            case Abort():
                self._abort(message)
            case EndEngine():
                pass
            case _:
                self._run(self._answer(message))

    def _run(self, errand: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(errand)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)
        return task

    def _submit(self, asked: RequestSpec) -> None:
        request_id, sampling, number = asked.request_id, asked.sampling, next(self._numbers)
        assert request_id is not None and sampling is not None
        # A replica may still end an earlier request of this id.
        unique_id = f"{request_id}#{number}"
        if sampling.seed is None:
            sampling = sampling.with_seed(self.config.seed + number)
        first_choice = asked.choice_of
        if first_choice is not None:
            first_choice = self._first_choices.get(first_choice) or first_choice
        spec = structs.replace(
            asked,
            sampling=sampling,
            request_id=unique_id,
            choice_of=first_choice,
            arrival_s=None,
        )
        order = Order(unique_id, spec)
        if asked.choice_of is None:
            num_bytes = sys.getsizeof(request_id) + sys.getsizeof(unique_id)
            self._first_choices.put(request_id, unique_id, num_bytes)
        self._waiting.add(unique_id)
        progress = Progress(request_id)
        task = asyncio.ensure_future(self._follow_answer(order, progress))
        self._orders[request_id] = order, task
        task.add_done_callback(lambda task: self._settle(task, order, progress))

    def _abort(self, message: Abort) -> None:
        """End a request. Unless the client left, its replica ends it, so that both count the same
        reason and its last output is sent."""
        found = self._orders.get(message.request_id)
        if found is None:
            return
        order, task = found
        if message.reason == "abort":
            task.cancel()
            return
        # With its spec, so that a request that is not placed yet goes to the same replica.
        early = Abort(order.request_id, message.reason)
        ending = self._run(self._tell(replace(order, message=early)))
        ending.add_done_callback(
            lambda ending: task.cancel() if ending.cancelled() or ending.exception() else None
        )

    async def _tell(self, order: Order) -> Any:
        """Return the reply of a replica to the message of ``order``."""
        return await asyncio.wait_for(self._tell_replica.remote(order), CALL_S)

    async def _follow_answer(self, order: Order, progress: Progress) -> None:
        """Pass on the outputs of one request. If its replica dies, the request starts again on
        another one, which repeats what was sent already."""
        generate = self._handle.options(method_name="generate", stream=True)
        num_deaths = 0
        while True:
            self._fleet.expect(order.request_id)
            outputs = generate.remote(order)
            try:
                async for output in outputs:
                    if not progress.has_begun and output.new_token_ids:
                        self._waiting.discard(order.request_id)
                        self._fleet.prefilled(order.request_id)
                    whole = progress.add(output)
                    if whole is None:
                        outputs.cancel()
                        self._fail(order, progress, StepFailed(progress.broken_off))
                        return
                    if output.finish_reason is not None:
                        self._end(order, progress, whole)
                        return
                    if whole.new_token_ids or whole.new_text:
                        self._front.receive(Outputs(0, 0, (whole,)))
                return
            except asyncio.CancelledError:
                outputs.cancel()
                raise
            except Exception as error:
                if not self._is_death(error):
                    self._fail(order, progress, StepFailed(_cause(error)))
                    return
                num_deaths += 1
                if num_deaths == MAX_DEATHS:
                    self._fail(order, progress, StepFailed(progress.broken_off))
                    return
                logger.warning("request %s lost its replica and starts again", progress.request_id)
                self._fleet.ended(order.request_id)
                progress.restart()

    def _settle(self, task: asyncio.Task[None], order: Order, progress: Progress) -> None:
        """End a request that its ``task`` did not end, because it was cancelled or failed."""
        if self._orders.get(progress.request_id) != (order, task):
            return
        if not task.cancelled():
            if task.exception() is not None:
                logger.error("A request failed.", exc_info=task.exception())
            error: RequestError = StepFailed("its replica ended before the answer was done")
            self._fail(order, progress, error)
        elif not self._is_open:
            self._fail(order, progress, EngineStopped(STOPPED))
        else:
            self._end(order, progress, progress.aborted())

    def _fail(self, order: Order, progress: Progress, error: RequestError) -> None:
        self._end(order, progress, RequestOutput.failed(progress.request_id, error))

    def _end(self, order: Order, progress: Progress, last: RequestOutput) -> None:
        """Send the last output of a request, and release its id. Does nothing if it has ended."""
        found = self._orders.get(progress.request_id)
        if found is None or found[0] is not order:  # Another request may have this id by now.
            return
        del self._orders[progress.request_id]
        self._fleet.ended(order.request_id)
        self._waiting.discard(order.request_id)
        self._front.receive(Outputs(0, 0, (last,)))

    async def _each(self, question: Question) -> dict[str, Any]:
        """Return the replies to ``question``, for each replica that is up and responds."""
        asked = {
            replica: self._tell_replica.remote(Order(replica=replica, message=question))
            for replica in self._fleet.members
        }
        found = {}
        for replica, response in asked.items():
            try:
                found[replica] = await asyncio.wait_for(response, CALL_S)
            except Exception as error:  # Ray raises errors of many types while a replica ends.
                logger.info("replica %s did not answer %s: %s", replica, question, error)
        if not found:
            raise EngineStopped("No replica answers.")
        return found

    async def _answer(self, question: Question) -> None:
        try:
            reply = Reply(question.number, await self._value(question))
        except Exception as error:
            reply = Reply(question.number, error=RequestError.of(error).to_wire())
        self._front.receive(reply)

    async def _value(self, question: Question) -> Any:
        """Query every replica and return the sum, or one replica for a view. Raises EngineStopped
        if none responds.

        Counts of ended replicas are kept. ``EndSession`` has no effect: only the last request of a
        session declares its end. Nor has ``StopAccepting``, because replicas have no role.
        """
        match question:
            case Compile():  # Replicas compile the grammar again when they receive it.
                async with self._compiling:
                    await asyncio.to_thread(self._compile, question.grammar)
            case AskReport():
                return await self._report(question)
            case AskCacheView():
                replicas = await self._each(question)
                return (await self._report(AskReport())).as_dict() | {"replicas": replicas}
            case ResetCache():
                await self._each(question)
            case OpenView():
                return await self._open_view(question)
            case AskView():
                return await self._ask_view(question)
        return None

    async def _open_view(self, question: OpenView) -> int:
        """Open a view of one replica. Raises ValueError if that one is not up."""
        members = self._fleet.members
        if not 1 <= question.replica <= len(members):
            raise ValueError(f"Replica {question.replica} is not up: there are {len(members)}.")
        replica = members[question.replica - 1]
        number = next(self._numbers)
        self._views[number] = replica, await self._ask(replica, question)
        return number

    async def _ask_view(self, question: AskView) -> Any:
        """Pass a question about a view on to its replica."""
        replica, view = self._views[question.view]
        if question.topic == "close":
            del self._views[question.view]
        found = await self._ask(replica, structs.replace(question, view=view))
        if question.topic == "whole":
            members = self._fleet.members
            place = members.index(replica) + 1 if replica in members else 0
            found["meta"] |= {"replica": place, "num_replicas": len(members)}
        return found

    async def _ask(self, replica: str, question: Question) -> Any:
        """Return one replica's reply. Raises EngineStopped if it is gone."""
        try:
            return await self._tell(Order(replica=replica, message=question))
        except RequestError:
            raise
        except Exception as error:  # Ray raises errors of many types while a replica ends.
            raise EngineStopped(f"Replica {replica} does not answer: {_cause(error)}") from error

    async def _report(self, question: AskReport) -> CacheReport:
        found = await self._each(question)
        members = self._fleet.members
        for replica in [each for each in self._reports if each not in members]:
            self._gone.update(self._reports.pop(replica).usage)
        self._reports |= {each: one for each, one in found.items() if each in members}
        return summed(list(found.values()), self._gone)

    async def drain(self) -> None:
        """Finish the running requests and end the replicas."""
        self._is_open = False
        while self._orders:
            await asyncio.wait([task for _, task in self._orders.values()])
        for follower in tuple(self._followers.values()):
            follower.cancel()
        await asyncio.to_thread(self._shut_down)
        self._front.closed(None)

    def stop(self) -> None:
        """Fail unfinished requests with EngineStopped. May be called from any thread."""
        self._is_open = False
        if self._loop is not None and not self._loop.is_closed():
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._cancel_all)

    def _cancel_all(self) -> None:
        for _, task in tuple(self._orders.values()):
            task.cancel()


def _cause(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return str(cause).splitlines()[0] if str(cause) else type(cause).__name__
