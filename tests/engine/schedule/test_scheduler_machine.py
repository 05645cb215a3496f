"""State machines of the scheduler, over an engine with memory that proves its reads."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine import Engine, EngineConfig, RequestOutput, SamplingParams
from engine.config import OF_CACHE
from engine.plugins.speculation.drafters import drafters_of
from engine.runner.predictor import Newest
from engine.schedule.drafting import Drafting
from engine.schedule.scheduler import Batch
from hybridcache.allocators.moves import Move
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import GIB
from hybridcache.radix.protocol import PromptBoundaries
from tests.engine.drafted import ScriptedDrafter
from tests.oracle import (
    Fingerprints,
    OracleRunner,
    OracleSampler,
    engine_with,
    fingerprint,
    ticking_clock,
)

VOCABULARY = 320
SAMPLER = OracleSampler(VOCABULARY)
PLACEMENTS = (
    ("branch", "boundary", "backoff", "end"),
    ("every:64", "end"),
    ("backoff",),
    ("adaptive",),
    ("none",),
)


class MachineRunner(OracleRunner):
    """Runner that counts its moves and can interrupt a step before or after them."""

    num_moves = 0
    most_slabs = 1
    interrupt_at: str | None = None

    def forward(self, batch: Batch, drawn: Sequence[int] = ()) -> Fingerprints:
        slabs = [order for order in batch.moves if isinstance(order, Move)]
        assert len(slabs) <= self.most_slabs, "a step waits for too many slabs"
        assert batch.segments or batch.moves, "a step has no task"
        self.num_moves += len(batch.moves)
        place, self.interrupt_at = self.interrupt_at, None
        if place == "before":
            raise KeyboardInterrupt
        if place == "moved":
            super().forward(Batch((), moves=batch.moves))
            raise KeyboardInterrupt
        logits = super().forward(batch, drawn)
        if place == "after":
            raise KeyboardInterrupt
        return logits


def make_engine(
    prefix_cache: str = "hybrid",
    kv_tokens: int = 1024,
    slots: int = 6,
    slab_rows: int | None = None,
    drafting: Drafting | None = None,
    owns_states: bool = False,
    host_rows: int | None = None,
    disk_rows: int | None = None,
    clock: Callable[[], float] | None = None,
    **settings: object,
) -> Engine:
    """Return an engine on two pools, or with ``slab_rows`` on one arena of slabs with that many
    rows.

    ``host_rows`` and ``disk_rows`` add tiers; ``owns_states`` puts running states next to the
    arena. Without a ``clock``, each reading of the time takes a millisecond.
    """
    kind = "hybrid" if prefix_cache == "radix" else prefix_cache
    if kind == "none":
        settings = {name: value for name, value in settings.items() if name not in OF_CACHE}
    config = EngineConfig(prefix_cache=kind, **settings)
    if slab_rows is not None and prefix_cache == "hybrid":
        least = 10 * (slab_rows + 2 * config.page_size)
        if host_rows is not None:
            config = dataclasses.replace(config, host_gib=(least + 10 * host_rows) / GIB)
        if disk_rows is not None:
            folder_bytes = 2 * (1 << 13) + 4 * (least + 10 * disk_rows)
            disk_gib = folder_bytes / GIB
            config = dataclasses.replace(config, state_dir=tempfile.mkdtemp(), disk_gib=disk_gib)
    geometry = ModelGeometry.preset("qwen3-next")
    num_slots: int | None = 0 if prefix_cache == "radix" else slots
    if slab_rows is not None and num_slots:
        state = {"recurrent_elements": 0, "conv_bytes": 10 * slab_rows - 3}
        geometry = dataclasses.replace(geometry, kv_bytes_per_token=10, **state)
        slab_rows = -(-slab_rows // config.page_size) * config.page_size
        kv_tokens, num_slots = kv_tokens + max(slots, 3) * slab_rows, None
    runner = MachineRunner(
        kv_tokens,
        num_slots,
        vocab_size=VOCABULARY,
        exact=config.exact,
        geometry=geometry,
        page_size=config.page_size,
        owns_states=owns_states,
    )
    # A request that begins with a load takes two slots: its own, and one for the loaded state.
    runner.most_slabs += host_rows is not None or disk_rows is not None
    parts: dict[str, object] = {"runner": runner, "sampler": SAMPLER}
    parts["clock"] = clock or ticking_clock()
    return engine_with(lambda _: {"drafting": drafting}, config, **parts)


def answer(
    prompt: list[int], params: SamplingParams, exact: bool
) -> tuple[list[int], list[float], str]:
    """Return (tokens, log-probabilities, finish reason) that a request must end with."""
    before = 0
    for token in prompt:
        before = fingerprint(before, token)
    tokens: list[int] = []
    logprobs: list[float] = []
    while True:
        sampled = SAMPLER.choose(before)
        tokens.append(sampled.token_id)
        logprobs.append(sampled.logprob)
        if sampled.token_id in params.stop_token_ids:
            return tokens, logprobs, "stop"
        if len(tokens) == params.max_tokens:
            return tokens, logprobs, "length"
        before = fingerprint(before, sampled.token_id, exact)


def pattern(family: int, length: int) -> list[int]:
    """Return a prompt; prompts of one family are prefixes of one another."""
    return [(7 * family + i * (family + 3)) % VOCABULARY for i in range(length)]


lengths = st.one_of(st.integers(1, 400), st.sampled_from([63, 64, 65, 127, 128, 129, 192, 256]))
prompts = st.builds(
    lambda family, shared, suffix, other: pattern(family, shared) + pattern(10 + other, suffix),
    st.integers(0, 2),
    lengths,
    st.integers(0, 80),
    st.integers(0, 2),
)
sampling = st.builds(
    lambda max_tokens, stop, penalty: SamplingParams(
        max_tokens=max_tokens,
        stop_token_ids=tuple(stop),
        logprobs=0,
        frequency_penalty=penalty,  # the oracle only checks that earlier tokens are counted
    ),
    st.integers(1, 90),
    st.sets(st.integers(0, VOCABULARY - 1), max_size=10),
    st.sampled_from([0.0, 0.0, 0.5]),
)


def half_right(done: int, most: int) -> int:
    """Return the number of right tokens of a draft. Drafts may go past a stop."""
    return (0, most // 2, most)[done % 3]


class SchedulerMachine(RuleBasedStateMachine):
    """State machine of arrivals, equal prompts, next turns, aborts, resets, and steps between
    them."""

    now_s = 0.0
    step_s = 0.05
    """Duration of a step in the simulated time."""

    @initialize(
        prefix_cache=st.sampled_from(["hybrid", "hybrid", "radix", "none"]),
        kv_pages=st.integers(3, 14),
        slots=st.integers(1, 8),
        max_running=st.integers(1, 5),
        token_budget=st.sampled_from([64, 100, 128, 512]),
        page_size=st.sampled_from([1, 1, 16, 64]),
        grid=st.sampled_from([16, 64, 128]),
        checkpoints=st.sampled_from(PLACEMENTS),
        eviction=st.sampled_from(["lru", "survival", "gdsf", "sieve"]),
        exact=st.booleans(),
        overlap=st.sampled_from(["off", "on"]),
        slab_rows=st.sampled_from([None, 1, 5, 40, 64, 150]),
        drafts=st.sampled_from(["none", "scripted", "tree", "mtp", "tree,mtp"]),
        draft_len=st.sampled_from([1, 5, 32]),
        owns_states=st.booleans(),
        host_rows=st.sampled_from([None, 0, 100, 1000]),
        disk_rows=st.sampled_from([None, None, 200]),
        step_s=st.sampled_from([0.001, 0.05, 1.0]),
    )
    def start(
        self, kv_pages: int, drafts: str, draft_len: int, step_s: float, **settings: object
    ) -> None:
        self.step_s = step_s
        if drafts.endswith("mtp") and settings["prefix_cache"] == "radix":
            drafts = "scripted"  # A head needs states.
        self.drafter = ScriptedDrafter(half_right)
        drafters = [(self.drafter, draft_len)]
        if drafts != "scripted":
            lengths = dict.fromkeys(drafts.split(","), draft_len)
            lengths |= {"tree": 3} if drafts == "tree,mtp" else {}
            drafters = drafters_of(lengths, self.guess, shares=True)
        drafting = Drafting(drafters, max_verified=2 * (1 + draft_len))
        drafting = drafting if drafts != "none" else None
        options = {"drafting": drafting, "clock": self.clock}
        self.serve(make_engine(kv_tokens=64 * kv_pages, **options, **settings))

    def clock(self) -> float:
        """Return the simulated time, so that a run repeats: the policy orders by time."""
        return self.now_s

    def guess(self, newest: Sequence[Newest], most: Sequence[int]) -> list[np.ndarray]:
        return self.engine.runner.guess(newest, most)

    def serve(self, engine: Engine) -> None:
        self.engine = engine
        self.expected: dict[str, tuple[list[int], list[float], str]] = {}
        self.outputs: dict[str, RequestOutput] = {}
        self.histories: list[list[int]] = []

    def submit(self, prompt: list[int], params: SamplingParams, **options: object) -> None:
        prompt = prompt[: self.engine.max_model_len - params.max_tokens]
        request_id = self.engine.submit(prompt, params, **options)
        exact = self.engine.config.exact
        self.expected[request_id] = answer(prompt, params, exact)
        further = dataclasses.replace(params, stop_token_ids=(), max_tokens=params.max_tokens + 33)
        tokens, _, _ = answer(prompt, further, exact)
        known = self.drafter.answers.setdefault(np.array(prompt, np.int32).tobytes(), tokens)
        known += tokens[len(known) :]
        self.histories.append(prompt + self.expected[request_id][0])

    @rule(
        prompt=prompts,
        params=sampling,
        boundary=st.integers(0, 400),
        copies=st.integers(1, 4),
        namespace=st.sampled_from([None, None, "salt"]),
    )
    def arrive(
        self,
        prompt: list[int],
        params: SamplingParams,
        boundary: int,
        copies: int,
        namespace: str | None,
    ) -> None:
        known = PromptBoundaries((boundary,))
        for _ in range(copies):
            self.submit(prompt, params, boundaries=known, namespace=namespace)

    @precondition(lambda self: self.histories)
    @rule(
        which=st.integers(0, 1000), new=st.integers(0, 70), params=sampling, cut=st.integers(0, 5)
    )
    def next_turn(self, which: int, new: int, params: SamplingParams, cut: int) -> None:
        history = self.histories[which % len(self.histories)]
        self.submit(history[: max(len(history) - cut, 1)] + pattern(5, new), params)

    @rule(prompt=prompts, params=sampling, namespace=st.sampled_from(["salt", None]))
    def arrive_scored(self, prompt: list[int], params: SamplingParams, namespace: object) -> None:
        self.submit(prompt, params, namespace=namespace, prompt_logprobs=0)

    @rule(steps=st.integers(1, 40))
    def run(self, steps: int) -> None:
        self.steps(steps)

    def steps(self, count: int) -> None:
        for _ in range(count):
            if self.engine.has_work():
                self.step_once()

    def step_once(self) -> None:
        runner, scheduler = self.engine.runner, self.engine._scheduler
        before = runner.num_tokens_computed, runner.num_moves
        self.now_s += self.step_s
        outputs = self.engine.step()
        for output in outputs:
            self.outputs[output.request_id] = output
        self.engine.check()
        if scheduler.withholds_all:
            assert scheduler.wakes_at_s is not None, "nothing runs, and the policy waits for ever"
            self.now_s = scheduler.wakes_at_s
        elif self.engine.config.overlap == "off":
            after = runner.num_tokens_computed, runner.num_moves
            assert after > before, "a step has no task"

    @rule(place=st.sampled_from(["before", "moved", "after"]))
    def interrupt(self, place: str) -> None:
        runner = self.engine.runner
        runner.interrupt_at = place
        try:
            while self.engine.has_work() and runner.interrupt_at:
                self.step_once()
        except KeyboardInterrupt:
            self.engine.check()
        finally:  # Else a failure interrupts the end of the example, and with it pytest.
            runner.interrupt_at = None

    @precondition(lambda self: self.expected)
    @rule(which=st.integers(0, 1000))
    def abort(self, which: int) -> None:
        request_id = list(self.expected)[which % len(self.expected)]
        output = self.engine.abort(request_id)
        if output is not None:
            assert output.finish_reason == "abort"
            tokens, _, _ = self.expected.pop(request_id)
            assert output.token_ids == tokens[: len(output.token_ids)]
            self.outputs.pop(request_id, None)

    @rule()
    def reset(self) -> None:
        self.engine.reset_prefix_cache()

    @invariant()
    def check_engine(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        try:
            self.finish()
        finally:
            self.engine.close()
            if (folder := self.engine.config.state_dir) is not None:
                shutil.rmtree(folder)

    def finish(self) -> None:
        for _ in range(20_000):
            if not self.engine.has_work():
                break
            self.step_once()
        assert not self.engine.has_work(), "some requests never finish"
        for request_id, (tokens, logprobs, reason) in self.expected.items():
            output = self.outputs[request_id]
            assert output.token_ids == tokens
            assert [sampled.logprob for sampled in output.logprobs] == logprobs
            assert output.finish_reason == reason
            assert output.cached_len + sum(output.losses) == len(output.prompt_token_ids)
            if output.prompt_logprobs is not None:
                assert output.prompt_logprobs[0] is None
                before, expected = 0, []
                for token, following in itertools.pairwise(output.prompt_token_ids.tolist()):
                    before = fingerprint(before, token)
                    expected += SAMPLER.score(np.array([before]), [following], 0).wait()
                assert list(output.prompt_logprobs[1:]) == expected
        assert self.engine.report().kv.held == self.engine.report().slots.held == 0


class TightMachine(SchedulerMachine):
    """State machine with overlap and memory for one request and part of the next.

    Prompts share less than a checkpoint, so a publish changes rows and many steps are empty.
    """

    @initialize(
        prefix_cache=st.sampled_from(["hybrid", "radix"]),
        kv_tokens=st.sampled_from([192, 256, 288, 320, 384]),
        slots=st.integers(2, 6),
        max_running=st.integers(2, 3),
        token_budget=st.sampled_from([64, 128]),
        page_size=st.sampled_from([1, 1, 16]),
        checkpoints=st.sampled_from(PLACEMENTS),
        exact=st.booleans(),
        slab_rows=st.sampled_from([None, None, 16, 50]),
        drafts=st.booleans(),
        owns_states=st.booleans(),
        host_rows=st.sampled_from([None, 0, 300]),
    )
    def start(self, drafts: bool, **settings: object) -> None:
        self.drafter = ScriptedDrafter(half_right)
        drafting = Drafting([(self.drafter, 3)], max_verified=8) if drafts else None
        self.serve(make_engine(overlap="on", drafting=drafting, clock=self.clock, **settings))

    @rule(
        shared=st.integers(1, 63),
        short=st.integers(1, 130),
        margin=st.integers(1, 80),
        steps=st.integers(0, 4),
        remaining=st.integers(1, 4),
        namespace=st.sampled_from([None, None, "salt"]),
        when_idle=st.booleans(),
    )
    def arrive(
        self,
        shared: int,
        short: int,
        margin: int,
        steps: int,
        remaining: int,
        namespace: str | None,
        when_idle: bool,
    ) -> None:
        """Submit a prompt and, near the end of its answer, one with the same beginning that nearly
        fills the pool."""
        self.steps(1000 if when_idle else 0)
        long = self.engine.max_model_len - shared - margin
        for family, (length, answer) in enumerate([(short, steps + remaining), (long, remaining)]):
            prompt = pattern(0, shared) + pattern(10 + family, length)
            params = SamplingParams(max_tokens=answer, logprobs=0)
            self.submit(prompt, params, namespace=namespace)
            self.steps(0 if family else steps)


TestSchedulerMachine = pytest.mark.timeout(600)(SchedulerMachine.TestCase)
TestTightMachine = pytest.mark.timeout(600)(TightMachine.TestCase)
TestTightMachine.settings = settings(
    max_examples=3 * settings.default.max_examples,
    stateful_step_count=settings.default.stateful_step_count // 2,
)
"""Many short runs, because the fault to find is a coincidence of one arrival."""


def test_nothing_is_withheld_once_the_last_running_request_has_left() -> None:
    """With overlap, the policy decides before it is known that the last one ends."""
    machine = TightMachine()
    settings = {"prefix_cache": "hybrid", "checkpoints": PLACEMENTS[0], "drafts": True}
    settings |= {"kv_tokens": 192, "slots": 2, "max_running": 2, "token_budget": 128}
    settings |= dict.fromkeys(("exact", "owns_states"), False) | {"page_size": 1}
    machine.start(slab_rows=None, host_rows=None, **settings)
    usual = {**dict.fromkeys(("shared", "short", "margin", "remaining"), 1), "steps": 0}
    usual |= {"namespace": None, "when_idle": False}
    late = {"shared": 55, "when_idle": True, "namespace": "salt"}
    for change in (*[{}] * 3, {"margin": 6, "shared": 3}, {"namespace": "salt"}, {}, late):
        machine.arrive(**usual | change)
    machine.teardown()
