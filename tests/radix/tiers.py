"""Reference memory of a tiered cache: it applies the transfers and checks all contents.

Each device row stores (namespace, prefix) of its token, each slot that of its state, and the rows
of the tiers likewise. After all transfers are applied in order, the contents must match the tree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Any

import numpy as np

from hybridcache.allocators.moves import DEVICE, Copy, Drop, Indices, Move
from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.radix.api import PrefixMatch
from hybridcache.radix.tiers import TieredRadixCache
from hybridcache.radix.tokens import Tokens
from hybridcache.radix.tree import RadixNode
from tests.radix.twins import prefix_of

Content = tuple[Hashable, tuple[int, ...]]


class TieredMemory:
    """Cache with the contents of its rows and slots."""

    def __init__(self, config: CacheConfig) -> None:
        cache = build_prefix_cache(config)
        assert isinstance(cache, TieredRadixCache)
        self.cache = cache
        self.rows: dict[str, dict[int, Any]] = {tier: {} for tier in (DEVICE, *cache.offload.names)}
        self.slots: dict[int, Any] = {}
        self.held_rows = 0
        self.copied: list[Copy] = []

    def apply_transfers(self) -> None:
        """Apply all pending transfers of the cache."""
        plan = self.cache.take_step()
        for transfer in plan.transfers:
            if isinstance(transfer, Move):
                device = self.rows[DEVICE]
                moved = [device.get(row) for row in transfer.src.tolist()]
                device.update(zip(transfer.dst.tolist(), moved, strict=True))
            elif isinstance(transfer, Drop):
                for row in transfer.rows.tolist():
                    del self.rows[transfer.tier][row]
            else:
                self._copy(transfer)
        plan.done()

    def _copy(self, copy: Copy) -> None:
        self.copied.append(copy)
        if copy.kind == "kv":
            found = [self.rows[copy.src_tier].get(row) for row in copy.src.tolist()]
        elif copy.src_tier == DEVICE:
            found = [(self.slots[copy.src.item()], piece) for piece in range(self.state_rows)]
        else:
            found = [self.rows[copy.src_tier][row] for row in copy.src.tolist()]
        if copy.kind == "checkpoint" and copy.dst_tier == DEVICE:
            content = {owner for owner, _ in found}
            assert [piece for _, piece in found] == list(range(self.state_rows))
            assert len(content) == 1, "a state was assembled from several states"
            self.slots[copy.dst.item()] = content.pop()
        else:
            self.rows[copy.dst_tier].update(zip(copy.dst.tolist(), found, strict=True))
        namespace, prefix = found[-1] if copy.kind == "kv" else found[0][0]
        assert len(prefix) == copy.position
        assert (copy.path is not None) == (copy.dst_tier == "disk")
        if copy.path is not None:
            assert (copy.path[0], tuple(copy.path[1].tolist())) == (namespace, prefix)

    @property
    def state_rows(self) -> int:
        return self.cache.offload.state_rows

    def serve(self, tokens: Tokens, namespace: Hashable, positions: list[int], fetch: int) -> None:
        """Serve one request.

        ``fetch`` is the index of the loadable prefix to load; nothing is loaded past the last.
        """
        cache = self.cache
        match = cache.match(tokens, namespace)
        self.compare(match, tokens, namespace)
        if fetch < len(match.loadable):
            wanted = match.loadable[fetch]
            if cache.load(wanted):
                match = cache.match(tokens, namespace)
                assert match.cached_len == wanted.position
        handle = cache.lock(match.node)
        cache.touch(match)
        slots = []
        for position in positions:
            slot = cache.allocate_slot()
            if slot is not None:
                slots.append((position, slot))
        new = cache.allocate_kv(len(tokens) - match.cached_len)
        self.apply_transfers()
        if match.node is not None:
            slot = match.checkpoint
            assert slot is not None and self.slots[slot] == self.prefix(tokens, match, namespace)
        if new is None:
            cache.unlock(handle)
            for _, slot in slots:
                cache.free_slot(slot)
            return
        ids = tuple(tokens.tolist())
        for position, row in enumerate(new.tolist(), match.cached_len):
            self.rows[DEVICE][row] = namespace, ids[: position + 1]
        for position, slot in slots:
            self.slots[slot] = namespace, ids[:position]
        rows = np.concatenate([cache.gather(match.node), new])
        result = cache.insert(tokens, rows[: len(tokens)], slots, namespace, match.cached_len)
        cache.free_kv(result.duplicates)
        cache.free_kv(rows[max(result.inserted_len, match.cached_len) :])
        for slot in result.rejected_slots:
            cache.free_slot(slot)
        cache.unlock(handle)

    def prefix(self, tokens: Tokens, match: PrefixMatch, namespace: Hashable) -> Content:
        """Return the expected content of the state that ``match`` resumes from."""
        return namespace, tuple(tokens[: match.cached_len].tolist())

    def compare(self, match: PrefixMatch, tokens: Tokens, namespace: Hashable) -> None:
        """Compare ``match.loadable`` with its definition.

        A position is loadable if its state is in a tier and the KV of every token before it is on
        the device or in a tier.
        """
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
            is_offloaded = entry is not None and entry.state is not None
            if shared == len(prefix) and is_offloaded:
                has_state.add(shared)
        expected = [
            position
            for position in sorted(has_state)
            if match.cached_len < position < len(whole) and has_kv.issuperset(range(position + 1))
        ]
        assert [loadable.position for loadable in match.loadable] == expected

    def adopt(self, tokens: Tokens, namespace: Hashable, tier: str) -> None:
        """Add a prefix to ``tier``, as if an earlier process had left it there."""
        taken = self.cache.adopt(tokens, namespace, tier)
        self.apply_transfers()
        if taken is not None:
            start, kv_rows, state_rows = taken
            ids = tuple(tokens.tolist())
            for position, row in enumerate(kv_rows.tolist(), start):
                self.rows[tier][row] = namespace, ids[: position + 1]
            for piece, row in enumerate(state_rows.tolist()):
                self.rows[tier][row] = (namespace, ids), piece

    def lose(self, tier: str, every: int) -> None:
        """Lose one in ``every`` rows of ``tier``.

        Check that the states that depend on a lost row are dropped, and with one tier no others:
        KV that moves to a second tier may find no room there.
        """
        number = self.cache.offload.names.index(tier)

        def is_lost(rows: Indices) -> bool:
            return bool((rows % every == 0).any())

        def stored() -> dict[int, list[Indices]]:
            found: dict[int, list[Indices]] = {}
            for node in self.cache._tree.nodes():
                entry = node.offloaded
                if entry is not None and entry.state is not None:
                    rows = found[id(node)] = [entry.state.rows] * (entry.state.tier == number)
                    above: RadixNode | None = node
                    while above is not None and above.kv is None and above.offloaded is not None:
                        if above.offloaded.kv is not None and above.offloaded.kv_tier == number:
                            rows.append(above.offloaded.kv)
                        above = above.parent
            return found

        before = stored()
        self.cache.offload.drop_lost(tier, is_lost)
        after = stored()
        intact = {node for node, rows in before.items() if not any(map(is_lost, rows))}
        has_one_tier = len(self.cache.offload.names) == 1
        assert set(after) == intact if has_one_tier else set(after) <= intact, (
            "the remaining states are not those without lost rows"
        )
        for node in self.cache._tree.nodes():
            entry = node.offloaded
            if entry is not None and entry.kv is not None and entry.kv_tier == number:
                assert not is_lost(entry.kv)

    def check(self) -> None:
        """Check the tree's invariants and the contents of all rows and slots."""
        self.apply_transfers()
        self.cache.check(held_tokens=0, held_slots=0)
        assert not self.cache.is_loading
        num_rows: Counter[tuple[str, str]] = Counter()
        for copy in self.copied:
            num = len(copy.src) if copy.kind == "kv" else self.state_rows
            num_rows[copy.src_tier, copy.dst_tier] += num
        assert num_rows == self.cache.offload.copied_rows
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
