"""vLLM 0.33's hybrid prefix cache: chained block hashes, one free queue, states only where a prefill chunk ends.

Published behaviour that decides its hit rates:

- Attention pages are inflated until one holds as many bytes as a state page (1,056 tokens on Qwen3-Next in float32),
  so hits come in blocks. Layers are grouped by the number of full-attention layers: a state costs one block in each of
  the ``num_linear / num_full`` state groups.
- One free queue for all groups, least recently freed first, blind to kind and cost; a block without a hash goes first.
- ``align``: prefill chunks are cut at the prompt's last block boundary, and at the *junction*: how deep attention
  blocks matched beyond the state (so a fork pays on its third sighting, floored to a block).
- ``retention=0`` registers only those two states; ``None`` every chunk end and every block crossed in decode.
- ``match_unit`` below the block size adds a stop at the prompt's last unit boundary and registers the partial blocks
  there; resuming in one copies it.
- Blocks are never de-duplicated: what is computed again is stored again.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from hybridcache.baselines.protocol import BaselineConfig
from hybridcache.interface import Tokens

KERNEL_BLOCK = 16
"""The attention kernel's page, tokens: inflated block sizes are multiples of it."""


def inflated_block_size(config: BaselineConfig) -> int:
    """Tokens per block: the least multiple of the kernel block whose attention page holds a state page."""
    attention_row = config.kv_bytes_per_token // config.num_full_layers
    state_page = -(-config.state_bytes // config.num_linear_layers)
    step = max(KERNEL_BLOCK, config.unit)
    return -(-state_page // (attention_row * step)) * step


class BlockPool:
    """Blocks of equal size with one free queue and a map from content key to the blocks that hold it."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free: OrderedDict[int, None] = OrderedDict(
            (block, None) for block in range(num_blocks)
        )
        self.key_of: dict[int, Hashable] = {}
        self.blocks_of: dict[Hashable, dict[int, None]] = {}
        self.references = [0] * num_blocks

    def lookup(self, key: Hashable) -> int | None:
        blocks = self.blocks_of.get(key)
        return next(iter(blocks)) if blocks else None

    def take(self, block: int) -> None:
        """Hold a cached block once more."""
        if self.references[block] == 0:
            del self.free[block]
        self.references[block] += 1

    def allocate(self) -> int:
        """The block at the head of the free queue, its content forgotten. Raises KeyError if none is free."""
        block, _ = self.free.popitem(last=False)
        self.forget(block)
        self.references[block] = 1
        return block

    def register(self, block: int, key: Hashable) -> None:
        self.forget(block)
        self.key_of[block] = key
        self.blocks_of.setdefault(key, {})[block] = None

    def forget(self, block: int) -> None:
        key = self.key_of.pop(block, None)
        if key is not None:
            blocks = self.blocks_of[key]
            del blocks[block]
            if not blocks:
                del self.blocks_of[key]

    def release(self, block: int) -> None:
        """Let go of a block once; hashed ones queue last, others go first."""
        self.references[block] -= 1
        if self.references[block] == 0:
            self.free[block] = None
            if block not in self.key_of:
                self.free.move_to_end(block, last=False)


@dataclass(frozen=True, slots=True)
class _Hit:
    length: int
    attention: tuple[int, ...]
    states: tuple[int, ...]
    junction: int


class VllmCache:
    """vLLM 0.33 in ``align`` mode.

    ``match_unit``: tokens (None: the block). ``retention``: 0 keeps prompt and junction states, None keeps all.
    """

    def __init__(
        self, config: BaselineConfig, match_unit: int | None = None, retention: int | None = 0
    ) -> None:
        self.config = config
        self.block_tokens = inflated_block_size(config)
        self.block_size = self.block_tokens // config.unit
        self.unit = self.block_size if match_unit is None else max(1, match_unit // config.unit)
        self.keep_all = retention is None
        self.num_state_groups = -(-config.num_linear_layers // config.num_full_layers)
        self.pool = BlockPool(
            config.budget_bytes // (self.block_tokens * config.kv_bytes_per_token)
        )
        self.partials: dict[bytes, dict[int, int]] = {}

    def begin(self, tokens: Tokens, namespace: Hashable = None) -> VllmSession | None:
        hashes = self._hash_blocks(tokens, namespace)
        hit = self._match(tokens, hashes)
        blocks_needed = -(-len(tokens) // self.block_size) - len(hit.attention)
        # What is hit and held by nobody is in the free queue too, and will leave it.
        claimed = sum(block in self.pool.free for block in (*hit.attention, *hit.states))
        if blocks_needed + 3 * self.num_state_groups + 1 > len(self.pool.free) - claimed:
            return None
        return VllmSession(self, tokens, hashes, hit)

    def check(self) -> None:
        held = sum(1 for count in self.pool.references if count)
        assert held + len(self.pool.free) == self.pool.num_blocks, "blocks: held + free != total"
        for key, blocks in self.pool.blocks_of.items():
            assert all(self.pool.key_of[block] == key for block in blocks), (
                "key map is not symmetric"
            )

    def _hash_blocks(self, tokens: Tokens, namespace: Hashable) -> list[bytes]:
        """Chained hashes of the full blocks; the first entry stands for the empty prefix."""
        hashes = [hashlib.blake2b(repr(namespace).encode(), digest_size=16).digest()]
        for end in range(self.block_size, len(tokens) + 1, self.block_size):
            hashes.append(_chain(hashes[-1], tokens[end - self.block_size : end]))
        return hashes

    def _match(self, tokens: Tokens, hashes: list[bytes]) -> _Hit:
        """Attention left to right, then the deepest state at or before its end. At most ``n - 1`` tokens."""
        limit = len(tokens) - 1
        attention: list[int] = []
        for depth in range(1, limit // self.block_size + 1):
            block = self.pool.lookup(("attention", hashes[depth]))
            if block is None:
                break
            attention.append(block)
        reach = len(attention) * self.block_size
        for depth in range(len(attention), -1, -1):
            partial = self._match_partial(tokens, hashes, depth, limit, depth < len(attention))
            if partial is not None:
                length, own, states = partial
                return _Hit(length, (*attention[:depth], own), states, reach)
            if depth:
                states = self._states(("state", hashes[depth]))
                if states:
                    return _Hit(depth * self.block_size, tuple(attention[:depth]), states, reach)
        return _Hit(0, (), (), reach)

    def _match_partial(
        self, tokens: Tokens, hashes: list[bytes], depth: int, limit: int, full_block: bool
    ) -> tuple[int, int, tuple[int, ...]] | None:
        if depth >= len(hashes):
            return None
        start = depth * self.block_size
        for length in sorted(self.partials.get(hashes[depth], ()), reverse=True):
            if start + length > limit:
                continue
            key = _chain(hashes[depth], tokens[start : start + length])
            states = self._states(("state", key))
            own = self.pool.lookup(("attention", key))
            if own is None and full_block:
                own = self.pool.lookup(("attention", hashes[depth + 1]))
            if states and own is not None:
                return start + length, own, states
        return None

    def _states(self, key: tuple[str, bytes]) -> tuple[int, ...]:
        found = tuple(
            block
            for group in range(self.num_state_groups)
            if (block := self.pool.lookup((*key, group))) is not None
        )
        return found if len(found) == self.num_state_groups else ()


class VllmSession:
    """One request: its block tables, one attention group and the state groups' running blocks."""

    def __init__(self, cache: VllmCache, tokens: Tokens, hashes: list[bytes], hit: _Hit) -> None:
        self.cache = cache
        self.pool = cache.pool
        self.cached_len = hit.length
        self.tokens = tokens
        self.hashes = hashes
        self.attention = list(hit.attention)
        self.states: list[int] = list(hit.states)
        self.sources: list[int] = []
        inside = hit.length % cache.block_size != 0
        for block in (*hit.attention, *(() if inside else hit.states)):
            self.pool.take(block)
        if inside:
            self._copy_tail()
        self.num_registered = hit.length // cache.block_size
        self.num_chunks = 0
        stops = self._stops(hit)
        start = hit.length
        for end in stops:
            self._compute(start, end, register=end != len(tokens) or cache.keep_all)
            start = end

    def finish(self, output: Tokens) -> None:
        length = len(self.tokens)
        total = length + len(output)
        self._extend_hashes(output)
        block_size = self.cache.block_size
        for end in range(length // block_size * block_size + block_size, total + 1, block_size):
            if not self._fits(self.cache.num_state_groups + 1):
                break
            self._grow_attention(end)
            self._register_attention(end)
            if self.cache.keep_all:
                self._register_states(("state", self.hashes[end // block_size]))
            self._advance_states()
        if self._fits(1):
            self._grow_attention(total)
        for block in (*reversed(self.attention), *self.sources, *self.states):
            self.pool.release(block)

    def _stops(self, hit: _Hit) -> list[int]:
        """Where chunks end: the mandatory stops, and block boundaries no further apart than the token budget."""
        length, size, unit = len(self.tokens), self.cache.block_size, self.cache.unit
        wanted = {length, length // size * size}
        if hit.junction > hit.length:
            wanted.add(hit.junction)
        if unit < size:
            wanted.add((length - 1) // unit * unit)
            if hit.length % size:
                wanted.add(-(-hit.length // size) * size)
        budget = max(size, self.cache.config.prefill_chunk // self.cache.config.unit // size * size)
        stops: list[int] = []
        start = hit.length
        for stop in sorted(stop for stop in wanted if hit.length < stop <= length):
            while stop - start > budget:
                start = (start + budget) // size * size
                stops.append(start)
            stops.append(stop)
            start = stop
        return stops

    def _compute(self, start: int, end: int, register: bool) -> None:
        """One chunk: new attention blocks, the running state moves on, what ends on a boundary is registered."""
        size = self.cache.block_size
        self.num_chunks += 1
        self._grow_attention(end)
        self._advance_states()
        self._register_attention(end)
        if end % size == 0:
            self._register_states(("state", self.hashes[end // size]))
        elif register and self.cache.unit < size:
            self._register_partial(end)

    def _copy_tail(self) -> None:
        """Resuming inside a block: the request goes on in private copies of the tail's blocks (attention and states). The
        states are read where they are and keep their place in the free queue."""
        shared = self.attention[-1]
        self.attention[-1] = self.pool.allocate()
        self.pool.release(shared)
        self.states = [self.pool.allocate() for _ in self.states]

    def _grow_attention(self, end: int) -> None:
        while len(self.attention) * self.cache.block_size < end:
            self.attention.append(self.pool.allocate())

    def _register_attention(self, end: int) -> None:
        for depth in range(self.num_registered, end // self.cache.block_size):
            self.pool.register(self.attention[depth], ("attention", self.hashes[depth + 1]))
        self.num_registered = max(self.num_registered, end // self.cache.block_size)

    def _register_partial(self, end: int) -> None:
        depth, length = divmod(end, self.cache.block_size)
        key = _chain(self.hashes[depth], self.tokens[depth * self.cache.block_size : end])
        self.pool.register(self.attention[depth], ("attention", key))
        self._register_states(("state", key))
        self.cache.partials.setdefault(self.hashes[depth], {})[length] = 1
        if self._fits(1):
            shared = self.attention[depth]
            self.attention[depth] = self.pool.allocate()
            self.pool.release(shared)

    def _register_states(self, key: tuple[str, bytes]) -> None:
        for group, block in enumerate(self.states):
            self.pool.register(block, (*key, group))

    def _advance_states(self) -> None:
        """The running state gets fresh blocks; the ones it came from are let go one step later."""
        for block in self.sources:
            self.pool.release(block)
        self.sources = self.states
        self.states = [self.pool.allocate() for _ in range(self.cache.num_state_groups)]

    def _extend_hashes(self, output: Tokens) -> None:
        size = self.cache.block_size
        done = (len(self.hashes) - 1) * size
        tail = [*self.tokens[done:].tolist(), *output.tolist()]
        for start in range(0, len(tail) - size + 1, size):
            self.hashes.append(_chain(self.hashes[-1], tail[start : start + size]))

    def _fits(self, num_blocks: int) -> bool:
        return len(self.pool.free) >= num_blocks


def _chain(parent: bytes, tokens: Tokens | list[int]) -> bytes:
    content = np.asarray(tokens, dtype=np.int32).tobytes()
    return hashlib.blake2b(content, key=parent, digest_size=16).digest()
