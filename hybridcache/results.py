"""Results of a prefix cache's verbs, and the loss causes of a request."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

from hybridcache.tokens import Indices


class Losses(NamedTuple):
    """Prompt tokens that were computed, by cause. They sum with ``cached_len`` to the prompt's
    length. ``match`` fills in all but the last two; ``losses_of`` adds those."""

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
    """State and KV were stored, partly in lower tiers, and were not loaded: computing was faster,
    or the device had no free memory."""


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
    or ghost is on the path: had it and its KV been kept, ``missed_tokens`` more tokens would have
    been reused."""
    resumed: Any = None
    """The checkpoint (a policy ``Item``) at ``cached_len``; None at 0 and in attention-only
    caches."""
    lower: tuple[Resumable, ...] = ()
    """Past ``cached_len``, ascending: what ``fetch`` could bring."""
    forks: bool = True
    """Whether other tokens were seen to follow at ``branch_len``; False: all that was seen ends
    there. True where it is not known."""

    @property
    def missed_tokens(self) -> int:
        """Tokens that ``missed`` would have saved beyond the checkpoint that was found; 0 if
        nothing was missed. A refused checkpoint was found, so its tokens do not count."""
        if self.missed is None:
            return 0
        return max(int(self.missed.position) - self.cached_len - self.losses.refused, 0)


NEAREST_FIRST = (2, 3, 4, 1, 0)
"""Fields of ``Losses`` in the order in which their tokens follow ``cached_len``."""


def losses_of(found: PrefixMatch, cached_len: int, loadable_len: int = 0) -> Losses:
    """Attribute each prompt token that a request computes to exactly one cause.

    ``found`` is the match before any memory was taken for the request, ``cached_len`` the position
    that it resumes from after refusals and loads, and ``loadable_len`` the deepest position that it
    could have loaded from lower tiers and did not (0 if there is none). The sum of the result and
    ``cached_len`` is ``found.num_tokens``. O(1).

    Tokens up to ``found.cached_len`` that are not reused were refused; those after it up to
    ``loadable_len`` were not fetched; all others keep the cause that ``found`` gives them.
    """
    refused = max(found.cached_len - cached_len, 0)
    reached_len = max(found.cached_len, cached_len)
    not_fetched = max(loadable_len - reached_len, 0)
    counts = list(found.losses)
    explained = reached_len + not_fetched - found.cached_len
    for cause in NEAREST_FIRST:
        taken = min(explained, counts[cause])
        counts[cause] -= taken
        explained -= taken
    return Losses._make((*counts[:5], refused, not_fetched))


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
