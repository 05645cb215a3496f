"""Tests of the engine on one arena for rows and states: rows move while requests run, are
preempted, aborted and interrupted."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from engine import Engine, EngineConfig, SamplingParams, engine_config
from engine.schedule.batch import Batch
from hybridcache.geometry.model import ModelGeometry
from tests.oracle import Fingerprints, OracleRunner, OracleSampler

SLAB = 40
Interrupt = Callable[["MovingRunner", Batch], None]


def geometry(slab_rows: int = SLAB) -> ModelGeometry:
    """Return a geometry with states nearly as large as the KV of ``slab_rows`` tokens."""
    preset = ModelGeometry.preset("qwen3-next")
    return dataclasses.replace(
        preset, kv_bytes_per_token=10, recurrent_elements=0, conv_bytes=10 * slab_rows - 3
    )


class MovingRunner(OracleRunner):
    """Runner that records its batches and calls ``before_forward`` first, which may interrupt a
    step."""

    def __init__(self, num_rows: int, slab_rows: int = SLAB, **settings: Any) -> None:
        super().__init__(num_rows, None, geometry=geometry(slab_rows), **settings)
        self.batches: list[Batch] = []
        self.before_forward: Interrupt | None = None

    def forward(self, batch: Batch, drawn: Sequence[int] = ()) -> Fingerprints:
        self.batches.append(batch)
        assert len(batch.moves) <= 1, "a step waits for two slabs"
        if self.before_forward is not None:
            self.before_forward(self, batch)
        return super().forward(batch, drawn)

    @property
    def num_moves(self) -> int:
        return sum(len(batch.moves) for batch in self.batches)


def make_engine(num_rows: int = 700, **settings: Any) -> Engine:
    page_size = settings.get("page_size", 1)
    config = engine_config(**{"max_running": 4, "token_budget": 128, "check": True} | settings)
    longest = max(
        len(prompt) + params.max_tokens for prompt, params in zip(prompts(), SAMPLING, strict=True)
    )
    runner = MovingRunner(num_rows, page_size=page_size, exact=config.exact, max_model_len=longest)
    return Engine(config, runner=runner, sampler=OracleSampler())


def prompts(count: int = 24) -> list[list[int]]:
    """Return prompts that fork from three stems; some are repeated."""
    rng = np.random.default_rng(5)
    stems = [rng.integers(0, 320, 200).tolist() for _ in range(3)]
    made = []
    for i in range(count):
        cut = int(rng.choice([64, 100, 130, 200]))
        suffix = rng.integers(0, 320, int(rng.integers(1, 60))).tolist()
        made.append(stems[i % 3][:cut] + (suffix if i % 4 else []))
    return made


SAMPLING = [SamplingParams(max_tokens=n, temperature=0) for n in (3, 60, 70, 9) * 6]


def serve(engine: Engine) -> list[list[int]]:
    """Return the answers of all prompts; interrupted steps are repeated."""
    order = [
        engine.submit(prompt, params) for prompt, params in zip(prompts(), SAMPLING, strict=True)
    ]
    answers: dict[str, list[int]] = {}
    while engine.has_work():
        with contextlib.suppress(KeyboardInterrupt):
            for output in engine.step():
                answers[output.request_id] = output.token_ids
        engine.check()
    return [answers[request_id] for request_id in order]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    config = EngineConfig(prefix_cache="none", max_running=1)
    return serve(Engine(config, runner=OracleRunner(4000, 4), sampler=OracleSampler()))


@pytest.mark.full("on")
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_requests_can_be_aborted_while_rows_move(expected: list[list[int]], overlap: str) -> None:
    """Check that a request aborted between a move and its batch leaves the moved rows intact."""
    engine = make_engine(overlap=overlap)
    manager = engine._manager
    order = [
        engine.submit(prompt, params) for prompt, params in zip(prompts(), SAMPLING, strict=True)
    ]
    answers: dict[str, list[int]] = {}
    aborted = set()
    take = manager.take_checkpoint_slots

    def abort_after_a_move(request: Any, end: int) -> Any:
        found = take(request, end)
        if manager.has_moves and len(aborted) < 6 and request.request_id not in aborted:
            aborted.add(request.request_id)
        return found

    manager.take_checkpoint_slots = abort_after_a_move  # type: ignore[method-assign]
    while engine.has_work():
        for output in engine.step():
            answers[output.request_id] = output.token_ids
        for request_id in aborted:
            engine.abort(request_id)
        engine.check()
    assert len(aborted) >= 3
    for request_id, tokens in zip(order, expected, strict=True):
        if request_id not in aborted:
            assert answers[request_id] == tokens
    manager.take_checkpoint_slots = take  # type: ignore[method-assign]
    assert serve(engine) == expected
