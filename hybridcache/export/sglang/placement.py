"""Placement of the one state that an SGLang prefill exports.

An extend saves one state: at its last grid position, counted from its start, or at the position
returned by ``match_prefix`` (``mamba_branching_seqlen``) if that is inside the extend.
"""

from __future__ import annotations

from hybridcache.api import PrefixMatch
from hybridcache.tokens import Tokens


def branch_position(prompt: Tokens, match: PrefixMatch, grid: int) -> int | None:
    """Return the position of a fork to save a state at, or None to save at the extend's end.

    The fork is the position at which ``prompt`` diverges from earlier prompts, ghosts included:
    similar prompts will resume there. The result is rounded down to a multiple of ``grid`` from
    ``match.cached_len``, as SGLang's kernels require. A prompt that only continues a conversation
    has no fork, and the state at its end is more valuable. O(1).
    """
    cached_len = match.cached_len
    seen = min(match.seen_len, len(prompt) - 1)
    position = seen - (seen - cached_len) % grid
    if position <= cached_len or not match.forks:
        return None
    return position
