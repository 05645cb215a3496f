"""Protocol and configuration of a rebuilt peer cache.

A peer manages its memory in its own unit (inflated pages, hash pages, two pools), so it does not
implement ``PrefixCache``. A request is *begun* (matched, its prompt computed) and *finished* (its
answer decoded, everything released). It holds its memory in between, so concurrent requests compete
for memory as they do in the peer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

from hybridcache.config import GRID
from hybridcache.radix.tokens import Tokens


@dataclass(frozen=True, slots=True)
class BaselineConfig:
    """Memory of a peer, one byte budget, and the sizes of the model."""

    budget_bytes: int
    kv_bytes_per_token: int
    """Bytes of one token's KV over all full-attention layers."""
    state_bytes: int
    """Bytes of one state (conv + recurrent, all linear layers)."""
    num_full_layers: int = 12
    num_linear_layers: int = 36
    grid: int = GRID
    """Chunk of the linear kernel, in tokens."""
    unit: int = 1
    """Tokens per id of the trace (1; 64 or 512 for traces of block hashes)."""
    prefill_chunk: int = 8192
    """Most prompt tokens computed in one forward pass."""
    token_flops: float = 0.0
    """FLOPs of a token without attention to earlier tokens, or 0 if the model is not described."""
    pair_flops: float = 0.0
    """FLOPs of attention per pair of tokens, over all attention layers."""


class PeerSession:
    """One request of a peer, from its match to its release."""

    __slots__ = ()
    cached_len: int
    """Prompt ids reused (in trace units)."""
    num_chunks: int
    losses = None
    copy_s = 0.0

    def prefilled(self) -> None:
        """Do nothing: peers publish when they finish."""

    def finish(self, output: Tokens) -> None:
        """Decode ``output``, then release the request. Call once."""
        raise NotImplementedError


class Baseline(Protocol):
    """Prefix cache of a peer."""

    def begin(self, tokens: Tokens, namespace: Hashable = None) -> PeerSession | None:
        """Match ``tokens``, take memory for the prefill (evicting if needed), and compute the
        prompt. Returns None, and holds nothing, if running requests leave too little memory; the
        caller must wait. O(prompt)."""
        ...

    def check(self) -> None:
        """Check the peer's accounting. Raises AssertionError if it is inconsistent. O(cache)."""
        ...


def begin(
    baseline: Baseline, tokens: Tokens, namespace: Hashable, **facts: Any
) -> PeerSession | None:
    """Begin a request. A system gets those of ``facts`` that it names in ``takes``: the known
    ``boundaries``, the client's ``session``, the ``stop_reason`` of the answer, which it uses only
    then, and a ``clock``."""
    taken = {name: facts[name] for name in getattr(baseline, "takes", ()) if name in facts}
    return baseline.begin(tokens, namespace, **taken)


BaselineFactory = Callable[[BaselineConfig], Baseline]


def replay(
    baseline: Baseline, tokens: Tokens, output: Tokens, namespace: Hashable = None, **facts: Any
) -> int:
    """Begin and finish one request on its own; returns its ``cached_len``, 0 if it does not fit."""
    session = begin(baseline, tokens, namespace, **facts)
    if session is None:
        return 0
    session.finish(output)
    return session.cached_len
