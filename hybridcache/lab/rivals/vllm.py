"""vLLM 0.33's hybrid prefix cache: chained block hashes, one free queue, states at ends of chunks.

Source: the published behaviour of ``vllm/v1/core`` (KV cache manager, block pool, chunk split) at
0.33.0, `align` mode, one attention group, no speculative decoding. Rules that decide its hit rates:

- *Inflation.* An attention block holds as many bytes as a state page (1,056 tokens on Qwen3-Next in
  float32). Layers are grouped by the number of full-attention layers: a state costs one block in
  each of the ``num_linear / num_full`` groups.
- *One free queue* for all groups, least recently freed first, independent of kind and cost. A block
  without content is first. One block of the pool, the null block, is never used.
- *Chunks* end at the prompt's last block boundary and at the *junction*: the length of the
  attention match beyond the state, floored to a block. So a fork is useful from its third sighting
  on. With a match unit, chunks also end at the prompt's last unit boundary and at the first block
  boundary after a resume inside a block.
- *Retention.* The states of those stops are registered; with ``keep_all``, those of every chunk end
  and every block crossed in decode.
- *Match unit* below the block size: the blocks of the prompt's last unit boundary are registered
  under their part. The attention block keeps growing under both keys. The states' block is
  overwritten, so a copy is made for the cache and released at once. In the queue, it is older than
  everything else of its request.
- *Resuming inside a block* copies the tail (attention and states); the source blocks are released
  after that pass.
- *Release.* A superseded state is released one pass after the next block was entered, before the
  request's attention blocks. At the end the attention blocks are released, deepest first, then the
  states. The last decoded token is never computed.
- Blocks are never de-duplicated: content computed again is stored again.

Left out: preemption, waiting for a state that another request produces in the same step, states
exported from within a chunk (an option of one backend), and offload to host memory.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybridcache.lab.rivals.protocol import BaselineConfig, PeerSession
from hybridcache.radix.tokens import Tokens

KERNEL_BLOCK = 16
"""Page of the attention kernel, in tokens: inflated block sizes are multiples of it."""
PIN_S = 2.0
"""Longest pin of CacheTTL's released scheduler, and mean duration of a tool up to which it pins."""
_ATTENTION = -1
"""Number of the attention group in a key; the state groups count from 0."""


def inflated_block_size(config: BaselineConfig, match_unit: int = 1) -> int:
    """Return the tokens per block: the least multiple of the kernel block, the match unit and the
    trace's unit with an attention page that holds a state page."""
    attention_row = config.kv_bytes_per_token // config.num_full_layers
    state_page = -(-config.state_bytes // config.num_linear_layers)
    step = math.lcm(KERNEL_BLOCK, config.unit, match_unit)
    return -(-state_page // (attention_row * step)) * step


class PrefixHashes:
    """Digests of the text up to every multiple of ``unit`` ids."""

    def __init__(self, namespace: Hashable, unit: int) -> None:
        self.digests: list[bytes] = []
        self._unit_bytes = 4 * unit
        self._hash = hashlib.blake2b(repr(namespace).encode(), digest_size=16)
        self._rest = b""

    def extend(self, tokens: Tokens) -> None:
        """Append ``tokens`` to the text."""
        content = self._rest + np.asarray(tokens, dtype=np.int32).tobytes()
        end = len(content) // self._unit_bytes * self._unit_bytes
        for start in range(0, end, self._unit_bytes):
            self._hash.update(content[start : start + self._unit_bytes])
            self.digests.append(self._hash.copy().digest())
        self._rest = content[end:]


@dataclass(frozen=True, slots=True)
class _Hit:
    length: int
    attention: tuple[int, ...]
    states: tuple[int, ...]
    junction: int
    """Length of the attention match, or 0 if it is no longer than the state match."""


class VllmCache:
    """vLLM 0.33 in ``align`` mode. ``match_unit``: tokens, or None for a whole block. States of
    prompt ends and junctions are kept, or those of all blocks with ``keep_all``."""

    def __init__(
        self, config: BaselineConfig, match_unit: int | None = None, keep_all: bool = False
    ) -> None:
        self.config = config
        self.block_tokens = inflated_block_size(config, match_unit or 1)
        self.block_size = self.block_tokens // config.unit
        self.unit = self.block_size if match_unit is None else max(1, match_unit // config.unit)
        """Tokens of the trace per match unit; divides the block."""
        self.keep_all = keep_all
        self.num_state_groups = -(-config.num_linear_layers // config.num_full_layers)
        self.block_bytes = self.block_tokens * config.kv_bytes_per_token
        num_blocks = config.budget_bytes // self.block_bytes
        self.pool = BlockPool(max(0, num_blocks - 1))

    def begin(self, tokens: Tokens, namespace: Hashable = None) -> VllmSession | None:
        hashes = PrefixHashes(namespace, self.unit)
        hashes.extend(tokens)
        hit = self._match(hashes.digests, len(tokens) - 1)
        blocks_needed = -(-len(tokens) // self.block_size) - len(hit.attention)
        # Unreferenced blocks of the hit are in the free queue too, and will leave it.
        claimed = sum(block in self.pool.free for block in (*hit.attention, *hit.states))
        if blocks_needed + 3 * self.num_state_groups + 1 > len(self.pool.free) - claimed:
            return None
        return VllmSession(self, tokens, hashes, hit)

    def finished(self, session: VllmSession) -> None:
        """Do nothing for a finished request."""

    def check(self) -> None:
        """Raise AssertionError if the accounting of the pool is inconsistent. O(blocks)."""
        self.pool.check()

    def _match(self, digests: list[bytes], limit: int) -> _Hit:
        """Match attention, then the deepest state at or before its end, up to ``limit``."""
        attention, reach = self._match_attention(digests, limit)
        for count in range(reach // self.unit, 0, -1):
            states = self._states(digests[count - 1])
            if states:
                length = count * self.unit
                blocks = attention[: -(-length // self.block_size)]
                return _Hit(length, tuple(blocks), states, reach if reach > length else 0)
        return _Hit(0, (), (), reach)

    def _match_attention(self, digests: list[bytes], limit: int) -> tuple[list[int], int]:
        """Return the full blocks from the start, then the deepest registered part of the next one,
        and the number of tokens in them."""
        lookup, per_block = self.pool.lookup, self.block_size // self.unit
        blocks: list[int] = []
        for depth in range(1, limit // self.block_size + 1):
            block = lookup((_ATTENTION, digests[depth * per_block - 1]))
            if block is None:
                break
            blocks.append(block)
        full = len(blocks) * per_block
        for count in range(min(limit // self.unit, full + per_block - 1), full, -1):
            block = lookup((_ATTENTION, digests[count - 1]))
            if block is not None:
                return [*blocks, block], count * self.unit
        return blocks, full * self.unit

    def _states(self, digest: bytes) -> tuple[int, ...]:
        """Return the blocks of the state at a digest, one per group, or () if one is missing."""
        found = (self.pool.lookup((group, digest)) for group in range(self.num_state_groups))
        blocks = tuple(block for block in found if block is not None)
        return blocks if len(blocks) == self.num_state_groups else ()


class VllmTtlCache(VllmCache):
    """vLLM with CacheTTL's pins: the blocks that a session can reuse after a call of a tool, with
    their state, are kept until its next request begins, for ``PIN_S`` at most, unless calls take
    longer on average. The latest pin ends early if no request could run otherwise.

    Source: arXiv 2511.02230 and the rule of its released scheduler. Left out: a pin is also kept
    while the session's next request waits, and sessions enter in the order of their first request.
    """

    takes = "session", "stop_reason", "clock"

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.pins: dict[Hashable, tuple[float, list[int]]] = {}
        """Time of the end and blocks of each pinned session."""
        self._called_s: dict[Hashable, float] = {}
        """Time of each session's latest call."""
        self._calls_s: list[float] = []
        """Durations of calls. Traces do not name the tools, so there is one."""
        self._running: dict[VllmSession, dict[str, Any]] = {}

    def begin(self, tokens: Tokens, namespace: Hashable = None, **facts: Any) -> VllmSession | None:
        name, now_s = facts.get("session"), facts.get("clock", float)()
        if name in self._called_s:
            self._calls_s.append(now_s - self._called_s.pop(name))
        for other in [one for one, pin in self.pins.items() if pin[0] <= now_s and one != name]:
            self._unpin(other)
        while (served := super().begin(tokens, namespace)) is None:
            if self._running or not self.pins:
                return None
            self._unpin(max(self.pins, key=lambda one: self.pins[one][0]))
        self._unpin(name)
        self._running[served] = facts
        return served

    def finished(self, session: VllmSession) -> None:
        facts = self._running.pop(session)
        if facts.get("stop_reason") == "tool_use":
            name, now_s = facts["session"], facts["clock"]()
            self._called_s[name] = now_s
            if sum(self._calls_s) <= PIN_S * len(self._calls_s):
                hit = self._match(session.hashes.digests, len(session.hashes.digests) * self.unit)
                self._unpin(name)
                self.pins[name] = now_s + PIN_S, [*hit.states, *hit.attention]
                for block in self.pins[name][1]:
                    self.pool.take(block)

    def _unpin(self, name: Hashable) -> None:
        _, blocks = self.pins.pop(name, (0.0, []))
        self.pool.release(reversed(blocks))


class VllmSession(PeerSession):
    """One request: its block tables, one of attention and one {depth in blocks: block} of each
    state group."""

    def __init__(self, cache: VllmCache, tokens: Tokens, hashes: PrefixHashes, hit: _Hit) -> None:
        self.cache = cache
        self.pool = cache.pool
        self.cached_len = hit.length
        self.num_chunks = 0
        self._length = len(tokens)
        self.hashes = hashes
        self._junction = hit.junction
        size = cache.block_size
        self._kept = {(self._length - 1) // size, hit.junction // size}
        self._attention = list(hit.attention)
        last = (hit.length - 1) // size
        self._states: list[dict[int, int]] = [
            {last: hit.states[group]} if hit.states else {}
            for group in range(cache.num_state_groups)
        ]
        self._num_columns = len(hit.attention)
        self._num_registered = hit.length // size
        self._copy_tail = hit.length % size != 0
        self._save_tail = False
        for block in (*hit.attention, *hit.states):
            self.pool.take(block)
        start = self.cached_len
        while start < self._length:
            end = self._chunk_end(start)
            self._step(start, end)
            self.num_chunks += 1
            start = end

    def finish(self, output: Tokens) -> None:
        """Decode ``output``, all but its last token computed, and release the request."""
        self.hashes.extend(output)
        total = self._length + max(0, len(output) - 1)
        for end in self._decode_stops(total):
            if len(self.pool.free) <= self.cache.num_state_groups:
                break
            self._step(end - 1, end)
        self.pool.release(reversed(self._attention))
        for table in self._states:
            self.pool.release(table[depth] for depth in sorted(table, reverse=True))
        self.cache.finished(self)

    def _chunk_end(self, start: int) -> int:
        """Return the end of the chunk that begins at ``start``."""
        length, size, unit = self._length, self.cache.block_size, self.cache.unit
        budget = max(1, self.cache.config.prefill_chunk // self.cache.config.unit)
        end = min(start + budget, length)
        if end < length and (end // size * size > start or size <= budget):
            end = end // size * size
        last_block = (length - 1) // size * size
        stops = [last_block]
        if unit < size:  # a hit may end inside a block
            stops.append(max(last_block, (length - 1) // unit * unit))
            if start % size:
                stops.append((start // size + 1) * size)
        if start < self._junction < end:
            stops.append(start + (self._junction - start) // size * size)
        return min((stop for stop in stops if start < stop < end), default=end)

    def _decode_stops(self, total: int) -> Iterator[int]:
        """Yield the decoded tokens at which blocks are allocated or released: the first, and each
        block's last, first and second."""
        size = self.cache.block_size
        stops = {self._length + 1}
        for boundary in range(self._length // size * size, total + 1, size):
            stops.update((boundary, boundary + 1, boundary + 2))
        return (stop for stop in sorted(stops) if self._length < stop <= total)

    def _step(self, computed: int, end: int) -> None:
        """Run one forward pass from ``computed`` to ``end``."""
        size, unit = self.cache.block_size, self.cache.unit
        for table in self._states:  # Those that are a block or more behind are released.
            old = [at for at in sorted(table, reverse=True) if at < (computed - 1) // size]
            self.pool.release([table.pop(depth) for depth in old])
        copied = self._allocate(end)
        for depth in range(self._num_registered, end // size):
            self._register(self._attention[depth], _ATTENTION, (depth + 1) * size)
        boundary = (self._length - 1) // unit * unit
        if boundary % size and boundary <= end:
            self._register(self._attention[boundary // size], _ATTENTION, boundary)
        self._register_states(end)
        self.pool.release(copied)

    def _allocate(self, end: int) -> list[int]:
        """Allocate blocks for the tokens up to ``end``, and copies of a tail. Returns the blocks to
        release after the pass."""
        num_columns = -(-end // self.cache.block_size)
        tail = self._num_columns - 1
        copied = []
        if self._copy_tail:
            copied.append(self._attention[tail])
            self._attention[tail] = self.pool.allocate()
        while len(self._attention) < num_columns:
            self._attention.append(self.pool.allocate())
        for table in self._states:
            if self._copy_tail:
                copied.append(table[tail])
                table[tail] = self.pool.allocate()
            elif self._save_tail:
                saved = self.pool.allocate()
                self.pool.move(table[tail], saved)
                copied.append(saved)
            if num_columns > self._num_columns:
                table[num_columns - 1] = self.pool.allocate()
        self._num_columns = max(self._num_columns, num_columns)
        self._copy_tail = self._save_tail = False
        return copied

    def _register_states(self, end: int) -> None:
        """Register the current states."""
        size, unit = self.cache.block_size, self.cache.unit
        at_tail = end % size != 0 and end == (self._length - 1) // unit * unit
        for group, table in enumerate(self._states):
            for depth in range(self._num_registered, end // size):
                is_kept = self.cache.keep_all or depth + 1 in self._kept
                if depth in table and is_kept:
                    self._register(table[depth], group, (depth + 1) * size)
            if at_tail:
                self._register(table[end // size], group, end)
        self._save_tail = at_tail
        self._num_registered = max(self._num_registered, end // size)

    def _register(self, block: int, group: int, length: int) -> None:
        digest = self.hashes.digests[length // self.cache.unit - 1]
        self.pool.register(block, (group, digest), length)


# --- Block pool -----------------------------------------------------------------------------------


class BlockPool:
    """Blocks of equal size with content keys, and one free queue in the order of reuse. A free
    block keeps its content until it is allocated again. A block may have several keys, and a key
    several blocks. O(1) per block."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._references = [0] * num_blocks
        self._keys_of: dict[int, dict[Hashable, int]] = {}
        """Keys of each block with content and their lengths, the longest first."""
        self._blocks_of: dict[Hashable, dict[int, None]] = {}

    def lookup(self, key: Hashable) -> int | None:
        """Return the block that has held ``key`` longest, or None."""
        blocks = self._blocks_of.get(key)
        return next(iter(blocks)) if blocks else None

    def take(self, block: int) -> None:
        """Add a reference to a block; a free one leaves the queue with its content."""
        if self._references[block] == 0:
            del self.free[block]
        self._references[block] += 1

    def allocate(self) -> int:
        """Return the head of the free queue, without its content. KeyError if none is free."""
        block, _ = self.free.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def release(self, blocks: Iterable[int]) -> None:
        """Remove one reference from each block. Unreferenced blocks are queued last, in the order
        given, or first if they have no content."""
        empty = []
        for block in blocks:
            self._references[block] -= 1
            if self._references[block] == 0:
                self.free[block] = None
                if block not in self._keys_of:
                    empty.append(block)
        for block in reversed(empty):
            self.free.move_to_end(block, last=False)

    def register(self, block: int, key: Hashable, length: int) -> None:
        """Register ``block`` under ``key``, which ends ``length`` tokens into the text. A key
        longer than the first one replaces all (the block has grown)."""
        keys = self._keys_of.get(block, {})
        if key in keys:
            return
        if keys and next(iter(keys.values())) < length:
            self._forget(block)
        self._keys_of.setdefault(block, {})[key] = length
        self._blocks_of.setdefault(key, {})[block] = None

    def move(self, source: int, target: int) -> None:
        """Move the keys of ``source`` to ``target``, which has none."""
        for key, length in self._forget(source).items():
            self.register(target, key, length)

    def check(self) -> None:
        """Raise AssertionError unless each block is either referenced or free, and keys and blocks
        refer to each other. O(blocks)."""
        held = sum(count > 0 for count in self._references)
        assert held + len(self.free) == self.num_blocks, "blocks: held + free != all"
        assert all(self._references[block] == 0 for block in self.free), "a held block is free"
        named = {(block, key) for block, keys in self._keys_of.items() for key in keys}
        kept = {(block, key) for key, blocks in self._blocks_of.items() for block in blocks}
        assert named == kept, "keys and blocks do not name each other"

    def _forget(self, block: int) -> dict[Hashable, int]:
        """Remove all keys of ``block`` and return them, with their lengths."""
        keys = self._keys_of.pop(block, {})
        for key in keys:
            blocks = self._blocks_of[key]
            del blocks[block]
            if not blocks:
                del self._blocks_of[key]
        return keys
