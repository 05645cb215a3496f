"""The core of an engine: takes prompts and returns tokens, with the parts that it was given. It is
used by one thread; see ``AsyncEngine`` for asyncio."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine.config import BUILTIN_NAME, EngineConfig
from engine.errors import DuplicateId, QueueFull, StepFailed
from engine.interrupts import DelayedSignals
from engine.requests.request import (
    Intake,
    Prompt,
    Request,
    RequestSpec,
    SamplingInput,
    SamplingParams,
)
from engine.schedule.report import CacheReport, PoolReport, StepReport, cache_kind
from engine.schedule.scheduler import NO_STEP, Batch, BytesLost, Pending, Scheduler
from engine.text.answers import Answer, FinishReason, RequestOutput
from engine.text.bounded import BoundedMemory
from engine.text.grammar import Grammar, GrammarError
from engine.weights.hub import display_name
from hybridcache.policies.registry import make_admission
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.protocol import PolicyError
from hybridcache.radix.tokens import EMPTY
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.loading import Loader

if TYPE_CHECKING:
    import torch

    from engine.runner.model_runner import ModelRunner
    from engine.runner.sampler import Sampler

WITHHELD_S = 0.002
"""Pause between two checks of requests that the admission policy withholds while nothing runs."""
MAX_RECENT, RECENT_BYTES = 256, 8 << 20
"""Limits of the requests that ended last: their number, and the bytes of their token ids."""

logger = logging.getLogger(__name__)


class Damage(Enum):
    """Damage that an exception leaves in an engine."""

    NONE = 0
    STEP = 1
    """The step that is being computed is lost."""
    ALL = 2
    """Cache and queue may be half changed."""


class EngineCore:
    """Steps requests. ``Engine`` makes its parts; plugins and observers use it through this
    class.

    Every call that changes the engine is whole after an exception. Signals are handled at its end.
    After a MemoryError in the middle of a change the cache starts again empty, and all requests
    wait again; none is lost or answered twice. If another exception cuts this repair, the next call
    begins with it.
    """

    def __init__(
        self,
        runner: ModelRunner,
        sampler: Sampler,
        intake: Intake,
        scheduler: Scheduler,
        plugins: Mapping[str, Plugin],
    ) -> None:
        """``plugins``: optional capabilities chosen by the settings, by name."""
        self.config, self.tokenizer, self.clock = intake.config, intake.tokenizer, intake.clock
        self.runner, self.plugins = runner, plugins
        self._sampler, self._intake = sampler, intake
        self.validate, self.make = intake.validate, partial(Request, intake=intake)
        """See ``Intake.validate`` and ``Request``. Safe to call from any thread."""
        self.sampling_defaults = intake.sampling_defaults
        self.max_model_len = intake.max_model_len
        """Maximum number of tokens of a prompt and its answer together."""
        self.observers: list[Callable[[StepReport], None]] = []
        """Functions that are called after every step."""
        self.recent = BoundedMemory[str, Request](RECENT_BYTES)
        """Requests that ended last, by id."""
        drafting = scheduler.drafting
        self.on_end: list[Callable[[Request], None]] = [drafting.forget] if drafting else []
        """Functions that are called with every request that has ended."""
        self.on_emptied: list[Callable[[bool], None]] = [drafting.reset] if drafting else []
        """Functions that are called when the cache was emptied, with True if rows were lost, and
        False if a caller emptied it."""
        self.transfers: list[Transfers] = [] if scheduler.loader is None else [scheduler.loader]
        """Transfers of prefixes from and to other places."""
        self._scheduler, self._manager = scheduler, scheduler.manager
        overlap = self.config.overlap
        self._overlaps = overlap == "on" or (overlap == "auto" and runner.is_asynchronous)
        self._in_flight: Batch | None = None
        self.interrupted: tuple[str, ...] = ()
        """Requests that were running when the last step failed; empty if it did not."""
        self._requests: dict[str, Request] = {}
        self._committing = NO_STEP
        """The step that is being published."""
        self._outputs: list[RequestOutput] = []
        """Outputs that no call has returned yet."""
        self._damage = Damage.NONE
        """Damage that an exception would leave now, or has left."""
        self._open_plugins = list(plugins.values())
        """Plugins that are not closed."""
        self._is_closed = False

    @property
    def cache(self) -> HybridRadixCache:
        """The cache. A step that fails in the middle of its work replaces it by an empty one."""
        return self._manager.cache

    @property
    def model_name(self) -> str:
        """Name of the model on the hub, or of its directory."""
        return display_name(Path(self.config.model)) if self.config.model else BUILTIN_NAME

    def submit(
        self, prompt: Prompt | RequestSpec, sampling: SamplingParams | None = None, **options: Any
    ) -> str:
        """Queue a prompt; returns the request's id. O(length of the prompt).

        ``options`` are the other fields of ``RequestSpec``, as in
        ``submit([1, 2, 3], params, namespace="tenant")``. A whole ``RequestSpec`` may be given in
        place of the prompt. Raises ValueError for a request that cannot be served, and QueueFull if
        the queue is full.
        """
        spec = RequestSpec.of(prompt, sampling, options)
        if not self.has_room:
            raise QueueFull(self.config.max_queue)
        if spec.request_id is not None and spec.request_id in self._requests:
            raise DuplicateId(spec.request_id)
        request = self.make(self.validate(spec))
        request.answer = Answer(request.tokens[: request.prompt_len])
        self.enqueue(request)
        return request.request_id

    def compile(self, grammar: Grammar, namespace: Hashable = None) -> None:
        """Compile ``grammar`` in advance for requests of ``namespace``, in at most 0.1 s; the first
        call takes up to a second. Safe to call from any thread. Raises ValueError if it is invalid.
        """
        self._intake.grammar_rule(grammar, namespace)

    def prepare_grammars(self) -> None:
        """Load the grammar library and build its vocabulary, if the tokenizer supports grammars. A
        large one takes a second, during which no other thread of the process runs."""
        with suppress(GrammarError):
            self.compile(Grammar.of_choices(("a",)))

    def enqueue(self, request: Request) -> None:
        """Queue a request. Raises PolicyError, and queues nothing, if a user's policy fails. After
        any other exception, ``requests`` contains it whole or not at all."""
        with self._whole():
            try:
                self.start_request(request)
            except ValueError:  # The scheduler has refused it, and changed nothing.
                self._damage = Damage.NONE
                raise

    def start_request(self, request: Request) -> None:
        """Queue a request in the middle of another call, as plugins do; see ``enqueue``."""
        self._scheduler.add(request)
        self._requests[request.request_id] = request

    @property
    def requests(self) -> Collection[Request]:
        """Waiting and running requests."""
        return self._requests.values()

    @property
    def has_room(self) -> bool:
        """True if one more request may be queued."""
        return len(self._requests) < self.config.max_running + self.config.max_queue

    def abort(self, request_id: str, reason: FinishReason = "abort") -> RequestOutput | None:
        """End a request at once with ``reason``; its memory is free when this returns. Returns its
        last output, or None if it had ended already. After an exception, repeat the call; an output
        that it could not return comes with the next step, or from ``take_outputs``."""
        with self._whole(Damage.NONE):
            self._collect()
            if (request := self._requests.get(request_id)) is None:
                return None
            self._damage = Damage.ALL
            self.end_request(request, reason)
            self._damage = Damage.NONE
            self._collect()
        if request.mailbox is not None:
            return request.mailbox[-1]
        # One assignment without a call: nothing can come between it and the caller.
        *self._outputs, last = self._outputs
        return last

    def end_request(self, request: Request, reason: FinishReason = "abort") -> None:
        """End a request in the middle of another call, as plugins do. Its last output comes with
        those of the step."""
        self._scheduler.abort(request, reason)
        self._scheduler.progressed[request] = None

    def has_work(self) -> bool:
        """Return True if ``step`` has something to compute or outputs to return."""
        return (
            self._scheduler.has_work()
            or self._damage is not Damage.NONE
            or self._in_flight is not None
            or bool(self._scheduler.progressed)
            or bool(self._outputs)
            or any(plugin.has_work for plugin in self.plugins.values())
        )

    def run_idle_tasks(self) -> float | None:
        """Run background work while there is nothing to compute. Returns the seconds until the next
        task is due, or None if there is none."""
        if self.config.check:
            self.check()
        with self._whole():
            delays = [plugin.on_idle() for plugin in self.plugins.values()]
        return min((delay for delay in delays if delay is not None), default=None)

    def disconnect(self, *, at_once: bool) -> None:
        """Accept no more work from other engines, because the engine is about to end. Local
        requests can still be submitted. Work in progress for other engines, or requested from
        them, is finished unless ``at_once``."""
        with self._whole():
            for each in self.transfers:
                each.disconnect(at_once=at_once)

    @contextmanager
    def _whole(self, damage: Damage = Damage.ALL) -> Iterator[None]:
        """Run a call that changes the engine. ``damage``: that of an exception in it, until the
        call sets another."""
        with DelayedSignals():
            try:
                self._repair()
                self._damage = damage
                yield
                self._damage = Damage.NONE
            except BaseException as error:
                self._repair(error)
                if not isinstance(error, BytesLost):
                    raise

    def _repair(self, error: BaseException | None = None) -> None:
        """Repair the damage that ``error`` has left, or an earlier one whose repair was cut."""
        if self._damage is Damage.NONE:
            return
        is_known = self._damage is Damage.STEP or isinstance(error, BytesLost | PolicyError)
        self._damage = Damage.ALL
        interrupted = self._undo() if is_known else self._begin_again(error)
        if not isinstance(error, BytesLost):
            self.interrupted = interrupted
        self._damage = Damage.NONE
        self._collect()

    def step(self) -> list[RequestOutput]:
        """Compute one batch; returns the new output of each request.

        On an asynchronous device a step is committed after the next one was launched, so outputs
        come one call later. If a step raises, its requests survive, and outputs that it had
        committed come with the next call, or from ``take_outputs``. An error of the runner, the
        sampler or a policy undoes the step. After any other one, such as a MemoryError in the
        cache, the cache starts again empty.
        """
        self._advance()
        return self._take()

    def _advance(self, *, is_awaited: bool = False) -> None:
        """Compute one batch, and collect the outputs. Raises StepFailed if a caller waits for the
        outputs of a request, and there is nothing to compute."""
        if is_awaited and not self.has_work():
            raise StepFailed("the engine has lost the request")
        self.interrupted = ()
        with self._whole():
            if not self._scheduler.must_commit:
                for each in self.transfers:
                    each.advance()
            step = due = self._launch()
            if self._overlaps:  # The device has probably finished the previous step.
                due, self._in_flight = self._in_flight or NO_STEP, step if step.segments else None
            self._commit(due)

    def _undo(self) -> tuple[str, ...]:
        """Undo the last step, which failed outside of the cache. Returns the ids of the requests
        that were running."""
        self._in_flight = None
        interrupted = tuple(request.request_id for request in self._scheduler.recover())
        half_done, self._committing = self._committing, NO_STEP
        # After a step with drafts, published states are in their slots only after the runner's
        # commit.
        was_lost = self._manager.lost_moves() or half_done.has_drafts
        for each in self.transfers:
            each.step_failed(was_lost=was_lost)
        if was_lost:
            self._forget(was_lost=True)
        return interrupted

    def _begin_again(self, error: BaseException | None) -> tuple[str, ...]:
        """Replace the cache and the queue, which ``error`` may have left half changed. All requests
        wait again. Returns the ids of those that were running. Can be repeated after an exception
        at any line."""
        name = "An exception" if error is None else type(error).__name__
        logger.error("%s in the middle of a call: the cache starts again, empty.", name)
        self._in_flight, self._committing = None, NO_STEP
        requests = {**dict.fromkeys(self._requests.values()), **self._scheduler.progressed}
        admission = make_admission(self.config.admission)
        interrupted = self._scheduler.begin_again(requests, admission)
        for each in self.transfers:
            try:
                each.step_failed(was_lost=True)
            except MemoryError:  # The next call repeats it.
                raise
            except Exception:  # It may be half changed too.
                logger.exception("A part of the engine could not end its work.")
        self._forget(was_lost=True)
        return tuple(request.request_id for request in interrupted)

    def _launch(self) -> Batch:
        """Schedule the next step and start its computation; wait briefly if there is none."""
        self._laps = [self.clock()]
        step = self._scheduler.schedule()
        if step is NO_STEP and self._in_flight is None:
            for each in self.transfers:
                each.wait()
            if self._scheduler.withholds_all:
                time.sleep(WITHHELD_S)
        self._laps.append(self.clock())
        before = self._in_flight or NO_STEP
        drawn = before.drawn.tokens if step.late_tokens and before.drawn is not None else None
        self._damage = Damage.STEP
        logits = self.runner.forward(step, drawn) if step.segments or step.moves else None
        if step is not NO_STEP:
            self._manager.step.done()
        self._laps.append(self.clock())
        if logits is not None:
            self._sample(step, logits)
        self._laps.append(self.clock())
        return step

    def _sample(self, step: Batch, logits: torch.Tensor) -> None:
        """Start drawing the step's tokens, and scoring prompts if requested. Waits only if a rule
        depends on a token of the previous step, while the device computes this one."""
        late_tokens = dict(step.late_tokens)
        inputs: list[SamplingInput] = []
        rows: list[int] = []
        scores: list[Pending] = []
        num_rows = 0
        for index, segment in enumerate(step.segments):
            first, num_rows = num_rows, num_rows + segment.num_logits
            request = segment.request
            if segment.scores:  # the prompt's tokens that follow those of the segment
                ids = request.tokens[segment.start + 1 : request.prompt_len][: num_rows - first]
                num_top = request.spec.prompt_logprobs or 0
                rated = logits[first : first + len(ids)]
                scores.append(self._sampler.score(rated, ids.tolist(), num_top))
            if segment.samples:
                drawn = None
                if index in late_tokens:
                    drawn = partial(_token, self._in_flight, late_tokens[index])
                drafts = EMPTY if segment.draft is None else segment.draft.tokens
                inputs += request.sampling_inputs(drafts, drawn)
                rows += range(num_rows - 1 - segment.num_drafts, num_rows)
        if inputs:
            step.drawn = self._sampler.launch(logits, inputs, rows)
        step.scores = scores

    def _commit(self, step: Batch) -> None:
        tokens = step.drawn.wait() if step.drawn is not None else ()
        scored = [score.wait() for score in step.scores] if step.scores else ()
        self._laps.append(self.clock())
        self._damage = Damage.ALL
        self._committing = step
        taken = self._scheduler.commit(step, tokens, scored)
        self._damage = Damage.STEP
        if taken:
            self.runner.commit(step, taken)
        self._committing = NO_STEP
        self._damage = Damage.NONE
        self._collect()
        if self.config.check:
            self._manager.check_rows(self.runner.table_row)
            if not self._scheduler.has_work() and self._in_flight is None:
                self.check()
        if self.observers:
            self._tell_observers(step)

    def take_outputs(self) -> list[RequestOutput]:
        """Return committed outputs that were not returned yet, for example after a failed step."""
        with self._whole(Damage.NONE):
            self._collect()
        return self._take()

    def _take(self) -> list[RequestOutput]:
        # One assignment without a call: an allocation fails before it, and Python handles signals
        # after calls only. So nothing can come between it and the caller.
        taken, self._outputs = self._outputs, []
        return taken

    def _collect(self) -> None:
        """Put the new output of each request into the outputs to return. After an exception at any
        place, another call goes on."""
        while progressed := self._scheduler.progressed:
            request = next(iter(progressed))
            if (output := request.report()) is not None:
                if output.finish_reason is not None:
                    self._forget_request(request)
                outputs = self._outputs if request.mailbox is None else request.mailbox
                if not outputs or outputs[-1] is not output:
                    outputs += [output]  # No call, so no signal comes before the next line.
                request.output_is_taken = True
            del progressed[request]

    def _forget_request(self, request: Request) -> None:
        """Forget a request that has ended, unless it is forgotten."""
        if request.request_id in self._requests:
            num_bytes = max(request.tokens.nbytes, RECENT_BYTES // MAX_RECENT)
            self.recent.put(request.request_id, request, num_bytes)
            for listener in self.on_end:
                listener(request)
            del self._requests[request.request_id]

    def _tell_observers(self, step: Batch) -> None:
        started, scheduled, computed, launched, waited = self._laps
        report = StepReport(
            schedule_s=scheduled - started,
            forward_s=computed - scheduled,
            sample_s=launched - computed,
            wait_s=waited - launched,
            commit_s=self.clock() - waited,
            prefilled=tuple((one.start, one.end) for one in step.segments if not one.is_decode),
            num_decode_tokens=step.num_decode_tokens,
        )
        for observer in self.observers:
            observer(report)

    def generate(
        self,
        prompts: Sequence[Prompt | RequestSpec],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answer all ``prompts`` and return their last outputs, in the same order.

        ``sampling`` is one object for all prompts or a sequence with one per prompt; ``options``
        apply to all (see ``submit``). Raises ValueError for an invalid prompt.
        """
        if isinstance(prompts, str):
            raise ValueError("generate takes a list of prompts; give a single one as [prompt].")
        each = [sampling] * len(prompts) if not isinstance(sampling, Sequence) else list(sampling)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts came with {len(each)} sampling parameters.")
        last, places = dict[int, RequestOutput](), dict[str, int]()
        queue, mailbox = deque(enumerate(zip(prompts, each, strict=True))), list[RequestOutput]()
        try:
            while queue or places:
                with DelayedSignals():
                    while queue and self.has_room:
                        place, (prompt, params) = queue.popleft()
                        name = self.submit(prompt, params, **options)
                        self._requests[name].mailbox, places[name] = mailbox, place
                    self._advance(is_awaited=True)
                    for output in mailbox:
                        if output.finish_reason is not None and output.request_id in places:
                            last[places.pop(output.request_id)] = output
                    mailbox.clear()
        finally:
            self._end_followed(mailbox)
        return [last[place] for place in range(len(prompts))]

    def stream(
        self, prompt: Prompt | RequestSpec, sampling: SamplingParams | None = None, **options: Any
    ) -> Iterator[RequestOutput]:
        """Queue one prompt at the first output that is read, and yield all. Closing or dropping the
        iterator ends the request."""
        mailbox, is_finished = list[RequestOutput](), False
        try:
            with DelayedSignals():
                self._requests[self.submit(prompt, sampling, **options)].mailbox = mailbox
            while not is_finished:
                while not mailbox:
                    with DelayedSignals():
                        self._advance(is_awaited=True)
                output = mailbox.pop(0)
                is_finished = output.finish_reason is not None
                yield output
        finally:
            self._end_followed(mailbox)

    def _end_followed(self, mailbox: list[RequestOutput]) -> None:
        """End the requests of ``mailbox``, which nothing reads any more."""
        with DelayedSignals():
            for request in [one for one in self.requests if one.mailbox is mailbox]:
                self.abort(request.request_id)

    def end_session(self, request_id: str) -> None:
        """End the session of ``request_id``, its newest request: no request will follow it. Does
        nothing if a newer request followed. O(1)."""
        with self._whole():
            self._scheduler.sessions.end(request_id)

    def reset_prefix_cache(self) -> None:
        """Forget every prefix that no running request uses, in every tier."""
        with self._whole():
            self._forget(was_lost=False)

    def _forget(self, *, was_lost: bool) -> None:
        self.cache.reset()
        for listener in self.on_emptied:
            listener(was_lost)

    def report(self) -> CacheReport:
        """Return the current sizes, rates and losses of the cache. O(running requests +
        namespaces)."""
        config, cache, memory = self.config, self.cache, self.runner.memory
        held_rows, held_slots = self._manager.held()
        kv = PoolReport.of(cache.free_tokens, cache.cached_tokens, held_rows)
        slots = PoolReport.of(cache.free_slots, cache.num_checkpoints, held_slots)
        total, is_kept = cache.stats.total, config.prefix_cache != "none"
        prefilling = [one for one in self._scheduler.running if one.is_prefilling]
        report = CacheReport(
            prefix_cache=cache_kind(config.prefix_cache, memory),
            eviction=config.eviction if is_kept else "none",
            checkpoints=config.checkpoints if is_kept else (),
            grid=cache.grid,
            page_size=cache.page_size,
            memory=memory.memory,
            bytes=kv.with_slots(slots, memory),
            kv=kv,
            slots=slots,
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            token_hit_rate=total.token_hit_rate,
            request_hit_rate=total.request_hit_rate,
            usage=cache.stats.as_dict(),
            admission=str(config.admission),
            queue=self._scheduler.admission_report(),
            num_prefilled=sum(one.computed_len for one in prefilling),
            num_to_prefill=sum(one.prefill_len for one in prefilling),
        )
        for plugin in self.plugins.values():
            report = plugin.completed(report)
        return report

    def cache_view(self) -> dict[str, object]:
        """Return ``report`` as plain data, with an outline of the tree: a line per node, without
        tokens."""
        return asdict(self.report()) | {"tree": self.cache.render(40).splitlines()}

    def close(self) -> None:
        """End all requests, including those of other engines, and complete pending writes. After an
        exception, repeat the call: it goes on. Further calls do nothing."""
        if self._is_closed:
            return
        with DelayedSignals():
            for request_id in tuple(self._requests):
                self.abort(request_id)
            self.disconnect(at_once=True)
            while self.has_work():
                self.step()
            while self._open_plugins:
                self._open_plugins[0].close()
                del self._open_plugins[0]
            self._is_closed = True

    def check(self) -> None:
        """Raise AssertionError unless every invariant of the cache holds, ``free + cached + held ==
        total``, and the runner reads for each request the KV rows of its lease. O(cache)."""
        with self._whole(Damage.NONE):
            self._scheduler.check()
            self._manager.check(self.runner.table_row)


def _token(before: Batch | None, row: int) -> int:
    """Wait for the token in ``row`` of those drawn by the step ``before``."""
    assert before is not None and before.drawn is not None
    return int(before.drawn.wait()[row].token_id)


class Transfers(Protocol):
    """Transfers of prefixes in progress: those that a ``Loader`` brings for waiting requests, and
    those that a prefill server sends. Called by the engine's thread between two steps."""

    def advance(self) -> None:
        """Process events since the last step, in a bounded time."""

    def wait(self) -> None:
        """Sleep briefly, or until ``advance`` has work, because nothing can be computed."""

    def step_failed(self, *, was_lost: bool) -> None:
        """End work that depends on the failed step. ``was_lost``: the contents of all rows are
        unknown too, and the cache is emptied next."""

    def disconnect(self, *, at_once: bool) -> None:
        """Accept no more work from other engines. End ``at_once`` all work done for them or
        requested from them, or finish it. May be called repeatedly."""


class Plugin:
    """One optional capability of one engine, made from its settings before anything is loaded. The
    methods are called in this order: first, once each, while the engine is built; then in its
    thread. Each does nothing unless it is overridden."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config

    def open_manager(self, manager: CacheManager, runner: ModelRunner) -> Loader[Request] | None:
        """Prepare the new ``manager``. Returns a loader of prefixes, or None."""
        return None

    def attach(self, engine: EngineCore, manager: CacheManager) -> None:
        """Start work for the complete engine, in whose lists of functions and ``transfers`` the
        plugin may register."""

    def start_screen(self) -> Sequence[tuple[str, str]]:
        """Return lines of the start screen: (title, text)."""
        return ()

    @property
    def has_work(self) -> bool:
        """True if a step has something to do although no request waits or runs."""
        return False

    def on_idle(self) -> float | None:
        """Do background work. Returns the seconds until the next task is due, or None."""
        return None

    def close(self) -> None:
        """Complete pending writes and end other processes, after the last step."""

    def completed(self, report: CacheReport) -> CacheReport:
        """Return ``report`` with the fields of this plugin."""
        return report
