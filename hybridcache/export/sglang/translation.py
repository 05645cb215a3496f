"""Translation between SGLang's settings, keys and logs and those of this project.

Nothing here imports SGLang: eviction names, unsupported settings, ``RadixKey`` to tokens, the
position of an exported state, and loss causes as metrics.
"""

from __future__ import annotations

import logging
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


WITHOUT = "or --radix-cache-backend hybridcache"


def why_not(ctx: Any, memory: Any, disagg: Any, parallel: Any) -> str | None:
    """Return a message for the first unsupported setting, or None if all are supported.

    Args:
        ctx: SGLang's build context.
        memory: SGLang's memory settings.
        disagg: SGLang's disaggregation settings.
        parallel: SGLang's parallelism settings.
    """
    params = ctx.params
    refusals = (
        (
            ctx.is_hybrid_swa or params.sliding_window_size is not None,
            "hybridcache keeps no sliding windows: drop --radix-cache-backend hybridcache for this "
            "model",
        ),
        (
            ctx.enable_hierarchical_cache,
            f"hybridcache has no host tier inside SGLang: drop --enable-hierarchical-cache, "
            f"{WITHOUT}",
        ),
        (memory.enable_lmcache, f"hybridcache does not work with LMCache: drop it, {WITHOUT}"),
        (memory.enable_flexkv, f"hybridcache does not work with FlexKV: drop it, {WITHOUT}"),
        (
            memory.enable_unified_memory,
            "hybridcache needs KV and states in pools of their own: drop --enable-unified-memory, "
            f"{WITHOUT}",
        ),
        (
            disagg.disaggregation_mode != "null",
            "hybridcache is not verified with prefill and decode apart: drop "
            f"--disaggregation-mode, {WITHOUT}",
        ),
        (
            parallel.dcp_enabled,
            f"hybridcache does not work with decode context parallelism: drop it, {WITHOUT}",
        ),
        (
            params.is_eagle and not ctx.is_hybrid_ssm,
            "hybridcache keys single tokens, where EAGLE on an attention-only model wants pairs: "
            f"drop --speculative-algorithm, {WITHOUT}",
        ),
        (
            eviction_name(params.eviction_policy) not in EVICTION_NAMES,
            f"hybridcache has no eviction {params.eviction_policy!r}: choose "
            "--radix-eviction-policy survival, plain-lru or lfu",
        ),
    )
    return next((sentence for refused, sentence in refusals if refused), None)


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

logger = logging.getLogger("hybridcache.sglang")


class LossMeter:
    """Counters and log lines of reused and lost tokens.

    Args:
        grid: Distance of a prefill's states, counted from its first token.
        labels: Labels of the counters, or None for log lines only.
        level: Log level.
    """

    def __init__(self, grid: int, labels: dict[str, Any] | None, level: int) -> None:
        self._grid = grid
        self._level = level
        self._cached: Any = None
        self._lost: dict[str, Any] = {}
        if labels is not None:
            from prometheus_client import Counter

            names = list(labels)
            self._cached = Counter(
                "hybridcache:cached_tokens", "Prompt tokens reused from the cache.", names
            ).labels(**labels)
            lost = Counter(
                "hybridcache:lost_tokens",
                "Prompt tokens not reused, by cause.",
                [*names, "cause"],
            )
            self._lost = {cause: lost.labels(**labels, cause=cause) for cause in Losses._fields}

    def record(self, rid: str, match: PrefixMatch) -> None:
        """Count a request that was admitted and has computed its first chunk. O(1)."""
        losses = on_grid(match, self._grid)
        if self._cached is not None:
            self._cached.inc(match.cached_len)
            for cause, tokens in losses._asdict().items():
                self._lost[cause].inc(tokens)
        if logger.isEnabledFor(self._level):
            logger.log(self._level, "%s", describe(rid, match, losses))


def on_grid(match: PrefixMatch, grid: int) -> Losses:
    """Correct ``match.losses`` for states at a distance of ``grid`` (the tree's own grid is 1)."""
    losses = match.losses
    below = min(losses.never_checkpointed, match.kv_match_len % grid)
    return losses._replace(
        never_checkpointed=losses.never_checkpointed - below, below_grid=losses.below_grid + below
    )


def describe(rid: str, match: PrefixMatch, losses: Losses) -> str:
    """Describe reused and lost tokens, with causes, in one line.

    >>> losses = Losses(200, 0, 64, 0, 0)
    >>> describe("a7", PrefixMatch(1264, 1000, 1064, 1064, 5, losses, None, None), losses)
    'a7: 1000 of 1264 prompt tokens cached; lost: 200 never seen, 64 checkpoint evicted'
    """
    lost = [
        f"{tokens} {cause.replace('_', ' ')}"
        for cause, tokens in losses._asdict().items()
        if tokens
    ]
    line = f"{rid}: {match.cached_len} of {match.num_tokens} prompt tokens cached"
    return f"{line}; lost: {', '.join(lost)}" if lost else line
