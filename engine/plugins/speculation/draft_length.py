"""Draft length of one request and drafter, and pauses of drafters that are wrong.

``DraftLength`` is the interface. ``LookupLength`` serves drafters that cost a look-up,
``HeadLength`` the multi-token head, by the acceptance of each place in a draft. Both pause after
failures; ``ProbeSchedule`` limits the steps with probes that end a pause, over all requests.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

MIN_REST, MAX_REST = 16, 512
"""Minimum and maximum pause in steps, of one drafter and one request."""
MAX_GAP = 128
"""Maximum gap between two steps with probes, over all requests. A probe costs one to two steps, so
these cost 1 %."""


class ProbeSchedule:
    """Steps in which paused drafters may probe one token, for all requests and drafters together.

    All probes that are due share one step, so two drafters, or many short requests, cost no more
    than one. The gap between two such steps is 16. It doubles after each step without an accepted
    probe, up to 128, and is 16 again after a step with one.

    >>> tries = ProbeSchedule()
    >>> tries.take(3); tries.learn(3, False); tries.opens
    35
    >>> tries.take(35); tries.learn(35, True); tries.opens
    51
    """

    __slots__ = ("_gap", "_judged", "opens")

    def __init__(self) -> None:
        self.opens = 0
        """First step in which probes are allowed."""
        self._gap, self._judged = MIN_REST, -1

    def take(self, step: int) -> None:
        """Record that ``step`` has probes."""
        self.opens = step + self._gap

    def learn(self, step: int, is_right: bool) -> None:
        """Record the result of a probe of ``step``, the newest step with probes."""
        if is_right:
            self._gap = MIN_REST
        elif step > self._judged:
            self._gap = min(2 * self._gap, MAX_GAP)
        self._judged = step
        self.opens = step + self._gap


class DraftLength(ABC):
    """Draft length of one drafter for one request, with pauses.

    After rejected drafts the drafter pauses for 16 steps. Then it may probe one token. A wrong
    probe doubles the next pause, up to 512 steps; a right one ends the pauses.
    """

    __slots__ = ("_rest", "is_trying", "wakes")

    def __init__(self) -> None:
        self.wakes = 0
        """First step in which the drafter may draft."""
        self.is_trying = False
        self._rest = MIN_REST

    @property
    @abstractmethod
    def length(self) -> int:
        """Maximum number of tokens to draft."""

    @abstractmethod
    def learn(self, step: int, num_drafted: int, num_accepted: int) -> None:
        """Record the result of the draft of ``step``. ``num_drafted`` 0 means that the drafter
        found nothing."""

    def _back_off(self, step: int) -> None:
        """Start a pause: drafts do not pay off."""
        self.wakes, self.is_trying = step + 1 + self._rest, True
        self._rest = min(2 * self._rest, MAX_REST)

    def _reset_backoff(self) -> None:
        """End the pauses: a draft was right."""
        self._rest, self.is_trying = MIN_REST, False


FIRST_LEN = 4
MAX_MISSES = 2
"""Number of consecutive verifications without an accepted token, after which the drafter pauses."""
MAX_IDLE = 8
"""Maximum number of steps between two calls of a drafter that found nothing."""


class LookupLength(DraftLength):
    """Draft length that follows the number of tokens accepted last.

    The length doubles after a draft that was accepted completely; else it is the accepted length
    plus one. After ``MAX_MISSES`` consecutive verifications without an accepted token, the drafter
    pauses. Drafts that are never right cost about one verification of two tokens in 500 steps. A
    drafter without a draft is called again 1, 2, 4 and then every 8 steps later.

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
            # A draft that was shortened for lack of room does not shorten the next one.
            grown = max(grown, self._length) if num_accepted == num_drafted else grown
            self._length = min(grown, self._max_tokens)
            return
        self._misses += 1
        self._length = 1
        if self._misses >= MAX_MISSES:
            self._back_off(step)


FIRST_ACCEPTANCE = 0.7
"""Assumed acceptance before the first draft."""
MIN_ACCEPTANCE = 0.4
"""Minimum acceptance: a token below it costs more than it gains."""
WEIGHT = 1 / 8
"""Weight of the newest draft of a request. Half of it is used for the average of all requests."""


class GlobalAcceptance:
    """Recent acceptance of the first token of a draft, over all requests."""

    __slots__ = ("right",)

    def __init__(self) -> None:
        self.right = FIRST_ACCEPTANCE

    def learn(self, is_right: bool) -> None:
        self.right += (is_right - self.right) * WEIGHT / 2


class HeadLength(DraftLength):
    """Draft length by the recent acceptance of each place in a draft, given those before it.

    A draft is as long as the probability that all of it is accepted stays above ``MIN_ACCEPTANCE``.
    If even the first token is below, the drafter pauses. The estimate of a place that was not
    drafted rises a little with every draft that is accepted completely. New requests start with the
    acceptance of all requests; if that is low, with a probe. So a head that is never right costs
    short requests no more than long ones.

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
