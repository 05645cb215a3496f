"""Requests that arrive together: who should wait a few steps because somebody ahead is computing
the same prefix.

Two prompts with the same beginning that are prefilled side by side would both compute it. So a
waiting request *follows* a running prefill, its leader, as long as the leader has still to pass a
position that the follower could resume from. The leader is asked to save its state there, which it
would have no reason to do by itself. Whoever leads is running, older work goes first, and a leader
that is preempted or gone leads nobody: no request waits for one that does not move.
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
    """A request that was let in to prefill, as long as it does."""

    rank: int
    """How many were let in before it."""
    request: ScheduledRequest
    lease: Lease | None

    @property
    def is_ahead(self) -> bool:
        return self.request.lease is self.lease and self.request.is_prefilling


class Following(NamedTuple):
    """What a waiting request could have of a leader's work."""

    leader: Leader
    resume_points: tuple[int, ...]
    """Positions it could resume from, if the leader saved its state there; ascending."""


@dataclass(slots=True)
class Follower:
    """A waiting request that was compared with leaders."""

    followings: list[Following] = field(default_factory=list)
    num_leaders_seen: int = 0
    """How many of all requests let in so far it was compared with."""


class Sharing:
    """Knows who prefills, and finds for each waiting request whom it should follow."""

    def __init__(self, manager: CacheManager) -> None:
        self._manager = manager
        self._leaders: list[Leader] = []
        self._followers: dict[ScheduledRequest, Follower] = {}
        self._num_let_in = 0

    @property
    def followers(self) -> Set[ScheduledRequest]:
        """The waiting requests that were compared with leaders."""
        return self._followers.keys()

    def follows(self, request: ScheduledRequest) -> bool:
        """Whether waiting ``request`` was found to share with somebody let in before. O(1)."""
        follower = self._followers.get(request)
        return follower is not None and bool(follower.followings)

    def forget(self, request: ScheduledRequest) -> None:
        """``request`` waits no more."""
        self._followers.pop(request, None)

    def let_in(self, request: ScheduledRequest) -> None:
        """``request`` runs: it follows nobody any more, and others may follow it."""
        self.forget(request)
        self._leaders = [leader for leader in self._leaders if leader.is_ahead]
        self._leaders.append(Leader(self._num_let_in, request, request.lease))
        self._num_let_in += 1

    def goal(self, request: ScheduledRequest) -> int:
        """The deepest position that somebody ahead is going to make ``request`` resumable at; 0:
        nobody is.

        Whoever is followed is asked to save its state there. O(leaders let in since the last call +
        those followed).
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
        """Compare ``request`` with the leaders that it was not compared with yet; all that it
        could follow."""
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
    """Whether ``request`` has the token that ``leader`` computes next: if not, nothing ahead of it
    is shared. O(1)."""
    at = leader.computed_len
    return (
        at < request.num_tokens
        and leader.namespace == request.namespace
        and bool(leader.tokens[at] == request.tokens[at])
    )
