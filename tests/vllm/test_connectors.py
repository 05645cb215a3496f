"""Connectors with HybridScheduler and with vLLM's own: no request resumes from other contents."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("vllm")

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
)
from vllm.v1.core.sched.scheduler import Scheduler

from hybridcache import open_trace
from hybridcache.vllm.check import isolation
from hybridcache.vllm.check.engine import COPY_S, SMALL, STEP_S, TOKEN_S, Options, StubEngine, run
from hybridcache.vllm.check.isolation import PARTS, Turn, drop_from_hashes, mixed
from hybridcache.vllm.check.transfers import RemotePrefill, Transfers
from hybridcache.vllm.places import FADING, PROMPT_TOKENS, SimulatedHost
from hybridcache.vllm.pool import HybridPool, Layout, derive
from tests.refused import refused

NUM_CHUNKS = 600


def connector(name: str, **fields: Any) -> dict[str, Any]:
    """Return the value of ``--kv-transfer-config``."""
    modules = {
        "HybridOffloadingConnector": "hybridcache.vllm.connector",
        "RemotePrefill": "hybridcache.vllm.check.transfers",
    }
    extra = {"cpu_bytes_to_use": NUM_CHUNKS * 128 * 256} | fields.pop("extra", {})
    found = {"kv_connector": name, "kv_connector_extra_config": extra} | fields
    return found | ({"kv_connector_module_path": modules[name]} if name in modules else {})


HOST, STOCK = connector("HybridOffloadingConnector"), connector("OffloadingConnector")
REMOTE = connector("RemotePrefill", extra={"share": 0.6})
RECOMPUTE = {"kv_load_failure_policy": "recompute"}


def serve(requests: Any, **options: Any) -> Any:
    """Serve ``requests`` in a pool of 60 blocks, which is short."""
    return run(requests, Options(**(SMALL | {"blocks": 60, "sessions": 4} | options)))


MODES: dict[str, dict[str, Any]] = {
    "in time": {},
    "late": {"late": 5, "overlap": True},
    "whole blocks": {"late": 2, "unit": 0},
    "drafts": {"drafts": 2, "eagle": True, "late": 1},
    "aborts, resets, failures": {
        "late": 5, "overlap": True, "chaos": 0.3, "resets": 0.03, "failures": 0.3,
    },
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("scheduler", "transfer"),
    [("vllm", STOCK), ("hybridcache", STOCK), ("hybridcache", HOST), ("hybridcache", REMOTE)],
    ids=["vllm, host", "stock connector", "host", "remote"],
)
def test_rows_and_states_are_those_of_the_prompt(scheduler, transfer, mode):
    if scheduler == "vllm" and "resets" in MODES[mode] and vllm.__version__ < "0.33":
        pytest.skip("vLLM 0.32 stops at an assertion when a request loads again after a reset")
    options = MODES[mode] | {"kv_transfer_config": transfer | RECOMPUTE, "scheduler": scheduler}
    report = serve(mixed(1, sessions=16), **options)
    assert report.num_wrong == 0 < report.resumed_tokens
    assert report.external_tokens > 0 or report.stored_blocks > 0
    assert bool(report.failed_loads) == bool(options.get("failures"))
    assert bool(report.resets) == bool(options.get("resets"))


def test_a_failed_load_ends_its_request_by_the_policy_of_vllm():
    requests = [*mixed(1, sessions=16)]
    report = serve(requests, failures=0.3, late=1, kv_transfer_config=HOST)
    assert report.num_wrong == 0 < report.failed_loads
    assert report.requests + report.failed_loads == len(requests)


class LMCacheTwin(RemotePrefill):
    """Connector with a name that is refused."""


def test_connectors_whose_contents_nobody_has_checked_are_refused():
    given = {"kv_connector": "LMCacheTwin", "kv_connector_module_path": __name__}
    options = Options(**SMALL, blocks=60, kv_transfer_config=given)
    refused(r"connector LMCacheTwin \(--kv-transfer-config\)", StubEngine, options)


def test_objects_of_other_plug_ins_are_not_derived():
    refused("HybridPool from vLLM's BlockPool", derive, object(), HybridPool, kind=TypeError)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_missing_in_the_hashes_is_found(part, monkeypatch):
    requests = [*mixed(embedded=0.7 if part == "embedding" else 0.15)]
    options = {"blocks": 200, "sessions": 8}
    assert serve(requests, **options).num_wrong == 0
    name = PARTS[part][0]
    monkeypatch.setattr(isolation.kv_cache_utils, name, getattr(isolation.kv_cache_utils, name))
    drop_from_hashes(part)
    found = serve(requests, **options)
    assert found.wrong_rows > 500 and found.wrong_states > 0


def unaligned(self: Any, *args: Any) -> None:
    """Start as vLLM did before its pull request 44599: hits do not end at blocks of states."""
    STARTED(self, *args)
    self._mamba_align_size = None
    self.config = self.config._replace(supports_partial_tail=False)


def divergent(self: Any, request: Any, *args: Any) -> Any:
    """Return the hit of issue 46453: rows deeper than the state, which no connector brings."""
    return (*self.kv_cache_manager.get_computed_blocks_for_connector(request, *args)[:3], False)


def unfenced(self: Any, meta: Any, step: int) -> None:
    """Start the transfers of a step, and flush none whose blocks are used again."""
    meta.jobs_to_flush = None
    START(self, meta, step)


START = Transfers.start
STARTED = OffloadingConnectorScheduler.__init__
FAULTS = {
    "44599": (OffloadingConnectorScheduler, "__init__", unaligned),
    "46453": (Scheduler, "_get_local_prefix_cache_hit", divergent),
    "no fence": (Transfers, "start", unfenced),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_former_version_is_found(fault, monkeypatch):
    owner, name, broken = FAULTS[fault]
    requests = [*mixed(3, sessions=20, is_text=True)]
    options: dict[str, Any] = {"scheduler": "vllm", "unit": 0, "retention": None, "blocks": 30}
    options |= {"late": 5, "overlap": True, "kv_transfer_config": STOCK}
    assert serve(requests, **options).num_wrong == 0
    monkeypatch.setattr(owner, name, broken)
    assert serve(requests, **options).num_wrong > 0


# --- Hits -----------------------------------------------------------------------------------------


def turns(seed: int, count: int) -> list[Turn]:
    """Return turns of a chat: prompts of 300, 700, ... tokens, and answers of 100."""
    text = np.random.default_rng(seed).integers(1, 9999, 400 * count).astype(np.int32)
    ends = range(300, 400 * count, 400)
    return [Turn(seed, text[:end], text[end : end + 100]) for end in ends]


def finish(engine: StubEngine, *requests: Turn) -> None:
    """Serve one request after the other, and three more steps for the transfers."""
    for one in requests:
        engine.submit(deque([one]))
        while engine.live:
            engine.step()
    for _ in range(3):
        engine.step()
    assert engine.report.num_wrong == 0


@pytest.mark.parametrize(
    ("transfer", "expected"), [(HOST, 384), (STOCK, 0)], ids=["ours", "vLLM's"]
)
def test_the_next_turn_resumes_from_the_host_at_the_end_of_the_answer(transfer, expected):
    engine = StubEngine(Options(**SMALL, blocks=40, kv_transfer_config=transfer))
    first, second = turns(1, 2)
    finish(engine, first, *(turns(seed, 1)[0] for seed in range(2, 14)))
    before, loaded = engine.report.external_tokens, PROMPT_TOKENS.labels("loaded")._value
    counted = loaded.get()
    finish(engine, second)
    assert engine.report.external_tokens - before == loaded.get() - counted == expected


def test_a_state_that_the_next_turn_needs_no_more_is_not_stored():
    engine = StubEngine(Options(**SMALL, blocks=60, kv_transfer_config=HOST))
    finish(engine, *turns(1, 1))
    # 399 tokens: three blocks of rows, and the state after 384 of them in two groups. That at the
    # end of the prompt, which the device has too, would be three blocks more.
    assert engine.report.stored_blocks == 5 < 3 * len(engine.scheduler.kv_cache_manager.tree.states)


def test_the_block_that_a_hit_ended_in_is_stored_when_it_is_whole():
    """A chat without the device's cache: each turn resumes at the end of the answer before it."""
    engine = StubEngine(Options(**SMALL, blocks=60, kv_transfer_config=HOST))
    for one, expected in zip(turns(1, 5), np.cumsum([0, 384, 768, 1184, 1568]), strict=True):
        finish(engine, one)
        assert engine.report.external_tokens == expected
        assert engine.scheduler.reset_prefix_cache()


def test_a_reset_with_the_connector_forgets_the_host():
    engine = StubEngine(Options(**SMALL, blocks=60, kv_transfer_config=HOST))
    loaded, (first, second) = [], turns(1, 2)
    for one, with_connector in ((first, False), (second, True), (second, True)):
        finish(engine, one)
        loaded.append(engine.report.external_tokens)
        assert engine.scheduler.reset_prefix_cache(reset_connector=with_connector)
    assert 0 == loaded[0] < loaded[1] == loaded[2]


def test_a_decode_node_receives_the_tokens_that_vllm_would_ask_for():
    """No states lie on the device in vLLM's way, so that both know the same rows."""
    sent = []
    for scheduler in ("vllm", "hybridcache"):
        options = SMALL | {"blocks": 400, "unit": 0, "sessions": 1, "scheduler": scheduler}
        engine = StubEngine(Options(**options, kv_transfer_config=connector("RemotePrefill")))
        finish(engine, *(one for seed in range(4) for one in turns(seed, 3)))
        remote = engine.scheduler.connector
        sent.append((remote.asked_tokens, remote.external_tokens))
    assert sent[0] == sent[1] and sent[0][1] < sent[0][0] * 0.8


def test_the_time_model_counts_steps_tokens_and_copies():
    """Two prompts of 300 tokens in turn, the second one behind a hit of 288 in a copied block."""
    engine = StubEngine(Options(**SMALL, blocks=60))
    finish(engine, *[turns(1, 1)[0]] * 2)
    report = engine.report
    assert report.computed_tokens == 2 * 399 - 288
    expected = report.computed_tokens * TOKEN_S + report.copied_blocks * COPY_S
    num_steps = round((report.seconds - expected) / STEP_S)
    assert report.seconds == pytest.approx(num_steps * STEP_S + expected) and num_steps > 198
    first, second = engine.ttfts_s
    assert STEP_S < second < first - 200 * TOKEN_S


@pytest.mark.parametrize(
    ("trace", "gib", "host_gib", "least"), [("resend", 1, 3, 0.6), ("branch", 2, 2, 0.8)]
)
def test_states_that_a_short_device_loses_come_from_the_host(trace, gib, host_gib, least):
    """Prompts come again with other answers, or heads with other ends: on the device no state
    survives until its next turn. Of the states of `branch` the host has room for those at ends of
    blocks alone."""
    requests = [*open_trace(trace)]
    host = {"kv_connector_extra_config": {"cpu_bytes_to_use": host_gib * 2**30}}
    ours, theirs = (
        run(requests, Options(gib, name, unit=unit, kv_transfer_config=transfer | host))
        for name, unit, transfer in (("hybridcache", 32, HOST), ("vllm", 0, STOCK))
    )
    assert ours.num_wrong == 0 and ours.hit_rate > least
    assert ours.hit_rate > theirs.hit_rate - 1e-3 > 0


LAYOUT = Layout(unit=2, block_size=6, block_bytes=1, drop=0, attention=0, states=(1, 2))


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 20), st.integers(0, 20)), max_size=12),
    st.integers(1, 30),
    st.sampled_from([LAYOUT.unit, LAYOUT.block_size]),
)
def test_a_simulated_host_has_what_was_used_last(prompts, num_blocks, grid):
    """The reference keeps a list of (text, length) keys, oldest first, and searches all of it."""
    host, held, cost, hits = SimulatedHost(num_blocks, LAYOUT, grid), [], {}, 0.0
    for text, length, seen in prompts:
        hashes = [f"{text} {end}" for end in range(2, length + 1, 2)]
        seen = min(seen, length)
        host.serve(SimpleNamespace(block_hashes=hashes, num_tokens=length), [seen])
        rows = [(text, "rows", end) for end in range(6, length + 1, 6)]
        hit = max(
            at
            for at in range(0, length, grid)
            if at == 0 or ((text, at) in held and all(row in held for row in rows if row[2] <= at))
        )
        hits = hits * FADING + hit
        states = sorted({at - at % grid for at in (hit, length, seen)} - {0}, reverse=True)
        used = [(text, at) for at in states] + rows[::-1]
        cost |= {(text, at): 2 + (at % 6 > 0) for at in states} | dict.fromkeys(rows, 1)
        held = [one for one in held if one not in used] + used
        while sum(cost[one] for one in held) > num_blocks:
            del held[0]
    assert host.hits == pytest.approx(hits)
