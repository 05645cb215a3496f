"""How many tokens to draft for one request where each costs a pass of a head."""

from __future__ import annotations

from engine.plugins.speculation.probe import Turns

FIRST_ODDS = 0.7
"""Before anything is known."""
MIN_ODDS = 0.4
"""A token that is right less often costs more than it gives."""
WEIGHT = 1 / 8
"""Of the newest draft of a request; half as much among those of all."""


class Luck:
    """How often the first token of a draft was right lately, whoever's."""

    __slots__ = ("right",)

    def __init__(self) -> None:
        self.right = FIRST_ODDS

    def learn(self, is_right: bool) -> None:
        self.right += (is_right - self.right) * WEIGHT / 2


class Odds(Turns):
    """Follows how often each place of a draft was right lately, where those before it were.

    A draft is as long as the chance that all of it is right stays above ``MIN_ODDS``. Where not
    even the first token's does, the head rests (`Turns`). A place that is not drafted is forgiven a
    little with every draft that is right as far as it goes. A new request begins with the ``luck``
    of those before it, where that is bad with a try: so a head that is never right here costs short
    requests no more than a long one.

    >>> odds = Odds(3)
    >>> odds.length
    2
    >>> for step in range(9): odds.learn(step, odds.length, odds.length)
    >>> odds.length
    3
    """

    __slots__ = ("_luck", "_right")

    def __init__(self, max_tokens: int, luck: Luck | None = None) -> None:
        super().__init__()
        self._luck = luck or Luck()
        self.is_trying = self._luck.right < MIN_ODDS
        self._right = [self._luck.right] + [FIRST_ODDS] * (max_tokens - 1)

    @property
    def length(self) -> int:
        if self.is_trying:
            return 1
        length, odds = 0, 1.0
        for right in self._right:
            odds *= right
            if odds < MIN_ODDS:
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
            self._move(num_drafted, max(self._right[num_drafted], FIRST_ODDS))
        if num_accepted:
            self._go_on()
            self._right[0] = max(self._right[0], MIN_ODDS)
        elif self._right[0] < MIN_ODDS:
            self._lie_down(step)

    def _move(self, place: int, to: float) -> None:
        self._right[place] += (to - self._right[place]) * WEIGHT
