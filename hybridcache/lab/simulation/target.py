"""Simulated caches: the project's own behind leases, or a rebuilt peer."""

from __future__ import annotations

from itertools import count

import numpy as np

from hybridcache.allocators.moves import DEVICE
from hybridcache.config import build_prefix_cache
from hybridcache.lab.baselines import BASELINES
from hybridcache.lab.baselines.protocol import BaselineConfig, PeerSession
from hybridcache.lab.scenario import Scenario
from hybridcache.lab.trace import TraceRequest
from hybridcache.lease import Lease, LeaseRequest
from hybridcache.policies.protocol import PromptBoundaries, raise_failure


def build_target(scenario: Scenario, unit: int) -> Target:
    """Build an empty target for a cell of ``scenario``, at one size."""
    return (BaselineTarget if scenario.baseline else LeaseTarget)(scenario, unit)


class LeaseTarget:
    """The project's own cache, driven through leases exactly as the engine drives it."""

    def __init__(self, scenario: Scenario, unit: int) -> None:
        geometry = scenario.geometry()
        self.cache = cache = build_prefix_cache(scenario.cache_config(geometry, unit))
        self.exchange = scenario.exchange(geometry, unit)
        self.placement = scenario.placement(unit)
        self.request_type: type[LeasedRequest] = LeasedRequest
        self.num_exports = 0
        self.uncomputed = 1 if unit == 1 else 0
        """Tokens at an answer's end that have no KV: the last sampled token is never computed; in
        units of many tokens it is within the last one."""
        self._stateful = bool(geometry.num_linear_layers)
        self._own_slots = None if geometry.checkpoint_bytes is None else count()
        """Slot numbers of running requests, if their states are outside the cache's memory: each
        gets its own, as in the engine."""
        self.now_s = 0.0
        """Timestamp of the present request: the clock of policies in replays."""
        cache.policy.set_clock(lambda: self.now_s)
        self.priority_classes = cache.policy.has_priority_classes
        """True if unreachable KV and superseded checkpoints are evicted before all other items."""

    def begin(self, request: TraceRequest) -> LeasedRequest | None:
        """Match, and take memory for the prompt and its checkpoints. Returns None, and holds
        nothing, if running requests leave too little memory."""
        self.now_s = request.timestamp_s
        if self._stateful and self._own_slots is None and not self.cache.num_slots:
            return None  # a pool of states that is smaller than one
        asked = LeaseRequest(
            request.tokens,
            request.namespace,
            PromptBoundaries(request.boundaries, request.answer_survives),
            stateful=self._stateful,
            own_slot=None if self._own_slots is None else next(self._own_slots),
        )
        before = {} if self.exchange is None else self._fetched_bytes()
        lease = Lease.begin(self.cache, self.placement, asked, self.exchange)
        if lease is None:
            return None
        served = self.request_type(self, lease, request)
        if self.exchange is not None:
            after = self._fetched_bytes()
            copied = {word: after[word] - before[word] for word in after}
            served.copy_s = self.exchange.copy_seconds(copied)
        if not served.claim(lease.cached_len):
            lease.abort()
            return None
        return served

    def _fetched_bytes(self) -> dict[str, int]:
        """Return the bytes copied to the device so far, by tier."""
        lower = self.cache.offload
        if lower is None:
            return {}
        rows = lower.copied_rows
        return {word: rows.get((word, DEVICE), 0) * lower.row_bytes for word in lower.names}

    def counters(self) -> dict[str, int]:
        """Return the counters of the cache, in ids and slots. Raises the failure of a user's policy
        in the last request."""
        raise_failure(self.cache.policy.failure)
        lower, arena = self.cache.offload, self.cache.arena
        found = self.cache.stats.as_dict() | {"checkpoint_copies": self.num_exports}
        if lower is not None:
            for (src, dst), rows in lower.copied_rows.items():
                found[f"{src}_to_{dst}_bytes"] = rows * lower.row_bytes
        if arena is not None:
            found |= {"moved_slabs": arena.num_moves, "moved_tokens": arena.num_moved_rows}
        return found


class LeasedRequest:
    """One request of a ``LeaseTarget``, which takes memory for a prompt or an answer at once."""

    __slots__ = (
        "_end",
        "_lease",
        "_request",
        "_target",
        "cached_len",
        "copy_s",
        "losses",
    )

    def __init__(self, target: LeaseTarget, lease: Lease, request: TraceRequest) -> None:
        self._target, self._lease, self._request = target, lease, request
        self.cached_len = self._end = lease.cached_len
        """Prompt ids reused."""
        self.losses = lease.losses
        """Reasons why not more."""
        self.copy_s = 0.0
        """Seconds of copies from lower tiers that this request waited for."""

    def claim(self, start: int) -> bool:
        """Take memory for the piece of the prompt that begins at ``start``. Returns False if it is
        refused."""
        end = self._chunk_end(start)
        if not self._lease.extend(end):
            return False
        self._target.num_exports += len(self._lease.take_checkpoint_slots(start, end) or ())
        self._target.cache.take_step().done()  # There are no tensors.
        self._end = end
        return True

    def _chunk_end(self, start: int) -> int:
        """Return the end of the piece of the prompt that begins at ``start``: the whole prompt."""
        return len(self._request.tokens)

    def prefilled(self) -> None:
        """Publish the prompt, which is computed."""
        tokens = self._request.tokens
        self._lease.publish(tokens, self._end)
        while self._end < len(tokens) and self.claim(self._end):
            self._lease.publish(tokens, self._end)

    def finish(self) -> None:
        """Publish the answer, which is decoded, and release all memory."""
        lease, target = self._lease, self._target
        tokens, output = self._request.tokens, self._request.output
        num_ids = len(tokens)
        computed_len = num_ids + len(output) - target.uncomputed
        stop_reason = "session_end" if self._request.session_end else self._request.stop_reason
        if self._end < num_ids or computed_len <= num_ids:
            lease.finish(tokens, self._end, stop_reason=stop_reason)
            return
        decoded_len = self._decode(computed_len)
        target.cache.take_step().done()
        everything = np.empty(num_ids + len(output), np.int32)
        start = lease.published_len  # The lease does not read earlier ids again.
        everything[start:num_ids], everything[num_ids:] = tokens[start:], output
        lease.finish(everything, decoded_len, stop_reason=stop_reason)

    def _decode(self, computed_len: int) -> int:
        """Take memory for the whole answer. Returns the computed length."""
        lease, num_ids = self._lease, len(self._request.tokens)
        if not lease.extend(computed_len):
            return num_ids
        self._target.num_exports += len(lease.take_checkpoint_slots(num_ids, computed_len) or ())
        return computed_len


# --- Rebuilt competitors ------------------------------------------------------------------------


class BaselineTarget:
    """A rebuilt peer. Its losses are not known."""

    priority_classes = None

    def __init__(self, scenario: Scenario, unit: int) -> None:
        geometry = scenario.geometry()
        config = BaselineConfig(
            budget_bytes=scenario.budget_bytes,
            kv_bytes_per_token=geometry.kv_bytes_per_token,
            state_bytes=geometry.state_bytes,
            num_full_layers=geometry.num_full_layers,
            num_linear_layers=geometry.num_linear_layers,
            grid=scenario.grid,
            unit=unit,
            token_flops=geometry.flops_per_token,
            pair_flops=geometry.attention_flops_per_pair,
        )
        self.baseline = BASELINES[str(scenario.baseline)](config)

    def begin(self, request: TraceRequest) -> PeerRequest | None:
        session = self.baseline.begin(request.tokens, request.namespace)
        return None if session is None else PeerRequest(session, request)

    def counters(self) -> dict[str, int]:
        # Peers without pages reuse single tokens.
        return {"page_tokens": getattr(self.baseline, "page_tokens", 1)}


class PeerRequest:
    """One request of a peer, with the methods of a ``LeasedRequest``."""

    __slots__ = ("_request", "_session", "cached_len", "copy_s", "losses")

    def __init__(self, session: PeerSession, request: TraceRequest) -> None:
        self._session, self._request = session, request
        self.cached_len = session.cached_len
        self.losses = None
        self.copy_s = 0.0

    def prefilled(self) -> None:
        """Do nothing: peers publish when they finish."""

    def finish(self) -> None:
        self._session.finish(self._request.output)


Target = LeaseTarget | BaselineTarget
"""Cache that requests are served with."""
Served = LeasedRequest | PeerRequest
"""Request that the cache serves, from its match to its release."""
