"""Exceptions at every line of a call: the cache and the answers stay right, or start again.

A trace function raises at one executed line of ``hybridcache`` or ``engine``, as a lack of memory
or an interrupt would, and another one in the repair that follows. The oracle verifies every later
read. Each answer must be that of an undisturbed run, and end once; a request may also be refused
with an error.
"""

from __future__ import annotations

import dis
import errno
import gc
import linecache
import os
import random
import re
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import numpy as np
import pytest

import engine as engine_package
import hybridcache
from engine import Engine, EngineConfig, Grammar, RequestOutput, SamplingParams
from engine.core import Damage, EngineCore
from engine.errors import DuplicateId
from engine.interrupts import DelayedSignals
from engine.plugins.speculation.drafters import drafters_of
from engine.plugins.tiers.records import RecordStore
from engine.requests.request import Request
from engine.schedule.drafting import Drafting
from engine.text.answers import Answer
from engine.text.tokenizer_files import HFTokenizer
from hybridcache import CacheConfig, Lease, LeaseRequest, build_prefix_cache, parse_placement
from hybridcache.geometry.sizes import ModelError
from hybridcache.radix.protocol import PromptBoundaries
from tests.engine.drafted import ScriptedDrafter
from tests.engine.plugins.disaggregation.pair import GREEDY, plain_engine, text
from tests.engine.schedule.test_scheduler_machine import answer, half_right, make_engine, pattern
from tests.oracle import OracleRunner, OracleSampler, ticking_clock

pytestmark = pytest.mark.usefixtures("ctrl_c")

FOLDERS = tuple(str(Path(one.__file__).parent) for one in (engine_package, hybridcache))
Place = tuple[str, int]
"""File and number of a source line."""
ENDLESS = SamplingParams(max_tokens=99, ignore_eos=True)
EXTRA = "extra"
"""Request that is submitted while others run."""
SMALL = {"kv_tokens": 320, "slots": 6, "max_running": 3, "token_budget": 128, "grid": 16}
SURVIVAL = {"eviction": "survival", "checkpoints": ("adaptive",)}
C_CALLS = {dis.opmap[name] for name in ("CALL", "CALL_FUNCTION_EX")}
code_of = cache(attrgetter("co_code"))
SETTINGS: dict[str, dict[str, Any]] = {
    "pools": SMALL | {"page_size": 16, "checkpoints": ("every:64", "end")},
    "survival": SMALL | SURVIVAL | {"kv_tokens": 288, "overlap": "on"},
    "arena": SMALL | {"kv_tokens": 200, "slots": 5, "slab_rows": 40, "overlap": "on"},
    "host": SMALL | {"slots": 4, "slab_rows": 20, "host_rows": 200, "eviction": "survival"},
    "disk": SMALL
    | {"kv_tokens": 256, "slots": 8, "slab_rows": 20, "host_rows": 60, "disk_rows": 200},
    "drafts": SMALL | {"drafts": "scripted", "slab_rows": 40, "overlap": "on"},
    "tree": SMALL | {"drafts": "tree,mtp", "slots": 8},
    "radix": SMALL | {"prefix_cache": "radix"},
    "own": SMALL | {"owns_states": True, "exact": True},
    "text": SMALL | {"overlap": "on"},
}
"""Settings of engines whose memory is too small for their requests."""


class Raise:
    """Trace function that counts the executed lines, and raises at one of them. With ``place``, it
    counts the executions of that source line only."""

    def __init__(
        self,
        at: int | None = None,
        error: type[BaseException] = MemoryError,
        place: Place | None = None,
    ) -> None:
        self.at, self.error, self.place, self.has_raised = at, error, place, False
        self.places: list[Place] = []
        """Executed lines."""

    def __call__(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        # A trace function can raise between the end of a ``with`` block and the release of its
        # lock, as in bounded.py. Nothing else can.
        file, left_out = frame.f_code.co_filename, ("/debug.py", "/bounded.py")
        is_other = self.place is not None and file != self.place[0]
        is_ours = file.startswith(FOLDERS) and not file.endswith(left_out)
        return self.line if is_ours and not is_other else None

    def line(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        if event == "line" and not only_returns(place_of(frame)) and not leaves_block(frame):
            self.note(place_of(frame))
        return self.line

    def note(self, place: Place) -> None:
        """Count one execution, and raise at its turn."""
        if self.place in (None, place):
            self.places.append(place)
            if len(self.places) == self.at:
                self.has_raised = True
                raise self.error

    def run(self, call: Callable[[], Any]) -> Any:
        before = sys.gettrace()
        gc.disable()  # No other code may run in the call.
        sys.settrace(self)
        try:
            return call()
        finally:
            sys.settrace(before)
            gc.enable()


@cache
def only_returns(place: Place) -> bool:
    """Return True for a line that returns a local variable, at which no exception can come."""
    return re.fullmatch(r"\s*return \w+\s*", linecache.getline(*place)) is not None


def leaves_block(frame: FrameType) -> bool:
    """Return True at the end of a ``with`` block, before the call of ``__exit__``, where no
    exception can come either: Python handles signals in that call."""
    is_end = dis.opname[code_of(frame.f_code)[frame.f_lasti]] in ("LOAD_CONST", "NOP")
    return is_end and linecache.getline(*place_of(frame)).lstrip().startswith("with ")


def place_of(frame: FrameType) -> Place:
    return frame.f_code.co_filename, frame.f_lineno


class Interrupt(Raise):
    """Trace function that raises after a call of a function in C, where Python handles signals, in
    the middle of a line."""

    def __init__(
        self, at: int | None = None, error: Any = KeyboardInterrupt, place: Place | None = None
    ) -> None:
        super().__init__(at, error, place)
        self._last: dict[FrameType, int] = {}
        """Last instruction of each frame, unless it called a function in Python."""

    def __call__(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        if frame.f_back is not None:
            self._last.pop(frame.f_back, None)
        traced = super().__call__(frame, event, argument)
        frame.f_trace_opcodes, frame.f_trace_lines = traced is not None, traced is None
        return traced

    def line(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        last = self._last.pop(frame, None)
        if event == "opcode":
            self._last[frame] = code_of(frame.f_code)[frame.f_lasti]
            if last in C_CALLS:
                self.note(place_of(frame))
        return self.line


class Starve(Raise):
    """Makes allocations number ``at`` to ``at + most`` of a call fail, in any thread."""

    def __init__(self, at: int, most: int = 1) -> None:
        super().__init__(at, MemoryError)
        self._most = most

    def run(self, call: Callable[[], Any]) -> Any:
        import _testcapi

        gc.disable()
        try:
            _testcapi.set_nomemory(self.at, (self.at or 0) + self._most)
            return call()
        except BaseException:
            self.has_raised = True
            raise
        finally:
            _testcapi.remove_mem_hooks()
            gc.enable()


class Service:
    """Requests to a small engine, and their outputs."""

    sides: tuple[str, ...] = ("engine",)
    """Names of the engines that take turns."""

    def __init__(self, name: str, **others: Any) -> None:
        settings = SETTINGS[name] | others
        drafts = settings.pop("drafts", None)
        self.drafter = ScriptedDrafter(half_right)
        if drafts is not None:
            guess = lambda newest, most: self.engine.runner.guess(newest, most)  # noqa: E731
            drafters = [(self.drafter, 5)]
            if drafts != "scripted":
                drafters = drafters_of(dict.fromkeys(drafts.split(","), 3), guess, shares=True)
            settings["drafting"] = Drafting(drafters, max_verified=12)
        self.has_text = name == "text"
        self.engine = text_engine(**settings) if self.has_text else make_engine(**settings)
        self.expected: dict[str, list[int]] = {}
        self.num_submitted = 0
        self.aborted = set[str]()
        """Requests that may end before their answer is complete."""
        self.outputs: dict[str, list[Any]] = {}

    def submit(
        self, family: int, length: int, num_new: int, max_tokens: int, **options: Any
    ) -> None:
        prompt = pattern(family, length) + pattern(11 + family, num_new)
        params = SamplingParams(max_tokens=max_tokens, logprobs=0, ignore_eos=True)
        if self.has_text:
            params = replace(params, stop=("ab", "x"), frequency_penalty=0.5, min_tokens=9)
            if max_tokens % 2:
                options["grammar"] = Grammar.of_regex("[a-z ]{60}")
        tokens, _, _ = answer(prompt, params, self.engine.config.exact)
        self.script(prompt)
        known = PromptBoundaries((length,))
        name = options.get("request_id", f"{self.num_submitted}")
        self.num_submitted += "request_id" not in options
        options["request_id"] = name
        self.expected[name] = tokens
        try:
            self.engine.submit(prompt, params, boundaries=known, **options)
        except DuplicateId:
            raise
        except BaseException:
            if all(name != one.request_id for one in self.engine.requests):
                del self.expected[name]
            raise

    def script(self, prompt: list[int]) -> None:
        """Let the drafter know the answer to ``prompt``."""
        longer, _, _ = answer(prompt, SamplingParams(max_tokens=99), self.engine.config.exact)
        self.drafter.answers[np.array(prompt, np.int32).tobytes()] = longer

    def submit_some(self) -> None:
        for number, length in enumerate((64, 130, 100, 64, 160)):
            space = "salt" if number == 3 else None
            self.submit(number % 2, length, 9 * number, 18 + 7 * number % 30, namespace=space)

    def take(self, found: object) -> None:
        """Note the outputs that a call has returned."""
        for output in found if isinstance(found, list) else [found]:
            if isinstance(output, RequestOutput):
                self.outputs.setdefault(output.request_id, []).append(output)

    def has_work(self) -> bool:
        return self.engine.has_work()

    def step(self, side: str) -> list[RequestOutput]:
        """Step an engine. Returns the outputs, which are not noted: the list of a test may have no
        memory in a call that is torn."""
        return self.engine.step()

    def turn(self, side: str) -> None:
        self.take(self.step(side))

    def finish(self) -> None:
        for number in range(2000):
            if not self.has_work():
                break
            for side in self.sides:
                self.turn(side)
            if number < 2 or number % 16 == 0:
                self.engine.check()
        self.engine.check()
        assert not self.has_work(), "some requests never finish"
        assert self.expected.keys() == self.outputs.keys(), "an answer is missing"
        for name, tokens in self.expected.items():
            parts = self.outputs[name]
            found = [token for part in parts for token in part.new_token_ids]
            assert [part.is_finished for part in parts].count(True) == 1, (
                f"{name} does not end once"
            )
            assert parts[-1].is_finished, f"{name} goes on after its end"
            assert found == parts[-1].token_ids, f"tokens of {name} are lost or returned twice"
            if self.has_text and name == EXTRA:
                continue
            if self.has_text:
                tokens, text = reference()[name]
                said = "".join(part.new_text for part in parts)
                is_whole = parts[-1].failure is None and name not in self.aborted
                assert said == (text if is_whole else text[: len(said)])
            if parts[-1].failure is None and name not in self.aborted:
                assert found == tokens, f"{name} has another answer"
                assert len(parts[-1].logprobs) == len(found)
            else:
                assert found == tokens[: len(found)], f"{name} has another answer"
        report = self.engine.report()
        assert report.kv.held == report.slots.held == 0

    def is_ending(self) -> bool:
        return any(one.num_tokens + 1 == one.max_len for one in self.engine.requests)

    def close(self) -> None:
        self.engine.close()
        assert not self.engine.has_work()
        if (folder := self.engine.config.state_dir) is not None:
            shutil.rmtree(folder)


def text_engine(kv_tokens: int, slots: int, **settings: Any) -> Engine:
    """Return an engine with a tokenizer, for answers with text, penalties, stops and grammars."""
    runner = OracleRunner(kv_tokens, slots)
    config = EngineConfig(**settings)
    parts = {"sampler": OracleSampler(), "tokenizer": HFTokenizer(), "clock": ticking_clock()}
    return Engine(config, runner=runner, **parts)


@cache
def reference() -> dict[str, tuple[list[int], str]]:
    """Return the tokens and the text of each answer of an undisturbed run."""
    service, found = Service("text"), dict[str, tuple[list[int], str]]()
    for _ in range(2):
        service.submit_some()
        while service.engine.has_work():
            for output in service.engine.step():
                found[output.request_id] = output.token_ids, output.text
    service.close()
    return found


def spread(places: list[Place], most: int, rng: random.Random) -> list[int]:
    """Return the numbers of at most ``most`` of the executed ``places``, from 1 on: evenly spread
    over the different source lines, each at any time that it is executed."""
    found: dict[Place, list[int]] = {}
    for number, place in enumerate(places, 1):
        found.setdefault(place, []).append(number)
    ordered = sorted(found)
    count, first = min(most, len(ordered)), rng.randrange(len(ordered))
    chosen = [(first + number * len(ordered) // count) % len(ordered) for number in range(count)]
    return [rng.choice(found[ordered[each]]) for each in chosen]


def some(places: list[Place], most: int, rng: random.Random) -> list[Place]:
    """Return at most ``most`` of ``places``, evenly spread."""
    count, first = min(most, len(places)), rng.randrange(len(places))
    numbers = (first + number * len(places) // count for number in range(count))
    return [places[number % len(places)] for number in numbers]


def check_service(service: Service) -> None:
    """Check signals, every invariant and all answers, and serve more requests."""
    with pytest.raises(KeyboardInterrupt):
        for _ in range(2):  # If ``DelayedSignals`` was cut, the first may be noted only.
            signal.raise_signal(signal.SIGINT)
    service.engine.check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "a handler is left"
    service.finish()
    service.submit_some()  # They find what the cache has now.
    service.finish()
    service.close()


def test_the_steps_preempt_move_load_and_draft() -> None:
    numbers = Counter[str]()
    for name in SETTINGS.keys() - {"text"}:
        service = Service(name)
        service.submit_some()
        service.finish()
        engine = service.engine
        last = [parts[-1] for parts in service.outputs.values()]
        numbers["preemptions"] += sum(one.num_preemptions for one in last)
        numbers["drafts"] += sum(one.drafts.num_verified for one in last if one.drafts)
        numbers["moves"] += engine.cache.arena.num_moves if engine.cache.arena else 0
        numbers["evictions"] += engine.cache.stats.evictions
        numbers |= {tier.tier: tier.taken_in for tier in engine.report().tiers}
        numbers["fetched"] += sum(tier.fetched for tier in engine.report().tiers)
        service.close()
    expected = "preemptions", "drafts", "moves", "evictions", "host", "disk", "fetched"
    assert all(numbers[what] > 0 for what in expected), numbers


# --- A model with weights of four bits -----------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "most"),
    [
        ("int4", 2),
        *(pytest.param(kind, 200, marks=pytest.mark.full) for kind in ("int4", "int4-128")),
    ],
)
def test_an_exception_at_lines_of_a_step_changes_no_answer_of_four_bits(
    quantization: str, most: int
) -> None:
    """Raise at ``most`` source lines of steps that compute, evenly spread. The disturbed answers
    have the same tokens, or one is refused, and the next ones also have the same bits."""
    try:
        engine = plain_engine(quantization=quantization)
    except ModelError as error:
        if "needs a CPU with AVX2" not in str(error):
            raise
        pytest.skip("no product in four bits")
    prompts = [text(0, 80), text(0, 64) + text(1, 20)]
    recorder, rng = Raise(), random.Random(quantization)
    answers_of(engine, prompts, None)  # Some lines are executed once only.
    expected = answers_of(engine, prompts, recorder)
    counts, num_raised = Counter(recorder.places), 0
    for number, place in enumerate(some(sorted(counts), most, rng)):
        error = (MemoryError, KeyboardInterrupt)[number % 2]
        tracer = Raise(rng.randint(1, counts[place]), error, place)
        disturbed = answers_of(engine, prompts, tracer)
        for one, undisturbed in zip(disturbed, expected, strict=True):
            assert one.failure or one.token_ids == undisturbed.token_ids
        assert sum(bool(one.failure) for one in disturbed) <= tracer.has_raised
        num_raised += tracer.has_raised
    assert num_raised >= 0.5 * most
    again = answers_of(engine, prompts, None)
    assert [one.logprobs for one in again] == [one.logprobs for one in expected]
    engine.close()


def answers_of(
    engine: Engine, prompts: list[list[int]], tracer: Raise | None
) -> list[RequestOutput]:
    """Return the last output of each request, from an empty cache."""
    engine.reset_prefix_cache()
    names = [engine.submit(prompt, GREEDY) for prompt in prompts]
    last = dict[str, RequestOutput]()
    while engine.has_work():
        try:
            is_traced = tracer is not None and not tracer.has_raised
            outputs = tracer.run(engine.step) if is_traced else engine.step()
        except (MemoryError, KeyboardInterrupt):
            assert tracer is not None and tracer.has_raised
            outputs = engine.take_outputs()
        last |= {output.request_id: output for output in outputs}
    engine.check()
    return [last[name] for name in names]


# --- The other calls -----------------------------------------------------------------------------


def abort(service: Service) -> RequestOutput | None:
    name = next(iter(service.expected))
    service.aborted.add(name)
    return service.engine.abort(name)


def submit(service: Service) -> None:
    service.submit(0, 64, 5, 9, request_id=EXTRA)


def follow(service: Service, call: str) -> None:
    """Answer two prompts by ``generate`` or ``stream``. Other requests go on, and their outputs
    come later. After a lack of memory, no request of the call is left."""
    prompts = pattern(0, 64) + pattern(11, 5), pattern(1, 40)
    params, engine = SamplingParams(max_tokens=9, ignore_eos=True), service.engine
    for prompt in prompts:
        service.script(prompt)
    try:
        if call == "generate":
            found = engine.generate(prompts, params)
        else:
            streams = [list(engine.stream(prompt, params)) for prompt in prompts]
            found = [outputs[-1] for outputs in streams]
            for of, last in zip(streams, found, strict=True):
                assert last.token_ids == [token for one in of for token in one.new_token_ids]
    except MemoryError:
        assert all(one.mailbox is None for one in engine.requests)
        raise
    for prompt, output in zip(prompts, found, strict=True):
        assert output.token_ids == answer(prompt, params, engine.config.exact)[0]


CALLS: dict[str, Callable[[Service], object]] = {
    "abort": abort,
    "generate": lambda service: follow(service, "generate"),
    "stream": lambda service: follow(service, "stream"),
    "close": lambda service: service.engine.close(),
    "disconnect": lambda service: service.engine.disconnect(at_once=False),
    "end_session": lambda service: service.engine.end_session(list(service.expected)[-1]),
    "reset_prefix_cache": lambda service: service.engine.reset_prefix_cache(),
    "run_idle_tasks": lambda service: service.engine.run_idle_tasks(),
    "step": lambda service: service.step("engine"),
    "submit": submit,
    "take_outputs": lambda service: service.engine.take_outputs(),
}
"""Public calls that change an engine. Some return outputs."""


def busy(settings: str) -> Service:
    """Return a service in the middle of its work, with outputs that were not taken."""
    service = Service(settings)
    service.submit_some()
    for _ in range(4):
        service.take(service.engine.step())
    return service


def disturb(service: Service, call: str, tracer: Raise) -> bool:
    """Raise in a call, repeat it, and check everything. Returns False if the place was not
    reached."""
    try:
        service.take(tracer.run(partial(CALLS[call], service)))
    except tracer.error:
        service.take(service.engine.take_outputs())
        service.engine.check()
    service.take(CALLS[call](service))
    check_service(service)
    return tracer.has_raised


# --- Handing over outputs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [EngineCore._collect, EngineCore._forget_request, EngineCore.abort, Request.report, Answer.add],
)
def test_an_interrupt_inside_a_line_loses_no_output(function: FunctionType) -> None:
    """It comes after each call in C of a function that hands over outputs, or at each line."""
    lines = {line for _, _, line in function.__code__.co_lines() if line is not None}
    num_raised = 0
    for place in ((function.__code__.co_filename, line) for line in sorted(lines)):
        kind = Raise if function is Answer.add else Interrupt
        service = busy("text" if function is Answer.add else "pools")
        while function is EngineCore._forget_request and not service.is_ending():
            service.turn("engine")
        call = "abort" if function is EngineCore.abort else "step"
        num_raised += disturb(service, call, kind(1, KeyboardInterrupt, place))
    assert num_raised


@pytest.mark.parametrize("num_outputs", [1, 3, 9])
@pytest.mark.parametrize("is_step", [True, False])
def test_an_allocation_that_fails_loses_no_output(num_outputs: int, is_step: bool) -> None:
    """Outputs of any number leave the engine whole or not at all."""
    pytest.importorskip("_testcapi")
    for at in range(1, 9):
        engine = make_engine(**SMALL | {"kv_tokens": 4000, "slots": 20, "max_running": 9})
        names = [engine.submit(pattern(number, 9), ENDLESS) for number in range(num_outputs)]
        while engine._scheduler.waiting:
            engine.step()
        engine._advance()
        before = {id(one) for one in engine._outputs}
        call = engine._take if is_step else partial(engine.abort, names[0])
        try:
            found = Starve(at).run(call)
        except MemoryError:
            found = call()
        taken = (found if is_step else [found]) + engine.take_outputs()
        assert before <= {id(one) for one in taken}
        assert [one.is_finished for one in taken if one].count(True) == (not is_step)


def test_signals_are_delayed_after_two_of_them_have_cut_the_end_of_a_call() -> None:
    """The second one comes in ``__exit__``, before its first line."""
    cut, caught = DelayedSignals(), list[str]()
    cut.__enter__()
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with suppress(KeyboardInterrupt), DelayedSignals():
        signal.raise_signal(signal.SIGINT)
        caught.append("the end of the block")
    assert caught and signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- Exceptions in the repair --------------------------------------------------------------------


class Again:
    """Exceptions in the first repairs of an engine, each at one line. Python traces nothing after
    the first exception of a trace function, so each repair gets a trace function of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lines: list[int]) -> None:
        self.lines = lines
        self.num_raised = 0
        repair = EngineCore._repair

        def repaired(engine: EngineCore, error: BaseException | None = None) -> None:
            if not self.lines or engine._damage is Damage.NONE:
                return repair(engine, error)
            tracer, before = Raise(self.lines.pop(0)), sys.gettrace()
            sys.settrace(tracer)
            try:
                return repair(engine, error)
            finally:
                sys.settrace(before)
                self.num_raised += tracer.has_raised

        monkeypatch.setattr(EngineCore, "_repair", repaired)


# --- The library's own verbs ---------------------------------------------------------------------

CACHES: dict[str, dict[str, Any]] = {
    "pools": {"num_kv_tokens": 120, "num_slots": 4, "page_size": 4},
    "arena": {"memory": "arena", "total_bytes": 1600},
    "survival": {"total_bytes": 1600, "eviction": "survival"},
    "tiers": {"memory": "arena", "total_bytes": 1600, "host_bytes": 600, "disk_bytes": 1200},
}


class Loads:
    """Rule of an embedder that loads all offloaded prefixes."""

    def seconds_saved(self, cached_len: int, position: int, *_: object) -> float:
        return position - cached_len


class Embedder:
    """Caller of the library without an engine."""

    def __init__(self, settings: str) -> None:
        sizes = {"kv_bytes_per_token": 8, "state_bytes": 64, "grid": 8}
        self.cache = build_prefix_cache(CacheConfig(**sizes | CACHES[settings]))
        self.placement = parse_placement("adaptive")

    def serve(self, family: int, length: int) -> None:
        """Serve one request with every verb of a lease."""
        prompt = np.array(pattern(family, length), np.int32)
        lease = Lease.begin(self.cache, self.placement, LeaseRequest(prompt), Loads())
        if lease is None:
            return
        at = lease.cached_len
        for end in (length // 2, length):
            if end <= at:
                continue
            if lease.extend(end) is None:
                self.cache.take_step().done()
                return lease.abort()
            lease.take_checkpoint_slots(at, end)
            self.cache.take_step().done()
            lease.publish(prompt, end)
            at = end
        if family % 2:
            return lease.preempt(prompt, length)
        lease.finish(prompt, length, stop_reason="end_turn")

    def hold(self, family: int) -> None:
        """Lock a prefix, evict others, and insert one without a lease."""
        prompt = np.array(pattern(family, 24), np.int32)
        with self.cache.lock(self.cache.match(prompt).node):
            self.cache.evict(8, 1)
        rows, slot = self.cache.allocate_kv(24), self.cache.allocate_slot()
        self.cache.take_step().done()
        if rows is None or slot is None:
            return
        result = self.cache.insert(prompt, rows, [(16, slot)])
        self.cache.free_kv(result.duplicates)
        for rejected in result.rejected_slots:
            self.cache.free_slot(rejected)

    def work(self) -> None:
        for number, length in enumerate((20, 40, 33, 64, 20, 48)):
            self.serve(number % 3, length)
            self.hold(number % 4)
        self.cache.take_step().done()

    def finish(self) -> None:
        self.work()
        self.cache.check(0, 0)
        self.cache.reset()
        self.cache.check(0, 0)
        assert self.cache.cached_tokens == self.cache.num_checkpoints == 0


@pytest.mark.parametrize("settings", CACHES)
@pytest.mark.parametrize("most", [15, pytest.param(10_000, marks=pytest.mark.full)])
def test_after_an_exception_at_lines_of_its_verbs_a_rebuilt_cache_works(
    settings: str, most: int
) -> None:
    """Raise at ``most`` lines of the verbs, and at a line of ``rebuilt``; work must go on."""
    embedder, tracer, rng = Embedder(settings), Raise(), random.Random(settings)
    tracer.run(embedder.work)
    embedder.finish()
    for number, line in enumerate(spread(tracer.places, most, rng)):
        embedder, error = Embedder(settings), (MemoryError, KeyboardInterrupt)[number % 2]
        with pytest.raises(error):
            Raise(line, error).run(embedder.work)
        with suppress(MemoryError):
            Raise(rng.randint(1, 200)).run(embedder.cache.rebuilt)
        embedder.cache = embedder.cache.rebuilt()
        embedder.cache.check(0, 0)
        embedder.finish()


# --- The disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("rename", errno.ENOSPC),
        ("open", errno.EROFS),
        ("open", errno.EDQUOT),
        ("fsync", errno.EDQUOT),
    ],
)
def test_a_disk_that_fails_in_the_middle_costs_no_answer(
    call: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is full, or read-only, from one step on: requests are computed, and the folder is released
    at the end."""
    service, real = busy("disk"), getattr(os, call)

    def failing(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name == "disk":
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, failing)
    service.finish()
    service.submit_some()
    service.finish()
    service.engine.close()
    folder = service.engine.report().folder
    assert folder is not None and os.strerror(number) in (folder.problem or "")
    monkeypatch.undo()
    RecordStore(Path(service.engine.config.state_dir)).close()
    service.close()
