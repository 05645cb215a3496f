"""Tests of the SGLang adapter with fakes: allocator views, keys, states, placement, losses and
unsupported settings."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hybridcache import CacheConfig
from hybridcache import sglang as sglang_plugin
from hybridcache.allocators.moves import DEVICE, HOST, Copy
from hybridcache.config import build_on
from hybridcache.sglang import translation
from hybridcache.sglang.translation import (
    BOUNDARIES,
    NO_TOKEN,
    HostReader,
    HostTier,
    RequestStates,
    RowView,
    SlotView,
    TokenWords,
    boundaries_of,
    branch_position,
    namespace_of,
    read_every,
    why_not,
)
from tests.radix import serving
from tests.radix.serving import ids
from tests.refused import refused
from tests.sglang.waits import Streams


class FakeRows:
    """Fake of SGLang's token allocator: a tensor of free indices. Row 0 is padding."""

    page_size, device = 1, "cpu"

    def __init__(self, size):
        self.size = size
        self.free_pages = torch.arange(1, size + 1)
        self.num_frees = 0

    def available_size(self):
        return len(self.free_pages)

    def get_all_free_pages(self):
        return self.free_pages

    def alloc(self, num):
        if num > len(self.free_pages):
            return None
        taken, self.free_pages = self.free_pages[:num], self.free_pages[num:]
        return taken

    def free(self, rows):
        assert rows.dtype == torch.int64
        self.num_frees += 1
        self.free_pages = torch.cat((self.free_pages, rows))


class FakeSlots(FakeRows):
    """Fake of SGLang's state allocator."""

    @property
    def free_slots(self):
        return self.free_pages


class FakePool:
    """Fake of SGLang's request pool: live slots, two tracking slots, and copies of states."""

    mamba_ping_pong_track_buffer_size = 2

    def __init__(self, num_slots):
        self.mamba_allocator = FakeSlots(num_slots)
        self.copied = []
        self.mamba_pool = SimpleNamespace(
            copy_from=lambda src, dst: self.copied.append((int(src), int(dst))),
            replayssm_write_pos=None,
        )

    def translate_mamba_indices(self, slots):
        return slots

    def get_mamba_ping_pong_keep_idx(self, req):
        return req.kv.mamba_last_track_idx

    def get_mamba_ping_pong_other_idx(self, index):
        return 1 - index

    def donate_mamba_ping_pong_slot(self, req, fresh):
        index = req.kv.mamba_last_track_idx
        donated = req.kv.mamba_ping_pong_track_buffer[index].unsqueeze(0).clone()
        req.kv.mamba_ping_pong_track_buffer[index] = fresh[0]
        return donated

    def free_mamba_cache(self, req, mamba_ping_pong_track_buffer_to_keep=None):
        keep = mamba_ping_pong_track_buffer_to_keep
        self.mamba_allocator.free(req.kv.mamba_pool_idx.unsqueeze(0))
        buffer = req.kv.mamba_ping_pong_track_buffer
        for index in range(0 if buffer is None else 2):
            if index != keep:
                self.mamba_allocator.free(buffer[index : index + 1])


def fake_cache(num_rows=100, num_slots=8, extra_buffer=True):
    """Return (cache, rows, slots, states) on top of fakes."""
    pool = FakePool(num_slots)
    rows = RowView(FakeRows(num_rows), 1, 8)
    slots = SlotView(pool.mamba_allocator, 64)
    config = CacheConfig(
        num_kv_tokens=rows.capacity,
        num_slots=slots.capacity,
        kv_bytes_per_token=8,
        state_bytes=64,
        grid=1,
    )
    cache = build_on(config, rows, slots)
    return (
        cache,
        rows,
        slots,
        RequestStates(pool, slots, rows.give_back, HostReader("cpu"), extra_buffer=extra_buffer),
    )


def publish(cache, tokens, with_state=True):
    tokens = ids(tokens)
    return serving.publish(cache, tokens, [len(tokens)] * with_state).node


def request(states, extra_buffer=True):
    """Return a request that holds its slots."""
    take = states._pool.mamba_allocator.alloc
    kv = SimpleNamespace(
        mamba_pool_idx=take(1)[0],
        holds_mamba=True,
        mamba_cow_src_index=None,
        mamba_needs_clear=True,
        mamba_ping_pong_track_buffer=take(2).clone() if extra_buffer else None,
        mamba_last_track_idx=0,
        mamba_last_track_seqlen=None,
        mamba_prev_track_seqlen=None,
    )
    return SimpleNamespace(kv=kv)


def test_evicted_rows_are_returned_to_sglang_in_one_call():
    cache, rows, _, _ = fake_cache()
    for start in range(0, 50, 10):
        publish(cache, range(start, start + 10))
    assert rows.num_taken == 50 and rows._theirs.available_size() == 50
    cache.check(held_tokens=0, held_slots=0)
    cache.evict(num_tokens=25)
    assert (rows.num_free, rows._theirs.available_size()) == (80, 50), "not yet returned"
    cache.check(held_tokens=0, held_slots=0)
    rows.give_back()
    assert (rows._theirs.available_size(), rows._theirs.num_frees) == (80, 1)
    assert 0 not in rows.free_rows().tolist(), "row 0 is SGLang's padding"


def test_prompt_of_a_key_has_one_token_after_its_limit():
    class Key(SimpleNamespace):
        def __len__(self):
            return min(self.limit, len(self.token_ids))

    words, key = TokenWords(), Key(token_ids=array("q", [4, 5, 6]), limit=2)
    assert words.prompt_of(key).tolist() == [4, 5, 6], "the last token follows the limit"
    key.limit = 3
    assert words.prompt_of(key).tolist() == [4, 5, 6, NO_TOKEN]
    key = Key(token_ids=array("q"), limit=0)
    assert words.prompt_of(key).tolist() == [NO_TOKEN]


def test_wide_ids_have_numbers_of_their_own_also_when_old_ones_are_dropped():
    """No number means two ids, and of the most recent ids none has two."""
    words, draw, means = TokenWords(limit=8), random.Random(0), {}
    for _ in range(400):
        wide = [2**31 + (draw.randrange(12) << 32) for _ in range(draw.randrange(1, 5))]
        keys = array("q", [7, *wide, 9])
        found = words.of(keys, len(keys))
        assert found[[0, -1]].tolist() == [7, 9] and (found[1:-1] < NO_TOKEN).all()
        for word, wide_id in zip(found[1:-1].tolist(), wide, strict=True):
            assert means.setdefault(word, wide_id) == wide_id
        assert words.ids_of(found) == keys and words.of(keys, 2).tolist() == found[:2].tolist()
    assert len(words._words) == len(words._ids) == 8 < len(means)


def test_adapters_and_salts_have_different_namespaces():
    names = [namespace_of(*pair) for pair in ((None, None), ("a", None), (None, "a"), ("", None))]
    assert names[0] is None and len(set(names)) == 4


def resume(cache, states, req, length=12):
    """Return the match of a prompt of ``length`` tokens, and the match that it resumes from."""
    prompt = np.arange(length, dtype=np.int32)
    found = cache.match(prompt)
    return found, states.resume(cache, req, prompt, found)


@pytest.mark.parametrize("shallower", [4, None])
def test_hit_without_free_slot_resumes_from_a_shallower_checkpoint(shallower):
    """All slots are in use, so the request takes the slot of the matched checkpoint. The shallower
    checkpoint stays, because another request has locked it."""
    cache, _, slots, states = fake_cache(num_slots=3, extra_buffer=False)
    other = publish(cache, range(4)) if shallower else None
    receipt = cache.lock(other)
    publish(cache, range(10))
    held = [cache.allocate_slot() for _ in range(slots.num_free)]
    holds_none = {"holds_mamba": False, "mamba_pool_idx": None, "mamba_cow_src_index": None}
    req = SimpleNamespace(kv=SimpleNamespace(**holds_none, mamba_needs_clear=True))
    found, resumed = resume(cache, states, req)
    assert (found.cached_len, resumed.cached_len) == (10, shallower or 0)
    assert resumed.losses.refused == 10 - (shallower or 0)
    assert resumed.cached_len + sum(resumed.losses) == 12
    if shallower:
        assert int(req.kv.mamba_cow_src_index) == resumed.checkpoint == other.checkpoint.slot
        assert int(req.kv.mamba_pool_idx) == found.checkpoint
    else:
        assert resumed.checkpoint is None and req.kv.mamba_pool_idx is None
    live = [] if req.kv.mamba_pool_idx is None else [int(req.kv.mamba_pool_idx)]
    cache.unlock(receipt)
    cache.check(held_tokens=0, held_slots=len(held) + len(live))


def test_running_request_donates_its_tracked_slot_and_gets_another():
    cache, _, _, states = fake_cache()
    req = request(states)
    tracked = int(req.kv.mamba_ping_pong_track_buffer[0])
    assert states.offer_running(cache, req, 70) is None, "no state is tracked yet"
    req.kv.mamba_last_track_seqlen = 64
    offer = states.offer_running(cache, req, 70)
    assert (offer.position, int(offer.slot)) == (64, tracked)
    assert int(req.kv.mamba_ping_pong_track_buffer[0]) != tracked
    free = states._pool.mamba_allocator.available_size()
    states.settle_running(req, offer, taken=False)
    assert states._pool.mamba_allocator.available_size() == free + 1
    assert req.kv.mamba_last_track_seqlen is None


@pytest.mark.parametrize(
    ("latest", "before", "expected"),
    [
        (None, None, None),
        (128, None, (128, 0)),
        (150, None, (150, 0)),
        (192, 128, (128, 1)),
        (192, None, None),
    ],
)
def test_finished_request_offers_its_deepest_usable_state(latest, before, expected):
    _, _, _, states = fake_cache()
    req = request(states)
    req.kv.mamba_last_track_seqlen, req.kv.mamba_prev_track_seqlen = latest, before
    offer = states.offer_finished(req, 150)
    assert (offer and (offer.position, offer.keep)) == expected


def branch(cache, tokens, grid=4):
    prompt = np.asarray(tokens, np.int32)
    return branch_position(prompt, cache.match(prompt), grid)


def test_branch_position_is_at_forks_but_not_at_continuations():
    cache, *_ = fake_cache()
    publish(cache, range(20))
    assert branch(cache, [*range(11), 90, 91, 92, 93, 94]) == 8, "fork inside of a node"
    assert branch(cache, [*range(20), 90, 91, 92]) is None, "the node has a state"
    cache, *_ = fake_cache()
    publish(cache, range(20), with_state=False)
    assert branch(cache, [*range(20), 90, 91]) is None, "the prompt continues a leaf"
    publish(cache, [*range(20), 70, 71], with_state=False)
    assert branch(cache, [*range(20), 90, 91]) == 20, "another prompt continued there"
    assert branch(cache, [80, 81, 82]) is None


def test_declared_boundaries_and_a_fixed_distance_come_after_forks():
    cache, *_ = fake_cache()
    prompt = np.arange(100, dtype=np.int32)

    def position(*given):
        return branch_position(prompt, cache.match(prompt), 4, *given)

    assert position() is None
    assert position((30, 41)) == 40, "the deepest one, rounded down"
    assert position((30, 100)) == 28, "the whole prompt is no prefix of a later one"
    assert position((), 32) == 96 and position((30,), 32) == 28
    assert position((), 128) is None, "shorter than the threshold"
    publish(cache, [*range(20), 900, 901])
    assert position((30, 41), 32) == 20, "a fork that was seen comes first"
    params = SimpleNamespace(custom_params={BOUNDARIES: [30, -1, "x", True, 41]})
    assert boundaries_of(SimpleNamespace(sampling_params=params)) == (30, 41)
    assert boundaries_of(None) == boundaries_of(SimpleNamespace(sampling_params=None)) == ()
    for text in ("0", "-1", "x", "1.5"):
        refused("must be an integer above 0", read_every, text)


@pytest.mark.parametrize("has_streams", [False, True])
def test_rows_and_states_return_from_the_host_unchanged(has_streams, monkeypatch):
    """Rows on the host are fragmented, and a state does not fill its last row."""
    if has_streams:
        streams = Streams()
        monkeypatch.setattr(translation, "streams_of", lambda device: streams)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
    layers = [torch.rand(20, 2, 3).to(torch.bfloat16) for _ in range(4)]
    states = [torch.rand(2, 6, 5), torch.rand(3, 6, 2, 7).to(torch.float16)]
    before = [one.clone() for one in (*layers, *states)]
    host = HostTier(layers, states, 40, state_rows=4, fence="passes")
    rows, there = ids([3, 9, 4, 11]), ids([7, 8, 30, 2])
    host.run([Copy("kv", DEVICE, rows, HOST, there, 4)])
    host.run([Copy("checkpoint", DEVICE, ids([5]), HOST, ids([20, 21, 0, 39]), 4)])
    for one in layers:
        one[rows] = 0
    for one in states:
        one[:, 5] = 0
    loaded = ids([12, 0, 1, 19])
    host.run([Copy("kv", HOST, there, DEVICE, loaded, 4)])
    host.run([Copy("checkpoint", HOST, ids([20, 21, 0, 39]), DEVICE, ids([2]), 4)])
    for one, was in zip(layers, before[:4], strict=True):
        assert torch.equal(one[loaded], was[rows])
        assert torch.equal(one[[2, 5, 6]], was[[2, 5, 6]]), "other rows are untouched"
    for one, was in zip(states, before[4:], strict=True):
        assert torch.equal(one[:, 2], was[:, 5]) and torch.equal(one[:, 1], was[:, 1])
    assert not has_streams or streams.num_fences == 4


TIERED = {"enable_hierarchical_cache": True}


def settings(**changed):
    """Return (ctx, memory, disagg, parallel, spec) of a hybrid model with default settings."""
    values = {
        "is_hybrid_swa": False,
        "is_hybrid_ssm": True,
        "enable_hierarchical_cache": False,
        "sliding_window_size": None,
        "is_eagle": False,
        "eviction_policy": "lru",
        "hicache_storage_backend": None,
        "pp_size": 1,
        "speculative_algorithm": None,
        "enable_lmcache": False,
        "enable_flexkv": False,
        "enable_unified_memory": False,
        "disaggregation_mode": "null",
        "dcp_enabled": False,
    }
    everything = SimpleNamespace(**(values | changed))
    everything.params = everything
    return (everything,) * 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"is_hybrid_swa": True}, "sliding windows"),
        ({"sliding_window_size": 128}, "sliding windows"),
        (TIERED | {"hicache_storage_backend": "file"}, "--hicache-storage-backend"),
        (TIERED | {"is_hybrid_ssm": False}, "--enable-hierarchical-cache on attention-only models"),
        (TIERED | {"pp_size": 2}, "--pp-size"),
        (TIERED | {"speculative_algorithm": "NEXTN"}, "--speculative-algorithm"),
        ({"enable_lmcache": True}, "LMCache"),
        ({"enable_flexkv": True}, "FlexKV"),
        ({"enable_unified_memory": True}, "--enable-unified-memory"),
        (TIERED | {"disaggregation_mode": "decode"}, "--disaggregation-mode decode"),
        (
            {"disaggregation_mode": "prefill", "speculative_algorithm": "NEXTN"},
            "--disaggregation-mode with --speculative-algorithm",
        ),
        ({"dcp_enabled": True}, "decode context parallelism"),
        ({"is_eagle": True, "is_hybrid_ssm": False}, "--speculative-algorithm"),
        ({"eviction_policy": "priority"}, "eviction policy"),
    ],
)
def test_unsupported_settings_give_one_line(changed, message):
    assert why_not(*settings(**TIERED)) is None
    reason = why_not(*settings(**changed))
    assert reason is not None and message in reason and "\n" not in reason


def test_another_version_is_named_and_its_fault_has_one_sentence(monkeypatch, caplog):
    monkeypatch.setattr(sglang_plugin, "version", lambda name: "0.5.23")
    assert sglang_plugin.version_note() == ""
    monkeypatch.setattr(sglang_plugin, "TESTED", ("0.4.0",))
    note = sglang_plugin.version_note()
    assert "tested with SGLang 0.4.0" in note and "is installed" in note
    refused(r"tested with SGLang 0\.4\.0.*Error: ", sglang_plugin._build, None)
    monkeypatch.setattr(sglang_plugin, "_register", lambda: [].missing)
    sglang_plugin.plug_in()
    assert "tested with SGLang 0.4.0" in caplog.text


@pytest.mark.parametrize("asked", ["lru", "priority"])
def test_default_of_a_model_is_no_choice_of_a_policy(asked):
    """SGLang 0.5.23 records whether the flag was given, and sets `priority` for Qwen3-VL."""
    for is_explicit in (False, True):
        changed = {"_radix_eviction_policy_explicitly_set": is_explicit, "eviction_policy": asked}
        given = settings(**changed)
        chosen = translation.chosen_eviction(given[0], given[1])
        assert chosen == (asked if is_explicit else "survival")
        assert (why_not(*given) is None) == (chosen != "priority")
