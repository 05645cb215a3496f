"""Drafts: the requests that get drafts in a step, their drafters and lengths.

``DraftLength`` is the length for one request and drafter. Drafters are in
``engine.plugins.speculation``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from engine.requests.request import Request
from engine.text.answers import DraftCounts
from hybridcache.radix.tokens import EMPTY, Tokens


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens proposed as a continuation of a request."""

    tokens: Tokens
    """int32[d] with d of 1 or more."""
    source: str
    """Name of the drafter."""


FIRST_ACCEPTANCE = 0.7
"""Assumed acceptance before the first draft."""
WEIGHT = 1 / 4
"""Weight of the newest draft of a request. Half of it is used for the average of all requests."""


class GlobalAcceptance:
    """Recent acceptance of the first token of a draft, over all requests."""

    __slots__ = ("right",)

    def __init__(self) -> None:
        self.right = FIRST_ACCEPTANCE

    def learn(self, is_right: bool) -> None:
        self.right += (is_right - self.right) * WEIGHT / 2


class Drafter:
    """Source of drafts. A wrong draft costs time but changes no token. Every method does nothing
    unless it is overridden.

    It is called between two steps, once for all requests that may take drafts. A drafter that
    computes, such as the model's multi-token head, makes one pass over the batch. It reads a hidden
    vector of each request, declared as a state of the sequence: like any other state, it is saved
    with checkpoints and advanced by commits.
    """

    name: str
    acceptance: GlobalAcceptance | None = None
    """Acceptance with which a new request starts, or None if requests do not share it."""

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens]:
        """Return a draft for each (request, maximum number of tokens), in order: int32[d].

        Must take a bounded time, because all requests wait for it.
        """
        return [EMPTY] * len(wanted)

    def forget(self, request: Request) -> None:
        """Drop the state of ``request``, which has ended."""

    def reset(self) -> None:
        """Drop the state of requests that ended: the cache was emptied."""


MIN_REST, MAX_REST = 16, 512
"""Minimum and maximum pause in steps, of one drafter and one request."""
PROBE_GAP = 64
"""Steps between two steps with probes, over all requests and drafters, unless one is right. A probe
costs one to two steps."""
FIRST_LEN = 4
MAX_IDLE = 8
"""Maximum number of steps between two calls of a drafter that found nothing."""
MIN_ACCEPTANCE = 0.4
"""Minimum acceptance: drafts below it cost more than they gain."""


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

    def at(self, step: int, probes_from: int) -> int:
        """Return the maximum number of tokens to draft in ``step``, 0 in a pause. ``probes_from``:
        first step in which probes are allowed."""
        first = max(self.wakes, probes_from) if self.is_trying else self.wakes
        return self.length if first <= step else 0

    def learn(self, step: int, num_drafted: int, num_accepted: int) -> None:
        """Record the result of the draft of ``step``; ``num_drafted`` is 0 if none was found."""
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


class Drafting:
    """Calls the drafters, divides the tokens that a step may verify, and keeps draft lengths.

    Probes of all requests and drafters share a step. So short requests, or several drafters that
    are never right, cost no more than one long request.
    """

    def __init__(
        self,
        drafters: Sequence[tuple[Drafter, int]],
        *,
        max_verified: int,
        max_decoding: int | None = None,
    ) -> None:
        """Make a manager for ``drafters``, with the maximum length of their drafts. They are called
        in this order.

        ``max_verified``: maximum number of tokens of all requests with drafts in one step,
        including those that are not drafts. ``max_decoding``: a step in which more requests decode
        has no drafts.
        """
        self._drafters = drafters
        self._max_decoding = max_decoding
        self._max_verified = max_verified
        self._lengths: dict[Request, dict[str, DraftLength]] = {}
        """Draft length of each drafter."""
        self._step = self._probes_from = 0
        """Number of the last step, and first step in which probes are allowed."""

    @property
    def requests(self) -> Set[Request]:
        """Requests with draft state."""
        return self._lengths.keys()

    def propose(self, decoding: Iterable[tuple[Request, int]]) -> dict[Request, Draft]:
        """Return drafts for some of the decoding (request, maximum number of tokens that still
        fit).

        Each draft is from the first drafter that has one. The more requests have a draft, the
        shorter each draft is.
        """
        self._step += 1
        decoding = tuple(decoding)
        if self._max_decoding is not None and len(decoding) > self._max_decoding:
            return {}
        wanted: dict[Request, dict[str, int]] = {}
        for request, room in decoding:
            due = self._due(request, self._step)
            lengths = {name: min(most, room) for name, most in due.items()}
            if max(lengths.values()) > 0:
                wanted[request] = lengths
        return self._as_fits(self._ask(wanted)) if wanted else {}

    def _ask(self, wanted: Mapping[Request, Mapping[str, int]]) -> dict[Request, Draft]:
        """Return drafts for requests, with the maximum length of each drafter."""
        share = max(1, self._max_verified // len(wanted) - 1)
        drafts: dict[Request, Draft] = {}
        for drafter, _ in self._drafters:
            missing = [
                (request, min(lengths[drafter.name], share))
                for request, lengths in wanted.items()
                if lengths[drafter.name] and request not in drafts
            ]
            if not missing:
                continue
            for (request, _), tokens in zip(missing, drafter.propose(missing), strict=True):
                if not len(tokens):
                    self._lengths[request][drafter.name].learn(self._step, 0, 0)
                    continue
                tokens = request.possible(tokens)
                if len(tokens):
                    drafts[request] = Draft(tokens, drafter.name)
        return drafts

    def _due(self, request: Request, step: int) -> dict[str, int]:
        """Return the maximum number of tokens of each drafter in ``step``."""
        if request not in self._lengths:
            self._lengths[request] = {
                drafter.name: DraftLength(most, drafter.acceptance)
                for drafter, most in self._drafters
            }
            request.drafts = request.drafts or DraftCounts()
        lengths = self._lengths[request].items()
        return {name: length.at(step, self._probes_from) for name, length in lengths}

    def may_guess(self, running: Iterable[Request]) -> bool:
        """Return True if any of them may get a draft in its next step."""
        decoding = [one for one in running if one.scheduled_len >= one.prefill_len]
        if self._max_decoding is not None and len(decoding) > self._max_decoding:
            return False
        return any(max(self._due(one, self._step + 1).values()) > 0 for one in decoding)

    def _as_fits(self, drafts: dict[Request, Draft]) -> dict[Request, Draft]:
        """Return the first of ``drafts`` that fit into a step."""
        room, fitting = self._max_verified, {}
        for request, draft in drafts.items():
            room -= 1 + len(draft.tokens)
            if room >= 0:
                fitting[request] = draft
                if self._lengths[request][draft.source].is_trying:
                    self._probes_from = self._step + PROBE_GAP
        return fitting

    def learn(self, request: Request, draft: Draft, num_accepted: int, num_new: int) -> None:
        """Record how many tokens of ``draft`` were accepted. The answer, which may have ended
        inside the draft, got ``num_new`` tokens. Counted are tokens of the answer: one of them is
        not a draft."""
        num_drafts, source = len(draft.tokens), draft.source
        length = self._lengths[request][source]
        if length.is_trying and num_accepted:
            self._probes_from = self._step + 1
        length.learn(self._step, num_drafts, num_accepted)
        counts = request.drafts
        assert counts is not None
        counts.count(source, num_drafts, max(0, min(num_accepted, num_new - 1)))

    def forget(self, request: Request) -> None:
        """Drop the state of ``request``, which has ended."""
        self._lengths.pop(request, None)
        for drafter, _ in self._drafters:
            drafter.forget(request)

    def reset(self, was_lost: bool = False) -> None:
        """Drop the state of ended requests: the cache was emptied, or its rows were lost."""
        for drafter, _ in self._drafters:
            drafter.reset()
