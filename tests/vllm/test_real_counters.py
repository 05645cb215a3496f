"""Hits of vLLM with our scheduler are those that the simulator foretells, token for token."""

from __future__ import annotations

import numpy as np
import pytest

from hybridcache.lab.runs.simulate import simulate
from hybridcache.lab.traces.trace import Trace, TraceRequest
from tests.vllm.real_engine import (
    GRID,
    Ask,
    Engine,
    Load,
    assert_same_tokens,
    force_async_scheduling,
    write_model,
)


@pytest.fixture(scope="module", params=[64, 32])
def load(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Serve chats, branches and edits, one request at a time, in a pool that has room for all.

    The parameter is the match unit. 32 is half a chunk of the kernel, so that some hits are rounded
    differently.
    """
    force_async_scheduling()
    engine = Engine(
        write_model(tmp_path_factory.mktemp("model")),
        scheduler_cls="hybridcache.vllm.HybridScheduler",
        prefix_match_unit=request.param,
        num_gpu_blocks_override=600,
    )
    load = Load(engine)
    histories = load.chats(1)
    for history in histories:
        load.branches_and_edits(history, 1)
    for history in histories:
        load.serve(Ask(tuple(history)))
    return load


def test_hits_are_those_of_the_simulator(load: Load) -> None:
    requests = []
    for number, one in enumerate(load.served):
        prompt, answer = (np.array(ids, np.int32) for ids in (one.ask.prompt, one.answer.tokens))
        requests.append(TraceRequest(float(number), number, None, prompt, answer))
    trace = Trace("served", 1, lambda: requests)
    unit = load.engine.scheduler.hash_block_size
    [run] = simulate(trace, gib=64, grid=unit, bound=False, progress=False).runs
    hits = [one.answer.cached_len for one in load.served]
    # The learned placement counts in words of hashes here, and in tokens there.
    assert sum(hits) == pytest.approx(run.cached_tokens, rel=0.0 if unit == 64 else 0.01)
    assert sum(hit > 0 for hit in hits) == run.hits > 50
    metrics = {one.name: one for one in load.engine.llm.get_metrics()}
    assert metrics["vllm:prefix_cache_hits"].value == sum(hits)
    assert metrics["vllm:prefix_cache_queries"].value == sum(len(q.tokens) for q in requests)


def test_answers_are_those_of_cold_runs(load: Load) -> None:
    unit = load.engine.scheduler.hash_block_size
    assert any(one.answer.cached_len % GRID for one in load.served) == (unit < GRID)
    for one in load.served[::3]:
        cold = load.engine.cold(one.ask.prompt, one.ask.max_tokens)
        assert_same_tokens(one.answer, cold)
