"""How many tokens to draft for one request."""

from __future__ import annotations

FIRST_LEN = 4
MAX_MISSES = 2
"""Verifications in a row that accept nothing, after which no more drafts are made for a while."""
MIN_REST, MAX_REST = 16, 512
"""Steps."""
MAX_IDLE = 4
"""Steps between two questions to a drafter that had nothing lately."""


class Pace:
    """Follows what was accepted lately.

    The length doubles where all drafts were accepted, else it is one more than what was. After
    ``MAX_MISSES`` verifications in a row that accepted nothing there are no drafts for 16 steps,
    then one try of one token, and where that is wrong too, twice as many steps without, up to 512:
    drafts that are never right cost about one verification of two tokens in 500 steps. A draft that
    is right ends that. A drafter that has nothing is asked again 1, 2 and then every 4 steps later.

    >>> pace = Pace(8)
    >>> pace.next()
    4
    >>> pace.learn(4, 4); pace.next()
    8
    >>> pace.learn(8, 2); pace.next()
    3
    """

    __slots__ = ("_idle", "_length", "_max_tokens", "_misses", "_rest", "_resting")

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._length = min(FIRST_LEN, max_tokens)
        self._misses = self._resting = 0
        self._rest, self._idle = MIN_REST, 1

    def next(self) -> int:
        """Most tokens to draft for the next step."""
        if self._resting:
            self._resting -= 1
            return 0
        return self._length

    @property
    def is_resting(self) -> bool:
        """Whether ``next`` is going to be 0."""
        return self._resting > 0

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """What became of a draft; of none: that nothing was found to guess."""
        if not num_drafted:
            self._resting, self._idle = self._idle - 1, min(2 * self._idle, MAX_IDLE)
            return
        self._idle = 1
        if num_accepted:
            self._misses, self._rest = 0, MIN_REST
            grown = 2 * num_drafted if num_accepted == num_drafted else num_accepted + 1
            # A draft that was cut short for want of room does not shorten the next.
            grown = max(grown, self._length) if num_accepted == num_drafted else grown
            self._length = min(grown, self._max_tokens)
            return
        self._misses += 1
        self._length = 1
        if self._misses >= MAX_MISSES:
            self._resting, self._rest = self._rest, min(2 * self._rest, MAX_REST)
