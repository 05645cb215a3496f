"""Draft length of one request and drafter, and pauses of drafters that are wrong.

``DraftLength`` serves every drafter. ``ProbeSchedule`` spreads the probes that end a pause over the
steps of all requests.
"""

from __future__ import annotations

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


FIRST_LEN = 4
MAX_IDLE = 8
"""Maximum number of steps between two calls of a drafter that found nothing."""
FIRST_ACCEPTANCE = 0.7
"""Assumed acceptance before the first draft."""
MIN_ACCEPTANCE = 0.4
"""Minimum acceptance: drafts below it cost more than they gain."""
WEIGHT = 1 / 4
"""Weight of the newest draft of a request. Half of it is used for the average of all requests."""


class GlobalAcceptance:
    """Recent acceptance of the first token of a draft, over all requests."""

    __slots__ = ("right",)

    def __init__(self) -> None:
        self.right = FIRST_ACCEPTANCE

    def learn(self, is_right: bool) -> None:
        self.right += (is_right - self.right) * WEIGHT / 2


class DraftLength:
    """Draft length of one request and drafter, by the tokens accepted last.

    The length doubles after a draft that was accepted completely; else it is the accepted length
    plus one, or half of the last length if that is more. If the first token of recent drafts is
    right less often than ``MIN_ACCEPTANCE``, the drafter pauses for 16 steps. Then it may probe one
    token; if that is wrong, the next pause is twice as long, up to 512 steps. An accepted token
    ends the pauses. A drafter that finds nothing is called again 1, 2, 4 and then every 8 steps
    later.

    With ``shared``, a new request starts with the acceptance of all requests, and with a probe if
    that is low. So a drafter that is never right costs short requests no more than long ones.

    >>> lengths = DraftLength(8)
    >>> lengths.length
    4
    >>> lengths.learn(0, 4, 4); lengths.length
    8
    >>> lengths.learn(1, 8, 2); lengths.length
    4
    """

    def __init__(self, max_tokens: int, shared: GlobalAcceptance | None = None) -> None:
        self.wakes = 0
        """First step in which the drafter may draft."""
        self._shared = shared or GlobalAcceptance()
        self._acceptance = self._shared.right
        self.is_trying = self._acceptance < MIN_ACCEPTANCE
        self._max, self._length = max_tokens, min(FIRST_LEN, max_tokens)
        self._rest, self._idle = MIN_REST, 1

    @property
    def length(self) -> int:
        """Maximum number of tokens to draft."""
        return 1 if self.is_trying else self._length

    def learn(self, step: int, num_drafted: int, num_accepted: int) -> None:
        """Record the result of the draft of ``step``. ``num_drafted`` 0 means that the drafter
        found nothing."""
        if not num_drafted:
            self.wakes, self._idle = step + self._idle, min(2 * self._idle, MAX_IDLE)
            return
        self._idle = 1
        self._shared.learn(num_accepted > 0)
        self._acceptance += ((num_accepted > 0) - self._acceptance) * WEIGHT
        # A draft that was shortened for lack of room does not shorten the next one.
        is_whole = num_accepted == num_drafted
        less = max(num_accepted + 1, (self._length + 1) // 2)
        length = max(2 * num_drafted, self._length) if is_whole else less
        self._length = min(length, self._max)
        if num_accepted:
            self._rest, self.is_trying = MIN_REST, False
            self._acceptance = max(self._acceptance, MIN_ACCEPTANCE)
        elif self._acceptance < MIN_ACCEPTANCE:
            self.wakes, self.is_trying = step + 1 + self._rest, True
            self._rest = min(2 * self._rest, MAX_REST)
