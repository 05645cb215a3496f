"""What a rebuilt peer must answer, and what it is given.

A peer owns its memory in its own unit (inflated pages, hash pages, two pools), so it does not stand
behind ``PrefixCache``: a request is *begun* (matched, its prompt computed) and *finished* (its
answer decoded, everything released). Between the two it holds its memory, so concurrent requests
press on each other as they do in the peer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

from hybridcache.config import GRID
from hybridcache.tokens import Tokens


@dataclass(frozen=True, slots=True)
class BaselineConfig:
    """The memory a peer is given and the model's sizes. One byte budget, unless the peer splits it
    (see ``split``)."""

    budget_bytes: int
    kv_bytes_per_token: int
    """Bytes of one token's KV over all full-attention layers."""
    state_bytes: int
    """Bytes of one state (conv + recurrent, all linear layers)."""
    num_full_layers: int = 12
    num_linear_layers: int = 36
    grid: int = GRID
    """The linear kernel's chunk, tokens."""
    unit: int = 1
    """Tokens that one id of the trace stands for (1; 64 or 512 for traces of block hashes)."""
    prefill_chunk: int = 8192
    """Most prompt tokens computed in one forward pass."""
    host_bytes: int = 0
    """Of host memory beside the budget, for all that a peer keeps there; 0: none."""


class Session(Protocol):
    """One request of a peer, from its match to its release."""

    cached_len: int
    """Prompt ids reused (in trace units)."""
    num_chunks: int
    """Forward passes its prefill took."""
    fetched_bytes: int
    """From host memory to the device, before the prompt could be computed."""

    def finish(self, output: Tokens) -> None:
        """Decode ``output``, then release the request. Call once."""
        ...


class Baseline(Protocol):
    """A peer's prefix cache."""

    @property
    def spilled_bytes(self) -> int:
        """From the device to host memory so far."""
        ...

    def begin(self, tokens: Tokens, namespace: Hashable = None) -> Session | None:
        """Match ``tokens``, take what the prefill needs (evicting), compute the prompt. None: too
        little memory is free of running requests; nothing is held and the caller waits.
        O(prompt)."""
        ...

    def check(self) -> None:
        """AssertionError if the peer's books do not balance. O(cache)."""
        ...


BaselineFactory = Callable[[BaselineConfig], Baseline]


def replay(baseline: Baseline, tokens: Tokens, output: Tokens, namespace: Hashable = None) -> int:
    """One request on its own, begun and finished; returns its ``cached_len`` (0 if it does not fit
    at all)."""
    session = baseline.begin(tokens, namespace)
    if session is None:
        return 0
    session.finish(output)
    return session.cached_len
