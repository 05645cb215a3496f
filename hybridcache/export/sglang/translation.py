"""Translation between SGLang's settings, keys and metrics and those of this project.

Nothing here imports SGLang: eviction names, unsupported settings, ``RadixKey`` to tokens, the
position of an exported state, and loss causes as metrics.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from typing import Any

import numpy as np

from hybridcache.api import Losses, PrefixMatch
from hybridcache.policies.registry import DEFAULT_EVICTION, EVICTION_NAMES
from hybridcache.tokens import Tokens

# --- Settings -----------------------------------------------------------------------------------

PLAIN_LRU = "plain-lru"
"""Least recently used, under a name that differs from SGLang's default."""
ADDED_EVICTION = ("survival", PLAIN_LRU)
"""Values added to ``--radix-eviction-policy``."""


def eviction_name(asked: str) -> str:
    """Translate a value of ``--radix-eviction-policy`` into this project's policy name.

    ``lru`` is SGLang's default and cannot be distinguished from an explicit ``lru``. It is
    translated to this project's default. ``plain-lru`` is LRU.

    >>> [eviction_name(asked) for asked in ("lru", "plain-lru", "lfu")]
    ['survival', 'lru', 'lfu']
    """
    return {"lru": DEFAULT_EVICTION, PLAIN_LRU: "lru"}.get(asked, asked)


def why_not(ctx: Any, memory: Any, disagg: Any, parallel: Any) -> str | None:
    """Return a message for the first unsupported setting, or None if all are supported.

    Args:
        ctx: SGLang's build context.
        memory: SGLang's memory settings.
        disagg: SGLang's disaggregation settings.
        parallel: SGLang's parallelism settings.
    """
    params = ctx.params
    has_windows = ctx.is_hybrid_swa or params.sliding_window_size is not None
    unknown = eviction_name(params.eviction_policy) not in EVICTION_NAMES
    refused = {
        "models with sliding windows": has_windows,
        "--enable-hierarchical-cache": ctx.enable_hierarchical_cache,
        "LMCache": memory.enable_lmcache,
        "FlexKV": memory.enable_flexkv,
        "--enable-unified-memory": memory.enable_unified_memory,
        "--disaggregation-mode": disagg.disaggregation_mode != "null",
        "decode context parallelism": parallel.dcp_enabled,
        "--speculative-algorithm EAGLE on attention-only models": params.is_eagle
        and not ctx.is_hybrid_ssm,
        f"eviction policy {params.eviction_policy} (only survival, plain-lru and lfu)": unknown,
    }
    for what, is_set in refused.items():
        if is_set:
            backend = "--radix-cache-backend hybridcache"
            return f"hybridcache does not support {what}: drop it, or {backend}"
    return None


# --- Keys ---------------------------------------------------------------------------------------

MAX_TOKEN = 2**31 - 1
NO_TOKEN = -1
"""Pseudo-token that equals no cached token. Appended if the next token of a key is unknown."""


def namespace_of(extra_key: str | None, cache_salt: str | None) -> Hashable:
    """Return the namespace of an adapter and a salt. Different ones share no prefixes."""
    return None if extra_key is None and cache_salt is None else (extra_key, cache_salt)


def tokens_of(ids: array[int], num_tokens: int) -> Tokens:
    """Return the first ``num_tokens`` of ``ids`` (int64) as int32[n]. O(n).

    The result ends before the first id that does not fit, so nothing after it is cached or found.
    """
    wide = np.frombuffer(ids, np.int64)[:num_tokens]
    if len(wide) and wide.max() > MAX_TOKEN:
        wide = wide[: int((wide > MAX_TOKEN).argmax())]
    return wide.astype(np.int32)


def prompt_of(key: Any) -> Tokens:
    """Return the prompt of ``key``: its reusable tokens and the token after them. O(n)."""
    num_tokens = len(key)
    tokens = tokens_of(key.token_ids, num_tokens + 1)
    if len(tokens) > num_tokens:
        return tokens
    return np.append(tokens, np.int32(NO_TOKEN))


# --- Placement ----------------------------------------------------------------------------------


def branch_position(prompt: Tokens, match: PrefixMatch, grid: int) -> int | None:
    """Return the position of a fork to save a state at, or None to save at the extend's end.

    An SGLang prefill saves one state: at its last grid position, counted from its start, or at the
    position returned by ``match_prefix`` (``mamba_branching_seqlen``) if that is inside the extend.

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


# --- Metrics ------------------------------------------------------------------------------------


class LossMeter:
    """Counters of reused and lost tokens.

    Args:
        grid: Distance of a prefill's states, counted from its first token.
        labels: Labels of the counters.
    """

    def __init__(self, grid: int, labels: dict[str, Any]) -> None:
        from prometheus_client import Counter

        self._grid, names = grid, list(labels)
        self._cached = Counter(
            "hybridcache:cached_tokens", "Prompt tokens reused from the cache.", names
        ).labels(**labels)
        lost = Counter(
            "hybridcache:lost_tokens", "Prompt tokens not reused, by cause.", [*names, "cause"]
        )
        self._lost = {cause: lost.labels(**labels, cause=cause) for cause in Losses._fields}

    def record(self, match: PrefixMatch) -> None:
        """Count a request that was admitted and has computed its first chunk. O(1)."""
        lost = match.losses._asdict()
        # The tree's own grid is 1.
        below = min(match.losses.never_checkpointed, match.kv_match_len % self._grid)
        lost["never_checkpointed"] -= below
        lost["below_grid"] += below
        self._cached.inc(match.cached_len)
        for cause, tokens in lost.items():
            self._lost[cause].inc(tokens)
