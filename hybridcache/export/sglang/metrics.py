"""Metrics of reused and recomputed prompt tokens, by cause: counters and one log line per
request."""

from __future__ import annotations

import logging
from typing import Any

from hybridcache.api import Losses, PrefixMatch

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
