"""Contract of an admission policy: its view of waiting requests, sessions and memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass


class Session:
    """One conversation or agent run of one tenant, recognised by the tokens of its prompts."""

    def __init__(self, number: int, tenant: Hashable, began_s: float) -> None:
        self.number = number
        """Rank among all sessions, by the arrival of the first request."""
        self.tenant = tenant
        """Namespace of its requests."""
        self.began_s = began_s
        """Time at which the first request arrived."""
        self.has_ended = False
        """True if its client said that no further request follows."""
        self.newest_id = ""
        """Id of the newest request; of several choices, the id of the first one."""
        self.num_requests = 0
        """Prompts so far; several choices of one prompt count once."""
        self.num_admitted = 0
        """Choices of the newest prompt that were admitted."""
        self.num_open = 0
        """Requests that wait or run."""
        self.num_tokens = 0
        """Tokens of the longest text so far: prompt and, once it has ended, answer."""
        self.known_len = 0
        """Tokens of the newest prompt that were sent before: the part that can have been lost."""
        self.shared_len = 0
        """Tokens of the first prompt that were cached for other sessions."""
        self.idle_since_s = began_s
        """Time at which the last request ended, if none is open."""
        self.anchors: list[tuple[int, int]] = []
        """(length, hash) of the prefixes that the next prompt may begin with; see ``Sessions``."""


class WaitingRequest:
    """Part of a request that admission policies read. The scheduler writes it
    (``scheduling.request.ScheduledRequest``)."""

    def __init__(self, *, arrival: int, arrival_s: float, num_tokens: int, max_len: int) -> None:
        self.arrival = arrival
        """Rank among all requests: older is smaller."""
        self.arrival_s = arrival_s
        """Time of arrival."""
        self.num_tokens = self.prefill_len = num_tokens
        """Tokens to have before the next one is sampled: the prompt; after a preemption also the
        answer so far. The first ``prefill_len`` are computed by prefills."""
        self.max_len = max_len
        """Most tokens of prompt and answer together."""
        self.computed_len = 0
        """Computed tokens."""
        self.num_preemptions = 0
        self.num_passes = 0
        """Requests that arrived later and were admitted before this one."""
        self.cached_len = 0
        """Reused tokens, set at the first admission."""
        self.lost_len = 0
        """Prompt tokens to compute again because they, or a checkpoint after them, were evicted.
        Set at each admission. Includes tokens of the session's previous prompt even if their
        eviction is no longer recorded in the cache."""
        self.row: int | None = None
        """Row of the request table while it runs, else None."""
        self.session: Session
        """Set when it is queued."""

    @property
    def is_running(self) -> bool:
        """True from its admission until it is answered or preempted."""
        return self.row is not None

    @property
    def is_prefilling(self) -> bool:
        """True while prompt tokens, or tokens lost by a preemption, are not computed."""
        return self.computed_len < self.prefill_len


@dataclass(kw_only=True, eq=False)
class Load:
    """The state of the server as a policy sees it. Read-only: the scheduler changes the collections
    and ``now_s``."""

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
    """Function of a waiting request. Returns its tokens that are cached now, or could be loaded
    from another tier. Counts as no use of the cache. O(1) while the cache has not changed since the
    last call, else O(length)."""
    footprint: Callable[[Session], float]
    """Function of a session. Returns the part of the memory, 0 to 1, that its text takes. Includes
    one checkpoint and excludes text shared with other sessions."""


class AdmissionPolicy:
    """Decides in which order waiting requests are admitted, and which must wait.

    The base class admits the oldest first and withholds none. Subclasses override the methods they
    need. The scheduler admits the requests given by ``order`` as long as there are places, token
    budget and memory.

    The scheduler keeps these invariants for every policy:

    - Admission never stops running requests.
    - A request that follows a running prefill waits for it.
    - A step in which nothing runs admits the oldest waiting request that ``order`` withholds, once
      ``wakes_at_s`` is None.
    """

    wakes_at_s: float | None = None
    """Time at which ``order`` would withhold less than it last did, if nothing else happens before;
    None if it would not. Set by ``order``."""

    def arrived(self, request: WaitingRequest, load: Load) -> None:
        """Record that ``request`` waits from now on."""

    def order(self, waiting: Sequence[WaitingRequest], load: Load) -> Iterable[WaitingRequest]:
        """Return the requests that may be admitted now, in this order. ``waiting`` is sorted by
        arrival; requests left out must wait. Called once for each step with waiting requests."""
        return waiting

    def admitted(self, request: WaitingRequest, load: Load) -> None:
        """Record that ``request`` was admitted, for the first time or after a preemption."""

    def computed(self, num_tokens: int, seconds: float, load: Load) -> None:
        """Record that the step ending now took ``seconds`` and computed ``num_tokens`` prompt
        tokens."""

    def left(self, request: WaitingRequest, load: Load) -> None:
        """Record that ``request`` was answered or aborted."""

    def report(self) -> Mapping[str, float | str]:
        """Return figures for ``/metrics`` and the live page, by name."""
        return {}
