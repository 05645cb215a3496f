"""Tests of rebuilt baselines: known behaviour on prompts small enough to count by hand, hits of
each request recorded with vLLM 0.33, and invariants."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybridcache.lab.rivals.lightllm import LightllmCache
from hybridcache.lab.rivals.llama_cpp import LlamaCppCache
from hybridcache.lab.rivals.protocol import Baseline, BaselineConfig, begin, replay
from hybridcache.lab.rivals.sglang import SglangCache
from hybridcache.lab.rivals.snapshots import OllamaCache, TensorRtCache
from hybridcache.lab.rivals.systems import BASELINES
from hybridcache.lab.rivals.vllm import VllmCache, VllmTtlCache
from hybridcache.lab.traces.generators import GENERATORS
from hybridcache.radix.tokens import Tokens

GIB = 1 << 30
QWEN3_NEXT = BaselineConfig(
    budget_bytes=40 * GIB, kv_bytes_per_token=24_576, state_bytes=36 * (49_152 + 2_097_152)
)
SMALL = BaselineConfig(
    budget_bytes=40_000, kv_bytes_per_token=12, state_bytes=640, num_full_layers=1,
    num_linear_layers=3, grid=8,
)  # fmt: skip


def text(seed: int, length: int) -> Tokens:
    """Return random tokens."""
    return np.random.default_rng(seed).integers(0, 150_000, length, dtype=np.int32)


def repeated_hits(peer: Baseline, prefix: Tokens, count: int = 6) -> list[int]:
    """Return the tokens reused by each of ``count`` prompts: a shared prefix and 700 random
    tokens."""
    return [
        replay(peer, np.concatenate((prefix, text(100 + n, 700))), text(200 + n, 8))
        for n in range(count)
    ]


def test_lightllm_has_one_state_at_the_last_whole_page() -> None:
    peer = LightllmCache(QWEN3_NEXT)
    assert repeated_hits(peer, text(0, 1500)) == [0] * 6
    prompt = text(1, 1600)
    assert [replay(peer, prompt, text(2, 50)) for _ in range(2)] == [0, 1536]
    assert replay(peer, prompt[:1536], text(2, 50)) == 0, "the last token is not hashed"


def sglang(**settings: object) -> SglangCache:
    return SglangCache(QWEN3_NEXT, **settings)  # type: ignore[arg-type]


def test_sglang_reuses_a_prefix_from_the_third_prompt_on_the_grid() -> None:
    assert repeated_hits(sglang(), text(0, 1500), 4) == [0, 0, 1472, 1472]


def test_sglang_end_placement_never_reuses_a_system_prompt() -> None:
    peer = sglang(placement="end")
    assert repeated_hits(peer, text(0, 1500)) == [0] * 6
    node, kv_len = peer.match(peer.roots[None], text(0, 1500))
    assert (node.depth, kv_len) == (0, 1500), "its KV is there, but no state"


@pytest.mark.parametrize(("placement", "states"), [("extra_buffer", 3), ("end", 1)])
def test_sglang_charges_a_running_request_all_its_states(placement: Any, states: int) -> None:
    peer = sglang(placement=placement, num_slots=2 * (states + 2))
    running = [peer.begin(text(seed, 300)) for seed in range(3)]
    assert running.pop() is None and peer.held_slots == 2 * states
    assert [session.finish(text(9, 5)) for session in running if session] == [None] * 2
    assert peer.held_slots == 0


def test_sglang_evicts_states_of_open_sessions_last_and_their_newest_only() -> None:
    peer = sglang(placement="end", num_kv_tokens=100_000, num_slots=6, sessions=True)

    def turn(session: int, tokens: Tokens, ends: bool = False) -> int:
        served = begin(peer, tokens, None, session=session, stop_reason="session_end" * ends)
        assert served is not None
        served.finish(text(9, 20))
        peer.check()
        return served.cached_len

    turn(1, text(1, 100))
    assert turn(1, np.concatenate((text(1, 100), text(9, 20), text(2, 80)))) == 120
    turn(2, text(3, 100), ends=True)
    for seed in range(10, 14):
        turn(seed, text(seed, 100), ends=True)
    again = np.concatenate((text(1, 100), text(9, 20), text(2, 80), text(9, 20), text(4, 9)))
    assert turn(1, again) == 220, "session 1 is open, so its newest state outlasts newer ones"
    assert turn(2, np.concatenate((text(3, 100), text(9, 20), text(5, 9)))) == 0


def test_sglang_cap_drops_the_shallowest_states_of_a_path() -> None:
    peer = sglang(placement="end", num_kv_tokens=100_000, num_slots=9, max_states_per_path=2)
    history = text(0, 100)
    for turn in range(4):
        replay(peer, history, text(10 + turn, 20))
        history = np.concatenate((history, text(10 + turn, 20), text(20 + turn, 80)))
    assert len(peer.states) == 2
    peer.check()


RECORD: dict[str, dict[str, dict[str, Any]]] = json.loads(
    (Path(__file__).parent / "vllm_hits.json").read_text()
)
"""Written by record_vllm.py of commit efe20553, with vLLM's own ``KVCacheManager`` and chunk split,
one request at a time."""
VARIANTS: dict[str, tuple[int, int | None, bool]] = {
    "block 1056": (1056, None, False),
    "match unit 32": (1056, 32, False),
    "retention None": (1056, None, True),
    "match unit 32, retention None": (1056, 32, True),
    "block 544": (544, None, False),
    "block 544, match unit 32": (544, 32, False),
}
"""Block and match unit in tokens, and ``keep_all``, by name. Qwen3-Next's block is 1,056 with
float32 states, 544 with bfloat16 ones."""
BF16 = replace(QWEN3_NEXT, state_bytes=36 * (49_152 + 1_048_576))


@pytest.mark.full("few-shot", "branch", "resend", "short")
@pytest.mark.parametrize("workload", RECORD)
def test_each_request_reuses_as_many_tokens_as_in_vllm(workload: str) -> None:
    trace = list(GENERATORS[workload](seed=0))
    for cell, expected in RECORD[workload].items():
        name, _, size = cell.rpartition(", ")
        block, unit, keep_all = VARIANTS[name]
        config = QWEN3_NEXT if block == 1056 else BF16
        config = replace(config, budget_bytes=int(size.split()[0]) * GIB)
        peer = VllmCache(config, unit, keep_all)
        assert peer.block_tokens == block
        served = []
        for request in trace:
            session = peer.begin(request.tokens)
            assert session is not None
            served.append((session.cached_len, session.num_chunks))
            session.finish(request.output)
        peer.check()
        lines = "\n".join(f"{reused} {chunks}" for reused, chunks in served)
        assert expected == {
            "reused": sum(reused for reused, _ in served),
            "chunks": sum(chunks for _, chunks in served),
            "digest": hashlib.blake2b(lines.encode(), digest_size=8).hexdigest(),
        }, cell


@pytest.mark.parametrize("baseline", sorted(BASELINES))
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), concurrent=st.integers(1, 3))
def test_invariants_hold_and_hits_are_prefixes_of_earlier_prompts(
    baseline: str, seed: int, concurrent: int
) -> None:
    rng = np.random.default_rng(seed)
    peer = BASELINES[baseline](SMALL)
    stems = [rng.integers(0, 50, 300, dtype=np.int32) for _ in range(3)]
    seen: list[Tokens] = []
    running = []
    for _ in range(25):
        stem = stems[int(rng.integers(3))][: int(rng.integers(1, 300))]
        prompt = np.concatenate((stem, rng.integers(0, 50, int(rng.integers(1, 200)), np.int32)))
        session = peer.begin(prompt)
        if session is not None:
            hit = session.cached_len
            assert 0 <= hit < len(prompt)
            assert hit == 0 or any(np.array_equal(prompt[:hit], other[:hit]) for other in seen)
            answer = rng.integers(0, 50, int(rng.integers(0, 60)), dtype=np.int32)
            seen.append(np.concatenate((prompt, answer)))
            running.append(partial(session.finish, answer))
        while len(running) >= concurrent:
            running.pop(0)()
            peer.check()
    for finish in running:
        finish()
    peer.check()


@pytest.mark.parametrize(
    ("call_s", "returns_s", "hits"), [(1, 1.5, True), (1, 4, False), (9, 1, False)]
)
def test_vllm_ttl_pins_a_session_whose_tools_are_fast(
    call_s: float, returns_s: float, hits: bool
) -> None:
    now_s, prompt = [0.0], text(0, 3000)
    peer = VllmTtlCache(replace(QWEN3_NEXT, budget_bytes=GIB))

    def turn(session: int, tokens: Tokens, stop_reason: str = "") -> int:
        facts = {"session": session, "stop_reason": stop_reason, "clock": lambda: now_s[0]}
        served = begin(peer, tokens, None, **facts)
        assert served is not None
        served.finish(text(9, 20))
        peer.check()
        return served.cached_len

    turn(1, text(2, 50), "tool_use")
    now_s[0] += call_s
    turn(1, prompt, "tool_use")
    for seed in range(10, 30):
        now_s[0] += returns_s / 20
        turn(seed, text(seed, 3000))
    assert bool(turn(1, prompt)) == hits


# --- Systems rebuilt from pull requests: prompts that can be counted by hand ----------------------


def followed(
    peer: Baseline, prompt: Tokens, boundaries: tuple[int, ...] = (), seed: int = 9
) -> int:
    """Return the reused tokens of a request with an answer of 21 tokens."""
    session = begin(peer, prompt, None, boundaries=boundaries)
    assert session is not None
    session.finish(text(seed, 21))
    peer.check()
    return session.cached_len


def test_llama_cpp_resumes_from_the_slot_s_end_or_its_last_checkpoint() -> None:
    peer = LlamaCppCache(QWEN3_NEXT)
    prompt, more = text(0, 2000), text(1, 300)
    assert followed(peer, prompt, (1500,)) == 0
    # The last token of the answer is not computed, so the slot has 2,020 tokens.
    continued = np.concatenate((prompt, text(9, 21)[:20], more))
    assert followed(peer, continued, (1500, 2020)) == 2020
    assert peer.slots[0].checkpoints == [1484, 1500, 1996, 2020, 2316]  # 1804 is before 2020
    # The answer is rewritten: the checkpoint four tokens before the first prompt's end survives.
    assert followed(peer, np.concatenate((prompt, more)), (1500,)) == 1996
    assert followed(peer, np.concatenate((prompt[:1490], more)), ()) == 1484
    # Four other prompts take all slots: nothing is left, though memory for it is.
    for seed in range(10, 14):
        assert followed(peer, text(seed, 500)) == 0
    assert followed(peer, prompt) == 0


def test_llama_cpp_clears_idle_slots_for_cells_and_lets_a_fifth_request_wait() -> None:
    peer = LlamaCppCache(
        replace(QWEN3_NEXT, budget_bytes=4 * QWEN3_NEXT.state_bytes + 1000 * 24_576)
    )
    assert followed(peer, text(0, 600)) == followed(peer, text(1, 700)) == 0
    assert [len(slot.tokens) for slot in peer.slots if len(slot.tokens)] == [720]
    assert peer.begin(text(2, 1001)) is None
    running = [peer.begin(text(seed, 50)) for seed in range(3, 7)]
    assert None not in running and peer.begin(text(8, 50)) is None


def test_tensorrt_llm_saves_at_declared_boundaries_and_at_branches() -> None:
    peer = TensorRtCache(QWEN3_NEXT)
    head = text(0, 1500)
    prompts = [np.concatenate((head, text(seed, 700))) for seed in (1, 2, 3)]
    assert [followed(peer, prompt, (1000,)) for prompt in prompts] == [0, 992, 1472]
    assert [followed(peer, one) for one in (prompts[0][:992], prompts[0][:1000])] == [0, 992]
    undeclared = TensorRtCache(QWEN3_NEXT)
    assert [followed(undeclared, prompt) for prompt in prompts] == [0, 0, 1472]


def test_ollama_falls_back_to_multiples_of_8192() -> None:
    peer = OllamaCache(QWEN3_NEXT)
    prompt = text(0, 20_000)
    assert followed(peer, prompt) == 0
    whole = np.concatenate((prompt, text(9, 21)))
    assert followed(peer, np.concatenate((whole, text(1, 50)))) == 20_021
    assert followed(peer, np.concatenate((prompt, text(2, 50)))) == 16_384
