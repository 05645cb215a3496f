"""Prefix sharing between requests that arrive together.

Two prompts with the same beginning that are prefilled side by side would both compute it. So a
waiting request *follows* a running prefill, its leader, as long as the leader has still to pass a
position from which the follower could resume. The leader saves its state there, which it would not
do otherwise. Leaders are running requests, older work goes first, and a preempted or finished
leader has no followers. So no request waits for one that makes no progress.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.tokens import common_prefix_len

if TYPE_CHECKING:
    from hybridcache.lease import Lease
    from hybridcache.scheduling.request import ScheduledRequest


class Leader(NamedTuple):
    """An admitted request, for as long as it prefills."""

    rank: int
    """Number of requests admitted before it."""
    request: ScheduledRequest
    lease: Lease | None

    @property
    def is_ahead(self) -> bool:
        return self.request.lease is self.lease and self.request.is_prefilling


class Following(NamedTuple):
    """Work of one leader that a waiting request could reuse."""

    leader: Leader
    resume_points: tuple[int, ...]
    """Ascending positions from which the request could resume if the leader saved its state
    there."""


@dataclass(slots=True)
class Follower:
    """A waiting request that was compared with leaders."""

    followings: list[Following] = field(default_factory=list)
    num_leaders_seen: int = 0
    """Number of admitted requests, counted from the first, with which it was compared."""


class Sharing:
    """Tracks prefilling requests and finds the leader of each waiting request."""

    def __init__(self, manager: CacheManager) -> None:
        self._manager = manager
        self._leaders: list[Leader] = []
        self._followers: dict[ScheduledRequest, Follower] = {}
        self._num_let_in = 0

    @property
    def followers(self) -> Set[ScheduledRequest]:
        """Waiting requests that were compared with leaders."""
        return self._followers.keys()

    def follows(self, request: ScheduledRequest) -> bool:
        """Return whether waiting ``request`` shares a prefix with a request admitted before.
        O(1)."""
        follower = self._followers.get(request)
        return follower is not None and bool(follower.followings)

    def forget(self, request: ScheduledRequest) -> None:
        """Remove ``request``, which no longer waits."""
        self._followers.pop(request, None)

    def let_in(self, request: ScheduledRequest) -> None:
        """Register ``request`` as running: it follows no leader any more, and others may follow
        it."""
        self.forget(request)
        self._leaders = [leader for leader in self._leaders if leader.is_ahead]
        self._leaders.append(Leader(self._num_let_in, request, request.lease))
        self._num_let_in += 1

    def goal(self, request: ScheduledRequest) -> int:
        """Return the deepest position from which a leader will make ``request`` resumable, or 0.

        Plans a checkpoint at that position in each leader that is followed. O(requests admitted
        since the last call + followed leaders).
        """
        if request.wants_scores:
            return 0
        goal = 0
        for leader, points in self._look_around(request):
            if leader.is_ahead:
                ahead = [p for p in points if self._manager.can_save(leader.request, p)]
                if ahead and ahead[-1] > leader.request.scheduled_len:
                    self._manager.plan_checkpoint(leader.request, ahead[-1])
                goal = max([goal, *ahead])
        return goal

    def _look_around(self, request: ScheduledRequest) -> list[Following]:
        """Compare ``request`` with the leaders that are new to it, and return all that it could
        follow."""
        follower = self._followers.setdefault(request, Follower())
        for leader in reversed(self._leaders):
            if leader.rank < follower.num_leaders_seen:
                break
            if leader.is_ahead and _goes_on_as(leader.request, request):
                points = self._resume_points(request, leader.request)
                if points:
                    follower.followings.append(Following(leader, points))
        follower.num_leaders_seen = self._num_let_in
        return follower.followings

    def _resume_points(
        self, request: ScheduledRequest, leader: ScheduledRequest
    ) -> tuple[int, ...]:
        grid = self._manager.checkpoint_grid
        shared = common_prefix_len(request.tokens, leader.tokens[: leader.prefill_len])
        usable = min(shared, request.num_tokens - 1) // grid * grid
        if usable <= leader.computed_len:
            return ()
        positions = self._manager.checkpoint_positions(request, shared)
        return tuple(sorted(position for position in positions if position <= usable))


def _goes_on_as(leader: ScheduledRequest, request: ScheduledRequest) -> bool:
    """Return whether the next token that ``leader`` computes is also in ``request``. If not, no
    later part is shared. O(1)."""
    at = leader.computed_len
    return (
        at < request.num_tokens
        and leader.namespace == request.namespace
        and bool(leader.tokens[at] == request.tokens[at])
    )
