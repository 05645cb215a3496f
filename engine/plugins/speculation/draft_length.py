"""How many tokens to draft for one request where a draft costs a look-up."""

from __future__ import annotations

from engine.plugins.speculation.probe import Turns

FIRST_LEN = 4
MAX_MISSES = 2
"""Verifications in a row that accept nothing, after which no more drafts are made for a while."""
MAX_IDLE = 8
"""Steps between two questions to a drafter that had nothing lately."""


class Pace(Turns):
    """Follows what was accepted lately.

    The length doubles where all drafts were accepted, else it is one more than what was. After
    ``MAX_MISSES`` verifications in a row that accepted nothing the drafter rests (`Turns`): drafts
    that are never right cost about one verification of two tokens in 500 steps. A drafter that has
    nothing is asked again 1, 2, 4 and then every 8 steps later.

    >>> pace = Pace(8)
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
            self._go_on()
            self._misses = 0
            grown = 2 * num_drafted if num_accepted == num_drafted else num_accepted + 1
            # A draft that was cut short for want of room does not shorten the next.
            grown = max(grown, self._length) if num_accepted == num_drafted else grown
            self._length = min(grown, self._max_tokens)
            return
        self._misses += 1
        self._length = 1
        if self._misses >= MAX_MISSES:
            self._lie_down(step)
