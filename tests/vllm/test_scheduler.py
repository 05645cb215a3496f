"""HybridScheduler in vLLM's own code, with a worker that stores the identity of each prefix."""

from __future__ import annotations

import inspect
import sys
import tomllib
from collections import deque
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_events import BlockStored
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import Request, RequestStatus

from hybridcache import open_trace
from hybridcache.adapters.events import Mirror
from hybridcache.adapters.routing.blocks import BlockEvents
from hybridcache.vllm import Settings, places, plug_in, scheduler
from hybridcache.vllm.check import engine as check
from hybridcache.vllm.check.engine import SMALL, Contents, Options, StubEngine, run
from hybridcache.vllm.scheduler import HybridManager
from tests.refused import refused
from tests.selection import ROOT


def prompt_of(*parts: tuple[int, int]) -> list[int]:
    """Return the tokens of parts (seed, length)."""
    draws = [np.random.default_rng(seed).integers(1, 9999, size) for seed, size in parts]
    return np.concatenate(draws).tolist()


def turn(prompt: Sequence[int], answer: int, session: object = None, **fields: Any) -> Any:
    tokens = np.array(prompt, np.int32)
    output = np.random.default_rng(len(prompt)).integers(1, 9999, answer).astype(np.int32)
    named = {"namespace": None, "boundaries": (), "session": session} | fields
    return SimpleNamespace(tokens=tokens, output=output, **named)


def chats(num_sessions: int, num_turns: int, seed: int = 0) -> list[Any]:
    """Draw conversations with one system prompt, whose turns contain all earlier ones."""
    chance, found = np.random.default_rng(seed), []
    for session in range(num_sessions):
        text = prompt_of((7, 300))
        for number in range(num_turns):
            text = text + prompt_of((1000 * session + number + 1, int(chance.integers(20, 400))))
            one = turn(text, int(chance.integers(3, 150)), session)
            found.append(one)
            text = text + one.output.tolist()
    return found


def serve(requests: list[Any], num_blocks: int, **options: Any) -> Any:
    return run(requests, Options(blocks=num_blocks, **(SMALL | {"sessions": 6} | options)))


def test_preempted_requests_resume_from_what_they_computed():
    report = serve(chats(8, 4), 30, overlap=True, settings={"placement": "end"})
    assert report.num_wrong == 0 and report.preemptions > 0
    assert report.resumed_tokens > report.hit_tokens


def test_one_request_at_a_time_keeps_the_order_of_the_trace():
    first, other = (turn(prompt_of((seed, 900)), 20, seed) for seed in (1, 2))
    again = turn([*first.tokens, *first.output], 20, 1)
    # Memory has room for one of the prompts: the other one comes between two turns.
    assert serve([first, other, again], 13, sessions=1).hit_tokens == 0
    assert serve([first, again, other], 13, sessions=1).hit_tokens > 500


class StuckError(Exception):
    """No end after a number of steps."""


@pytest.mark.parametrize("num_blocks", [14, 15])
def test_a_hit_that_does_not_fit_beside_its_copies_is_given_up(num_blocks, monkeypatch):
    """A prompt of 900 tokens fits into 12 blocks, and its hit inside a block needs 15."""
    plain = StubEngine.step

    def step(engine: StubEngine) -> None:
        plain(engine)
        if engine.report.steps > 900:
            raise StuckError(engine.report)

    monkeypatch.setattr(StubEngine, "step", step)
    first = turn(prompt_of((1, 700)), 130, "a")
    text = [*first.tokens, *first.output]
    again = turn(text + prompt_of((2, 70)), 20, "a")
    for overlap in (False, True):
        report = serve([first, again], num_blocks, overlap=overlap)
        assert report.num_wrong == 0 == report.hit_tokens and report.requests == 2


MODES = {
    "in turn": {},
    "asynchronous": {"overlap": True},
    "drafts": {"drafts": 2},
    "EAGLE": {"drafts": 3, "eagle": True, "overlap": True},
    "aborts and priorities": {"chaos": 0.3, "overlap": True, "seed": 3},
    "another eviction": {"settings": {"eviction": "lru"}},
    "whole blocks": {"unit": 0},
    "a stop at each unit": {"overlap": True, "settings": {"placement": "every:32"}},
}


@pytest.mark.parametrize("num_blocks", [40, 120])
@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_every_request_resumes_from_its_own_prompt(options, num_blocks):
    report = serve(chats(8, 4), num_blocks, **options)
    assert report.num_wrong == 0
    assert report.resumed_tokens > 0
    assert bool(report.aborts) == bool(options.get("chaos"))


def test_hashes_that_cover_the_next_token_are_matched(monkeypatch):
    """vLLM 0.33 has them with EAGLE and MTP, instead of a dropped unit."""
    make, hasher = check.make_config, check.get_request_block_hasher
    if "num_hash_lookahead_tokens" not in inspect.signature(hasher).parameters:
        pytest.skip("this version of vLLM has no such hashes")

    def changed(*args: Any) -> Any:
        config = make(*args)
        config.num_hash_lookahead_tokens = 1
        return config

    monkeypatch.setattr(check, "make_config", changed)
    monkeypatch.setattr(check, "get_request_block_hasher", lambda *args: hasher(*args, 1))
    report = serve(chats(8, 4), 60, drafts=2, eagle=True, overlap=True)
    assert report.num_wrong == 0 < report.hit_tokens


def test_a_copy_that_is_not_carried_out_is_found(monkeypatch):
    monkeypatch.setattr(Contents, "copy", lambda *_: None)
    report = serve(chats(8, 4), 120)
    assert report.wrong_rows > 100 < report.wrong_states * 1000


def test_a_state_that_kernels_export_inside_a_prefill_costs_no_hits(monkeypatch):
    """vLLM reserves a block for it. Here planned stops replace it, and no block is reserved."""
    plain, mamba2, kda = (serve(chats(8, 4), 40, exports=one) for one in (0, 1, 64))
    assert mamba2.num_wrong == 0 == kda.num_wrong
    assert mamba2.hit_tokens == kda.hit_tokens == plain.hit_tokens > 0
    options = {"scheduler": "vllm", "exports": 1}
    assert serve(chats(8, 4), 120, **options).num_wrong == 0
    monkeypatch.setattr(Contents, "_export", lambda *_: None)
    assert serve(chats(8, 4), 120, **options).wrong_states > 0


def test_hits_exceed_those_of_vllm_with_each_of_its_flags():
    requests = chats(8, 4)
    ours = serve(requests, 60).hit_rate
    for options in ({"unit": 0}, {}, {"unit": 0, "retention": None}):
        report = serve(requests, 60, scheduler="vllm", **options)
        assert report.num_wrong == 0 and ours > report.hit_rate + 0.1


@pytest.mark.parametrize(("trace", "gib"), [("branch", 4), ("resend?seed=2", 2)])
def test_prompts_at_once_do_not_plan_into_the_same_free_memory(trace, gib):
    # Each of the first prompts sees the free blocks that the others have planned states for.
    ours, as_it_is = (
        run(open_trace(trace), Options(gib, **options))
        for options in ({}, {"scheduler": "vllm", "unit": 0})
    )
    assert ours.num_wrong == 0
    assert ours.hit_tokens > as_it_is.hit_tokens > 0


def test_a_model_without_states_is_served_by_vllm_as_it_is():
    model = {"unit": 0, "sessions": 4, "layers": 1, "state_groups": 0, "row_bytes": 256}
    gib = 200 * 16 * 256 / 2**30
    reports = [run(chats(6, 3), Options(gib, name, **model)) for name in ("hybridcache", "vllm")]
    assert reports[0] == reports[1] and reports[0].hit_tokens > 0
    assert type(StubEngine(Options(0.01, **model)).scheduler) is AsyncScheduler


def test_a_plan_counts_a_use_of_lost_checkpoints_only_while_the_policy_decides(monkeypatch):
    """The request is counted by the cache when it is admitted."""
    plain, seen = places.Places.plan, []

    def plan(self: Any, *args: Any) -> None:
        found = self.tree.cache.evicted(next(one for one in args if hasattr(one, "seen_len")))
        before = [(one, one.earlier_uses) for one in found]
        plain(self, *args)
        assert before == [(one, one.earlier_uses) for one in found]
        seen.extend(before)

    survives, prefill = [], places.Prefill
    monkeypatch.setattr(
        places, "Prefill", lambda **of: survives.append(of["answer_survives"]) or prefill(**of)
    )
    monkeypatch.setattr(places.Places, "plan", plan)
    serve(chats(8, 4), 40)
    assert seen and survives and all(survives)


def test_with_drafts_no_token_of_a_step_in_flight_is_published_at_the_end(monkeypatch):
    plain, publish, ends, seen = HybridManager._end, HybridManager._publish, [], []

    def end(self: HybridManager, request: Request) -> None:
        ends.clear()
        plain(self, request)
        seen.extend(request.num_in_flight_tokens for _ in ends)
        assert all(at <= request.num_computed_tokens - request.num_in_flight_tokens for at in ends)

    def published(self: HybridManager, request: Request, tables: Any, at: int, states: Any) -> Any:
        ends.append(at)
        return publish(self, request, tables, at, states)

    monkeypatch.setattr(HybridManager, "_end", end)
    monkeypatch.setattr(HybridManager, "_publish", published)
    report = serve(chats(8, 4), 40, drafts=2, overlap=True, chaos=0.3, seed=3)
    assert report.num_wrong == 0 and any(seen)


# --- One engine ---------------------------------------------------------------------------------


class Steps:
    """StubEngine whose requests are added one by one. ``hits`` are those of each request."""

    def __init__(self, num_blocks: int = 200, **options: Any) -> None:
        fields = SMALL | {"blocks": num_blocks, "chunk": 4096} | options
        self.engine = StubEngine(Options(**fields))
        self.scheduler = self.engine.scheduler
        self.hits: list[int] = []
        manager = self.scheduler.kv_cache_manager
        manager.record_prefix_cache_stats = lambda _, hits: self.hits.append(hits)

    def serve(self, *turns: Any) -> list[int]:
        """Serve ``turns`` at once, and return their hits in tokens."""
        first = len(self.hits)
        for one in turns:
            self.engine.submit(deque([one]))
        while self.engine.live:
            self.engine.step()
        assert self.engine.report.num_wrong == 0
        return self.hits[first:]


def test_the_next_turn_resumes_at_the_end_of_the_answer():
    steps, first = Steps(), turn(prompt_of((1, 300)), 100)
    assert steps.serve(first) == [0]
    text = [*first.tokens, *first.output]
    # The last token of an answer is never computed: 399 tokens are 12 units of 32.
    assert steps.serve(turn([*text, *prompt_of((2, 50))], 5)) == [384]
    assert steps.engine.report.copied_blocks > 0


def test_an_overload_saves_answers_until_the_pool_is_filled_anew():
    """It does so after the first request for an answer."""
    steps, seeds = Steps(num_blocks=30, settings={"placement": "branch"}), iter(range(99))

    def next_hit() -> int:
        first = turn(prompt_of((next(seeds), 300)), 100)
        steps.serve(first)
        return steps.serve(turn([*first.tokens, *first.output, *prompt_of((next(seeds), 50))], 5))

    steps.serve(*(turn(prompt_of((next(seeds), 1200)), 20) for _ in range(3)))  # One waits.
    assert next_hit() == [0]
    rules = steps.scheduler.kv_cache_manager.places.policy
    rules.decode_interval, plain = lambda: 1, rules.decode_interval
    assert next_hit() == [384]
    rules.decode_interval = plain
    assert next_hit() == [384]
    for _ in range(3):
        steps.serve(turn(prompt_of((next(seeds), 900)), 5))
    assert next_hit() == [0]


def test_the_lock_of_an_admission_gives_way_to_its_own_blocks(monkeypatch):
    """A path may have rows in blocks that its hit does not use, as of an earlier copy."""
    steps, prompt = Steps(num_blocks=30), prompt_of((1, 300))
    steps.serve(turn(prompt, 4))
    plain, pool = KVCacheManager.allocate_slots, steps.scheduler.kv_cache_manager.block_pool
    found = []

    def take_all(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not found:
            found.extend(pool.get_new_blocks(pool.get_num_free_blocks()))
            pool.free_blocks(found)
            return None
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(KVCacheManager, "allocate_slots", take_all)
    assert steps.serve(turn(prompt, 4)) == [0]
    assert len(found) == 29


def test_equal_prompts_of_one_step_wait_for_the_first():
    steps, prompt = Steps(), prompt_of((1, 300))
    assert sorted(steps.serve(*[turn(prompt, 4) for _ in range(4)])) == [0, 288, 288, 288]


def test_next_turns_of_samples_resume_from_their_own_answers():
    """vLLM makes one request of each of n samples."""
    steps, prompt = Steps(), prompt_of((1, 300))
    samples = [turn(prompt, 100, name) for name in "abc"]
    for number, one in enumerate(samples):
        one.output = one.output + number
    assert sorted(steps.serve(*samples)) == [0, 288, 288]
    later = [turn([*prompt, *one.output, *prompt_of((2, 50))], 4) for one in samples]
    assert steps.serve(*later) == [384] * 3


def test_a_prompt_whose_grammar_is_compiled_lets_others_pass_and_hits_later(monkeypatch):
    steps, prompt = Steps(), prompt_of((1, 300))
    choice = StructuredOutputsParams(choice=["a"])
    with monkeypatch.context() as patched:
        patched.setattr(check, "SamplingParams", partial(SamplingParams, structured_outputs=choice))
        steps.engine.submit(deque([turn(prompt, 4)]))
    [live] = steps.engine.live.values()
    steps.engine.submit(deque([turn(prompt, 4)]))
    for _ in range(2):
        steps.engine.step()
    assert steps.hits == [0] and not live.request.num_computed_tokens
    live.request.structured_output_request.grammar = object()
    steps.serve()
    assert steps.hits == [0, 288]


@pytest.mark.parametrize("level", [0, 1])
def test_requests_go_on_after_sleep(level):
    """As in ``EngineCore.sleep``, whose level 1 also empties the cache."""
    steps, prompt = Steps(), prompt_of((1, 300))
    steps.serve(turn(prompt, 4))
    steps.engine.submit(deque([turn(prompt, 40)]))
    for _ in range(3):
        steps.engine.step()
    steps.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    if level:
        assert steps.scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
    before = steps.engine.report.computed_tokens
    for _ in range(3):
        steps.engine.step()
    assert steps.engine.report.computed_tokens == before
    steps.scheduler.set_pause_state(PauseState.UNPAUSED)
    steps.serve()
    assert steps.hits == [0, 288] + [0] * level


def test_the_text_that_prompts_of_one_step_share_is_saved():
    """They share 264 tokens, and 164 with the prompt before."""
    steps = Steps(chunk=128)
    groups = [(100, 90)], [(200, 90), (333, 90)], [(200, 40)]
    drawn = [[prompt_of((9, 64), (2, size), (size, rest)) for size, rest in one] for one in groups]
    hits = [steps.serve(*(turn(one, 4) for one in prompts)) for prompts in drawn]
    assert hits == [[0], [96, 96], [256]]


def test_the_policy_is_told_of_saved_states_and_listeners_of_removed_keys():
    """A key that another block has is not removed for listeners."""
    steps, told = Steps(), []
    manager = steps.scheduler.kv_cache_manager
    policy, pool, tree = manager.places.policy, manager.block_pool, manager.tree
    policy.on_saved, policy.on_dropped = told.append, lambda _: told.append(None)
    steps.serve(turn(prompt_of((1, 300)), 4))
    assert len(told) == len(tree.states) > 0 and None not in told
    pool.enable_kv_cache_events = True
    [key, *_] = (block.block_hash for blocks in tree.states.values() for block in blocks)
    pool._emit_block_removed_events([key])
    assert not pool.take_events()


def test_others_pass_a_request_that_waits_for_a_state_of_this_step():
    steps, prompt = Steps(), prompt_of((1, 300))
    for one in (prompt, prompt, prompt_of((2, 300))):
        steps.engine.submit(deque([turn(one, 4)]))
    steps.engine.step()
    assert [one.request_id for one in steps.scheduler.running] == ["r1", "r3"]
    steps.serve()
    assert steps.hits == [0, 0, 288]


def test_planned_states_keep_no_request_waiting():
    """Two prompts fit into 14 blocks, and not with room for their planned states."""
    steps = Steps(num_blocks=15)
    for seed in (1, 2):
        steps.engine.submit(deque([turn(prompt_of((seed, 700)), 40)]))
    steps.engine.step()
    assert len(steps.scheduler.running) == 2
    steps.serve()


def test_a_declared_boundary_is_hit_at_its_second_sighting():
    prompts = [prompt_of((1, 200), (seed, 300)) for seed in (2, 3)]
    plain = [Steps().serve(turn(one, 4)) for one in prompts]
    assert plain == [[0], [0]]
    steps = Steps()
    hits = [steps.serve(turn(one, 4, boundaries=(200,))) for one in prompts]
    assert hits == [[0], [192]]


def test_a_boundary_before_the_last_block_is_not_the_end_of_the_prompt():
    """The rest of a prompt may be longer than the header of an answer, though less than a block."""
    steps, prompt = Steps(unit=0), prompt_of((1, 140))
    hits = [steps.serve(turn(prompt, 4, boundaries=(110,))) for _ in range(2)]
    assert hits == [[0], [128]]


@pytest.mark.parametrize("scheduler", ["hybridcache", "vllm"])
def test_a_request_that_may_not_read_the_cache_is_saved_like_a_cold_one(scheduler):
    steps, prompt = Steps(scheduler=scheduler), prompt_of((1, 300))
    first = turn(prompt, 100, prompt_logprobs=1, boundaries=(200,))
    assert steps.serve(first) == [0]
    assert steps.serve(turn(prompt, 4, prompt_logprobs=1)) == [0]
    text, fork = [*prompt, *first.output], [*prompt[:200], *prompt_of((2, 100))]
    end, boundary = steps.serve(turn([*text, *prompt_of((2, 50))], 5), turn(fork, 5))
    # vLLM saves no answers, and no boundaries.
    assert (end, boundary) == ((384, 192) if scheduler == "hybridcache" else (288, 0))


def test_prompts_of_different_salts_share_nothing():
    steps, prompt = Steps(), prompt_of((1, 300))
    hits = [steps.serve(turn(prompt, 4, namespace=name)) for name in ("a", "b", None, "a", None)]
    assert hits == [[0], [0], [0], [288], [288]]


def test_a_reset_forgets_everything_also_while_requests_run():
    steps, prompt = Steps(), prompt_of((1, 300))
    steps.serve(turn(prompt, 4))
    assert steps.scheduler.reset_prefix_cache()
    assert steps.serve(turn(prompt, 4)) == [0]
    steps.engine.submit(deque([turn(prompt, 40)]))
    for _ in range(5):
        steps.engine.step()
    assert not steps.scheduler.reset_prefix_cache()
    assert steps.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert steps.serve() == [0]  # The preempted request begins again.
    tree = steps.scheduler.kv_cache_manager.tree
    tree.check()
    assert not steps.scheduler.kv_cache_manager.tracks and not tree.locks
    tree.cache.allocate_slot()
    refused("slots", tree.check, kind=AssertionError)


class Consumer:
    """Router's view of a pool, from the encoded events alone."""

    def __init__(self, pool: Any) -> None:
        self.pool, self.take, unit = pool, pool.take_events, pool.tree.layout.unit
        self.blocks, self.mirror = BlockEvents(unit, num_state_groups=2), Mirror(unit)
        self.num_stored = 0
        pool.take_events, pool.enable_kv_cache_events = self.follow, True

    def follow(self) -> list[Any]:
        events = self.take()
        for event in events:
            if isinstance(event, BlockStored):
                event.kv_cache_spec_kind = "mamba" if event.group_idx else "full_attention"
                self.num_stored += len(event.block_hashes)
        batch = msgspec.msgpack.encode([0.0, events])
        for change in self.blocks.read(self.blocks.next_sequence, batch):
            self.mirror.apply(change)
        assert self.blocks.num_unknown_parents == 0
        return events

    def estimate(self, request: Request) -> int:
        salt = (request.cache_salt,) if request.cache_salt else None
        return self.mirror.match(np.array(request.all_token_ids, np.int32), salt).cached_len


@pytest.mark.parametrize("unit", [32, 0])
@pytest.mark.parametrize("num_blocks", [30, 100])
def test_events_let_a_consumer_that_follows_parents_expect_each_hit(unit, num_blocks, monkeypatch):
    """Each lookup is compared with the consumer's expectation: rows and states, with no unknown
    parent."""
    steps = Steps(num_blocks=num_blocks, unit=unit)
    manager = steps.scheduler.kv_cache_manager
    pool, hits, plain = manager.block_pool, list[int](), HybridManager.get_computed_blocks
    consumer = Consumer(pool)

    def compared(self: Any, request: Request, limit: int | None = None) -> Any:
        found = plain(self, request, limit)
        pool.take_events()
        assert consumer.estimate(request) == found[1]
        hits.append(found[1])
        return found

    monkeypatch.setattr(HybridManager, "get_computed_blocks", compared)
    for one in chats(6, 3):
        steps.serve(one)
    pool.take_events()
    mirror, tree = consumer.mirror, manager.tree
    held = tree.num_units.sum() * tree.layout.unit, len(tree.states)
    assert (mirror.num_tokens, mirror.num_checkpoints) == held and max(hits)
    assert manager.reset_prefix_cache() and pool.take_events() and not mirror.num_tokens


@pytest.mark.parametrize("mode", ["incremental", "full"])
def test_full_report_repeats_the_rows_of_a_hit(mode):
    steps, first = Steps(), turn(prompt_of((1, 300)), 1)
    consumer = Consumer(steps.scheduler.kv_cache_manager.block_pool)
    assert steps.serve(first) == [0]
    consumer.follow()
    before = consumer.num_stored
    steps.engine.submit(deque([turn([*first.tokens, *prompt_of((2, 60))], 1)]))
    [live] = steps.engine.live.values()
    live.request.kv_cache_report_mode = mode
    assert steps.serve() == [288]
    consumer.follow()
    # 360 tokens: 2 new units of rows, and states of two groups at the end.
    assert consumer.num_stored - before == 2 + 2 + (9 if mode == "full" else 0)


def test_causes_of_loss_are_in_the_response_and_in_counters():
    from prometheus_client import REGISTRY

    def count(cause: str) -> float:
        labels = {"cause": cause}
        return REGISTRY.get_sample_value("hybridcache_prompt_tokens_total", labels) or 0.0

    steps, prompt = Steps(), prompt_of((1, 300))
    steps.serve(turn(prompt, 4))
    before = count("cached"), count("never_seen")
    params = SamplingParams(max_tokens=1, extra_args={"hybridcache_explain": 1})
    again = prompt + prompt_of((2, 64))
    request = Request("x", again, params, None, block_hasher=steps.engine._hasher)
    steps.scheduler.add_request(request)
    steps.scheduler.schedule()
    request.status = RequestStatus.FINISHED_ABORTED
    found, _ = steps.scheduler._free_request(request)
    lost = found["hybridcache"]
    assert sum(lost.values()) == 364 and lost["cached"] == 288
    assert count("cached") - before[0] == 288 and count("never_seen") - before[1] == 64


def test_the_causes_of_each_prompt_sum_to_its_length_at_its_admission(monkeypatch):
    """While a prompt waits for memory, its hit may be evicted."""
    plain, found, refused = HybridManager._admit, [], []

    def admit(self: Any, request: Request, track: Any, *args: Any, **kwargs: Any) -> Any:
        new = plain(self, request, track, *args, **kwargs)
        if new is not None:
            found.append((sum(track.causes.values()), request.num_tokens))
            refused.append(track.causes.get("refused", 0))
        return new

    monkeypatch.setattr(HybridManager, "_admit", admit)
    report = serve(chats(8, 4), 30, overlap=True)
    assert len(found) == report.requests + report.preemptions > report.requests
    # Of the second prompt, a hit is given up that does not fit beside its copies.
    first = turn(prompt_of((1, 700)), 100, "a")
    serve([first, turn([*first.tokens, *first.output, *prompt_of((2, 100))], 20, "a")], 14)
    assert refused[-1] > 0
    assert all(known == num_tokens for known, num_tokens in found)


@pytest.mark.parametrize(
    ("hints", "found", "num_wrong"),
    [
        (None, (), 0),
        ({"hybridcache_boundaries": [70, 20], "hybridcache_explain": 1, "other": 2}, (20, 70), 0),
        ({"hybridcache_boundaries": [20, 20, 101, -3, 0]}, (20,), 1),
        ({"hybridcache_boundary": [3]}, (), 1),
        ({"hybridcache_boundaries": 3}, (), 1),
        ({"hybridcache_boundaries": ["x"], "hybridcache_x": 1}, (), 2),
    ],
)
def test_wrong_hints_are_ignored_counted_and_named(hints, found, num_wrong, monkeypatch):
    named: list[Any] = []
    monkeypatch.setattr(places.logger, "warning_once", lambda _, one: named.append(one))
    before = places.WRONG_HINTS._value.get()
    params = SamplingParams(max_tokens=1, extra_args=hints)
    assert places.boundaries_of(Request("x", [1] * 100, params, None)) == found
    assert places.WRONG_HINTS._value.get() - before == num_wrong == len(named)


@pytest.mark.parametrize(("unit", "num_warnings"), [(32, 0), (0, 1)])
def test_the_start_names_what_was_chosen(unit, num_warnings, monkeypatch):
    lines: dict[str, list[str]] = {"info": [], "warning": []}
    for level, found in lines.items():
        add = lambda text, *args, found=found: found.append(text % args)  # noqa: E731
        monkeypatch.setattr(scheduler.logger, level, add)
    StubEngine(Options(unit=unit))
    (start,) = lines["info"]
    assert "eviction survival, placement adaptive" in start and "(77.9 MB)" in start
    assert f"multiples of {unit or 1056} tokens, a block has 1056 tokens" in start
    assert len(lines["warning"]) == num_warnings


# --- Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"evict": "lru"}, "no setting 'evict'"),
        ({"eviction": "x"}, "eviction"),
        ({"placement": "x"}, "placement"),
        ({"grid": 64}, "no setting 'grid'"),
        ("lru", "must be a JSON object"),
    ],
)
def test_a_wrong_setting_is_named_before_weights_are_loaded(given, named):
    refused(named, Settings.read, {"hybridcache": given}, kind=(ValueError, TypeError))


def test_the_plug_in_reads_the_flags_of_vllm_serve(monkeypatch):
    flags = "vllm serve x --scheduler-cls {} --additional-config={}".format
    wrong = '{"hybridcache":{"placement":"x"}}'
    for name, config in (("other", wrong), ("hybridcache.vllm.HybridScheduler", "{")):
        monkeypatch.setattr(sys, "argv", flags(name, config).split())
        plug_in()
    monkeypatch.setattr(sys, "argv", flags("hybridcache.vllm.HybridScheduler", wrong).split())
    refused("placement", plug_in)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = project["entry-points"]["vllm.general_plugins"]["hybridcache"]
    assert named == f"{plug_in.__module__}:{plug_in.__name__}"


REFUSED = {
    "--no-enable-prefix-caching": lambda config: vars(config.cache_config).update(
        enable_prefix_caching=False
    ),
    r"context parallelism \(attention blocks become longer": lambda config: vars(
        config.parallel_config
    ).update(decode_context_parallel_size=2),
    "several MTP modules": lambda config: vars(config).update(num_prefill_lookahead_tokens=2),
}


@pytest.mark.parametrize("num_attention_groups", [0, 2])
def test_models_without_exactly_one_attention_group_are_refused(num_attention_groups, monkeypatch):
    plain = check.KVCacheConfig

    def changed(kv_cache_groups: Any, **fields: Any) -> Any:
        groups = kv_cache_groups[:1] * num_attention_groups + kv_cache_groups[1:]
        return plain(kv_cache_groups=groups, **fields)

    monkeypatch.setattr(check, "KVCacheConfig", changed)
    refused("cache groups of this model", StubEngine, Options())


@pytest.mark.parametrize(("named", "change"), REFUSED.items(), ids=REFUSED)
def test_what_is_not_supported_is_named_at_the_start(named, change, monkeypatch):
    make = check.make_config

    def changed(*args: Any) -> Any:
        config = make(*args)
        change(config)
        return config

    monkeypatch.setattr(check, "make_config", changed)
    refused(named, StubEngine, Options())
