"""Runner without a model that verifies every read against the prefix it should contain.

A KV row contains the fingerprint of the prefix that ends there; a state contains that and its
length. A step that reads anything except the prefix that it continues raises AssertionError with
the contents it read. The next token is a function of the fingerprint. So greedy answers must not
depend on other requests, on the contents of the cache, or on the chunks of a prompt. With ``exact``
a fingerprint also depends on the tokens that a decode step computed, as bits would. Rows and states
are tagged with the namespace that made them, and must not be read in another.

In an arena rows and slots are the same bytes: a write to a slot erases the rows under it, and the
other way round.

It serves tests, and studies that need the engine's schedule without the cost of a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from operator import is_
from typing import TYPE_CHECKING, NamedTuple
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from engine import Engine, EngineConfig
from engine.messages import Exactness
from engine.plugins.tiers.tier_copies import KEPT
from engine.requests.logit_rules import FREE
from engine.requests.request import SamplingInput
from engine.schedule.scheduler import Batch, Scheduler, Segment
from engine.text.answers import SampledToken
from hybridcache.allocators.moves import DEVICE, Copy, Drop, Indices, Move, Transfer
from hybridcache.allocators.pools import slab_rows
from hybridcache.geometry.model import ModelGeometry
from hybridcache.radix.tokens import Tokens
from hybridcache.scheduling.cache_manager import CacheManager, MemorySizes

if TYPE_CHECKING:
    from engine.runner.predictor import Newest

Fingerprints = npt.NDArray[np.int64]
MASK = (1 << 62) - 1


def fingerprint(before: int, token: int, by_decode: bool = False) -> int:
    """Return the fingerprint of a prefix that is extended by one token."""
    mixed = (before * 6364136223846793005 + 2 * token + by_decode + 1442695040888963407) & MASK
    return mixed ^ (mixed >> 29)


class OracleState(NamedTuple):
    """Contents of a slot."""

    position: int
    fingerprint: int
    namespace: Hashable


class RowMark(NamedTuple):
    """Contents of a KV row."""

    fingerprint: int
    token: int
    by_decode: int


Stored = tuple[RowMark | OracleState, int]
"""Contents of a row of a host or disk tier: a KV row with its namespace, or a state with the number
of the piece."""


def ticking_clock() -> Callable[[], float]:
    """Return a clock that goes on by a millisecond with each reading, so that runs repeat."""
    return itertools.count(0.0, 0.001).__next__


def engine_with(hooks: Callable[[CacheManager], dict], config: EngineConfig, **parts: object):
    """Return an engine with these ``hooks`` of the scheduler in place of those of its plugins."""
    make = lambda manager, **options: Scheduler(manager, **options | hooks(manager))  # noqa: E731
    with patch("engine.engine.Scheduler", make):
        return Engine(config, **parts)


class OracleRunner:
    """Replacement of ModelRunner; ``forward`` returns a fingerprint for each row of logits."""

    def __init__(
        self,
        num_kv_tokens: int,
        num_slots: int | None,
        *,
        max_model_len: int = 1 << 20,
        vocab_size: int = 320,
        exact: bool = False,
        geometry: str | ModelGeometry = "qwen3-next",
        page_size: int = 1,
        owns_states: bool = False,
    ) -> None:
        """Make a runner with two pools, or with an arena of ``num_kv_tokens`` rows if ``num_slots``
        is None.

        ``num_slots`` 0 makes an attention-only model. ``geometry``, or the preset of that name, has
        the reported sizes of the memory. ``owns_states`` is that of ``MemorySizes``.
        """
        if isinstance(geometry, str):
            geometry = ModelGeometry.preset(geometry)
        self.geometry = geometry
        sizes = _sizes(num_kv_tokens, num_slots, geometry, page_size)
        self.memory = replace(sizes, owns_states=owns_states and sizes.is_stateful)
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self._exact = exact
        self._fingerprints: Fingerprints = np.zeros(num_kv_tokens, np.int64)
        self._tokens = np.zeros((num_kv_tokens, 2), np.int64)
        """(token, computed by a decode step)."""
        self._writers: npt.NDArray[np.int32] = np.full(num_kv_tokens, -1, np.int32)
        """Namespace of each row as an index of ``_namespaces``; -1 for a row that was not written,
        or is under a state."""
        self._namespaces: list[Hashable] = []
        self._states: list[OracleState | None] = [None] * self.memory.num_slots
        self._own: dict[int, OracleState | None] = {}
        """Running states by their slots, if these are separate from the memory's slots."""
        self._below: dict[tuple[str, int], Stored] = {}
        """Contents of the rows of host and disk tiers."""
        self._table: dict[int, npt.NDArray[np.intp]] = {}
        self._proved: dict[int, Fingerprints] = {}
        self._verified: list[tuple[Segment, Fingerprints]] = []
        """Segments of the last step that wait for their ``commit``, with the computed
        fingerprints."""
        self.is_asynchronous = False
        self.num_steps = self.num_tokens_computed = 0

    def forward(self, batch: Batch, drawn: Sequence[int] = ()) -> Fingerprints:
        """Make the batch's copies, verify every read, and compute: int64[rows of logits]."""
        self._forget_verified()
        for order in batch.moves:
            self._make(order)
        for row, start, indices in batch.row_writes:
            self._write_row(row, start, indices)
        for source, target in batch.restores:
            self._write_own(target, self._states[source])
        kinds = [segment.is_decode for segment in batch.segments]
        assert kinds == sorted(kinds, reverse=True), "a prefill before a decode"
        self._prove_disjoint(batch)
        late = {index: drawn[row] for index, row in batch.late_tokens}
        logits = [
            self._compute(segment, segment.token_ids.tolist() if i not in late else [late[i]])
            for i, segment in enumerate(batch.segments)
        ]
        self.num_steps += 1
        self.num_tokens_computed += sum(len(one.token_ids) for one in batch.segments)
        return np.array([one for rows in logits for one in rows], np.int64)

    def _forget_verified(self) -> None:
        """Invalidate the states of a verification that failed before its commit."""
        for segment, _ in self._verified:
            if segment.slot is not None:
                self._write_own(segment.slot, None)
        self._verified = []

    def table_row(self, row: int, end: int) -> Indices:
        """Return the KV indices of the positions of ``row`` below ``end``, as far as batches
        assigned them."""
        return self._table.get(row, np.empty(0, np.int32))[:end]

    def attach_tiers(self, copier: object, num_host_rows: int) -> None:
        """See ``ModelRunner``. Transfers are simulated here, and ``copier`` is ignored."""

    exactness, state_bytes = Exactness(), 0

    @property
    def drafts(self) -> OracleRunner:
        """The runner itself, which also drafts."""
        return self

    def identity(self, weights_digest: str | None = None) -> Mapping[str, str]:
        """Return the same identity for every runner of this kind."""
        return {"runner": "oracle"}

    def _make(self, order: Transfer) -> None:
        """Execute a move or a transfer between tiers, and verify its contents."""
        if isinstance(order, Move):
            self._move(order)
        elif isinstance(order, Drop):
            for row in order.rows.tolist():
                self._below.pop((order.tier, row), None)
        else:
            self._copy(order)

    def _copy(self, order: Copy) -> None:
        stored = self._stored(order)
        if order.path is not None:
            _prove_path(order, stored)
        if order.dst_tier == KEPT:
            return
        if order.dst_tier != DEVICE:
            assert len(stored) == len(order.dst), "rows that do not fit"
            pairs = zip(order.dst.tolist(), stored, strict=True)
            self._below.update({(order.dst_tier, row): one for row, one in pairs})
        elif order.kind == "checkpoint":
            state = stored[0][0]
            whole = [(state, piece) for piece in range(len(stored))]
            assert isinstance(state, OracleState) and stored == whole, "pieces of several states"
            self._write_state(int(order.dst[0]), state)
        else:
            for row, (token, place) in zip(order.dst.tolist(), stored, strict=True):
                assert isinstance(token, RowMark), "a piece of a state in a KV row"
                self._fingerprints[row], self._writers[row] = token.fingerprint, place
                self._tokens[row] = token.token, token.by_decode
            self._forget_states(order.dst)

    def _stored(self, order: Copy) -> list[Stored]:
        """Return the stored contents of the source rows of ``order``."""
        rows = order.src.tolist()
        if order.src_tier != DEVICE:
            return [self._below[order.src_tier, row] for row in rows]
        if order.kind == "checkpoint":
            state = self._states[rows[0]]
            assert state is not None, f"slot {rows[0]} is offloaded, and was never written"
            return [(state, piece) for piece in range(self._state_rows)]
        assert (self._writers[order.src] >= 0).all(), "a KV row is offloaded that was never written"
        return [
            (RowMark(int(self._fingerprints[row]), *self._tokens[row].tolist()), writer)
            for row, writer in zip(rows, self._writers[order.src].tolist(), strict=True)
        ]

    @property
    def _state_rows(self) -> int:
        sizes = self.memory
        return slab_rows(sizes.state_bytes, sizes.row_bytes, sizes.page_size)

    def _move(self, move: Move) -> None:
        assert not set(move.src.tolist()) & set(move.dst.tolist()), "a row moves into its slab"
        for what in (self._fingerprints, self._tokens, self._writers):
            what[move.dst] = what[move.src]
        self._forget_states(move.dst)

    def _forget_states(self, rows: Indices) -> None:
        """Invalidate the states over ``rows``, which were written."""
        for slot in self._slots_over(rows):
            self._states[slot] = None

    def _write_state(self, slot: int, state: OracleState | None) -> None:
        self._states[slot] = state
        size = self.memory.slab_rows
        self._writers[slot * size : (slot + 1) * size] = -1

    def _write_own(self, slot: int, state: OracleState | None) -> None:
        if self.memory.owns_states:
            self._own[slot] = state
        else:
            self._write_state(slot, state)

    def _read_own(self, slot: int) -> OracleState | None:
        return self._own.get(slot) if self.memory.owns_states else self._states[slot]

    def _slots_over(self, rows: Indices) -> set[int]:
        """Return the slots that share bytes with ``rows``."""
        if not self.memory.slab_rows:
            return set()
        slots = set((rows // self.memory.slab_rows).tolist())
        return {slot for slot in slots if slot < self.memory.num_slots}

    def _write_row(self, row: int, start: int, indices: npt.NDArray[np.int32]) -> None:
        table = self._table.get(row, np.empty(0, np.intp))
        end = start + len(indices)
        assert end <= self.max_model_len, "a row write past the end of the table"
        if end > len(table):
            table = np.concatenate([table, np.full(end - len(table), -1, np.intp)])
        table[start:end] = indices
        self._table[row] = table
        if start < len(self._proved.get(row, ())):
            del self._proved[row]

    def _prove_disjoint(self, batch: Batch) -> None:
        written = np.zeros(len(self._writers), np.bool_)
        for segment in batch.segments:
            rows = self.table_row(segment.row, segment.end)
            assert len(rows) == segment.end and (rows >= 0).all(), "a position without a KV row"
            own = rows[segment.start :]
            assert len(set(own.tolist())) == len(own), "two positions in one KV row"
            assert not written[own].any(), "two requests write one KV row"
            written[own] = True
        for segment in batch.segments:
            read = self._table[segment.row][: segment.start]
            assert not written[read].any(), "a request writes a KV row that another reads"
        running = [segment.slot for segment in batch.segments if segment.slot is not None]
        slots = [slot for segment in batch.segments for _, slot in segment.exports]
        if self.memory.owns_states:
            assert len(set(running)) == len(running), "two running states in one slot"
        else:
            slots += running
        assert len(set(slots)) == len(slots), "two states in one slot"
        for segment in batch.segments:
            under = self._slots_over(self._table[segment.row][: segment.end])
            assert not under & set(slots), "a KV row lies under a state"

    def _compute(self, segment: Segment, token_ids: list[int]) -> list[int]:
        start, end = segment.start, segment.end
        assert end > start, "a segment without tokens"
        proved = self._prove_kv(segment)
        before = int(proved[-1]) if start else 0
        if segment.slot is not None and start:
            self._prove_state(segment, before)
        by_decode = segment.is_decode and self._exact
        new = np.empty(end - start, np.int64)
        for i, token in enumerate(token_ids):
            new[i] = before = fingerprint(before, token, by_decode)
        rows = self._table[segment.row][start:end]
        self._fingerprints[rows] = new
        self._tokens[rows, 0] = token_ids
        self._tokens[rows, 1] = by_decode
        self._writers[rows] = self._writer(segment.namespace)
        self._forget_states(rows)
        self._proved[segment.row] = np.concatenate([proved, new])
        positions = [position for position, _ in segment.exports]
        assert len(set(positions)) == len(positions), "two checkpoints of one state"
        assert all(start < position <= end for position in positions), (
            "a checkpoint outside of its segment"
        )
        if segment.num_drafts:
            assert segment.is_decode and end - start == 1 + segment.num_drafts, (
                "drafts without a decode"
            )
            self._verified.append((segment, new))
        else:
            self._move_on(segment, new)
        return [int(one) for one in new[len(new) - segment.num_logits :]]

    def commit(self, batch: Batch, taken: Sequence[int]) -> None:
        """Advance the states of the segments with drafts by ``taken`` tokens each."""
        verified = [segment for segment in batch.segments if segment.num_drafts]
        assert all(map(is_, verified, (segment for segment, _ in self._verified)))
        for (segment, new), count in zip(self._verified, taken, strict=True):
            assert 0 <= count <= len(new)
            proved = self._proved[segment.row]
            self._proved[segment.row] = proved[: segment.start + count]
            if count:
                self._move_on(segment, new[:count])
        self._verified = []

    def guess(self, newest: Sequence[Newest], most: Sequence[int]) -> list[Tokens]:
        """Verify that each request's rows and state are those of the tokens before its newest one.
        The drafts are right up to a place that depends on the prefix."""
        assert not self._verified, "drafting from states that wait for their commit"
        found = []
        for request, count in zip(newest, most, strict=True):
            held = self._read_own(request.slot)
            assert held is not None, "drafting from a slot that was never written"
            token = np.array([request.token_id], np.int32)
            segment = Segment(
                request.row, request.slot, token, request.position, True, namespace=held.namespace
            )
            before = int(self._prove_kv(segment)[-1])
            self._prove_state(segment, before)
            tokens, token_id = np.empty(count, np.int32), request.token_id
            for place in range(count):
                before = fingerprint(before, token_id, self._exact)
                token_id = tokens[place] = before % self.vocab_size
            tokens[before % 97 % (count + 1) :] ^= 1
            found.append(tokens)
        return found

    def _move_on(self, segment: Segment, new: Fingerprints) -> None:
        """Update the state with ``new`` and write the checkpoints up to its end."""
        end = segment.start + len(new)

        def state(position: int) -> OracleState:
            return OracleState(position, int(new[position - segment.start - 1]), segment.namespace)

        for position, slot in segment.exports:
            if position <= end:
                self._write_state(slot, state(position))
        if segment.slot is not None:
            self._write_own(segment.slot, state(end))

    def _writer(self, namespace: Hashable) -> int:
        if namespace not in self._namespaces:
            self._namespaces.append(namespace)
        return self._namespaces.index(namespace)

    def _prove_state(self, segment: Segment, before: int) -> None:
        """Verify that the slot has the state of the tokens before ``segment``, made in its
        namespace."""
        assert segment.slot is not None
        held = self._read_own(segment.slot)
        assert held is not None, f"slot {segment.slot} was never written, but resumed from"
        assert held.namespace == segment.namespace, (
            f"namespace {segment.namespace!r} reads in slot {segment.slot} a state of "
            f"namespace {held.namespace!r}"
        )
        assert held == (segment.start, before, segment.namespace), (
            f"slot {segment.slot} holds the state of {held.position} tokens or of others, "
            f"not of the first {segment.start}"
        )

    def _prove_kv(self, segment: Segment) -> Fingerprints:
        """Return the fingerprints of the tokens before ``segment``, after verifying that its rows
        have them."""
        rows = self._table[segment.row][: segment.start]
        self._prove_namespace(segment, rows)
        proved = self._proved.get(segment.row)
        if proved is None:
            proved = np.empty(segment.start, np.int64)
            before = 0
            for i, (token, by_decode) in enumerate(self._tokens[rows].tolist()):
                proved[i] = before = fingerprint(before, token, bool(by_decode))
        assert len(proved) == segment.start, (
            f"computed up to {len(proved)}, continued at {segment.start}"
        )
        assert np.array_equal(self._fingerprints[rows], proved), "a KV row holds another prefix"
        return proved

    def _prove_namespace(self, segment: Segment, rows: Indices) -> None:
        writers = self._writers[rows]
        foreign = np.flatnonzero(writers != self._writer(segment.namespace))
        if len(foreign):
            position, writer = foreign[0], int(writers[foreign[0]])
            owner = "no namespace" if writer < 0 else f"namespace {self._namespaces[writer]!r}"
            raise AssertionError(
                f"namespace {segment.namespace!r} reads at position {position} a KV row of {owner}"
            )


def _sizes(
    num_kv_tokens: int, num_slots: int | None, geometry: ModelGeometry, page_size: int
) -> MemorySizes:
    row, state = geometry.kv_bytes_per_token, geometry.state_bytes
    if num_slots is not None:
        state *= num_slots > 0
        return MemorySizes("pools", num_kv_tokens, num_slots, row, state, page_size)
    num_slots = num_kv_tokens // slab_rows(state, row, page_size) if state else 0
    return MemorySizes("arena", num_kv_tokens, num_slots, row, state, page_size)


def _prove_path(order: Copy, stored: list[Stored]) -> None:
    """Verify that the data written to disk belongs to the path of ``order``."""
    assert order.path is not None
    namespace, tokens = order.path
    assert len(tokens) == order.position, "a path that ends elsewhere"
    found = [mark for mark, _ in stored]
    if order.kind == "checkpoint":
        (state,) = set(found)
        assert isinstance(state, OracleState) and state.position == order.position, "another state"
        assert state.namespace == namespace, "a state of another namespace"
        return
    first = order.position - len(found)
    assert [mark.token for mark in found if isinstance(mark, RowMark)] == tokens[first:].tolist(), (
        "KV of other tokens"
    )


class OracleDrawn:
    """Tokens that are available to the runner and the host at once."""

    def __init__(self, sampled: list[SampledToken]) -> None:
        self.tokens = [one.token_id for one in sampled]
        self._sampled = sampled

    def wait(self) -> list[SampledToken]:
        return self._sampled


class OracleSampler:
    """Selects tokens as a function of the fingerprint."""

    def __init__(self, vocab_size: int = 320) -> None:
        self._vocab_size = vocab_size

    def launch(
        self, logits: Fingerprints, requests: Sequence[SamplingInput], rows: Sequence[int]
    ) -> OracleDrawn:
        assert len(rows) == len(requests)
        for request in requests:
            repeats, params = request.ruling.repeats, request.params
            if repeats is not None and params.presence_penalty == 0:
                expected = request.draw * params.frequency_penalty
                assert np.isclose(repeats.numbers[1].sum(), expected), "not every token is counted"
        pairs = zip(rows, requests, strict=True)
        return OracleDrawn([self.choose(int(logits[row]), request) for row, request in pairs])

    def choose(self, logits: int, request: SamplingInput | None = None) -> SampledToken:
        """Return the one token that follows a prefix, among those that ``request`` allows."""
        ruling = FREE if request is None else request.ruling
        if ruling.mask is None and ruling.added is None:
            return SampledToken(logits % self._vocab_size, -(logits % 9973) / 1000)
        possible = np.arange(self._vocab_size)
        if ruling.mask is not None:
            possible = possible[np.unpackbits(ruling.mask, bitorder="little")[possible] == 1]
        if ruling.added is not None:
            ids, values = ruling.added
            possible = np.setdiff1d(possible, ids[np.isneginf(values)])
        token = int(possible[logits % len(possible)])
        return SampledToken(token, -(logits % 9973) / 1000)

    def score(self, logits: Fingerprints, token_ids: Sequence[int], num_top: int) -> OracleDrawn:
        """Return log-probabilities that depend on the prefix and on the token."""
        return OracleDrawn(
            [
                SampledToken(int(token), -((int(one) + int(token)) % 9973) / 1000)
                for one, token in zip(logits, token_ids, strict=True)
            ]
        )
