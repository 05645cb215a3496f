"""Tests of SGLang with our cache: requests at the interface, router events, construction, and the
scheduler. ``make sglang`` installs SGLang and runs them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from array import array
from types import SimpleNamespace

import pytest

from tests.sglang.caller import CORES, PATH, Caller

# isort: split

import msgspec
import numpy as np
import torch
from sglang.srt.disaggregation.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.sampling.sampling_params import SamplingParams

from hybridcache.adapters.events import Mirror
from hybridcache.adapters.routing.blocks import BlockEvents
from hybridcache.sglang import cache as backend
from hybridcache.sglang import translation
from hybridcache.sglang.cache import sizes_in_bytes
from tests.refused import refused
from tests.sglang.random_load import placeholders
from tests.sglang.waits import Streams, Waits


def make_request(rid, tokens, salt=None):
    return Req(
        rid=rid,
        origin_input_text="",
        origin_input_ids=array("q", tokens),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=4),
        cache_salt=salt,
    )


def serve(caller, rid, tokens, output=(), track=None, salt=None, locks=True):
    """Run one request through the cache interface and return its cached length."""
    cache, req = caller.cache, make_request(rid, tokens, salt)
    req.init_next_round_input(cache)
    hit, req.lock = req.prefix_len, cache.lock(req.last_node) if locks else None
    known = cache.prefix_device_indices(req)
    end = len(tokens) + len(output)
    caller.requests.alloc([req])
    rows = torch.cat((known, caller.rows.alloc(end - hit)))
    caller.requests.write((req.kv.req_pool_idx, slice(0, end)), rows.to(torch.int32))
    req.kv.kv_allocated_len = req.kv.kv_committed_len = req.extend_end = len(tokens)
    if track is not None and caller.slots is not None:
        req.kv.mamba_last_track_seqlen = track
    cache.checkpoint(req, up_to=len(tokens))
    req.output_ids = array("q", [*output, 0])
    req.kv.kv_allocated_len = req.kv.kv_committed_len = end
    req.finished_reason = FINISH_LENGTH(length=len(output))
    req.refresh_fill_ids()
    cache.checkpoint(req, up_to=end)
    cache.free_kv_row(req.kv, [(req.kv.cache_protected_len, end)])
    cache.unlock(req.lock)
    cache.on_release(req, checkpointed=True)
    caller.requests.free(req)
    return hit


@pytest.mark.parametrize("core", ["hybridcache", "python"])
def test_unfinished_and_finished_requests_are_cached(core):
    caller = Caller(core)
    assert serve(caller, "a", PATH, [20, 21, 22]) == 0
    assert serve(caller, "b", [*PATH, 50]) == 12, "the prompt's end"
    assert serve(caller, "c", [*PATH, 20, 21, 22, 60]) == 15, "the answer's end"
    caller.check()
    assert caller.cache.full_protected_size() == 0


@pytest.mark.parametrize("core", ["hybridcache", "python"])
def test_requests_with_different_salts_share_nothing(core):
    """A request's salt reaches its match, and the publication of its prompt and answer."""
    caller = Caller(core)
    assert serve(caller, "first", PATH, [20, 21], salt="a") == 0
    for salt, after_prompt, after_answer in (("b", 0, 0), (None, 0, 0), ("a", 12, 14)):
        assert serve(caller, f"prompt {salt}", [*PATH, 50], salt=salt) == after_prompt
        assert serve(caller, f"answer {salt}", [*PATH, 20, 21, 60], salt=salt) == after_answer


@pytest.mark.parametrize("core", ["hybridcache", "python"])
def test_hits_behind_an_image_are_those_of_text(core):
    """Placeholders of an image are ids above 2**31. Those of another image are never shared, also
    with the same text around them."""
    caller = Caller(core, 400, 40)
    for image, hits in ((1, [0, 0, 12]), (2, [0, 0, 12]), (1, [12, 0, 12])):
        prompt = [*PATH[:3], *placeholders(image, 6), *PATH[9:]]
        prompts = ([*prompt, 50], prompt, [*prompt, 60])
        assert [serve(caller, f"{image}", one, [20, 21]) for one in prompts] == hits


@pytest.mark.parametrize("core", ["hybridcache", "python"])
def test_three_prompts_with_one_prefix_have_the_hits_of_sglangs_test(core):
    """Cached tokens are 0, 0, 256: the second prompt saves a state at the fork."""
    caller = Caller(core, 4000, 20, extra_buffer=True)
    hits = []
    for tail in range(3):
        tokens = [*range(257), *[1000 + tail] * 100]
        req = make_request("probe", tokens)
        req.init_next_round_input(caller.cache, cow_mamba=False)
        track = req.mamba_branching_seqlen
        hits.append(serve(caller, str(tail), tokens, track=track or 320))
    assert hits == [0, 0, 256]
    caller.check()


@pytest.mark.parametrize("extra_buffer", [False, True])
def test_publications_do_not_wait_for_the_scheduling_stream(extra_buffer, monkeypatch):
    """Rows and tracked slots are copied on a stream of their own. Without the extra buffer, where
    SGLang does not overlap passes, each publication reads its slot from the scheduling stream."""
    streams = Streams()
    monkeypatch.setattr(translation, "streams_of", lambda device: streams)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
    caller = Caller("hybridcache", 4000, 20, extra_buffer=extra_buffer)
    waits: dict[str, list[int]] = {"match_prefix": [], "checkpoint": []}

    def count(name):
        call = getattr(caller.cache, name)

        def counted(*args, **kwargs):
            with Waits() as mode:
                result = call(*args, **kwargs)
            waits[name].append(mode.num)
            return result

        monkeypatch.setattr(caller.cache, name, counted)

    for name in waits:
        count(name)
    track = 64 if extra_buffer else None
    serve(caller, "a", range(100), range(500, 530), track=track)
    assert serve(caller, "b", range(140), track=track) == (64 if extra_buffer else 100)
    with Waits() as mode:
        int(torch.tensor(3))
        torch.tensor([3]).cpu()
    assert waits == {"match_prefix": [0, 0], "checkpoint": [not extra_buffer] * 4}
    assert streams.num_copies >= 4 - 2 * extra_buffer
    assert mode.num == 2
    caller.check()


def test_request_is_counted_once_despite_repeated_matches():
    caller = Caller("hybridcache")
    serve(caller, "a", PATH)
    for rid in "bc":
        waiting = make_request(rid, PATH)
        for _ in range(5):
            waiting.init_next_round_input(caller.cache, cow_mamba=False)
    assert caller.cache.tree.stats.total.requests == 1
    serve(caller, "d", [*PATH, 50])
    total = caller.cache.tree.stats.total
    assert (total.requests, total.cached_tokens, total.prompt_tokens) == (2, 12, 25)


@pytest.mark.parametrize("core", CORES)
def test_attention_only_model_reuses_any_prefix(core):
    caller = Caller(core, num_slots=0)
    assert not caller.cache.supports_mamba()
    caller.insert(PATH)
    assert caller.hit(PATH[:8], [50, 51]) == 8
    lock = caller.cache.lock(caller.match([*PATH[:8], 50])[1])
    assert caller.cache.full_protected_size() == 8
    assert caller.evict(1000) == (4, 0)
    caller.cache.unlock(lock)
    assert serve(caller, "a", [*PATH[:8], 60, 61], [62]) == 8
    assert serve(caller, "b", [*PATH[:8], 60, 61, 62, 63]) == 11
    caller.check()


def replayed(events):
    """Return the block hashes of stored and of removed blocks, in order."""
    kinds: dict[type, list[int]] = {BlockStored: [], BlockRemoved: []}
    for event in events:
        kinds[type(event)] += event.block_hashes
    return kinds[BlockStored], kinds[BlockRemoved]


def test_kv_events_have_the_same_blocks_as_sglangs():
    """Splits and removals give the same blocks too, so a router needs no change."""
    found = {}
    for core in ("hybridcache", "python"):
        caller = Caller(core, events=True)
        caller.cache.take_events()
        caller.insert(PATH)
        caller.insert([*PATH[:5], 50, 51])
        caller.insert([80, 81], extra_key="adapter")
        caller.insert([80, *placeholders(1, 5), 6])
        caller.insert([80, *placeholders(1, 2), 6])
        stored, _ = replayed(caller.cache.take_events())
        caller.evict(1000, 1000)
        _, gone = replayed(caller.cache.take_events())
        assert sorted(stored) == sorted(gone)
        found[core] = sorted(stored)
    assert found["hybridcache"] == found["python"] and len(found["python"]) == 24


@pytest.mark.parametrize("page_size", [1, 4])
def test_the_consumer_of_vllms_events_expects_each_hit(page_size, monkeypatch):
    """Rows and states, with splits, evictions and salts; nothing inside an image is expected."""
    monkeypatch.setenv(translation.STATES_VARIABLE, "1")
    caller = Caller("hybridcache", 200, 12, events=True, page_size=page_size)
    blocks, mirror = BlockEvents(page_size, 1), Mirror(page_size)

    def follow():
        batch = msgspec.msgpack.encode([0.0, caller.cache.take_events()])
        for event in blocks.read(blocks.next_sequence, batch):
            mirror.apply(event)

    draw, found, texts = random.Random(0), set(), [[]]
    for _ in range(300):
        salt, known = draw.choice([None, "a"]), draw.choice(texts[-6:])[: draw.randrange(0, 40, 4)]
        texts.append(text := [*known, *draw.choices(range(9), k=draw.choice((4, 12)))])
        follow()
        expected = mirror.match(np.array([*text, 99], np.int32), salt and (salt,)).cached_len
        assert expected == caller.match([*text, 99], salt=salt)[0]
        found.add(expected)
        caller.evict(max(0, 60 - caller.rows.available_size()), not caller.slots.available_size())
        caller.insert(text, salt=salt)
    assert blocks.num_unknown_parents == 0 and len(found) > 4
    caller.cache.reset()
    follow()
    assert not mirror.num_tokens
    image = placeholders(1, 8)
    caller.insert([1, 2, 3, 4, *image])
    follow()
    assert mirror.num_tokens == (4 if max(image) > translation.MAX_TOKEN else 12)


def test_pipeline_stages_use_the_same_sizes(monkeypatch):
    """Stages have different layers, so each uses the sum of the sizes of all stages."""
    caller = Caller("hybridcache")
    params = SimpleNamespace(
        token_to_kv_pool_allocator=caller.rows,
        req_to_token_pool=caller.requests,
        pp_size=1,
        pp_cache_group="stages",
    )
    token, state = sizes_in_bytes(params, is_hybrid_ssm=True)
    assert token >= 2 * 4 * 2 and state / token > 2000
    groups = []

    def all_reduce(sizes, group):
        groups.append(group)
        sizes += torch.tensor([100, 1000])

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    params.pp_size = 2
    assert sizes_in_bytes(params, is_hybrid_ssm=True) == (token + 100, state + 1000)
    assert groups == ["stages"]


def test_disabled_radix_cache_uses_sglangs_own(monkeypatch):
    monkeypatch.setattr(backend, "default_radix_cache_factory", lambda ctx: "default")
    assert backend.build_backend(SimpleNamespace(disable_radix_cache=True)) == "default"


def test_a_request_without_a_lock_is_published():
    caller = Caller("hybridcache")
    assert serve(caller, "a", PATH, [20], locks=False) == 0
    assert serve(caller, "b", [*PATH, 50], locks=False) == 12


def test_settings_that_are_not_supported_are_refused(monkeypatch):
    for name in ("get_memory", "get_disagg", "get_parallel", "get_spec"):
        monkeypatch.setattr(backend, name, lambda: None)
    monkeypatch.setattr(backend, "why_not", lambda *settings: "no windows")
    refused("no windows", backend.build_backend, SimpleNamespace(disable_radix_cache=False))


def test_reset_sends_an_event_to_the_router():
    caller = Caller("hybridcache", events=True)
    caller.insert(PATH)
    caller.cache.take_events()
    caller.cache.reset()
    assert [type(event) for event in caller.cache.take_events()] == [AllBlocksCleared]


def run_soak(*arguments, hash_seed="0"):
    """Run ``soak_sglang`` in a new process, because SGLang's settings are global."""
    command = [sys.executable, "-m", "experiments.sglang.soak", "--no-record", *arguments]
    seeded = os.environ | {"PYTHONHASHSEED": hash_seed}
    return subprocess.run(command, capture_output=True, text=True, env=seeded)


def soak(*arguments, hash_seed="0"):
    """Return the result of ``soak_sglang``."""
    done = run_soak(*arguments, hash_seed=hash_seed)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("states", "trace", "sessions"), [(8, "agent-tree", True), (8, "chat", 0)])
def test_the_rebuilt_cache_hits_as_sglang_request_by_request(states, trace, sessions):
    call = f"compare({states}, 40, {sessions}, [{trace!r}])"
    code = f"from experiments.sglang.counters import compare; print({call}[0]['other_hits'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["0"], done.stdout + done.stderr[-3000:]


@pytest.mark.parametrize(
    ("shared", "mode"),
    [("images", "images"), ("adapters", "images"), ("salts", "images"), ("salts", "decode")],
)
def test_soak_finds_prefixes_that_cross_between(shared, mode):
    """Negative controls of the isolation that the soak checks."""
    done = run_soak("--requests", "120", "--strategy", f"no_buffer {mode}", "--shared", shared)
    assert done.returncode and ("wrong rows" in done.stderr or "wrong state" in done.stderr)


@pytest.mark.parametrize(
    "strategy",
    [
        "no_buffer",
        "extra_buffer",
        "extra_buffer_lazy",
        "extra_buffer overlapped",
        "extra_buffer overlapped drafted",
        "extra_buffer_lazy overlapped drafted",
        "no_buffer tiered",
        "extra_buffer overlapped tiered",
        "no_buffer images",
        "extra_buffer overlapped images",
        "extra_buffer prefill",
        "extra_buffer overlapped prefill",
        "no_buffer decode",
    ],
)
def test_scheduler_serves_random_requests_under_memory_pressure(strategy):
    """The soak verifies every prefix, and the invariants of both systems after every step."""
    served = soak("--requests", "60", "--strategy", strategy)
    assert served["requests"] + served["aborted"] == 60 and served["cached_tokens"] > 0
    assert served["waits"] == 0
    assert (served["checkpoints_in_flight"] > 0) == ("overlapped" in strategy)
    for drafts in ("accepted_drafts", "rejected_drafts"):
        assert (served[drafts] > 100) == ("drafted" in strategy)
    assert (served["loaded_rows"] > 500) == ("tiered" in strategy)


@pytest.mark.parametrize("strategy", ["extra_buffer overlapped", "extra_buffer_lazy overlapped"])
def test_hits_with_multi_token_prediction_are_within_a_step_of_those_without(strategy):
    """The soak compares every answer with that of the model without drafts and cache."""
    arguments = ("--in-turn", "--requests", "40", "--strategy")
    without = soak(*arguments, strategy)
    drafted = soak(*arguments, f"{strategy} drafted")
    assert min(drafted["drafts"]) > 100 and without["drafts"] == [0, 0]
    assert max(without["hits"]) > 256
    for hit, with_drafts in zip(without["hits"], drafted["hits"], strict=True):
        assert abs(hit - with_drafts) <= 64, "the track interval"


def test_decisions_do_not_depend_on_the_hash_seed():
    """Ranks of tensor parallelism have different hash seeds and must make the same decisions."""
    arguments = ("--requests", "80", "--strategy", "extra_buffer", "--eviction", "survival")
    assert soak(*arguments, hash_seed="1") == soak(*arguments, hash_seed="2")
