"""States of SGLang requests, and the transfer of their slots to the cache as checkpoints.

A request owns a live slot. With an *extra buffer* it also owns tracking slots, in which its forward
passes save states at known lengths. The cache takes over a tracking slot without a copy, and a
running request gets a fresh slot in exchange (``donate``).

Without the extra buffer there is only the live state at the end of the computed tokens. It is
copied while the request runs, and taken over when it finishes. If no slot is available, nothing is
donated and the request continues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hybridcache.api import PrefixMatch, losses_of
from hybridcache.cache import HybridRadixCache
from hybridcache.export.sglang.views import RowView, SlotView
from hybridcache.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Offer:
    """State that a request can give to the cache."""

    position: int
    """Number of tokens it covers."""
    slot: torch.Tensor
    """Slot, int64[1]."""
    keep: int | None = None
    """Index of its tracking slot, for a finished request with an extra buffer."""


class RequestStates:
    """States of the requests of one scheduler, and allocation of their slots."""

    def __init__(self, pool: Any, slots: SlotView, rows: RowView, *, extra_buffer: bool) -> None:
        self._pool = pool
        self._slots = slots
        self._rows = rows
        self.extra_buffer = extra_buffer
        """True if a prefill exports a state before its end."""

    def take_slot(self, cache: HybridRadixCache) -> torch.Tensor | None:
        """Allocate a slot, int64[1], evicting if needed. None if every state is locked."""
        allocator = self._pool.mamba_allocator
        slot: torch.Tensor | None = allocator.alloc(1)
        if slot is None and cache.evict(num_slots=1).num_slots:
            self._rows.give_back()
            slot = allocator.alloc(1)
        return slot

    def resume(
        self, cache: HybridRadixCache, req: Any, prompt: Tokens, found: PrefixMatch
    ) -> PrefixMatch:
        """Give ``req`` a live slot and register the copy of its checkpoint before the forward pass.

        If the only available slot is that of ``found.checkpoint``, the request takes it and resumes
        from the next shallower checkpoint. Without any slot it starts from zero. ``losses.refused``
        counts the difference. O(len(prompt)).

        Args:
            cache: The cache.
            req: SGLang's request.
            prompt: Its tokens.
            found: Match of ``prompt`` with a checkpoint.

        Returns:
            The match to resume from.
        """
        receipt = cache.lock(found.node)
        slot = None if req.kv.holds_mamba else self.take_slot(cache)
        cache.unlock(receipt)
        match = found
        if slot is None and not req.kv.holds_mamba:
            slot = self.take_slot(cache)
            now = cache.match(prompt, found.namespace)
            if slot is None or now.checkpoint is None:
                now = now._replace(cached_len=0, checkpoint=None, node=None, resumed=None)
            match = found._replace(
                cached_len=now.cached_len,
                kv_match_len=now.kv_match_len,
                checkpoint=now.checkpoint,
                losses=losses_of(found, now.cached_len),
                node=now.node,
                resumed=now.resumed,
            )
        if match.checkpoint is None:
            if slot is not None:
                self._pool.mamba_allocator.free(slot)
            return match
        if slot is not None:
            req.kv.mamba_pool_idx = slot[0]
        req.kv.mamba_cow_src_index = self._slots.tensor(match.checkpoint)
        req.kv.mamba_needs_clear = False
        return match

    def offer_running(self, cache: HybridRadixCache, req: Any, num_tokens: int) -> Offer | None:
        """Return the state a running request donates after a chunk.

        None if there is no state, or no slot to continue with.
        """
        position = req.kv.mamba_last_track_seqlen if self.extra_buffer else num_tokens
        slot = None if position is None else self.take_slot(cache)
        if slot is None:
            return None
        if self.extra_buffer:
            return Offer(position, self._pool.donate_mamba_ping_pong_slot(req, slot))
        translate = self._pool.translate_mamba_indices
        live = req.kv.mamba_pool_idx.unsqueeze(0)
        self._pool.mamba_pool.copy_from(translate(live), translate(slot))
        return Offer(num_tokens, slot)

    def offer_finished(self, req: Any, num_tokens: int) -> Offer | None:
        """Return the deepest state of a finished request with at most ``num_tokens`` tokens."""
        if self.extra_buffer:
            return self._tracked(req, num_tokens)
        unflushed = self._pool.mamba_pool.replayssm_write_pos
        live = req.kv.mamba_pool_idx
        if unflushed is not None:
            num_tokens -= int(unflushed[live])
            unflushed[live] = 0
        return Offer(num_tokens, live.unsqueeze(-1).clone())

    def _tracked(self, req: Any, num_tokens: int) -> Offer | None:
        kv, pool = req.kv, self._pool
        position, index = kv.mamba_last_track_seqlen, pool.get_mamba_ping_pong_keep_idx(req)
        if position is not None and position > num_tokens:
            # The step in flight when the request ended went past its last token.
            if pool.mamba_ping_pong_track_buffer_size != 2:
                return None
            position, index = (
                kv.mamba_prev_track_seqlen,
                pool.get_mamba_ping_pong_other_idx(index),
            )
        if not position or position > num_tokens or kv.mamba_ping_pong_empty[index]:
            return None
        slot = kv.mamba_ping_pong_track_buffer[index].unsqueeze(-1).clone()
        return Offer(position, slot, index)

    def settle_running(self, req: Any, offer: Offer, taken: bool) -> None:
        """Clean up after the offer of ``offer_running`` was inserted or rejected."""
        if not taken:
            self._pool.mamba_allocator.free(offer.slot)
        req.kv.mamba_last_track_seqlen = None
        req.kv.mamba_prev_track_seqlen = None

    def release(self, req: Any, offer: Offer | None, taken: bool) -> None:
        """Free the slots of an ended request, except one that the tree has ``taken``."""
        if self.extra_buffer:
            keep = offer.keep if offer is not None and taken else None
            self._pool.free_mamba_cache(req, mamba_ping_pong_track_buffer_to_keep=keep)
        elif not taken:
            self._pool.free_mamba_cache(req)
