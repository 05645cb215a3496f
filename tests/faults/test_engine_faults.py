"""Faults of the engine: the scheduler's batches, drafts, sampling, isolation, stores and kernels.

The oracle's memory proves every read of a batch, so most of them are injected into what the runner
is given.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from engine import Engine, SamplingParams
from engine.plugins.speculation.draft_length import DraftLength
from engine.plugins.tiers.records import RecordStore
from engine.requests.logit_rules import TokenCounts
from engine.schedule.batch import Batch
from engine.testing.oracle import OracleRunner
from engine.testing.oracle_sampler import OracleSampler
from hybridcache.allocators.moves import Move
from hybridcache.lease import Lease
from tests.engine import test_drafters, test_engine
from tests.engine.store.test_records import StoreMachine
from tests.engine.test_scheduler_machine import SchedulerMachine
from tests.engine.test_token_counts import TokenCountsMachine
from tests.faults.injection import Check, Faults, Patch, assert_noticed, machine

FAULTS = Faults()
SHAPE = {
    "prefix_cache": "hybrid",
    "kv_pages": 6,
    "slots": 4,
    "max_running": 3,
    "token_budget": 100,
    "page_size": 1,
    "grid": 16,
    "checkpoints": ("every:64", "end"),
    "eviction": "lru",
    "exact": False,
    "overlap": "off",
    "slab_rows": None,
    "drafts": "none",
    "draft_len": 5,
    "owns_states": False,
    "host_rows": None,
    "disk_rows": None,
}
"""A small engine of the scheduler's state machine."""


def serving(name: str, num_runs: int = 6, **settings: Any) -> Check:
    """Return the check that serves random requests on an oracle: prompts that share beginnings,
    next turns, aborts; every read is proved and every answer compared."""

    def check() -> None:
        for seed in range(num_runs):
            rng = random.Random(seed)
            served = SchedulerMachine()
            served.start(**SHAPE | settings)
            for _ in range(12):
                params = SamplingParams(max_tokens=rng.randint(1, 40), logprobs=0)
                family = rng.randrange(3)
                prompt = [(7 * family + i) % 320 for i in range(rng.choice((64, 70, 150, 200)))]
                prompt += [rng.randrange(320) for _ in range(rng.randrange(40))]
                space = rng.choice((None, None, "salt"))
                served.arrive(prompt, params, boundary=64, copies=1, namespace=space)
                if rng.random() < 0.5:
                    served.next_turn(rng.randrange(9), rng.randrange(60), params, cut=0)
                if rng.random() < 0.2:
                    served.abort(rng.randrange(9))
                served.run(rng.randint(1, 20))
            served.teardown()

    check.__name__ = name
    return check


POOLS = serving("serving from pools")
ARENA = serving("serving from an arena", slab_rows=40)
HOST = serving("serving with host memory", slab_rows=40, host_rows=400, kv_pages=4)
OVERLAP = serving("overlapped steps", overlap="on")
DRAFTS = serving("serving with drafts", drafts="guesses")


def edit(patch: Patch, change: Callable[[Batch], Batch]) -> None:
    """Give the runner a changed batch."""

    @patch(OracleRunner, "forward")
    def forward(original: Any, self: Any, batch: Batch, drawn: Sequence[int] = ()) -> Any:
        return original(self, change(batch), drawn)


# --- Batches ------------------------------------------------------------------------------------


@FAULTS.noticed_by(POOLS)
def states_are_not_restored(patch: Patch) -> None:
    edit(patch, lambda batch: replace(batch, restores=()))


@FAULTS.noticed_by(POOLS)
def a_state_is_restored_from_another_slot(patch: Patch) -> None:
    def shift(batch: Batch) -> Batch:
        restores = ((max(0, source - 1), target) for source, target in batch.restores)
        return replace(batch, restores=tuple(restores))

    edit(patch, shift)


@FAULTS.noticed_by(POOLS)
def rows_of_the_table_are_not_written(patch: Patch) -> None:
    edit(patch, lambda batch: replace(batch, row_writes=batch.row_writes[:-1]))


@FAULTS.noticed_by(POOLS)
def rows_of_the_table_are_written_one_place_too_far(patch: Patch) -> None:
    def shift(batch: Batch) -> Batch:
        writes = [(row, start + (start > 0), rows) for row, start, rows in batch.row_writes]
        return replace(batch, row_writes=tuple(writes))

    edit(patch, shift)


@FAULTS.noticed_by(POOLS)
def checkpoints_are_not_written(patch: Patch) -> None:
    def drop(batch: Batch) -> Batch:
        kept = (structs.replace(segment, exports=()) for segment in batch.segments)
        return replace(batch, segments=tuple(kept))

    edit(patch, drop)


@FAULTS.noticed_by(POOLS)
def a_prefill_begins_one_token_too_late(patch: Patch) -> None:
    def shift(batch: Batch) -> Batch:
        moved = (
            structs.replace(segment, token_ids=segment.token_ids[1:], start=segment.start + 1)
            if not segment.is_decode and len(segment.token_ids) > 1 and not segment.exports
            else segment
            for segment in batch.segments
        )
        return replace(batch, segments=tuple(moved))

    edit(patch, shift)


@FAULTS.noticed_by(POOLS)
def a_request_reads_as_another_tenant(patch: Patch) -> None:
    def rename(batch: Batch) -> Batch:
        renamed = (structs.replace(segment, namespace="other") for segment in batch.segments[:1])
        return replace(batch, segments=(*renamed, *batch.segments[1:]))

    edit(patch, rename)


@FAULTS.noticed_by(OVERLAP)
def a_late_token_is_anothers(patch: Patch) -> None:
    def swap(batch: Batch) -> Batch:
        rows = [row for _, row in batch.late_tokens][::-1]
        late = zip(batch.late_tokens, rows, strict=True)
        return replace(batch, late_tokens=tuple((segment, row) for (segment, _), row in late))

    edit(patch, swap)


@FAULTS.noticed_by(ARENA)
def rows_that_moved_are_not_copied(patch: Patch) -> None:
    edit(patch, lambda batch: replace(batch, moves=()))


@FAULTS.noticed_by(ARENA)
def rows_move_the_wrong_way_round(patch: Patch) -> None:
    def turn(batch: Batch) -> Batch:
        turned = (
            order._replace(src=order.dst, dst=order.src) if isinstance(order, Move) else order
            for order in batch.moves
        )
        return replace(batch, moves=tuple(turned))

    edit(patch, turn)


@FAULTS.noticed_by(HOST)
def copies_between_tiers_are_made_last_first(patch: Patch) -> None:
    edit(patch, lambda batch: replace(batch, moves=batch.moves[::-1]))


# --- Leases of requests -------------------------------------------------------------------------


@FAULTS.noticed_by(POOLS)
def requests_share_one_namespace_in_the_cache(patch: Patch) -> None:
    @patch(Lease, "begin")
    def begin(original: Any, cls: Any, cache: Any, placement: Any, request: Any, *rest: Any) -> Any:
        return original(cls, cache, placement, request._replace(namespace=None), *rest)


@FAULTS.noticed_by(POOLS)
def a_preempted_or_finished_request_keeps_its_memory(patch: Patch) -> None:
    @patch(Lease, "finish")
    def finish(original: Any, self: Any, *args: Any, **more: Any) -> None:
        pass


@FAULTS.noticed_by(serving("exact mode", exact=True))
def exact_mode_publishes_what_decode_steps_computed(patch: Patch) -> None:
    @patch(Lease, "begin")
    def begin(original: Any, cls: Any, cache: Any, placement: Any, request: Any, *rest: Any) -> Any:
        return original(cls, cache, placement, request._replace(exact=False), *rest)


# --- Drafts -------------------------------------------------------------------------------------


@FAULTS.noticed_by(DRAFTS)
def one_wrong_guess_is_taken(patch: Patch) -> None:
    @patch(OracleRunner, "commit")
    def commit(original: Any, self: Any, batch: Batch, taken: Sequence[int]) -> None:
        lengths = [len(one.token_ids) for one in batch.segments if one.num_drafts]
        more = [min(count + 1, length) for count, length in zip(taken, lengths, strict=True)]
        original(self, batch, more)


@FAULTS.noticed_by(DRAFTS)
def states_do_not_move_on_by_what_was_taken(patch: Patch) -> None:
    @patch(OracleRunner, "commit")
    def commit(original: Any, self: Any, batch: Batch, taken: Sequence[int]) -> None:
        original(self, batch, [1] * len(taken))


@FAULTS.noticed_by(test_drafters.test_a_drafter_that_is_never_right_drafts_rarely)
def a_drafter_that_is_never_right_goes_on_guessing(patch: Patch) -> None:
    @patch(DraftLength, "learn")
    def learn(original: Any, self: Any, *args: Any, **more: Any) -> None:
        pass


# --- Sampling and requests ----------------------------------------------------------------------


@FAULTS.noticed_by(POOLS)
def tokens_are_drawn_from_a_neighbours_logits(patch: Patch) -> None:
    @patch(OracleSampler, "launch")
    def launch(original: Any, self: Any, logits: Any, requests: Any, rows: Any) -> Any:
        return original(self, logits, requests, list(rows)[::-1])


@FAULTS.noticed_by(machine(TokenCountsMachine))
def a_repeated_token_is_counted_once(patch: Patch) -> None:
    @patch(TokenCounts, "count")
    def count(original: Any, self: Any, output: Any) -> None:
        original(self, output)
        self.numbers[:] = np.minimum(self.numbers, 1)


@FAULTS.noticed_by(test_engine.test_namespaces_share_nothing)
def a_requests_namespace_is_forgotten(patch: Patch) -> None:
    @patch(Engine, "submit")
    def submit(original: Any, self: Any, prompt: Any, sampling: Any = None, **options: Any) -> str:
        return original(self, prompt, sampling, **options | {"namespace": None})


# --- Stores -------------------------------------------------------------------------------------


@FAULTS.noticed_by(machine(StoreMachine))
def a_damaged_record_is_believed(patch: Patch) -> None:
    @patch(RecordStore, "read")
    def read(original: Any, self: Any, number: int, out: memoryview) -> bool:
        original(self, number, out)
        return True


@FAULTS.noticed_by(machine(StoreMachine))
def a_dropped_record_lives_on(patch: Patch) -> None:
    @patch(RecordStore, "remove")
    def remove(original: Any, self: Any, number: int) -> None:
        pass


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_noticed(FAULTS[name], monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("check", FAULTS.checks, ids=lambda check: check.__name__)
def test_without_a_fault_the_check_passes(check: Check) -> None:
    check()
