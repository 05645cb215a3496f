"""Plain memory for a cache with tiers: it carries out the orders, and looks at every byte.

A row of the device holds (namespace, prefix) of the token whose KV it is, a slot that of its
state, and so do the rows below. Whatever the tree says, the right thing must be found there once
all orders are carried out, one after the other.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from hybridcache.allocators.moves import DEVICE, Copy, Drop, Move
from hybridcache.api import PrefixMatch
from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.radix.tree import RadixNode
from hybridcache.tokens import Indices, Tokens
from hybridcache.variants import TieredRadixCache
from tests.cache.twins import prefix_of

Content = tuple[Hashable, tuple[int, ...]]


class TieredMemory:
    """A cache and its bytes."""

    def __init__(self, config: CacheConfig) -> None:
        cache = build_prefix_cache(config)
        assert isinstance(cache, TieredRadixCache)
        self.cache = cache
        self.rows: dict[str, dict[int, Any]] = {word: {} for word in (DEVICE, *cache.offload.names)}
        self.slots: dict[int, Any] = {}
        self.held_rows = 0
        self.copied: list[Copy] = []

    def carry_out(self) -> None:
        """All orders so far."""
        plan = self.cache.take_step()
        for order in plan.transfers:
            if isinstance(order, Move):
                device = self.rows[DEVICE]
                moved = [device.get(row) for row in order.src.tolist()]
                device.update(zip(order.dst.tolist(), moved, strict=True))
            elif isinstance(order, Drop):
                for row in order.rows.tolist():
                    del self.rows[order.tier][row]
            else:
                self._copy(order)
        plan.done()

    def _copy(self, order: Copy) -> None:
        self.copied.append(order)
        if order.kind == "kv":
            found = [self.rows[order.src_tier].get(row) for row in order.src.tolist()]
        elif order.src_tier == DEVICE:
            found = [(self.slots[order.src.item()], piece) for piece in range(self.state_rows)]
        else:
            found = [self.rows[order.src_tier][row] for row in order.src.tolist()]
        if order.kind == "checkpoint" and order.dst_tier == DEVICE:
            content = {whole for whole, _ in found}
            assert [piece for _, piece in found] == list(range(self.state_rows))
            assert len(content) == 1, "a state was put together of several"
            self.slots[order.dst.item()] = content.pop()
        else:
            self.rows[order.dst_tier].update(zip(order.dst.tolist(), found, strict=True))
        if order.path is not None:
            assert len(order.path[1]) == order.position

    @property
    def state_rows(self) -> int:
        return self.cache.offload.state_rows

    def serve(self, tokens: Tokens, namespace: Hashable, positions: list[int], fetch: int) -> None:
        """One request. ``fetch``: which of what lies below it fetches; past the last: none."""
        cache = self.cache
        match = cache.match(tokens, namespace)
        self.compare(match, tokens, namespace)
        if fetch < len(match.loadable):
            wanted = match.loadable[fetch]
            if cache.fetch(wanted):
                match = cache.match(tokens, namespace)
                assert match.cached_len == wanted.position
        receipt = cache.lock(match.node)
        cache.touch(match)
        slots = []
        for position in positions:
            slot = cache.allocate_slot()
            if slot is not None:
                slots.append((position, slot))
        new = cache.allocate_kv(len(tokens) - match.cached_len)
        self.carry_out()
        if match.node is not None:
            slot = match.checkpoint
            assert slot is not None and self.slots[slot] == self.prefix(tokens, match, namespace)
        if new is None:
            cache.unlock(receipt)
            for _, slot in slots:
                cache.free_slot(slot)
            return
        ids = tuple(tokens.tolist())
        for place, row in enumerate(new.tolist()):
            known = ids[: match.cached_len + place + 1]
            self.rows[DEVICE][row] = namespace, known
        for position, slot in slots:
            self.slots[slot] = namespace, ids[:position]
        rows = np.concatenate([cache.gather(match.node), new])
        result = cache.insert(tokens, rows[: len(tokens)], slots, namespace, match.cached_len)
        cache.free_kv(result.duplicates)
        cache.free_kv(rows[max(result.inserted_len, match.cached_len) :])
        for slot in result.rejected_slots:
            cache.free_slot(slot)
        cache.unlock(receipt)

    def prefix(self, tokens: Tokens, match: PrefixMatch, namespace: Hashable) -> Content:
        """What the state that ``match`` resumes from is of."""
        return namespace, tuple(tokens[: match.cached_len].tolist())

    def compare(self, match: PrefixMatch, tokens: Tokens, namespace: Hashable) -> None:
        """``match.loadable`` by its definition: positions whose state is somewhere, and the KV of
        every token before."""
        whole = tuple(tokens.tolist())
        has_kv, has_state = {0}, set()
        for node in self.cache._tree.nodes():
            space, prefix = prefix_of(node)
            entry = node.offloaded
            shared = 0
            while shared < min(len(prefix), len(whole)) and prefix[shared] == whole[shared]:
                shared += 1
            if space != namespace:
                continue
            if node.kv is not None or (entry is not None and entry.kv is not None):
                has_kv.update(range(node.start + 1, shared + 1))
            is_there = entry is not None and entry.state is not None
            if shared == len(prefix) and is_there:
                has_state.add(shared)
        due = [
            position
            for position in sorted(has_state)
            if match.cached_len < position < len(whole) and has_kv.issuperset(range(position + 1))
        ]
        assert [one.position for one in match.loadable] == due

    def adopt(self, tokens: Tokens, namespace: Hashable, tier: str) -> None:
        """As if an earlier process had left it there."""
        taken = self.cache.adopt(tokens, namespace, tier)
        self.carry_out()
        if taken is not None:
            start, kv_rows, state_rows = taken
            ids = tuple(tokens.tolist())
            for place, row in enumerate(kv_rows.tolist()):
                self.rows[tier][row] = namespace, ids[: start + place + 1]
            for piece, row in enumerate(state_rows.tolist()):
                self.rows[tier][row] = (namespace, ids), piece

    def lose(self, tier: str, every: int) -> None:
        """Forget what lies in one row of ``every`` so many of ``tier``. Nothing else goes but what
        cannot be resumed without it."""
        number = self.cache.offload.names.index(tier)

        def is_lost(rows: Indices) -> bool:
            return bool((rows % every == 0).any())

        def stored() -> dict[int, list[Indices]]:
            found: dict[int, list[Indices]] = {}
            for node in self.cache._tree.nodes():
                entry = node.offloaded
                if entry is not None and entry.state is not None:
                    kept = found[id(node)] = [entry.state.rows] * (entry.state.tier == number)
                    above: RadixNode | None = node
                    while above is not None and above.kv is None and above.offloaded is not None:
                        if above.offloaded.kv is not None and above.offloaded.kv_tier == number:
                            kept.append(above.offloaded.kv)
                        above = above.parent
            return found

        before = stored()
        self.cache.drop_lost(tier, is_lost)
        after = stored()
        whole = {node for node, rows in before.items() if not any(map(is_lost, rows))}
        assert set(after) == whole, "states that can be resumed, and no others, are left"
        for node in self.cache._tree.nodes():
            entry = node.offloaded
            if entry is not None and entry.kv is not None and entry.kv_tier == number:
                assert not is_lost(entry.kv)

    def check(self) -> None:
        """The tree's invariants, and the bytes behind every number."""
        self.carry_out()
        self.cache.check(held_tokens=0, held_slots=0)
        for node in self.cache._tree.nodes():
            self._check_node(node)

    def _check_node(self, node: RadixNode) -> None:
        space, prefix = prefix_of(node)
        expected = [(space, prefix[: end + 1]) for end in range(node.start, node.end)]
        if node.kv is not None:
            assert [self.rows[DEVICE][row] for row in node.kv.indices.tolist()] == expected
        if node.checkpoint is not None:
            assert self.slots[node.checkpoint.slot] == (space, prefix)
        entry = node.offloaded
        if entry is not None and entry.kv is not None:
            memory = self.rows[self.cache.offload.names[entry.kv_tier]]
            assert [memory[row] for row in entry.kv.tolist()] == expected
        if entry is not None and entry.state is not None:
            memory = self.rows[self.cache.offload.names[entry.state.tier]]
            pieces = [memory[row] for row in entry.state.rows.tolist()]
            assert pieces == [((space, prefix), piece) for piece in range(self.state_rows)]
