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
    KVStored,
)

ATTENTION = frozenset({None, "full_attention"})
"""Values of ``kv_cache_spec_kind`` of groups whose blocks are rows, not states."""


@dataclass(slots=True)
class _Block:
    id: int
    namespace: Hashable
    end: int
    """Tokens from the start of the prompt."""
    parent: Hashable
    children: tuple[Hashable, ...] = ()
    states: int = 0
    """State groups that have a state at the end, as bits: sets would take 432 bytes per block."""
    is_resumable: bool = False


class BlockEvents:
    """Follower of the event batches of one replica.

    A block whose parent is unknown is ignored, and so are blocks with images, whose tokens do not
    tell them apart. Blocks behind a removed one are removed too: no hit can reach them.

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
        self._blocks: dict[Hashable, _Block] = {}
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
                for name in [one for one, block in self._blocks.items() if block.parent is None]:
                    self._remove(name, found)
            elif event["type"] == "BlockStored":
                is_rows = event.get("kv_cache_spec_kind") in ATTENTION
                (self._store_rows if is_rows else self._store_state)(event, found)
            elif event["type"] == "BlockRemoved":
                for name in event["block_hashes"]:
                    self._take(name, event.get("group_idx"), found)
        return found

    def is_restarted(self, sequence: int, payload: bytes) -> bool:
        """Return whether a batch that should be known is another one: its sender has started again,
        and counts from 0."""
        num_after = self.next_sequence - sequence
        sent: float = msgspec.msgpack.decode(payload)[0]
        return num_after > 0 and (
            sent != self.last_time if num_after == 1 else sent > self.last_time
        )

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
        keys, tokens = event.get("extra_keys"), event["token_ids"]
        for number, name in enumerate(event["block_hashes"]):
            above = self._blocks.get(parent)
            if parent is not None and above is None:
                self.num_unknown_parents += 1
                return
            extra = (keys[number] if keys else None) or ()
            if any(not isinstance(one, str) for one in extra):
                return
            if name not in self._blocks:
                space: Hashable
                if above is None:
                    names = extra or (event.get("lora_name"), event.get("cache_salt"))
                    space = tuple(one for one in names if one is not None) or None
                    start, above_id = 0, None
                else:
                    space, start, above_id = above.namespace, above.end, above.id
                try:
                    part = array("i", tokens[number * size : (number + 1) * size]).tobytes()
                except OverflowError:  # SGLang's placeholders of an image
                    return
                block = _Block(next(self._ids), space, start + size, parent)
                self._blocks[name] = block
                if above is not None:
                    above.children += (name,)
                found.append(KVStored(block.id, above_id, space, start, part))
            parent = name

    def _store_state(self, event: Mapping[str, Any], found: list[Event]) -> None:
        block = self._blocks.get(event["block_hashes"][-1])
        if block is not None:
            block.states |= 1 << event["group_idx"]
            if block.states.bit_count() == self._num_groups and not block.is_resumable:
                block.is_resumable = True
                found.append(CheckpointStored(block.id, block.end))

    def _take(self, name: Hashable, group: int | None, found: list[Event]) -> None:
        block = self._blocks.get(name)
        if block is not None and group is not None and block.states >> group & 1:
            block.states ^= 1 << group
            if block.is_resumable:
                block.is_resumable = False
                found.append(CheckpointRemoved(block.id, block.end))
        elif block is not None and group == self._rows_group:
            self._remove(name, found)

    def _remove(self, name: Hashable, found: list[Event]) -> None:
        """Remove a block and all behind it, the last ones first."""
        above = self._blocks.get(self._blocks[name].parent)
        if above is not None:
            above.children = tuple(one for one in above.children if one != name)
        path = [name]
        for one in path:
            path.extend(self._blocks[one].children)
        for one in reversed(path):
            block = self._blocks.pop(one)
            if block.is_resumable:
                found.append(CheckpointRemoved(block.id, block.end))
            found.append(KVRemoved(block.id))
