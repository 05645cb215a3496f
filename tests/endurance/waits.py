"""Waits of one tenant behind loads of others, on a simulated clock, with the bound of the docs.

A load keeps its number of requests open: each answer is followed by the next request. After two
minutes another tenant sends one prompt, and must be admitted within the bound of
``docs/concepts/admission.md``, which is computed from what is open at that moment.

Requests pass through the front end, whose heartbeats find none that only one side knows, and the
watchdog of the tests finds none that waits while the engine is idle.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from engine import AsyncEngine, Engine, EngineConfig, RequestSpec, SamplingParams
from engine.front.async_engine import RequestStream
from engine.requests.request import Request
from engine.schedule.scheduler import Batch, Segment
from tests.oracle import Fingerprints, OracleRunner, OracleSampler
from tests.watchdog import WATCHDOG

ROWS, PLACES = 8000, 4
STEP_S, TOKEN_S = 0.010, 0.001
"""Simulated time of a step, and of each of its tokens."""
ARRIVES_S = 120.0
VOCABULARY = 300
DUE_S, FACTOR = 20.0, 3.5

Random = random.Random
Text = list[int]


class Load(NamedTuple):
    """One kind of load."""

    num_open: int
    """Requests that are open at any time."""
    victim_len: int
    """Prompt tokens of the other tenant."""
    prompt: Callable[[Random, Text], Text]
    """Makes the next prompt of a client from its last prompt and answer, empty at first."""
    max_tokens: int = 2
    num_tenants: int = 8


def some(rng: Random, least: int, most: int) -> Text:
    return [rng.randrange(VOCABULARY) for _ in range(rng.randint(least, most))]


def grown(rng: Random, before: Text) -> Text:
    text = [*before, *some(rng, 8, 8)]
    return text if 8 < len(text) <= 1500 else some(rng, 600, 663)


SHARED = some(Random(2), 900, 900)
LOADS = {
    "nearly all rows": Load(8, 7500, lambda rng, _: some(rng, 7000, 7500)),
    "growing, long prompt": Load(40, 7500, grown),
    "long answers, long prompt": Load(40, 7500, lambda rng, _: some(rng, 100, 300), 400),
    "tiny, long prompt": Load(500, 7500, lambda rng, _: some(rng, 1, 20)),
    "tiny": Load(1000, 300, lambda rng, _: some(rng, 1, 20)),
    "hits": Load(100, 300, lambda rng, _: [*SHARED, *some(rng, 1, 1)], num_tenants=1),
    "hits, long prompt": Load(100, 7500, lambda rng, _: [*SHARED, *some(rng, 1, 1)], 2, 1),
    "long answers": Load(100, 300, lambda rng, _: some(rng, 100, 300), max_tokens=400),
    "growing": Load(100, 300, grown),
    "new tenants": Load(100, 300, lambda rng, _: some(rng, 600, 1500), num_tenants=1 << 30),
}
"""Loads by name. The memory has 8,000 rows and 4 places."""


class QuickRunner(OracleRunner):
    """Runner without a proof of what it reads, which takes most of the oracle's time."""

    def _prove_disjoint(self, batch: Batch) -> None:
        pass

    def _prove_kv(self, segment: Segment) -> Fingerprints:
        return self._fingerprints[self._table[segment.row][: segment.start]]


class Wait(NamedTuple):
    """Wait of the other tenant."""

    wait_s: float
    ahead_s: float
    """Time in which the open prompts are computed, without their cached parts."""
    bound_s: float
    num_beats: int
    """Comparisons of the requests of front end and engine."""


def bound(engine: Engine, max_tokens: int) -> tuple[float, float]:
    """Return the work ahead of a new request, and the bound of its wait, in seconds."""
    cache, open_now = engine.cache, list(engine.requests)
    uncached = sum(
        one.prefill_len - one.computed_len
        if one.lease is not None
        else one.num_tokens - cache.match(one.tokens, one.namespace).cached_len
        for one in open_now
    )
    # In the worst case each step computes one tile of a prompt, and a token of each answer.
    prompt_s = TOKEN_S + STEP_S / 64
    ahead_s = uncached * prompt_s
    together = min(PLACES, _fit(open_now, max_tokens))
    answers_s = max_tokens * (STEP_S + PLACES * TOKEN_S)
    rounds = 2 + len(open_now) / together
    return ahead_s, DUE_S + FACTOR * ahead_s + rounds * answers_s


def _fit(requests: list[Request], max_tokens: int) -> int:
    """Return the number of the longest ``requests`` that fit into the memory together."""
    longest = max(len(one.tokens) for one in requests) + max_tokens
    return max(1, ROWS // longest)


async def serve(load: Load, seed: int) -> Wait:
    """Return the wait of the other tenant. Raises AssertionError above the bound."""
    rng, now = Random(seed), [0.0]
    runner = QuickRunner(ROWS, 24, vocab_size=VOCABULARY, max_model_len=ROWS - 100)
    config = EngineConfig(max_running=PLACES, token_budget=256, max_queue=2048, warm_up=False)
    options: dict[str, Any] = {"tokenizer": None, "clock": lambda: now[0]}
    engine = Engine(config, runner=runner, sampler=OracleSampler(VOCABULARY), **options)
    front, texts, lost, ended = AsyncEngine(engine), dict[str, Text](), list[int](), list[Any]()
    host = front.channel.host
    # Its steps are called here, in the event loop.
    front.channel._thread = SimpleNamespace(is_alive=lambda: True, start=lambda: None)
    front.on_lost = lost.append
    WATCHDOG.fronts.add(front)
    WATCHDOG.start()
    front.start()

    def send(name: str, text: Text, namespace: str, max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        spec = RequestSpec(np.array(text, np.int32), params, namespace=namespace, request_id=name)
        stream = RequestStream(front.abort, ended.append)
        front.submit_valid(front._intake.validate(spec, now[0]), stream)
        host._run_commands()
        texts[name] = text

    number = 0
    for number in range(load.num_open):
        send(f"{number}", load.prompt(rng, []), f"{number % load.num_tenants}", load.max_tokens)
    num_computed, limit = 0, (0.0, 0.0)
    while True:
        if "victim" not in texts and now[0] >= ARRIVES_S:
            limit = bound(engine, load.max_tokens)
            send("victim", some(rng, load.victim_len, load.victim_len), "victim", 2)
            victim = next(one for one in engine.requests if one.request_id == "victim")
        host._step()
        host._run_commands()
        await asyncio.sleep(0)
        now[0] += STEP_S + TOKEN_S * (runner.num_tokens_computed - num_computed)
        num_computed = runner.num_tokens_computed
        if "victim" in texts:
            if victim.scheduled_s is not None:
                front._has_ended = True
                assert not lost and not WATCHDOG.found, (lost, WATCHDOG.found)
                wait_s = victim.scheduled_s - victim.arrival_s
                return Wait(wait_s, *limit, next(front._numbers))
            assert now[0] - victim.arrival_s <= limit[1], f"waits longer than {limit[1]:.0f} s"
        while ended:
            output, number = ended.pop(0), number + 1
            text = load.prompt(rng, [*texts.pop(output.request_id), *output.token_ids])
            send(f"{number}", text, f"{number % load.num_tenants}", load.max_tokens)


def run(seed: int, num_loads: int) -> dict[str, str]:
    """Run the first ``num_loads``. Returns their waits."""
    found: dict[str, str] = {}
    for name, load in list(LOADS.items())[:num_loads]:
        try:
            wait = asyncio.run(serve(load, seed))
        except AssertionError as error:
            raise AssertionError(f"{name}, seed {seed}: {error}") from error
        found[name] = f"{wait.wait_s:.0f} s, work ahead {wait.ahead_s:.0f} s, at most " + (
            f"{wait.bound_s:.0f} s, {wait.num_beats} comparisons"
        )
    return found
