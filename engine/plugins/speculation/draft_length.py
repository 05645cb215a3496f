"""Draft length of one request and drafter, and pauses of drafters that are wrong.

``DraftLength`` is the interface. ``LookupLength`` serves drafters that cost a look-up,
``HeadLength`` the multi-token head, by the acceptance of each place in a draft. Both pause after
failures; ``ProbeSchedule`` spreads the probes that end a pause over the steps of all requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

MIN_REST, MAX_REST = 16, 512
"""Steps, of one drafter and one request."""
MAX_GAP = 128
"""Steps between two with tries in them, whoever's. A try costs one to two steps: of these, some
1 %."""


class ProbeSchedule:
    """Steps in which drafters that were wrong lately may try one token: all that are due in the
    same one, whoever's and whichever, so that two drafters, or many short requests, cost no more
    than one. Between two such steps lie 16, twice as many with each in which nothing was right, up
    to 128; 16 again after one in which something was.

    >>> tries = ProbeSchedule()
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


class DraftLength(ABC):
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

    def _back_off(self, step: int) -> None:
        """Drafts do not pay."""
        self.wakes, self.is_trying = step + 1 + self._rest, True
        self._rest = min(2 * self._rest, MAX_REST)

    def _reset_backoff(self) -> None:
        """Something was right."""
        self._rest, self.is_trying = MIN_REST, False


FIRST_LEN = 4
MAX_MISSES = 2
"""Verifications in a row that accept nothing, after which no more drafts are made for a while."""
MAX_IDLE = 8
"""Steps between two questions to a drafter that had nothing lately."""


class LookupLength(DraftLength):
    """Follows what was accepted lately.

    The length doubles after a draft that was accepted whole; else it is the accepted length plus
    one. After ``MAX_MISSES`` verifications in a row that accepted nothing, the drafter pauses.
    Drafts that are never right cost about one verification of two tokens in 500 steps. A drafter
    without a draft is tried again 1, 2, 4 and then every 8 steps later.

    >>> pace = LookupLength(8)
    >>> pace.length
    4
    >>> pace.learn(0, 4, 4); pace.length
    8
    >>> pace.learn(1, 8, 2); pace.length
    3
    """

    __slots__ = ("_idle", "_length", "_max_tokens", "_misses")

    def __init__(self, max_tokens: int) -> None:
        super().__init__()
        self._max_tokens = max_tokens
        self._length = min(FIRST_LEN, max_tokens)
        self._misses, self._idle = 0, 1

    @property
    def length(self) -> int:
        return self._length

    def learn(self, step: int, num_drafted: int, num_accepted: int) -> None:
        if not num_drafted:
            self.wakes, self._idle = step + self._idle, min(2 * self._idle, MAX_IDLE)
            return
        self._idle = 1
        if num_accepted:
            self._reset_backoff()
            self._misses = 0
            grown = 2 * num_drafted if num_accepted == num_drafted else num_accepted + 1
            # A draft that was cut short for want of room does not shorten the next.
            grown = max(grown, self._length) if num_accepted == num_drafted else grown
            self._length = min(grown, self._max_tokens)
            return
        self._misses += 1
        self._length = 1
        if self._misses >= MAX_MISSES:
            self._back_off(step)


FIRST_ACCEPTANCE = 0.7
"""Before anything is known."""
MIN_ACCEPTANCE = 0.4
"""A token that is right less often costs more than it gives."""
WEIGHT = 1 / 8
"""Of the newest draft of a request; half as much among those of all."""


class GlobalAcceptance:
    """How often the first token of a draft was right lately, whoever's."""

    __slots__ = ("right",)

    def __init__(self) -> None:
        self.right = FIRST_ACCEPTANCE

    def learn(self, is_right: bool) -> None:
        self.right += (is_right - self.right) * WEIGHT / 2


class HeadLength(DraftLength):
    """Draft length by the recent acceptance of each place in a draft, given those before it.

    A draft is as long as the probability that all of it is accepted stays above
    ``MIN_ACCEPTANCE``. If even the first token is below, the drafter pauses. The estimate of a
    place that was not drafted rises a little with every draft that is accepted whole. New requests
    start with the acceptance of all requests; if that is low, with a probe. A head that is never
    right therefore costs short requests no more than long ones.

    >>> odds = HeadLength(3)
    >>> odds.length
    2
    >>> for step in range(9): odds.learn(step, odds.length, odds.length)
    >>> odds.length
    3
    """

    __slots__ = ("_luck", "_right")

    def __init__(self, max_tokens: int, luck: GlobalAcceptance | None = None) -> None:
        super().__init__()
        self._luck = luck or GlobalAcceptance()
        self.is_trying = self._luck.right < MIN_ACCEPTANCE
        self._right = [self._luck.right] + [FIRST_ACCEPTANCE] * (max_tokens - 1)

    @property
    def length(self) -> int:
        if self.is_trying:
            return 1
        length, odds = 0, 1.0
        for right in self._right:
            odds *= right
            if odds < MIN_ACCEPTANCE:
                break
            length += 1
        return length

    def learn(self, step: int, num_drafted: int, num_accepted: int) -> None:
        if not num_drafted:
            return
        self._luck.learn(num_accepted > 0)
        for place in range(min(num_accepted + 1, num_drafted)):
            self._move(place, float(place < num_accepted))
        if num_accepted == num_drafted < len(self._right):
            self._move(num_drafted, max(self._right[num_drafted], FIRST_ACCEPTANCE))
        if num_accepted:
            self._reset_backoff()
            self._right[0] = max(self._right[0], MIN_ACCEPTANCE)
        elif self._right[0] < MIN_ACCEPTANCE:
            self._back_off(step)

    def _move(self, place: int, to: float) -> None:
        self._right[place] += (to - self._right[place]) * WEIGHT
