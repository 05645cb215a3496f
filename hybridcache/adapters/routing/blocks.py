"""Translator of the block events of vLLM and SGLang to cache events, for routers of their replicas.

Both send msgpack maps with ``type`` ``BlockStored``, ``BlockRemoved`` or ``AllBlocksCleared``.
States are blocks of groups whose ``kv_cache_spec_kind`` is not ``full_attention``: vLLM reports
them, and this project's cache in SGLang if it is told to.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import msgspec

from hybridcache.adapters.events import (
    CheckpointRemoved,
    CheckpointStored,
    Event,
    EventsLost,
    KVRemoved,
    KVSplit,
    KVStored,
)

ATTENTION = frozenset({None, "full_attention"})
"""Values of ``kv_cache_spec_kind`` of groups whose blocks are rows, not states."""


@dataclass(slots=True)
class _Run:
    """Consecutive blocks, which are one edge: other blocks and states follow the last one only."""

    id: int
    namespace: Hashable
    start: int
    """Tokens before the first block."""
    names: list[int]
    """Hashes of the names of the blocks."""
    parent: _Run | None
    children: tuple[_Run, ...] = ()
    states: int = 0
    """State groups that have a state at the end, as bits: sets would take 432 bytes each."""


class BlockEvents:
    """Follower of the event batches of one replica.

    A block whose parent is unknown is ignored, and so are blocks with images, whose tokens do not
    tell them apart. Blocks behind a removed one are removed too: no hit can reach them. Memory is
    about 90 bytes per block, and 900 per run of blocks that were stored together.

    >>> blocks = BlockEvents(unit=2, num_state_groups=1)
    >>> stored = {"type": "BlockStored", "block_hashes": [5], "token_ids": [1, 2], "block_size": 2}
    >>> state = stored | {"group_idx": 1, "kv_cache_spec_kind": "mamba"}
    >>> batch = msgspec.msgpack.encode([0.0, [stored, state]])
    >>> [type(event).__name__ for event in blocks.read(0, batch)]
    ['KVStored', 'CheckpointStored']
    """

    def __init__(self, unit: int, num_state_groups: int, next_sequence: int = 0) -> None:
        """Follow a sender from batch ``next_sequence`` on, as if its cache was empty before.

        ``unit`` is the block size of its events, and the page size of the mirror that applies them.
        Shorter blocks are ignored. ``num_state_groups`` is 0 for attention-only models.
        """
        self._unit = unit
        self._num_groups = num_state_groups
        self._blocks: dict[int, _Run] = {}
        """Run of each block, by the hash of its name."""
        self._ids = count()
        self._rows_group: int | None = None
        self.next_sequence = next_sequence
        self.last_time = -math.inf
        """Time of the last batch by the sender's clock."""
        self.num_unknown_parents = 0

    def read(self, sequence: int, payload: bytes) -> list[Event]:
        """Translate one msgpack batch: [time, events, ...]. O(tokens). Raises EventsLost unless it
        is the next one: request the missing ones, or follow from batch 0 with a new follower."""
        if sequence != self.next_sequence:
            raise EventsLost(
                f"batch {sequence} of block events arrived, but {self.next_sequence} was expected: "
                "request a replay, or follow the replica from its first batch."
            )
        self.next_sequence += 1
        self.last_time, events, *_ = msgspec.msgpack.decode(payload)
        found: list[Event] = []
        for event in events:
            if event["type"] == "AllBlocksCleared":
                roots = {run.id: run for run in self._blocks.values() if run.parent is None}
                for run in roots.values():
                    self._remove(run, found)
            elif event["type"] == "BlockStored":
                is_rows = event.get("kv_cache_spec_kind") in ATTENTION
                (self._store_rows if is_rows else self._store_state)(event, found)
            elif event["type"] == "BlockRemoved":
                for name in event["block_hashes"]:
                    self._take(hash(name), event.get("group_idx"), found)
        return found

    def is_restarted(self, sequence: int, payload: bytes) -> bool:
        """Return whether a batch that should be known is another one: its sender has started again,
        and counts from 0."""
        num_after = self.next_sequence - sequence
        sent: float = msgspec.msgpack.decode(payload)[0]
        is_other = sent > self.last_time or (num_after == 1 and sent != self.last_time)
        return num_after > 0 and is_other

    def _store_rows(self, event: Mapping[str, Any], found: list[Event]) -> None:
        parent, size = event.get("parent_block_hash"), event["block_size"]
        self._rows_group = event.get("group_idx")
        if size > self._unit:
            raise ValueError(
                f"events have blocks of {size} tokens, and the router's unit is {self._unit}: "
                f"set unit to {size}."
            )
        if size < self._unit:
            return
        names, tokens = [hash(one) for one in event["block_hashes"]], event["token_ids"]
        first = next((at for at, one in enumerate(names) if one not in self._blocks), len(names))
        before = [parent if parent is None else hash(parent), *names][first]
        if before is not None and before not in self._blocks:
            self.num_unknown_parents += 1
            return
        extras = [one or () for one in event.get("extra_keys") or [()] * len(names)]
        part, new = array("i"), dict[int, None]()
        try:
            for at in range(first, len(names)):
                is_image = not all(isinstance(one, str) for one in extras[at])
                if is_image or names[at] in new or names[at] in self._blocks:
                    break  # A block in two runs could not be removed.
                part += array("i", tokens[at * size : (at + 1) * size])
                new[names[at]] = None
        except OverflowError:  # SGLang's placeholders of an image
            pass
        if not new:
            return
        above = None if before is None else self._cut(before, True, found)
        known = extras[0] or (event.get("lora_name"), event.get("cache_salt"))
        space: Hashable = tuple(one for one in known if one is not None) or None
        run = _Run(next(self._ids), space, 0, [*new], above)
        if above is not None:
            run.start, run.namespace = self._end(above), above.namespace
            above.children += (run,)
        self._blocks |= dict.fromkeys(new, run)
        above_id = None if above is None else above.id
        found.append(KVStored(run.id, above_id, run.namespace, run.start, part.tobytes()))

    def _end(self, run: _Run) -> int:
        return run.start + len(run.names) * self._unit

    def _cut(self, name: int, is_kept: bool, found: list[Event]) -> _Run:
        """Return the run that ends with a block, if the block ``is_kept``, or begins with it. The
        other blocks of its run are another one then. O(blocks of the run)."""
        run = self._blocks[name]
        count = run.names.index(name) + is_kept
        if not 0 < count < len(run.names):
            return run
        start, names = run.start + count * self._unit, run.names[count:]
        rest = _Run(run.id, run.namespace, start, names, run, run.children, run.states)
        for child in rest.children:
            child.parent = rest
        self._blocks |= dict.fromkeys(names, rest)
        del run.names[count:]
        run.id, run.children, run.states = next(self._ids), (rest,), 0
        found.append(KVSplit(rest.id, run.id, start))
        return run if is_kept else rest

    def _set_states(self, run: _Run, states: int, found: list[Event]) -> None:
        before, after = (0 < self._num_groups == one.bit_count() for one in (run.states, states))
        run.states = states
        if before != after:
            kind = CheckpointStored if after else CheckpointRemoved
            found.append(kind(run.id, self._end(run)))

    def _store_state(self, event: Mapping[str, Any], found: list[Event]) -> None:
        name = hash(event["block_hashes"][-1])
        if name in self._blocks:
            run = self._cut(name, True, found)
            self._set_states(run, run.states | 1 << event["group_idx"], found)

    def _take(self, name: int, group: int | None, found: list[Event]) -> None:
        run = self._blocks.get(name)
        if run and run.names[-1] == name and group is not None and run.states >> group & 1:
            self._set_states(run, run.states ^ 1 << group, found)
        elif run and group == self._rows_group:
            self._remove(self._cut(name, False, found), found)

    def _remove(self, run: _Run, found: list[Event]) -> None:
        """Remove a run and all behind it, the last ones first."""
        if run.parent is not None:
            run.parent.children = tuple(one for one in run.parent.children if one is not run)
        path = [run]
        for one in path:
            path.extend(one.children)
        for one in reversed(path):
            for name in one.names:
                del self._blocks[name]
            self._set_states(one, 0, found)
            found.append(KVRemoved(one.id))
