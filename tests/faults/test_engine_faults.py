"""Injected faults of the engine: batches, leases, drafts, sampling, namespaces and stores.

The oracle checks every read of a batch, so most faults are injected into the runner's batches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from msgspec import structs

from engine import Engine, SamplingParams
from engine.plugins.tiers.records import RecordStore
from engine.requests.logit_rules import TokenCounts
from engine.schedule.drafting import DraftLength
from engine.schedule.scheduler import Batch
from hybridcache.allocators.moves import Move, StepQueue
from hybridcache.radix.lease import Lease
from tests.engine import test_engine
from tests.engine.plugins.speculation import test_drafters
from tests.engine.plugins.tiers.test_records import StoreMachine
from tests.engine.requests.test_token_counts import TokenCountsMachine
from tests.engine.schedule.test_scheduler_machine import SchedulerMachine
from tests.faults.injection import Check, Fault, Faults, assert_detected, machine
from tests.oracle import OracleRunner, OracleSampler

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
    "step_s": 0.001,
}
"""Arguments of a small engine of the scheduler's state machine."""


def serving(name: str, num_runs: int = 6, **settings: Any) -> Check:
    """Return the check that serves random requests on an oracle.

    The requests share prefixes, continue as next turns and are aborted. The oracle checks every
    read and every answer.
    """

    def check() -> None:
        for seed in range(num_runs):
            rng = random.Random(seed)
            state_machine = SchedulerMachine()
            state_machine.start(**SHAPE | settings)
            for _ in range(12):
                params = SamplingParams(max_tokens=rng.randint(1, 40), logprobs=0)
                family = rng.randrange(3)
                prompt = [(7 * family + i) % 320 for i in range(rng.choice((64, 70, 150, 200)))]
                prompt += [rng.randrange(320) for _ in range(rng.randrange(40))]
                space = rng.choice((None, None, "salt"))
                state_machine.arrive(prompt, params, boundary=64, copies=1, namespace=space)
                if rng.random() < 0.5:
                    state_machine.next_turn(rng.randrange(9), rng.randrange(60), params, cut=0)
                if rng.random() < 0.2:
                    state_machine.abort(rng.randrange(9))
                state_machine.run(rng.randint(1, 20))
            state_machine.teardown()

    check.__name__ = name
    return check


POOLS = serving("serving from pools")
ARENA = serving("serving from an arena", slab_rows=40)
HOST = serving("serving with host memory", slab_rows=40, host_rows=400, kv_pages=4)
OVERLAP = serving("overlapped steps", overlap="on")
DRAFTS = serving("serving with drafts", drafts="scripted")
STORE = machine(StoreMachine)


Change = Callable[[Batch], Batch]


def in_batches(check: Check, description: str = "") -> Callable[[Change], None]:
    """Return a decorator that adds the fault of a change of each batch before the runner gets it.
    The name of the change is the description of the fault, unless there is one."""

    def add(change: Change) -> None:
        def forward(original: Any, self: Any, batch: Batch, drawn: Sequence[int] = ()) -> Any:
            return original(self, change(batch), drawn)

        name = description or change.__name__.replace("_", " ")
        FAULTS[name] = Fault(check, OracleRunner, "forward", forward)

    return add


# --- Batches ------------------------------------------------------------------------------------


@in_batches(POOLS)
def a_state_is_restored_from_another_slot(batch: Batch) -> Batch:
    restores = ((max(0, source - 1), target) for source, target in batch.restores)
    return replace(batch, restores=tuple(restores))


@in_batches(POOLS)
def rows_of_the_table_are_written_at_the_next_position(batch: Batch) -> Batch:
    writes = [(row, start + (start > 0), rows) for row, start, rows in batch.row_writes]
    return replace(batch, row_writes=tuple(writes))


@in_batches(POOLS)
def checkpoints_are_not_written(batch: Batch) -> Batch:
    segments = (structs.replace(segment, exports=()) for segment in batch.segments)
    return replace(batch, segments=tuple(segments))


@in_batches(POOLS)
def a_prefill_starts_one_token_too_late(batch: Batch) -> Batch:
    moved = (
        structs.replace(segment, token_ids=segment.token_ids[1:], start=segment.start + 1)
        if not segment.is_decode and len(segment.token_ids) > 1 and not segment.exports
        else segment
        for segment in batch.segments
    )
    return replace(batch, segments=tuple(moved))


@in_batches(POOLS)
def a_request_reads_with_the_wrong_namespace(batch: Batch) -> Batch:
    renamed = (structs.replace(segment, namespace="other") for segment in batch.segments[:1])
    return replace(batch, segments=(*renamed, *batch.segments[1:]))


@in_batches(POOLS)
def two_requests_write_the_same_rows(batch: Batch) -> Batch:
    if len(batch.row_writes) < 2:
        return batch
    first, (row, start, own), *rest = batch.row_writes
    count = min(len(first[2]), len(own))
    same = np.concatenate((first[2][:count], own[count:]))
    return replace(batch, row_writes=(first, (row, start, same), *rest))


@in_batches(POOLS)
def two_requests_run_in_one_slot(batch: Batch) -> Batch:
    same = (structs.replace(one, slot=batch.segments[0].slot) for one in batch.segments)
    return replace(batch, segments=tuple(same))


@in_batches(OVERLAP)
def late_tokens_are_swapped_between_requests(batch: Batch) -> Batch:
    rows = [row for _, row in batch.late_tokens][::-1]
    late = zip(batch.late_tokens, rows, strict=True)
    return replace(batch, late_tokens=tuple((segment, row) for (segment, _), row in late))


@in_batches(ARENA)
def rows_move_in_the_wrong_direction(batch: Batch) -> Batch:
    moves = (
        move._replace(src=move.dst, dst=move.src) if isinstance(move, Move) else move
        for move in batch.moves
    )
    return replace(batch, moves=tuple(moves))


@FAULTS.of(ARENA, Lease, "take_checkpoint_slots")
def a_step_waits_for_several_slabs(original: Any, self: Any, start: int, end: int, *_: Any) -> Any:
    return original(self, start, end)


@in_batches(HOST)
def copies_between_tiers_are_reversed(batch: Batch) -> Batch:
    return replace(batch, moves=batch.moves[::-1])


for _name, _part, _check in (
    ("the last state is not restored", "restores", POOLS),
    ("the last rows of the table are not written", "row_writes", POOLS),
    ("the last moved rows are not copied", "moves", ARENA),
):
    in_batches(_check, _name)(
        lambda batch, part=_part: replace(batch, **{part: getattr(batch, part)[:-1]})
    )


# --- Leases of requests -------------------------------------------------------------------------


@FAULTS.of(POOLS, Lease, "begin")
def requests_share_one_namespace_in_the_cache(
    original: Any, cls: Any, cache: Any, placement: Any, request: Any, *rest: Any
) -> Any:
    return original(cls, cache, placement, request._replace(namespace=None), *rest)


@FAULTS.of(serving("exact mode", exact=True), Lease, "begin")
def exact_mode_publishes_decoded_tokens(
    original: Any, cls: Any, cache: Any, placement: Any, request: Any, *rest: Any
) -> Any:
    return original(cls, cache, placement, request._replace(exact=False), *rest)


@FAULTS.of(ARENA, Lease, "rows_moved")
def new_rows_of_a_lease_do_not_follow_moves(original: Any, self: Any, move: Any) -> Any:
    self._indexed_len = self.extended_len
    return original(self, move)


@FAULTS.of(ARENA, Lease, "_insert")
def a_lease_does_not_report_replaced_duplicates(original: Any, self: Any, *rest: Any) -> Any:
    with mock.patch.object(Lease, "_note_changed"):
        return original(self, *rest)


@FAULTS.of(ARENA, StepQueue, "take")
def a_state_is_not_copied_before_resuming(original: Any, self: Any) -> Any:
    self.restores.clear()
    return original(self)


@FAULTS.of(ARENA, Lease, "take_checkpoint_slots")
def an_unwritten_checkpoint_is_published(original: Any, self: Any, *span: Any) -> Any:
    return (original(self, *span) or ())[:0]


# --- Drafts -------------------------------------------------------------------------------------


@FAULTS.of(DRAFTS, OracleRunner, "commit")
def one_wrong_draft_is_accepted(
    original: Any, self: Any, batch: Batch, accepted: Sequence[int]
) -> None:
    lengths = [len(segment.token_ids) for segment in batch.segments if segment.num_drafts]
    more = [min(count + 1, length) for count, length in zip(accepted, lengths, strict=True)]
    original(self, batch, more)


@FAULTS.of(DRAFTS, OracleRunner, "commit")
def states_do_not_advance_by_the_accepted_drafts(
    original: Any, self: Any, batch: Batch, accepted: Sequence[int]
) -> None:
    original(self, batch, [1] * len(accepted))


# --- Sampling and requests ----------------------------------------------------------------------


@FAULTS.of(POOLS, OracleSampler, "launch")
def tokens_are_sampled_from_logits_of_another_request(
    original: Any, self: Any, logits: Any, requests: Any, rows: Any
) -> Any:
    return original(self, logits, requests, list(rows)[::-1])


@FAULTS.of(machine(TokenCountsMachine), TokenCounts, "add")
def a_repeated_token_is_counted_once(original: Any, self: Any, tokens: Any) -> None:
    original(self, tokens)
    self.numbers[:] = np.minimum(self.numbers, 1)


@FAULTS.of(test_engine.test_namespaces_share_nothing, Engine, "submit")
def the_namespace_of_a_request_is_dropped(
    original: Any, self: Any, prompt: Any, sampling: Any = None, **options: Any
) -> str:
    return original(self, prompt, sampling, **options | {"namespace": None})


# --- Stores -------------------------------------------------------------------------------------


@FAULTS.of(STORE, RecordStore, "read")
def a_damaged_record_is_accepted(original: Any, self: Any, number: int, out: memoryview) -> bool:
    original(self, number, out)
    return True


# --- Methods that do nothing ----------------------------------------------------------------------

ACCEPTANCE = test_drafters.test_a_drafter_that_is_never_right_drafts_rarely
FAULTS |= {
    "a lease does not report moved rows": Fault(ARENA, Lease, "_note_changed"),
    "an aborted lease keeps its memory": Fault(ARENA, Lease, "abort"),
    "a preempted or finished request keeps its memory": Fault(POOLS, Lease, "finish"),
    "a drafter without acceptance continues drafting": Fault(ACCEPTANCE, DraftLength, "learn"),
    "a removed record is still readable": Fault(STORE, RecordStore, "remove_file"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_detected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_detected(FAULTS[name], monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("check", FAULTS.checks, ids=lambda check: check.__name__)
def test_without_a_fault_the_check_passes(check: Check) -> None:
    check()
