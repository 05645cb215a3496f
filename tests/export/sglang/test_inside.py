"""Inside SGLang's published package, where it is installed: its tree beside ours on the same
calls, and its scheduler on our cache. ``make sglang`` installs it and runs these.

Behaviours are those of SGLang's own unit tests of its radix cache, told anew: what a caller sees.
``CORES`` run the same steps; where ours does other than theirs, the test says so by name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from array import array
from types import SimpleNamespace

import pytest

from experiments.sglang import cpu

if not cpu.is_installed():
    pytest.skip("SGLang is not installed: make sglang", allow_module_level=True)
os.environ["SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"] = "1"
os.environ["SGLANG_CHECK_KV_PAGE_INVARIANTS"] = "1"
cpu.stand_in()

import torch  # noqa: E402
from sglang.srt.disaggregation.kv_events import (  # noqa: E402
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
)
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req  # noqa: E402
from sglang.srt.mem_cache.base_prefix_cache import (  # noqa: E402
    EvictParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.radix_cache import RadixKey  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from experiments.sglang.pools import new_world  # noqa: E402
from hybridcache.export.sglang import build  # noqa: E402
from hybridcache.export.sglang.build import sizes_in_bytes  # noqa: E402

CORES = ("hybridcache", "python", "rust")
PATH = list(range(1, 13))


class Caller:
    """A cache and its pools, with the calls that a scheduler makes."""

    def __init__(self, core: str, num_kv_tokens: int = 100, num_slots: int = 8, **pools):
        self.core = core
        self.cache, self.rows, self.requests = new_world(core, num_kv_tokens, num_slots, **pools)
        self.slots = self.requests.mamba_allocator if num_slots else None

    def insert(self, tokens, owned: int = 0, extra_key=None):
        """Publish ``tokens`` with rows and a state of the caller's."""
        tokens = list(tokens)
        rows = self.rows.alloc(len(tokens))
        slot = None if self.slots is None else self.slots.alloc(1)
        if owned:
            self.rows.free(rows[:owned])
            rows[:owned] = self.cache.path_device_indices(self.match(tokens[:owned])[1])
        result = self.cache.insert(
            InsertParams(
                key=RadixKey(array("q", tokens), extra_key),
                value=rows,
                mamba_value=slot,
                prev_prefix_len=owned,
            )
        )
        if result.mamba_exist:
            self.slots.free(slot)
        return result

    def match(self, tokens, extra_key=None):
        """(cached length, node): all of ``tokens`` may be reused."""
        key = RadixKey(array("q", tokens), extra_key)
        found = self.cache.match_prefix(MatchPrefixParams(key=key))
        return found.device_prefix_len, found.last_device_node

    def hit(self, *tokens) -> int:
        return self.match([token for part in tokens for token in part])[0]

    def evict(self, num_tokens: int = 0, num_states: int = 0):
        result = self.cache.evict(EvictParams(num_tokens=num_tokens, mamba_num=num_states))
        return result.num_tokens_evicted, result.mamba_num_evicted

    def check(self):
        """SGLang's invariant, of rows and of states, where no request holds any."""
        cache = self.cache
        cache.sanity_check()
        free = self.rows.available_size()
        assert free + cache.full_evictable_size() + cache.full_protected_size() == self.rows.size
        if self.slots is None:
            return
        free = self.slots.available_size()
        states = cache.mamba_evictable_size() + cache.mamba_protected_size()
        assert free + states == self.slots.size


@pytest.fixture(params=CORES)
def caller(request):
    caller = Caller(request.param)
    yield caller
    caller.check()


def test_insert_and_match_basic(caller):
    assert caller.hit(PATH) == 0
    assert caller.insert(PATH).prefix_len == 0
    assert caller.hit(PATH) == caller.hit(PATH, [50]) == 12
    rows = caller.cache.path_device_indices(caller.match(PATH)[1])
    assert rows.dtype == torch.int64 and len(rows) == 12


def test_each_prompt_hits_the_deepest_state_on_its_path(caller):
    caller.insert(PATH[:3])
    caller.insert(PATH[:7])
    assert [caller.hit(PATH[:n]) for n in (2, 3, 6, 7, 9)] == [0, 3, 3, 7, 7]


def test_shared_prefix_split_keeps_the_state_below(caller):
    caller.insert(PATH)
    assert caller.hit(PATH[:8], [50, 51]) == 0
    caller.insert([*PATH[:8], 50, 51])
    assert caller.hit(PATH) == 12 and caller.hit(PATH[:8], [50, 51]) == 10
    assert caller.hit(PATH[:8]) == 0


def test_a_state_inserted_twice_stays_the_callers(caller):
    caller.insert(PATH)
    free = caller.slots.available_size(), caller.rows.available_size()
    result = caller.insert(PATH)
    assert result.mamba_exist and result.prefix_len == 12
    assert (caller.slots.available_size(), caller.rows.available_size()) == free


def test_prev_prefix_len_keeps_the_trees_rows(caller):
    caller.insert(PATH[:6])
    lock = caller.cache.lock(caller.match(PATH[:6])[1])
    before = caller.cache.path_device_indices(lock.node)
    caller.insert(PATH, owned=6)
    caller.cache.unlock(lock)
    after = caller.cache.path_device_indices(caller.match(PATH)[1])
    assert after[:6].tolist() == before.tolist() and caller.rows.available_size() == 88


def test_evict_empty_tree_and_evict_until_empty(caller):
    assert caller.evict(10, 1) == (0, 0)
    for first in (20, 40, 60):
        caller.insert(range(first, first + 10))
    freed = caller.evict(1000, 1000)
    assert freed == (30, 3) and caller.cache.total_size()[0] == 0


def test_evict_respects_lru_order(caller):
    for first in (20, 40, 60):
        caller.insert(range(first, first + 10))
    caller.hit(range(20, 30))
    assert caller.evict(1) == (10, 1)
    assert [caller.hit(range(first, first + 10)) for first in (20, 40, 60)] == [10, 0, 10]


def test_only_the_state_that_is_used_is_refreshed(caller):
    caller.insert(PATH[:6])
    caller.insert(PATH)
    caller.insert([70, 71])
    caller.hit(PATH)
    assert caller.evict(0, 1) == (0, 1)
    assert (caller.hit(PATH[:6]), caller.hit(PATH), caller.hit([70, 71])) == (0, 12, 2)


def test_mamba_internal_tombstone_evict_and_refill(caller):
    caller.insert(PATH[:8])
    caller.insert(PATH)
    assert caller.evict(0, 1) == (0, 1), "an inner state leaves its KV"
    assert (caller.hit(PATH[:8]), caller.hit(PATH)) == (0, 12)
    assert not caller.insert(PATH[:8]).mamba_exist
    assert caller.hit(PATH[:8]) == 8


def test_mamba_evict_of_a_leaf_takes_its_kv(caller):
    caller.insert(PATH)
    assert caller.evict(0, 1) == (12, 1)


def test_evict_full_leaf_takes_its_state(caller):
    caller.insert(PATH[:8])
    caller.insert(PATH)
    assert caller.evict(1) == (4, 1)
    assert caller.hit(PATH) == 8


def test_evict_respects_lock_ref(caller):
    caller.insert(PATH)
    caller.insert([70, 71])
    lock = caller.cache.lock(caller.match(PATH)[1])
    assert caller.cache.full_protected_size() == 12
    assert caller.cache.mamba_protected_size() == 1
    assert caller.evict(1000, 1000) == (2, 1)
    caller.cache.unlock(lock)
    assert caller.cache.full_protected_size() == 0
    assert caller.evict(1000, 1000) == (12, 1)


def test_evict_locked_subtree_skipped(caller):
    caller.insert(PATH[:8])
    caller.insert([*PATH[:8], 50])
    caller.insert([*PATH[:8], 60])
    lock = caller.cache.lock(caller.match([*PATH[:8], 50])[1])
    caller.evict(1000)
    assert caller.hit(PATH[:8], [50]) == 9 and caller.hit(PATH[:8], [60]) == 8
    caller.cache.unlock(lock)


def test_a_lock_outlives_a_split_above_it(caller):
    caller.insert(PATH)
    lock = caller.cache.lock(caller.match(PATH)[1])
    caller.insert([*PATH[:5], 50])
    caller.evict(1000, 1000)
    assert caller.hit(PATH) == 12
    caller.cache.unlock(lock)
    caller.evict(1000, 1000)
    assert caller.cache.total_size()[0] == 0


def test_inc_and_dec_lock_ref_replay_a_receipt(caller):
    caller.insert(PATH)
    node = caller.match(PATH)[1]
    receipt = caller.cache.inc_lock_ref(node).to_dec_params()
    assert caller.evict(1000, 1000) == (0, 0)
    caller.cache.dec_lock_ref(node, receipt)
    assert caller.evict(1000, 1000) == (12, 1)


def test_evict_reinsert_after_full_eviction(caller):
    caller.insert(PATH)
    caller.evict(1000)
    caller.insert(PATH)
    assert caller.hit(PATH) == 12


def test_extra_keys_share_nothing(caller):
    caller.insert(PATH, extra_key="a")
    assert caller.match(PATH)[0] == 0 and caller.match(PATH, "b")[0] == 0
    assert caller.match(PATH, "a")[0] == 12


def test_reset_forgets_everything(caller):
    caller.insert(PATH)
    caller.cache.reset()
    caller.rows.clear()
    caller.requests.clear()
    assert caller.hit(PATH) == 0 and caller.rows.available_size() == 100


def test_random_calls_end_alike_in_what_can_be_reused(caller):
    """Without evictions there is one right answer."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda high: int(torch.randint(high, (1,), generator=generator))  # noqa: E731
    caller = Caller(caller.core, 5000, 200)
    published: set[tuple[int, ...]] = set()
    for _ in range(120):
        tokens = [draw(3) for _ in range(1 + draw(12))]
        best = max((n for n in range(len(tokens) + 1) if tuple(tokens[:n]) in published), default=0)
        assert caller.hit(tokens) == best
        caller.insert(tokens)
        published.add(tuple(tokens))
    caller.check()


def test_ours_a_look_changes_nothing_where_theirs_splits():
    caller = Caller("hybridcache")
    caller.insert(PATH)
    before = caller.cache.tree.render()
    caller.hit(PATH[:8], [50])
    assert caller.cache.tree.render() == before


def test_ours_kv_that_nothing_can_resume_from_goes_with_the_last_state():
    left = {}
    for core in ("hybridcache", "rust"):
        caller = Caller(core)
        caller.insert([*PATH[:8], 50, 51, 52])
        caller.insert([*PATH[:8], 60])
        caller.evict(0, 2)
        left[core] = caller.rows.size - caller.rows.available_size()
    assert left == {"hybridcache": 0, "rust": 8}


def test_ours_a_superseded_state_goes_first():
    """The tail of one conversation is worth more than another's middle."""
    found = {}
    for core in ("hybridcache", "rust"):
        caller = Caller(core)
        caller.insert([70, 71])
        caller.insert(PATH[:6])
        caller.insert(PATH)
        caller.evict(0, 1)
        found[core] = caller.hit([70, 71]), caller.hit(PATH[:6]), caller.hit(PATH)
    assert found == {"hybridcache": (2, 0, 12), "rust": (0, 6, 12)}


def make_request(rid, tokens):
    return Req(
        rid=rid,
        origin_input_text="",
        origin_input_ids=array("q", tokens),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=4),
    )


def serve(caller, rid, tokens, output=(), track=None):
    """A request's life at the interface; the tokens it was spared."""
    cache, req = caller.cache, make_request(rid, tokens)
    req.init_next_round_input(cache)
    hit, req.lock = req.prefix_len, cache.lock(req.last_node)
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
def test_cache_unfinished_and_finished_req(core):
    caller = Caller(core)
    assert serve(caller, "a", PATH, [20, 21, 22]) == 0
    assert serve(caller, "b", [*PATH, 50]) == 12, "the prompt's end"
    assert serve(caller, "c", [*PATH, 20, 21, 22, 60]) == 15, "the answer's end"
    caller.check()
    assert caller.cache.full_protected_size() == 0


@pytest.mark.parametrize("core", ["hybridcache", "python"])
def test_the_branching_kit_three_prompts_with_one_beginning(core):
    """Cached tokens 0, 0, 256: the fork gets its state when it is seen the second time."""
    caller = Caller(core, 4000, 20, extra_buffer=True)
    spared = []
    for tail in range(3):
        tokens = [*range(257), *[1000 + tail] * 100]
        req = make_request("probe", tokens)
        req.init_next_round_input(caller.cache, cow_mamba=False)
        track = req.mamba_branching_seqlen
        spared.append(serve(caller, str(tail), tokens, track=track or 320))
    assert spared == [0, 0, 256]
    caller.check()


def test_a_request_is_counted_once_however_often_it_was_matched():
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


def test_a_waiting_prefix_can_be_refreshed():
    caller = Caller("hybridcache")
    for first in (20, 40):
        caller.insert(range(first, first + 10))
    caller.hit([99])
    caller.cache.touch_prefix(RadixKey(array("q", range(20, 31))))
    caller.evict(1)
    assert (caller.hit(range(20, 30)), caller.hit(range(40, 50))) == (10, 0)


def test_dfs_weight_order_keeps_a_branch_together():
    caller = Caller("hybridcache")
    for tokens in (PATH[:4], [*PATH[:4], 50], [*PATH[:4], 60], [70, 71]):
        caller.insert(tokens)
    asked = ([70, 71], [*PATH[:4], 50], PATH[:4], [*PATH[:4], 60], [99], [*PATH[:4], 50])
    order = caller.cache.dfs_weight_order([caller.match(tokens)[1] for tokens in asked])
    assert order == [1, 5, 3, 2, 0, 4]


@pytest.mark.parametrize("core", CORES)
def test_an_attention_only_model_reuses_any_prefix(core):
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


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("num_slots", [0, 8])
def test_pages_are_kept_whole(core, num_slots):
    caller = Caller(core, num_slots=num_slots, page_size=4, extra_buffer=True)
    caller.insert(PATH)
    assert caller.hit(PATH, [50]) == 12 and caller.hit([1, 2, 3]) == 0
    caller.insert([*PATH[:4], 5, 6, 90, 91])
    assert caller.hit(PATH) == 12 and caller.hit(PATH[:4], [5, 6, 90, 91]) == 8
    caller.check()
    freed = caller.evict(1000, 1000)
    assert freed[0] == 16 and caller.rows.available_size() == 100


def replayed(events):
    """(stored, removed) block hashes, in order."""
    kinds: dict[type, list[int]] = {BlockStored: [], BlockRemoved: []}
    for event in events:
        kinds[type(event)] += event.block_hashes
    return kinds[BlockStored], kinds[BlockRemoved]


def test_kv_events_name_the_same_blocks_as_theirs():
    """A router that follows both knows the same prefixes, splits and removals included."""
    found = {}
    for core in ("hybridcache", "python"):
        caller = Caller(core, events=True)
        caller.cache.take_events()
        caller.insert(PATH)
        caller.insert([*PATH[:5], 50, 51])
        caller.insert([80, 81], extra_key="adapter")
        stored, _ = replayed(caller.cache.take_events())
        caller.evict(1000, 1000)
        _, gone = replayed(caller.cache.take_events())
        assert sorted(stored) == sorted(gone)
        found[core] = sorted(stored)
    assert found["hybridcache"] == found["python"] and len(found["python"]) == 16


def test_pipeline_stages_weigh_alike(monkeypatch):
    """Their layers differ, so each adds up what all of them hold."""
    caller = Caller("hybridcache")
    params = SimpleNamespace(
        token_to_kv_pool_allocator=caller.rows,
        req_to_token_pool=caller.requests,
        pp_size=1,
        pp_cache_group="stages",
    )
    token, state = sizes_in_bytes(params, is_hybrid_ssm=True)
    assert token >= 2 * 4 * 2 and state / token > 2000
    asked = []

    def all_reduce(sizes, group):
        asked.append(group)
        sizes += torch.tensor([100, 1000])

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    params.pp_size = 2
    assert sizes_in_bytes(params, is_hybrid_ssm=True) == (token + 100, state + 1000)
    assert asked == ["stages"]


def test_a_disabled_cache_is_sglangs_own(monkeypatch):
    monkeypatch.setattr(build, "default_radix_cache_factory", lambda ctx: "theirs")
    assert build.build_backend(SimpleNamespace(disable_radix_cache=True)) == "theirs"


def test_a_flush_tells_the_router():
    caller = Caller("hybridcache", events=True)
    caller.insert(PATH)
    caller.cache.take_events()
    caller.cache.reset()
    assert [type(event) for event in caller.cache.take_events()] == [AllBlocksCleared]


def soak(*arguments, hash_seed="0"):
    """What ``soak_sglang`` served, in a process of its own: SGLang's settings are global."""
    command = [sys.executable, "-m", "experiments.soak_sglang", "--no-record", *arguments]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "strategy", ["no_buffer", "extra_buffer", "extra_buffer_lazy", "extra_buffer overlapped"]
)
def test_the_scheduler_serves_random_requests_under_pressure(strategy):
    """Every prefix verified, both systems' invariants after every step."""
    served = soak("--requests", "60", "--strategy", strategy)
    assert served["requests"] + served["aborted"] == 60 and served["cached_tokens"] > 0


def test_every_rank_decides_alike():
    """Whatever order its process has for sets and hashes."""
    arguments = ("--requests", "80", "--strategy", "extra_buffer", "--eviction", "regret")
    assert soak(*arguments, hash_seed="1") == soak(*arguments, hash_seed="2")
