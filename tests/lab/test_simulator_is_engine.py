"""Tests that engine and simulator agree: the same hits for every request, and the same evictions in
the same order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from engine.config import BUILTIN_DIR, EngineConfig
from engine.engine import Engine
from engine.requests.request import SamplingParams
from engine.weights.model_config import read_config
from hybridcache.cache import HybridRadixCache
from hybridcache.config import CacheConfig
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import Roofline
from hybridcache.geometry.units import GIB
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.simulation.serving import serve
from hybridcache.lab.trace import TraceRequest
from hybridcache.policies.registry import DEFAULT_EVICTION, DEFAULT_PLACEMENT, EVICTION_NAMES
from tests.cache.twins import VictimLog
from tests.lab.engine_steps import stepped_target
from tests.oracle import OracleRunner, OracleSampler

POLICIES = sorted(EVICTION_NAMES)
CHECKPOINTS = "branch,boundary,backoff,every:256,end"
EvictionRecord = tuple[str, int, int]


@pytest.fixture
def evictions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EvictionRecord]]:
    """Evictions of all caches in order: (kind, position, serial of the item)."""
    found: list[EvictionRecord] = []
    make = HybridRadixCache.__init__

    class Log(VictimLog):
        def chosen(self, item: Any) -> None:
            found.append((item.kind, item.position, item.serial))

    def make_watched(cache: HybridRadixCache, *arguments: Any, **options: Any) -> None:
        make(cache, *arguments, **options)
        Log(cache)

    monkeypatch.setattr(HybridRadixCache, "__init__", make_watched)
    yield found


def prompts(seed: int, sessions: int, vocab: int) -> list[tuple[int, np.ndarray]]:
    """Return interleaved turns: (session, new tokens). Sessions with odd numbers share one prefix,
    those with even numbers another."""
    rng = np.random.default_rng(seed)
    systems = [rng.integers(0, vocab, 150, dtype=np.int32) for _ in range(2)]
    turns: list[tuple[int, np.ndarray]] = []
    for turn in range(3):
        for session in rng.permutation(sessions).tolist():
            added = rng.integers(0, vocab, int(rng.integers(20, 260)), dtype=np.int32)
            turns.append(
                (session, np.concatenate((systems[session % 2], added)) if turn == 0 else added)
            )
    return turns


def serve_in_turn(engine: Engine, turns: Sequence[tuple[int, np.ndarray]]) -> list[TraceRequest]:
    """Serve requests one after another. Return them with their cached lengths as timestamps."""
    histories: dict[int, np.ndarray] = {}
    served = []
    for session, added in turns:
        prompt = np.concatenate((histories.get(session, added[:0]), added))
        sampling = SamplingParams(
            max_tokens=int(added[0]) % 70 + 1, ignore_eos=True, temperature=0.0
        )
        [output] = engine.generate([prompt.tolist()], sampling)
        answer = np.asarray(output.token_ids, np.int32)
        histories[session] = np.concatenate((prompt, answer))
        served.append(
            TraceRequest(
                float(output.cached_len), session, None, prompt, answer, stop_reason="length"
            )
        )
    return served


def assert_simulator_agrees(
    policy: str, engine: Engine, served: list[TraceRequest], evictions: list[EvictionRecord]
) -> None:
    """Check that the simulator has the hits and evictions of the engine for the same requests."""
    by_engine = list(evictions)
    evictions.clear()
    memory, geometry = engine.runner.memory, engine.runner.geometry
    settings: dict[str, Any] = {"gib": memory.total_bytes / GIB}
    if memory.memory == "pools":
        kv_bytes = memory.num_kv_tokens * geometry.kv_bytes_per_token
        total_bytes = kv_bytes + memory.num_slots * geometry.state_bytes
        settings = {"gib": total_bytes / GIB, "memory": "pools", "kv_share": kv_bytes / total_bytes}
    cell = Scenario(
        "own",
        model=geometry,
        times=Roofline(geometry),
        page_size=memory.page_size,
        policy=policy,
        checkpoints=",".join(engine.config.checkpoints),
        **settings,
    )
    target = stepped_target(cell)
    log = serve(target, served, 1, cell)
    assert list(log.cached_tokens) == [int(request.timestamp_s) for request in served]
    assert sum(log.cached_tokens) > 0 and len(by_engine) > 8
    assert evictions == by_engine


def test_builtin_model_has_the_simulated_hits_and_evictions(
    evictions: list[EvictionRecord],
) -> None:
    cache_bytes = 1200 * 640 + 7 * 215040
    engine = Engine(EngineConfig(token_budget=256, cache_gib=cache_bytes / 2**30))
    served = serve_in_turn(engine, prompts(seed=3, sessions=3, vocab=256))
    assert_simulator_agrees(DEFAULT_EVICTION, engine, served, evictions)


@pytest.mark.full(
    "pools-lru-branch,boundary,backoff,every:256,end",
    "pools-marconi-branch,boundary,backoff,every:256,end",
    "pools-survival-branch,boundary,backoff,every:256,end",
    "pools-survival-adaptive",
    "arena-sieve-branch,boundary,backoff,every:256,end",
    "arena, pages of 16-lhd-branch,boundary,backoff,every:256,end",
)
@pytest.mark.parametrize(
    ("policy", "checkpoints"),
    [*((policy, CHECKPOINTS) for policy in POLICIES), (DEFAULT_EVICTION, DEFAULT_PLACEMENT)],
)
@pytest.mark.parametrize("memory", ["pools", "arena", "arena, pages of 16"])
def test_sequential_requests_have_the_simulated_hits_and_evictions(
    policy: str, checkpoints: str, memory: str, evictions: list[EvictionRecord]
) -> None:
    page_size = 16 if memory.endswith("16") else 1
    runner = OracleRunner(2000, 9)
    if memory != "pools":  # A small model with states as large as the KV of 105 tokens.
        geometry = ModelGeometry.from_config(read_config(BUILTIN_DIR) | {"head_dim": 128})
        runner = OracleRunner(3200, None, geometry=geometry, page_size=page_size)
    config = EngineConfig(
        eviction=policy,
        checkpoints=tuple(checkpoints.split(",")),
        token_budget=256,
        page_size=page_size,
    )
    engine = Engine(config, runner=runner, sampler=OracleSampler())
    served = serve_in_turn(engine, prompts(seed=4, sessions=8, vocab=320))
    assert_simulator_agrees(policy, engine, served, evictions)
    if memory != "pools":
        assert engine.cache.arena is not None and engine.cache.arena.num_moves > 1


def test_default_policies_are_the_same_everywhere() -> None:
    assert CacheConfig(num_kv_tokens=8, num_slots=1).eviction == DEFAULT_EVICTION == "survival"
    sweep = Scenario("short")
    assert (sweep.policy, sweep.checkpoints) == (DEFAULT_EVICTION, DEFAULT_PLACEMENT)
    engine = EngineConfig()
    assert (engine.eviction, engine.checkpoints) == (DEFAULT_EVICTION, (DEFAULT_PLACEMENT,))
