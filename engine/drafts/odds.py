"""How many tokens to draft for one request where each costs a pass of a head."""

from __future__ import annotations

from engine.drafts.pace import MAX_REST, MIN_REST

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


class Odds:
    """Follows how often each place of a draft was right lately, where those before it were.

    A draft is as long as the chance that all of it is right stays above ``MIN_ODDS``. Where not
    even the first token's does, there are no drafts for 16 steps, then one try of one token, and
    where that is wrong too, twice as many steps without, up to 512. A try that is right ends that.
    A place that is not drafted is forgiven a little with every draft that is right as far as it
    goes. A new request begins with the ``luck`` of those before it: so a head that is never right
    here is tried a few times a request, not anew.

    >>> odds = Odds(3)
    >>> odds.next()
    2
    >>> for _ in range(9): odds.learn(odds.next(), odds.next())
    >>> odds.next()
    3
    """

    __slots__ = ("_is_trying", "_luck", "_rest", "_resting", "_right")

    def __init__(self, max_tokens: int, luck: Luck | None = None) -> None:
        self._luck = luck or Luck()
        self._right = [self._luck.right] + [FIRST_ODDS] * (max_tokens - 1)
        self._resting = MIN_REST if self._luck.right < MIN_ODDS else 0
        self._rest = 2 * MIN_REST if self._resting else MIN_REST
        self._is_trying = False

    def next(self) -> int:
        """Most tokens to draft for the next step."""
        if self._resting:
            self._resting -= 1
            self._is_trying = not self._resting
            return 0
        if self._is_trying:
            return 1
        length, odds = 0, 1.0
        for right in self._right:
            odds *= right
            if odds < MIN_ODDS:
                break
            length += 1
        return length

    @property
    def is_resting(self) -> bool:
        """Whether ``next`` is going to be 0, for a rest."""
        return self._resting > 0

    def learn(self, num_drafted: int, num_accepted: int) -> None:
        """What became of a draft; of none: nothing."""
        if not num_drafted:
            return
        self._luck.learn(num_accepted > 0)
        for place in range(min(num_accepted + 1, num_drafted)):
            self._move(place, float(place < num_accepted))
        if num_accepted == num_drafted < len(self._right):
            self._move(num_drafted, max(self._right[num_drafted], FIRST_ODDS))
        if num_accepted:
            self._rest, self._is_trying = MIN_REST, False
            self._right[0] = max(self._right[0], MIN_ODDS)
        elif self._right[0] < MIN_ODDS:
            self._resting, self._rest = self._rest, min(2 * self._rest, MAX_REST)

    def _move(self, place: int, to: float) -> None:
        self._right[place] += (to - self._right[place]) * WEIGHT
