"""What the verbs of a prefix cache answer: frozen, built whole."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from hybridcache.tokens import Indices


class Losses(NamedTuple):
    """Why the prompt tokens that were not reused were not, by cause; tokens. Sums with
    ``cached_len`` to the prompt."""

    never_seen: int
    """Past ``branch_len``: no request ever brought these tokens in this position."""
    kv_evicted: int
    """Seen (a ghost remembers), but their KV was evicted."""
    checkpoint_evicted: int
    """KV is there; a checkpoint that would have reached them was evicted."""
    never_checkpointed: int
    """KV is there; no checkpoint was ever saved at or past them."""
    below_grid: int
    """KV is there, but no grid position lies between them and the last token that may be
    skipped."""
    refused: int = 0
    """A checkpoint was there, but no memory was available to resume from it."""
    not_fetched: int = 0
    """A state and all KV are there, in lower tiers in part, and were not fetched: computing anew
    was quicker, or no memory was available on the device."""

    def reached(self, num_tokens: int) -> Losses:
        """These, had ``num_tokens`` more tokens been reused: what lies nearest goes first."""
        found = list(self)
        for cause in (2, 3, 4, 1, 0):
            less = min(num_tokens, found[cause])
            found[cause] -= less
            num_tokens -= less
        return Losses(*found)


class Resumable(NamedTuple):
    """A position that could be resumed from if what lies in lower tiers were fetched."""

    position: int
    rows: tuple[int, ...]
    """By tier, the nearest first: rows to copy to the device."""
    node: Any
    """Opaque: what ``fetch`` works on."""


class PrefixMatch(NamedTuple):
    """What the cache holds of one prompt. Made by ``match``, which changes nothing; stale after the
    next insert or evict unless locked."""

    num_tokens: int
    """Length of the prompt."""
    cached_len: int
    """Deepest position with all KV and a checkpoint, at most ``num_tokens - 1``: what can be
    skipped."""
    kv_len: int
    """How deep KV alone reaches; >= ``cached_len``."""
    branch_len: int
    """How deep the tokens were ever seen, ghosts included; >= ``kv_len``."""
    checkpoint: int | None
    """Slot with the state at ``cached_len``; None at 0 and in attention-only caches."""
    losses: Losses
    node: Any
    """Opaque to callers: the node that ends at ``cached_len``; what ``lock``, ``touch`` and
    ``gather`` work on."""
    namespace: Hashable
    missed: Any = None
    """The deepest evicted checkpoint (a policy ``Item``) in (cached_len, num_tokens - 1] whose node
    or ghost is on the path: had it and its KV been kept, ``missed.position - cached_len`` more
    tokens would have been reused."""
    resumed: Any = None
    """The checkpoint (a policy ``Item``) at ``cached_len``; None at 0 and in attention-only
    caches."""
    lower: tuple[Resumable, ...] = ()
    """Past ``cached_len``, ascending: what ``fetch`` could bring."""
    forks: bool = True
    """Whether other tokens were seen to follow at ``branch_len``; False: all that was seen ends
    there. True where it is not known."""


class InsertResult(NamedTuple):
    """What ``insert`` did with what it was given."""

    inserted_len: int
    """Leading tokens that are now in the tree (page-aligned down)."""
    duplicates: Indices
    """The caller's KV indices the tree already had rows for, still held by the caller: switch to
    the tree's (``gather``) and free these."""
    rejected_slots: tuple[int, ...]
    """Slots not taken (a checkpoint is there already, or the position can not carry one), still
    held by the caller."""
    node: Any
    """Opaque: the node that ends at ``inserted_len``."""


class Eviction(NamedTuple):
    """What one ``evict`` freed to the allocators."""

    num_tokens: int
    num_slots: int
