"""Several replicas, which are actors of Ray, behind one front end: their start, the connection to
them, and the choice of one for each request."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from msgspec import structs

from engine.config import ConfigError, EngineConfig
from engine.engine import Engine, grammar_rules, load_tokenizer_of
from engine.errors import STOPPED, EngineStopped, RequestError, StepFailed
from engine.front.async_engine import AsyncEngine, EngineChannel, RequestStream, ThreadChannel
from engine.front.server.settings import ServerConfig
from engine.front.worker.screen import screen_rows, screen_text
from engine.messages import (
    Abort,
    Alive,
    Ask,
    AskView,
    Compile,
    EndEngine,
    EngineFacts,
    OpenView,
    Outputs,
    Question,
    Reply,
    ToEngine,
)
from engine.models import read_model
from engine.requests.request import RequestSpec, SamplingParams
from engine.schedule.report import CacheReport
from engine.text.answers import FinishReason, RequestOutput
from engine.weights.hub import resolve_config
from hybridcache.adapters.routing.outbox import EventBatch, Outbox
from hybridcache.adapters.routing.protocol import ReplicaSpec, Router, RouteRequest
from hybridcache.adapters.routing.registry import find_router
from hybridcache.command.signals import end_by_exception
from hybridcache.geometry.times import MeasuredTimes
from hybridcache.policies.registry import parse_placement

TRIAL_TOKENS = 512
"""Length of the prompt for the measurement at the start."""
ALIVE_S = 2.0
"""Interval in which the reader of events learns that the engine has ended."""
MAX_BATCHES = 1 << 20
"""Number of batches of events that are stored for their reader. A slower one loses the replica."""
Facts = tuple[EngineFacts, ReplicaSpec, list[tuple[str, str]]]
"""Facts about an engine for the server and its router, and rows of its start screen."""


class EngineReplica:
    """Computes answers and reports cache events."""

    def __init__(self, config: EngineConfig) -> None:
        self._engine = Engine(config)
        if config.warm_up:
            self._engine.prepare_grammars()
        self._times = self._timed()
        self._engine.reset_prefix_cache()
        self._engine.cache.stats.clear()
        self._outbox = Outbox(self._engine.cache, MAX_BATCHES)
        self._outbox.restart()  # With a first batch, which says that this replica is up.
        self._news = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        """Event loop of the reader of events."""
        self._engine.observers.append(lambda report: self._flush())
        self._async = AsyncEngine(self._engine)
        channel = self._async.channel
        assert isinstance(channel, ThreadChannel)
        self._host = channel.host
        self._async.start()

    def _timed(self) -> MeasuredTimes:
        """Time a prefill, the second of two. Others take a time in proportion to their length."""
        length = min(TRIAL_TOKENS, self._engine.max_model_len - 1)
        for first in (0, 1):
            prompt = np.arange(first, first + length) % self._engine.runner.vocab_size
            start = time.perf_counter()
            self._engine.generate([prompt], SamplingParams(max_tokens=1))
        return MeasuredTimes((0,), (0, length), ((0.0, time.perf_counter() - start),))

    def _flush(self) -> None:
        """Publish the events since the last call. Called in the engine's thread."""
        if self._outbox.flush() and self._loop is not None:
            self._loop.call_soon_threadsafe(self._news.set)

    async def facts(self, address: str) -> Facts:
        """Return the facts of this replica, behind a server at ``address``."""
        memory, cache = self._engine.runner.memory, self._engine.cache
        report, rules = await self._async.report(), self._engine.config.checkpoints
        spec = ReplicaSpec(
            self._times,
            page_size=cache.page_size,
            grid=cache.grid,
            kv_bytes=memory.row_bytes,
            state_bytes=memory.state_bytes,
            capacity_bytes=report.bytes.total,
            stateful=memory.is_stateful,
            placement=parse_placement(",".join(rules)) if memory.is_stateful else None,
        )
        rows = screen_rows(self._engine, address)
        rows[1:1] = [("prefill", f"{1 / self._times.seconds(0, 1):,.0f} tokens/s, measured")]
        return self._async.facts, spec, rows

    async def generate(self, spec: RequestSpec) -> AsyncIterator[RequestOutput]:
        """Yield outputs without the prompt and without earlier tokens, which the server has.

        An error of the request is yielded last. The request ends if the reader stops.
        """
        assert spec.request_id is not None
        stream: RequestStream | None = None
        is_covered = False
        try:
            stream = self._async.submit_valid(spec, RequestStream(self._async.abort, adds=False))
            async for output in stream:
                if not is_covered and output.new_token_ids:
                    is_covered = True
                    self._outbox.cover(spec.request_id)
                    self._host.call_soon(self._flush)
                yield output
        except Exception as error:
            yield RequestOutput.failed(spec.request_id, RequestError.of(error))
        finally:
            if stream is not None:
                stream.abort()

    async def events(self) -> AsyncIterator[EventBatch]:
        """Yield the changes of the cache as they occur, for one reader, until the engine ends. The
        first batch describes the whole cache."""
        self._loop = asyncio.get_running_loop()
        due = 0
        while self._async.is_alive:
            self._news.clear()
            batches = self._outbox.since(due)
            if batches is None:
                raise RuntimeError("the router has missed events")
            for batch in batches:
                yield batch
                due = batch.sequence + 1
            if not batches:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), ALIVE_S)

    async def tell(self, message: Question | Abort) -> object:
        """Pass a message to the engine, and return the reply to a question."""
        if isinstance(message, Abort):
            # The last output of the request follows the others.
            self._async.abort(message.request_id, message.reason)
            return None
        if isinstance(message, Ask) and message.topic in ("report", "cache_view"):
            return await (self._async.report if message.topic == "report" else self._async.view)()
        reply = await self._async.ask(message)
        self._host.call_soon(self._flush)  # The question may have emptied the cache.
        return reply


OF_EACH = ("grid", "page_size", "figures")
"""Fields of reports that are equal in all replicas, or cannot be added."""


def summed(reports: Sequence[CacheReport], gone: Counter[str]) -> CacheReport:
    """Return one report with sums of sizes and counts, and with rates of the sums. ``gone`` has the
    ``usage`` of replicas that have ended, so that counters never fall."""
    total = cast("CacheReport", _sum(reports))
    usage = {name: count + gone[name] for name, count in total.usage.items()}
    oldest_wait_s = max(each.queue.oldest_wait_s for each in reports)
    return replace(
        total,
        usage=usage,
        queue=replace(total.queue, oldest_wait_s=oldest_wait_s),
        age_s=max(each.age_s for each in reports),
        token_hit_rate=usage["cached_tokens"] / max(usage["prompt_tokens"], 1),
        request_hit_rate=usage["hits"] / max(usage["requests"], 1),
    )


def _sum(values: Sequence[Any], name: str = "") -> Any:
    """Add up numbers, also inside of other values; take the first of anything else."""
    first, kind = values[0], cast("Any", type(values[0]))
    if name in OF_EACH:
        return first
    if isinstance(first, int | float):
        return sum(values)
    if isinstance(first, dict):
        return {key: _sum([each[key] for each in values]) for key in first}
    if is_dataclass(first):
        names = [field.name for field in fields(first)]
        return kind(*(_sum([getattr(each, name) for each in values], name) for name in names))
    if isinstance(first, tuple) and first and is_dataclass(first[0]):
        return tuple(_sum(same) for same in zip(*values, strict=True))
    return first


START_S = 600.0
"""Maximum seconds for the replicas to load their models."""
BESIDE_REQUESTS = 64
"""Maximum number of other calls to a replica in addition to requests: its events and reports."""
CALL_S = 30.0
"""Maximum seconds that a replica may take to report."""
RETRY_S = 0.2
"""Pause before a replica is replaced, and between two looks for one that is up."""
MAX_DEATHS = 3
"""Number of replicas that one request may lose, because it may be the reason of their ends."""
BROKEN_OFF = StepFailed("the replica that computed it died; send the request again")
logger = logging.getLogger(__name__)


Actor = Any
"""``EngineReplica`` in another process: ``remote`` of a method calls it there."""


class Progress:
    """A request in progress: its outputs so far, as its replica sent them.

    A request whose replica died is computed again, with the same seed. The part that was sent
    already is compared and left out.
    """

    task: asyncio.Task[None]
    """Follows the answer."""

    def __init__(self, spec: RequestSpec, request_id: str) -> None:
        self.spec, self.request_id = spec, request_id
        self.replica: Actor | None = None
        """Actor that computes it, or None if none was chosen yet."""
        self._tokens: list[int] = []
        self._last = RequestOutput(request_id)

    def add(self, output: RequestOutput) -> RequestOutput | None:
        """Return the new part of the next output, or None if a repeated token is another one.
        O(new tokens)."""
        tokens, text = output.new_token_ids, output.new_text
        start = output.num_tokens - len(tokens)
        repeated = self._tokens[start : start + len(tokens)]
        if repeated != list(tokens[: len(repeated)]):
            return None
        num_chars = max(0, self._last.num_chars - (output.num_chars - len(text)))
        new = tokens[len(repeated) :]
        self._tokens += new
        self._last = structs.replace(
            output,
            new_token_ids=new,
            new_text=text[num_chars:],
            new_logprobs=output.new_logprobs[len(repeated) :],
            num_tokens=len(self._tokens),
            num_chars=max(self._last.num_chars, output.num_chars),
        )
        return self._last

    def ended(self, reason: FinishReason) -> RequestOutput:
        """Return the last output of an answer that is ended early."""
        return structs.replace(
            self._last, new_token_ids=(), new_text="", new_logprobs=(), finish_reason=reason
        )


class FleetChannel(EngineChannel):
    """Connection to several engines. Belongs to one event loop, except ``stop`` and messages to
    compile."""

    def __init__(
        self,
        config: EngineConfig,
        fleet: RayFleet,
        router: Router,
        facts: EngineFacts,
        replicas: Mapping[str, Actor],
    ) -> None:
        self.config, self.facts, self.num_engines = config, facts, len(replicas)
        tokenizer = load_tokenizer_of(config, facts.vocab_size)
        assert tokenizer is not None
        self.tokenizer = tokenizer
        self._compile = grammar_rules(self.tokenizer, facts.vocab_size)
        self._compiling = asyncio.Lock()
        """Held while a grammar is compiled, so that an equal one that waits is remembered."""
        self._fleet, self.router = fleet, router
        self.members: dict[str, Actor] = {}
        """Replicas that are up by name, the oldest first."""
        for name, replica in replicas.items():
            self._join(name, replica)
        self._names = map("replica-{}".format, itertools.count(len(replicas)))
        self._requests: dict[str, Progress] = {}
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        """Followers of replicas, questions and early ends in progress."""
        self._views: dict[int, tuple[str, int]] = {}
        """Number of each open view -> replica, and number of the view there."""
        self._reports: dict[str, CacheReport] = {}
        self._gone: Counter[str] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_open = True

    @property
    def is_alive(self) -> bool:
        """True if at least one replica is up."""
        return self._is_open and bool(self.members)

    def start(self) -> None:
        """Start to follow the events of all replicas."""
        self._loop = asyncio.get_running_loop()
        for name, replica in self.members.items():
            self._run(self._follow(name, replica))

    def _join(self, name: str, replica: Actor) -> None:
        self.members[name] = replica
        self.router.joined(name, time.monotonic())

    async def _follow(self, name: str, replica: Actor) -> None:
        """Pass the events of a replica to the router until it ends, and start another one."""
        while self._is_open:
            why = "its engine has failed"
            try:
                async for batch in replica.events.remote():
                    if name not in self.members:
                        self._join(name, replica)
                        logger.warning("A replica joined; now up: %d.", len(self.members))
                    self.router.on_events(name, *await batch)
            except Exception as error:  # Ray raises errors of many types while a replica ends.
                why = _cause(error)
            if self.members.pop(name, None) is not None:
                self.router.left(name, time.monotonic())
            now_up = len(self.members)
            logger.warning("A replica ended (%s), another starts; now up: %d.", why, now_up)
            if name in self._reports:
                self._gone.update(self._reports.pop(name).usage)
            self._fleet.end(replica)
            await asyncio.sleep(RETRY_S)
            name = next(self._names)
            replica = self._fleet.start(name)

    def send(self, message: ToEngine) -> None:
        match message:
            case RequestSpec():
                self._submit(message)
            case Abort():
                self._run(self._abort(message))
            case EndEngine():
                pass
            case _:
                self._run(self._answer(message))

    def _run(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _submit(self, spec: RequestSpec) -> None:
        request_id, sampling = spec.request_id, spec.sampling
        assert request_id is not None and sampling is not None
        if sampling.seed is None:
            sampling = sampling.with_seed(self.config.seed + next(self._numbers))
        spec = structs.replace(spec, sampling=sampling, arrival_s=None)
        request = self._requests[request_id] = Progress(spec, request_id)
        request.task = self._run(self._follow_answer(request))

    async def _abort(self, message: Abort) -> None:
        """End a request. Unless the client left, its replica ends it, so that both count the same
        reason and its last output is sent."""
        request = self._requests.get(message.request_id)
        if request is None:
            return
        if message.reason != "abort" and request.replica is not None:
            with suppress(Exception):  # The replica is gone.
                await self._tell(request.replica, message)
                return
        self._end(request, request.ended(message.reason))
        request.task.cancel()

    async def _tell(self, replica: Actor, message: Question | Abort) -> Any:
        """Return the reply of a replica to a message."""
        return await asyncio.wait_for(replica.tell.remote(message), CALL_S)

    async def _follow_answer(self, request: Progress) -> None:
        """Pass on the outputs of one request. If its replica dies, the request starts again on
        another one, which repeats what was sent already."""
        request_id, spec, router = request.request_id, request.spec, self.router
        tokens, known = np.array(spec.prompt, np.int32), spec.boundaries.positions
        route = RouteRequest(request_id, tokens, spec.namespace, known)
        outputs = None
        for _ in range(MAX_DEATHS):
            has_begun = False
            try:
                while not self.members:
                    await asyncio.sleep(RETRY_S)
                choice = router.route(route, time.monotonic())
                request.replica = self.members[str(choice.replica)]
                outputs = request.replica.generate.remote(spec)
                async for following in outputs:
                    output = await following
                    if not has_begun and output.new_token_ids:
                        has_begun = True
                        router.prefilled(request_id, time.monotonic())
                    whole = request.add(output)
                    if whole is None:
                        self._fleet.cancel(outputs)
                        self._fail(request, BROKEN_OFF)
                        return
                    if output.finish_reason is not None:
                        self._end(request, whole)
                        return
                    if whole.new_token_ids or whole.new_text:
                        self.front.receive(Outputs((whole,)))
            except asyncio.CancelledError:
                if outputs is not None:
                    self._fleet.cancel(outputs)
                raise
            except Exception as error:
                if not self._fleet.is_death(error):
                    self._fail(request, StepFailed(_cause(error)))
                    return
            logger.warning("request %s lost its replica and starts again", request_id)
            router.ended(request_id, time.monotonic())
            await asyncio.sleep(RETRY_S)  # Until the replica is known to be gone.
        self._fail(request, BROKEN_OFF)

    def _fail(self, request: Progress, error: RequestError) -> None:
        self._end(request, RequestOutput.failed(request.request_id, error))

    def _end(self, request: Progress, last: RequestOutput) -> None:
        """Send the last output of a request, unless it has ended."""
        if self._requests.get(request.request_id) is request:
            del self._requests[request.request_id]
            self.router.ended(request.request_id, time.monotonic())
            self.front.receive(Outputs((last,)))

    async def _answer(self, question: Question) -> None:
        try:
            reply = Reply(question.number, await self._value(question))
        except Exception as error:
            reply = Reply(question.number, error=RequestError.of(error).to_wire())
        self.front.receive(reply)

    async def _value(self, question: Question) -> object:
        """Query every replica and return the sum, or one replica for a view. Raises EngineStopped
        if none responds, and ValueError for a view of a replica that is not up.

        ``EndSession`` has no effect, because only the last request of a session declares its end,
        nor "stop_accepting", because replicas have no role.
        """
        match question:
            case Compile():  # Replicas compile the grammar again when they receive it.
                async with self._compiling:
                    await asyncio.to_thread(self._compile, question.grammar, question.namespace)
            case Ask("report"):
                return await self._report()
            case Alive():
                return [one for one in question.request_ids if one not in self._requests], 0
            case Ask("cache_view"):
                replicas = await self._each(question)
                return asdict(await self._report()) | {"replicas": replicas}
            case Ask("reset_cache"):
                await self._each(question)
            case OpenView():
                names, place = tuple(self.members), question.replica
                if not 1 <= place <= len(names):
                    raise ValueError(f"Replica {place} is not up: there are {len(names)}.")
                name, number = names[place - 1], next(self._numbers)
                self._views[number] = name, await self._ask(name, question)
                return number
            case AskView():
                return await self._ask_view(question)
        return None

    async def _each(self, question: Question) -> dict[str, Any]:
        """Return the replies to ``question``, for each replica that is up and responds."""
        names = tuple(self.members)
        replies = [self._ask(name, question) for name in names]
        found = zip(names, await asyncio.gather(*replies, return_exceptions=True), strict=True)
        if answered := {name: one for name, one in found if not isinstance(one, BaseException)}:
            return answered
        raise EngineStopped("No replica answers.")

    async def _ask(self, name: str, question: Question) -> Any:
        """Return one replica's reply. Raises EngineStopped if it is gone."""
        try:
            return await self._tell(self.members[name], question)
        except RequestError:
            raise
        except Exception as error:  # Ray raises errors of many types while a replica ends.
            raise EngineStopped(f"Replica {name} does not answer: {_cause(error)}") from error

    async def _report(self) -> CacheReport:
        found = await self._each(Ask("report"))
        self._reports |= {name: one for name, one in found.items() if name in self.members}
        return summed(list(found.values()), self._gone)

    async def _ask_view(self, question: AskView) -> object:
        """Pass a question about a view on to its replica."""
        name, view = self._views[question.view]
        if question.topic == "close":
            del self._views[question.view]
        found = await self._ask(name, structs.replace(question, view=view))
        if question.topic == "whole":
            names = list(self.members)
            place = names.index(name) + 1 if name in names else 0
            found["meta"] |= {"replica": place, "num_replicas": len(names)}
        return found

    async def drain(self) -> None:
        """Finish the running requests and end the replicas."""
        self._is_open = False
        while self._requests:
            await asyncio.wait([request.task for request in self._requests.values()])
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.to_thread(self._fleet.close)
        self.front.closed(None)

    def stop(self) -> None:
        """Fail unfinished requests with EngineStopped. May be called from any thread."""
        self._is_open = False
        if self._loop is not None and not self._loop.is_closed():
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._cancel_all)

    def _cancel_all(self) -> None:
        for request in tuple(self._requests.values()):
            self._fail(request, EngineStopped(STOPPED))
            request.task.cancel()


def _cause(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return str(cause).splitlines()[0] if str(cause) else type(cause).__name__


class RayFleet:
    """Starts and ends replicas on a Ray cluster: actors of ``EngineReplica``, whose methods are
    called with ``remote``."""

    def __init__(self, config: EngineConfig, settings: ServerConfig) -> None:
        """Join or start a cluster. Raises ValueError if it is too small or does not respond."""
        _join_ray(settings.ray)
        import ray

        self._ray, self._config = ray, config
        try:
            self.needs = needed(config, settings.replicas, ray.cluster_resources())
        except ValueError:
            self.close()
            raise
        here = str(Path(__file__).resolve().parents[3])  # Replicas start in another folder.
        paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self._class = ray.remote(
            max_concurrency=config.max_queue + config.max_running + BESIDE_REQUESTS,
            runtime_env={"env_vars": variables},
            **self.needs,
        )(EngineReplica)

    def start(self, name: str) -> Actor:
        """Return a new replica, which is loading its model."""
        return self._class.options(name=name).remote(self._config)

    def facts(self, replicas: Iterable[Actor], address: str) -> Facts:
        """Wait until all ``replicas`` have loaded their models, and return the facts of the
        first."""
        loading = [replica.facts.remote(address) for replica in replicas]
        found: Facts = self._ray.get(loading, timeout=START_S)[0]
        return found

    def end(self, replica: Actor) -> None:
        """End a replica at once."""
        self._ray.kill(replica)

    def cancel(self, outputs: object) -> None:
        """End a request, because nobody reads its ``outputs``."""
        self._ray.cancel(outputs)

    def is_death(self, error: Exception) -> bool:
        """Return True if a replica is gone, and False if it failed on a request."""
        errors = self._ray.exceptions
        return isinstance(error, errors.RayError) and not isinstance(error, errors.RayTaskError)

    def close(self) -> None:
        """End all replicas, and leave the cluster."""
        self._ray.shutdown()


def needed(
    config: EngineConfig, num_replicas: int, resources: Mapping[str, float]
) -> dict[str, int]:
    """Return what each replica asks of a cluster with these ``resources``. A replica sees only GPUs
    that it has asked for. Raises ValueError if there are too few cores, or GPUs for ``--device``.

    >>> needed(EngineConfig(), 2, {"CPU": 8.0}), needed(EngineConfig(), 2, {"CPU": 8.0, "GPU": 2.0})
    ({'num_cpus': 1}, {'num_cpus': 1, 'num_gpus': 1})
    """
    has_cores, has_gpus = (resources.get(kind, 0) >= num_replicas for kind in ("CPU", "GPU"))
    if not has_cores or (config.device not in (None, "cpu") and not has_gpus):
        raise ValueError(
            f"--replicas {num_replicas} need one core each, and one GPU with --device, but Ray has "
            f"{dict(resources)}: use fewer, or name a larger cluster with --ray ADDRESS."
        )
    return {"num_cpus": 1} | ({"num_gpus": 1} if has_gpus and config.device != "cpu" else {})


def _join_ray(address: str | None) -> None:
    """Join the cluster at ``address``, or start one. Raises ValueError if that fails."""
    import ray

    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    options = {"address": "local", "include_dashboard": False} if address is None else {}
    options |= {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        ray.init(**({"address": address} | options))
    except Exception as error:  # Ray raises errors of many types, for example on a busy machine.
        where = "did not start" if address is None else f"has no cluster at ray={address}"
        raise ValueError(
            f"--replicas: Ray {where} ({error}): `ray start --head` starts a cluster."
        ) from error
    # Ray's own handler aborts the process with a dump of its stack.
    end_by_exception(signal.SIGTERM)


def start_replicas(
    config: EngineConfig, settings: ServerConfig, address: str
) -> tuple[AsyncEngine, str]:
    """Start engines of ``config`` on a Ray cluster, and wait until all have loaded.

    Returns (the engines, the start screen). Raises ValueError for settings that replicas do not
    support, a router or cluster that does not exist, or too few cores or GPUs.
    """
    for is_set, flag in ((config.role is not None, "--role"), (config.tp > 1, "--tp")):
        if is_set:
            raise ConfigError(f"--replicas and {flag} cannot be combined: remove one of them.")
    config, make_router = resolve_config(config, read_model), find_router(settings.router)
    fleet = RayFleet(config, settings)
    try:
        names = map("replica-{}".format, range(settings.replicas))
        replicas = {name: fleet.start(name) for name in names}
        facts, spec, (model, *of_each) = fleet.facts(replicas.values(), address)
        engine = AsyncEngine(FleetChannel(config, fleet, make_router(spec), facts, replicas))
    except BaseException:
        fleet.close()
        raise
    each = "one core and one GPU each" if "num_gpus" in fleet.needs else "one core each"
    words = f"{settings.replicas} on Ray, {each}; the facts below are those of one"
    rows = [model, ("replicas", words), ("router", settings.router), *of_each]
    return engine, screen_text(rows)
