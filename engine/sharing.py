"""Requests that arrive together: who should wait a few steps because somebody ahead is computing the same prefix.

Two prompts with the same beginning that are prefilled side by side would both compute it. So a waiting request *follows* a
running prefill, its leader, as long as the leader has still to pass a position that the follower could resume from. The
leader is asked to save its state there, which it would have no reason to do by itself. Whoever leads is running, older work
goes first, and a leader that is preempted or gone leads nobody: no request waits for one that does not move.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engine.cache_manager import CacheManager
from engine.request import Request
from hybridcache.interface import Tokens


class Sharing:
    """Decides which waiting requests follow which running prefills."""

    def __init__(self, manager: CacheManager) -> None:
        self._manager = manager

    def must_wait(self, request: Request, prefills: Iterable[Request]) -> bool:
        """Whether one of the running ``prefills`` will leave ``request`` more to resume from than there is now.

        O(running prefills), and O(length) once for each pair and each time one is followed.
        """
        if request.wants_scores:
            return False
        goal = 0
        for leader in prefills:
            if leader.namespace == request.namespace:
                goal = max(goal, self._goal(request, leader))
        if not goal:
            return False
        found = self._manager.cache.match(request.tokens, request.namespace)
        return found.cached_len < goal

    def _goal(self, request: Request, leader: Request) -> int:
        """The deepest position that ``request`` could resume from once ``leader`` has passed it; 0: none is ahead."""
        points = request.resume_points.get(leader.arrival)
        if points is None:
            points = request.resume_points[leader.arrival] = self._resume_points(request, leader)
        goal = max((p for p in points if self._manager.can_save(leader, p)), default=0)
        if goal > leader.scheduled_len:
            self._manager.want(leader, goal)
        return goal

    def _resume_points(self, request: Request, leader: Request) -> tuple[int, ...]:
        step = self._manager.step
        shared = common_len(request.tokens, leader.tokens[: leader.prefill_len])
        usable = min(shared, request.num_tokens - 1) // step * step
        if not usable:
            return ()
        floored = {p // step * step for p in self._manager.checkpoint_positions(request, shared)}
        return tuple(sorted(p for p in floored if 0 < p <= usable))


def common_len(one: Tokens, other: Tokens) -> int:
    """Leading tokens that both have. O(their common length, in blocks)."""
    limit = min(len(one), len(other))
    for start in range(0, limit, 1024):
        end = min(start + 1024, limit)
        differs = one[start:end] != other[start:end]
        if differs.any():
            return start + int(np.argmax(differs))
    return limit
