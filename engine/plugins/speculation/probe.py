"""When a drafter is asked again after it was wrong: what one request knows, and what all share."""

from __future__ import annotations

from abc import ABC, abstractmethod

MIN_REST, MAX_REST = 16, 512
"""Steps, of one drafter and one request."""
MAX_GAP = 128
"""Steps between two with tries in them, whoever's. A try costs one to two steps: of these, some
1 %."""


class Tries:
    """Steps in which drafters that were wrong lately may try one token: all that are due in the
    same one, whoever's and whichever, so that two drafters, or many short requests, cost no more
    than one. Between two such steps lie 16, twice as many with each in which nothing was right, up
    to 128; 16 again after one in which something was.

    >>> tries = Tries()
    >>> tries.take(3); tries.learn(3, False); tries.opens
    35
    >>> tries.take(35); tries.learn(35, True); tries.opens
    51
    """

    __slots__ = ("_gap", "_judged", "opens")

    def __init__(self) -> None:
        self.opens = 0
        """The first step for them."""
        self._gap, self._judged = MIN_REST, -1

    def take(self, step: int) -> None:
        """There are tries in ``step``."""
        self.opens = step + self._gap

    def learn(self, step: int, is_right: bool) -> None:
        """What became of one of those of ``step``, the newest that has any."""
        if is_right:
            self._gap = MIN_REST
        elif step > self._judged:
            self._gap = min(2 * self._gap, MAX_GAP)
        self._judged = step
        self.opens = step + self._gap


class Turns(ABC):
    """When one drafter is asked for one request. Where its drafts did not pay, not for 16 steps;
    then it may try one token, and where that is wrong, twice as many steps later again, up to 512.
    A try that is right ends that."""

    __slots__ = ("_rest", "is_trying", "wakes")

    def __init__(self) -> None:
        self.wakes = 0
        """The first step in which to ask."""
        self.is_trying = False
        self._rest = MIN_REST

    @property
    @abstractmethod
    def length(self) -> int:
        """Most tokens to draft."""

    @abstractmethod
    def learn(self, step: int, num_drafted: int, num_accepted: int) -> None:
        """What became of the draft of ``step``; of none: nothing was found to guess."""

    def _lie_down(self, step: int) -> None:
        """Drafts do not pay."""
        self.wakes, self.is_trying = step + 1 + self._rest, True
        self._rest = min(2 * self._rest, MAX_REST)

    def _go_on(self) -> None:
        """Something was right."""
        self._rest, self.is_trying = MIN_REST, False
