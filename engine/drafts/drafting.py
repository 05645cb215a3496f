"""Who gets drafts in a step, how long, from whom, and what is learnt from them."""

from __future__ import annotations

from collections.abc import Sequence, Set

from engine.drafts.drafter import Draft, Drafter
from engine.drafts.pace import Pace
from engine.drafts.tree import SuffixDrafter, TreeDrafter
from engine.requests.request import Request
from engine.text.outputs import DraftCounts

WORDS: dict[str, tuple[type[TreeDrafter] | type[SuffixDrafter], ...]] = {
    "tree": (TreeDrafter, SuffixDrafter)
}
"""What each word of ``EngineConfig.draft`` asks, in order."""


class Drafting:
    """Asks the drafters, shares out what a step may verify, and keeps each request's pace."""

    def __init__(self, drafters: Sequence[Drafter], *, max_tokens: int, max_verified: int) -> None:
        """``max_tokens`` drafted for a request at a time; ``max_verified`` tokens, sure ones
        included, of all requests with drafts in one step."""
        self._drafters = drafters
        self._max_tokens = max_tokens
        self._max_verified = max_verified
        self._paces: dict[Request, Pace] = {}

    @classmethod
    def of(cls, words: Sequence[str], max_tokens: int, max_verified: int) -> Drafting:
        """With the drafters that ``words`` name."""
        drafters = [drafter() for word in words for drafter in WORDS[word]]
        return cls(drafters, max_tokens=max_tokens, max_verified=max_verified)

    @property
    def requests(self) -> Set[Request]:
        """Those that something is remembered of."""
        return self._paces.keys()

    def propose(self, decoding: Sequence[tuple[Request, int]]) -> dict[Request, Draft]:
        """Drafts for some of the (request, most tokens that still fit) that decode: the first
        drafter that has any. The more want some, the fewer each gets."""
        lengths: dict[Request, int] = {}
        for request, room in decoding:
            length = min(self._pace(request).next(), room)
            if length > 0:
                lengths[request] = length
        share = max(1, self._max_verified // len(lengths) - 1) if lengths else 0
        wanted = [(request, min(length, share)) for request, length in lengths.items()]
        drafts: dict[Request, Draft] = {}
        for drafter in self._drafters:
            missing = [pair for pair in wanted if pair[0] not in drafts]
            for (request, _), tokens in zip(missing, drafter.propose(missing), strict=True):
                if len(tokens):
                    drafts[request] = Draft(tokens, drafter.name)
        return self._as_fits(drafts)

    def _as_fits(self, drafts: dict[Request, Draft]) -> dict[Request, Draft]:
        """The first of ``drafts`` that a step has room for."""
        room, fitting = self._max_verified, {}
        for request, draft in drafts.items():
            room -= 1 + len(draft.tokens)
            if room >= 0:
                fitting[request] = draft
        return fitting

    def learn(self, request: Request, draft: Draft, num_accepted: int) -> None:
        """What became of the draft of the last step."""
        self._pace(request).learn(len(draft.tokens), num_accepted)
        counts = request.drafts
        assert counts is not None
        counts.count(draft.source, len(draft.tokens), num_accepted)

    def forget(self, request: Request) -> None:
        """``request`` has ended."""
        self._paces.pop(request, None)
        for drafter in self._drafters:
            drafter.forget(request)

    def _pace(self, request: Request) -> Pace:
        pace = self._paces.get(request)
        if pace is None:
            pace = self._paces[request] = Pace(self._max_tokens)
            request.drafts = request.drafts or DraftCounts()
        return pace
