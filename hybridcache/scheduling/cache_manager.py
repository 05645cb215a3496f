"""The sizes of a memory, and its manager: leases of the running requests, rows of the request
table, and copies for the next batch.

KV rows and slots belong to the lease (``hybridcache/radix/lease.py`` has the map).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from hybridcache.allocators.moves import Indices, StepPlan
from hybridcache.allocators.pools import slab_rows
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.lease import Lease, LeaseRequest
from hybridcache.radix.protocol import LoadRule, PlacementPolicy
from hybridcache.radix.tokens import require_index
from hybridcache.scheduling.request import ScheduledRequest

SLOTS_OF_ONE = 3
"""States of one request that cannot be evicted: its own, the checkpoint that it resumed from, and
the rolling checkpoint of its decoding."""


@dataclass(frozen=True, slots=True)
class MemorySizes:
    """Number and size of the KV rows and state slots in one memory."""

    memory: Literal["arena", "pools"]
    """``arena``: rows and slots share their bytes; ``pools``: each has its own."""
    num_kv_tokens: int
    """KV rows of the pool or of the whole arena, in whole pages."""
    num_slots: int
    """State slots of the pool, or slabs of the arena; 0 if the model is attention-only."""
    row_bytes: int
    """Bytes of one token's keys and values."""
    state_bytes: int
    """Bytes of one state; 0 if the model is attention-only."""
    page_size: int = 1
    owns_states: bool = False
    """True if running states are stored outside this memory, one per row of the request table. The
    slots then hold checkpoints only."""
    slab_rows: int = field(init=False)
    """KV rows that occupy as many bytes as one slot; 0 if states have a separate pool or do not
    exist."""

    def __post_init__(self) -> None:
        has_slabs = self.memory == "arena" and self.is_stateful
        rows = slab_rows(self.state_bytes, self.row_bytes, self.page_size) if has_slabs else 0
        object.__setattr__(self, "slab_rows", rows)

    @property
    def is_stateful(self) -> bool:
        return self.state_bytes > 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: ``state_bytes``, or a slab."""
        return self.slab_rows * self.row_bytes or self.state_bytes

    @property
    def total_bytes(self) -> int:
        num_bytes = self.num_kv_tokens * self.row_bytes
        return num_bytes + (0 if self.slab_rows else self.num_slots * self.state_bytes)

    def share(self, num_tokens: int, num_states: int) -> float:
        """Return the part of the memory, 0 to 1, that ``num_tokens`` KV rows and ``num_states``
        states take. With two pools, the fuller pool counts."""
        if self.memory == "arena" or not self.state_bytes:
            return (num_tokens + num_states * self.slab_rows) / self.num_kv_tokens
        return max(num_tokens / self.num_kv_tokens, num_states / max(1, self.num_slots))

    @property
    def max_request_len(self) -> int:
        """Longest request, in tokens, that can always be served to its end, if need be alone."""
        if self.is_stateful and not self.num_slots:
            return 0
        whole = self.num_kv_tokens // self.page_size * self.page_size
        return max(0, whole - SLOTS_OF_ONE * self.slab_rows)


TableRow = Callable[[int, int], Indices]
"""Function of (row, end): KV indices that a runner was given for the positions of a row below
``end``, possibly fewer."""
MAX_MOVES = 1
"""Slabs of an arena emptied per step. The bound keeps the wait shorter than the step."""


class Holder(Protocol):
    """Owner of rows and slots: a lease, or a prefix that arrives. Hashable by identity."""

    @property
    def held_tokens(self) -> int: ...

    @property
    def held_slots(self) -> int: ...


class CacheManager:
    """Assigns leases and rows to requests, and releases them."""

    def __init__(
        self,
        cache: HybridRadixCache,
        placement: PlacementPolicy,
        *,
        num_rows: int,
        stateful: bool,
        exact: bool = False,
        owns_states: bool = False,
        exchange: LoadRule | None = None,
    ) -> None:
        """
        Args:
            cache: made by ``build_prefix_cache``.
            placement: positions of checkpoints, made by ``parse_placement``.
            num_rows: rows of the request table: most running requests.
            stateful: False if the model is attention-only.
            exact: True to publish prefilled tokens only.
            owns_states: True if the state of a request has the slot number of its row, outside the
                memory of the cache.
            exchange: decides which offloaded prefixes to load; None to load nothing.

        Raises TypeError or ValueError unless ``num_rows`` is an integer of 1 or more. ``begin``
        raises those of the other arguments, as ``Lease.begin`` does.
        """
        require_index(num_rows, "num_rows", 1)
        self.cache = cache
        self.placement = placement
        self.stateful = stateful
        self._exact = exact
        self.owns_states = owns_states
        self._exchange = exchange
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self.num_rows = num_rows
        self._requests: dict[int, ScheduledRequest] = {}
        self.other_holders: dict[Holder, None] = {}
        """Owners of rows and slots that are no leases."""
        self.step = StepPlan()
        """Tensor work of the last batch."""
        has_pools = cache.arena is None and not cache.shares_memory
        self.memory = MemorySizes(
            "pools" if has_pools else "arena",
            cache.num_kv_tokens,
            cache.num_slots,
            cache.item_bytes.kv_token,
            cache.item_bytes.state if stateful else 0,
            cache.page_size,
            owns_states,
        )
        """Sizes of the cache's memory."""

    def begin(self, request: ScheduledRequest) -> bool:
        """Assign a lease and a row to ``request``, and set its lengths from the cached prefix.
        Returns False, and changes nothing, if there is no memory. Raises RuntimeError if it runs
        already."""
        if request.lease is not None:
            raise RuntimeError(f"request {request.request_id} has a lease already.")
        if not self._free_rows:
            return False
        row = self._free_rows[-1]
        prefill_len = request.prompt_len if self._exact else request.num_tokens
        asked = LeaseRequest(
            tokens=request.tokens[:prefill_len],
            namespace=request.namespace,
            boundaries=request.spec.boundaries,
            reuse=not request.wants_scores,
            exact=self._exact,
            stateful=self.stateful,
            table_row=row,
            own_slot=row if self.owns_states else None,
            resumes=request.is_counted,
            returns_within_s=request.spec.returns_within_s,
            session=request.spec.session,
        )
        lease = Lease.begin(self.cache, self.placement, asked, self._exchange)
        if lease is None:
            return False
        for position in request.spec.save_at:
            lease.plan_checkpoint(position, "asked")
        self._free_rows.pop()
        self._requests[row] = request
        request.lease, request.row = lease, row
        request.computed_len = request.scheduled_len = lease.cached_len
        request.prefill_len, request.num_drawn = prefill_len, 0
        return True

    def release(self, request: ScheduledRequest, *, aborts: bool = False) -> None:
        """Take back the row of ``request``, whose lease has ended. With ``aborts`` it ends now, and
        everything is freed that was not published."""
        lease, row = request.claims
        if aborts:
            lease.abort()
        request.is_counted = lease.is_counted
        del self._requests[row]
        self._free_rows.append(row)
        request.lease = request.row = None

    @property
    def num_slots_at_hand(self) -> int | None:
        """Number of slots that can be taken without emptying more than ``MAX_MOVES`` slabs for the
        next batch; None if there is no limit. It is 0 if loads have already emptied that many: then
        no request may begin before the next step."""
        arena = self.cache.arena
        if arena is None:
            return None
        return max(0, len(arena.free_slabs) + MAX_MOVES - self.cache.steps.num_moves)

    @property
    def has_moves(self) -> bool:
        """True if moves or copies of rows are not contained in any batch yet."""
        return bool(self.cache.steps.transfers)

    def take_step(self) -> StepPlan:
        """Return the tensor work of the next batch, to be done before it computes. Call its
        ``carry_out``, or ``done`` when the batch was given to the device, which orders its work."""
        self.step = step = self.cache.steps.take()
        if step.row_writes:  # Cut at the request table's width: a lease has whole pages of rows.
            clipped = [w.up_to(self._requests[w.table_row].max_len) for w in step.row_writes]
            step.row_writes = tuple(write for write in clipped if len(write.kv_indices))
        return step

    def lost_moves(self) -> bool:
        """Return, after a failed step, whether the moves of the last batch are uncertain. If so, no
        cached row can be trusted. Moves that no batch has taken remain for the next one. The other
        work of the batch is forgotten: its requests have no lease any more."""
        lost, self.step = bool(self.step.transfers), StepPlan()
        self.cache.steps.open_plan = None
        return lost

    def restart(self) -> None:
        """Replace the cache by an empty one (``HybridRadixCache.rebuilt``), after an exception in
        the middle of a call. No request has claims afterwards: call ``lose_claims`` of each."""
        self.cache = self.cache.rebuilt()
        self._free_rows = list(range(self.num_rows - 1, -1, -1))
        self._requests.clear()
        self.other_holders.clear()
        self.step = StepPlan()

    def held(self) -> tuple[int, int]:
        """Return (KV rows, slots) held by running requests and by ``other_holders``."""
        leases = [request.claims[0] for request in self._requests.values()]
        holders: list[Holder] = [*leases, *self.other_holders]
        return sum(one.held_tokens for one in holders), sum(one.held_slots for one in holders)

    def check(self, table_row: TableRow) -> None:
        """Recompute every invariant of the cache and of the rows, and ``free + cached + held ==
        total``. Raises AssertionError if one fails. O(cache)."""
        self.cache.check(*self.held())
        rows = sorted([*self._free_rows, *self._requests])
        assert rows == list(range(self.num_rows)), "a table row has no owner, or two"
        self.check_rows(table_row)

    def check_rows(self, table_row: TableRow) -> None:
        """Check that the runner's request table lists the lease's rows of every request, with the
        writes of the next batch. Raises AssertionError otherwise. Call only between two steps.
        O(tokens of the running requests)."""
        assert not self.cache.steps.restores, "a state copy was claimed, but no batch took it"
        writes = {write.table_row: write for write in self.cache.steps.due_row_writes()}
        for row, request in self._requests.items():
            expected = request.claims[0].kv_indices[: request.max_len]
            listed = np.full(len(expected), -1, np.int32)
            given = table_row(row, len(expected))
            listed[: len(given)] = given
            if row in writes:
                _, start, indices = writes[row].up_to(len(expected))
                listed[start : start + len(indices)] = indices
            wrong = np.flatnonzero(listed != expected)
            assert not len(wrong), (
                f"a row write was lost: at position {wrong[0]} of request {request.request_id} the "
                f"runner reads KV row {listed[wrong[0]]}, the lease has {expected[wrong[0]]}"
            )
