"""Requests as a scheduler and as an admission policy see them, and the interface of policies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hybridcache.radix.api import Losses
from hybridcache.radix.lease import Lease
from hybridcache.radix.protocol import PromptBoundaries
from hybridcache.radix.tokens import INT32, Tokens, require_index, require_int32
from hybridcache.radix.tree import SESSION_END
from hybridcache.scheduling.sessions import Session


class RequestFields(Protocol):
    """Fields of a request that its run only reads: a message of an engine, or a turn of a trace."""

    @property
    def request_id(self) -> str | None:
        """Name. Must be a string once the request is scheduled."""

    @property
    def namespace(self) -> Hashable:
        """Requests of different namespaces share nothing."""

    @property
    def boundaries(self) -> PromptBoundaries: ...

    @property
    def ends_session(self) -> bool:
        """True if no request of its session follows."""

    @property
    def returns_within_s(self) -> float | None:
        """Promise of the client, as in ``LeaseRequest``."""

    @property
    def session(self) -> str:
        """Client's name of the session, as in ``LeaseRequest``."""

    @property
    def choice_of(self) -> str | None:
        """Name of the first request, if this is another choice of the same answer."""

    @property
    def save_at(self) -> Sequence[int]:
        """Further positions of checkpoints."""


class WaitingRequest:
    """Part of a ``ScheduledRequest`` that admission policies read."""

    arrival: int
    """Rank among all requests: older is smaller."""
    arrival_s: float
    """Time of arrival."""
    num_tokens: int
    """Tokens to have before the next one is sampled: the prompt; after a preemption also the answer
    so far."""
    prefill_len: int
    """Number of first tokens that are computed by prefills."""
    max_len: int
    """Most tokens of prompt and answer together."""
    session: Session
    """Set when it is queued."""
    computed_len = 0
    """Computed tokens."""
    num_preemptions = 0
    num_passes = 0
    """Requests that arrived later and were admitted before this one."""
    cached_len = 0
    """Reused tokens, set at the first admission."""
    lost_len = 0
    """Prompt tokens to compute again because they, or a checkpoint after them, were evicted. Set at
    each admission. Includes tokens of the session's previous prompt even if their eviction is no
    longer recorded in the cache."""
    row: int | None = None
    """Row of the request table while it runs, else None."""

    @property
    def is_running(self) -> bool:
        """True from its admission until it is answered or preempted."""
        return self.row is not None

    @property
    def is_prefilling(self) -> bool:
        """True while prompt tokens, or tokens lost by a preemption, are not computed."""
        return self.computed_len < self.prefill_len


class ScheduledRequest(WaitingRequest):
    """Tokens, lengths and claims of one request.

    ``tokens`` is prompt and answer. ``computed_len`` of them are computed; below ``prefill_len`` by
    prefill, from there on one by one. The newest token is never computed before the next step.
    """

    def __init__(
        self, spec: RequestFields, prompt: Tokens, *, arrival: int, arrival_s: float, max_len: int
    ) -> None:
        """
        Args:
            spec: its fields.
            prompt: int32[n], at least one token. It is copied.
            arrival: number of the request in order of arrival: older is smaller.
            arrival_s: time of arrival, of the planner's clock.
            max_len: most tokens of prompt and answer together.

        Raises:
            TypeError, ValueError: the prompt is empty or not int32[n], or longer than ``max_len``.
                ``Lease.begin`` raises those of other fields.
        """
        if type(prompt) is not np.ndarray or prompt.dtype is not INT32 or prompt.ndim != 1:
            require_int32(prompt, "prompt")
        if type(max_len) is not int:
            require_index(max_len, "max_len")
        if not 0 < len(prompt) <= max_len:
            raise ValueError(
                f"a prompt must have from 1 to max_len tokens (got {len(prompt)}, and max_len is "
                f"{max_len})"
            )
        for position in spec.save_at:
            require_index(position, "each of save_at", 0)
        self.arrival, self.arrival_s, self.max_len = arrival, arrival_s, max_len
        self.num_tokens = self.prefill_len = self.prompt_len = len(prompt)
        self.spec = spec
        self.namespace = spec.namespace
        self.request_id = str(spec.request_id)
        self.buffer = np.empty(min(len(prompt) + 256, max_len), np.int32)
        """Prompt and answer so far, and room for more tokens."""
        self.buffer[: len(prompt)] = prompt
        self.scheduled_len = 0
        """Value of ``computed_len`` once every step planned so far is committed."""
        self.num_drawn = 0
        """Tokens sampled in steps that are not committed yet: unknown to the host."""
        self.lease: Lease | None = None
        """Its claims on the cache: None while it waits. It has a row for as long as a lease."""
        self.losses: Losses | None = None
        """Causes of the tokens that were not reused; None before the first admission."""
        self.loaded_len: int | None = None
        """Tokens of KV that were loaded for it; None if no load was considered yet."""
        self.scheduled_s: float | None = None
        """Time of its first admission."""
        self.is_counted = False
        """True if an earlier lease of this request is counted in the cache's statistics."""

    @property
    def tokens(self) -> Tokens:
        """Prompt and answer so far: int32[num_tokens], a view."""
        return self.buffer[: self.num_tokens]

    def append(self, token_id: int) -> None:
        """Add the newest token of the answer. O(1) amortised. Raises ValueError if the request has
        ``max_len`` tokens."""
        if self.num_tokens == len(self.buffer):
            if self.num_tokens == self.max_len:
                raise ValueError(
                    f"request {self.request_id} has its max_len of {self.max_len} tokens: end it"
                )
            longer = np.empty(min(2 * self.num_tokens, self.max_len), np.int32)
            longer[: self.num_tokens] = self.buffer
            self.buffer = longer
        self.buffer[self.num_tokens] = token_id
        self.num_tokens += 1

    @property
    def claims(self) -> tuple[Lease, int]:
        """Lease and row of the request. Raises RuntimeError while it waits."""
        if self.lease is None or self.row is None:
            raise RuntimeError(f"request {self.request_id} holds no lease.")
        return self.lease, self.row

    @property
    def known_len(self) -> int:
        """Tokens available on the device: ``num_tokens`` plus ``num_drawn``."""
        return self.num_tokens + self.num_drawn

    @property
    def wants_scores(self) -> bool:
        """True if every prompt position must be computed, even if it is cached."""
        return False

    @property
    def stop_reason(self) -> str:
        """Reason why the answer ended, as ``Lease.finish`` takes it; empty if it is not known."""
        return SESSION_END if self.spec.ends_session else ""

    def lose_claims(self) -> None:
        """Forget the lease, the row and all computed tokens, without a call of the cache."""
        if self.lease is not None:
            self.is_counted = self.lease.is_counted
        self.lease = self.row = None
        self.computed_len = self.scheduled_len = self.num_drawn = 0


# --- The interface of admission policies ----------------------------------------------------------


@dataclass(kw_only=True, eq=False)
class ServerLoad:
    """State of the server as a policy sees it. Read-only."""

    now_s: float = 0.0
    """Time of the step."""
    max_running: int
    """Most requests that run at a time."""
    running: Collection[WaitingRequest]
    """Admitted requests that are not answered yet."""
    open_sessions: Collection[Session]
    """Sessions with a waiting or running request."""
    idle_sessions: Collection[Session]
    """Other sessions that are remembered; the one idle for longest first."""
    cached_len: Callable[[WaitingRequest], int]
    """Function of a waiting request: its tokens that are cached now, or could be loaded from a
    tier. No use of the cache. O(1) while the cache has not changed since the last call, else
    O(length)."""
    footprint: Callable[[Session], float]
    """Function of a session: the part of the memory, 0 to 1, that its text and one checkpoint take,
    without text shared with other sessions."""


class AdmissionPolicy:
    """Order in which waiting requests are admitted, and choice of those that must wait.

    The base class admits the oldest first. The scheduler admits the requests given by ``order`` as
    long as there are places, token budget and memory.

    The scheduler keeps these invariants for every policy:

    - Admission never stops running requests.
    - A request that follows a running prefill waits for it.
    - A step in which nothing runs admits the oldest waiting request that ``order`` withholds, once
      ``wakes_at_s`` is None.
    """

    recognises_sessions: bool = True
    """Class attribute. False if the policy ignores ``WaitingRequest.session``: prompts are then not
    compared, and each request has a session of its own."""
    wakes_at_s: float | None = None
    """Time at which ``order`` would withhold less than it last did, if nothing else happens before;
    None if it would not. Set by ``order``."""

    def arrived(self, request: WaitingRequest, load: ServerLoad) -> None:
        """Record that ``request`` waits from now on, or refuse it by an exception."""

    def order(
        self, waiting: Sequence[WaitingRequest], load: ServerLoad
    ) -> Iterable[WaitingRequest]:
        """Return the requests that may be admitted now, in this order. ``waiting`` is sorted by
        arrival; requests left out must wait. Called once for each step with waiting requests."""
        return waiting

    def admitted(self, request: WaitingRequest, load: ServerLoad) -> None:
        """Record that ``request`` was admitted, for the first time or after a preemption."""

    def computed(self, num_tokens: int, seconds: float, load: ServerLoad) -> None:
        """Record that the step ending now took ``seconds`` and computed ``num_tokens`` prompt
        tokens."""

    def left(self, request: WaitingRequest, load: ServerLoad) -> None:
        """Record that ``request`` was answered or aborted."""

    def report(self) -> Mapping[str, float | str]:
        """Return figures for ``/metrics`` and the live page, by name."""
        return {}
