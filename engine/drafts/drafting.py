"""Who gets drafts in a step, how long, from whom, and what is learnt from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from typing import NamedTuple

from engine.drafts.drafter import Draft, Drafter
from engine.drafts.mtp import Guess, HeadDrafter
from engine.drafts.odds import Luck, Odds
from engine.drafts.pace import Pace
from engine.drafts.tree import SuffixDrafter, TreeDrafter
from engine.requests.request import Request
from engine.text.outputs import DraftCounts


class Source(NamedTuple):
    """A drafter, and what makes the pace of a request that it drafts for."""

    drafter: Drafter
    make_pace: Callable[[], Pace | Odds]


def _tree(max_tokens: int, guess: Guess) -> list[Source]:
    pace = partial(Pace, max_tokens)
    return [Source(TreeDrafter(), pace), Source(SuffixDrafter(), pace)]


def _mtp(max_tokens: int, guess: Guess) -> list[Source]:
    return [Source(HeadDrafter(guess), partial(Odds, max_tokens, Luck()))]


WORDS: dict[str, Callable[[int, Guess], list[Source]]] = {"tree": _tree, "mtp": _mtp}
"""What each word of ``EngineConfig.draft`` asks, in order."""


class Drafting:
    """Asks the drafters, shares out what a step may verify, and keeps each request's pace with
    each of them."""

    def __init__(self, sources: Sequence[Source], *, max_verified: int) -> None:
        """``max_verified`` tokens, sure ones included, of all requests with drafts in one step."""
        self._sources = sources
        self._max_verified = max_verified
        self._paces: dict[Request, dict[str, Pace | Odds]] = {}

    @classmethod
    def of(cls, words: Mapping[str, int], max_verified: int, guess: Guess) -> Drafting:
        """With the drafters that ``words`` name, and the most tokens of each; ``guess`` is what
        ``Runner.guess`` does."""
        sources = [source for word, most in words.items() for source in WORDS[word](most, guess)]
        return cls(sources, max_verified=max_verified)

    @property
    def requests(self) -> Set[Request]:
        """Those that something is remembered of."""
        return self._paces.keys()

    def propose(self, decoding: Sequence[tuple[Request, int]]) -> dict[Request, Draft]:
        """Drafts for some of the (request, most tokens that still fit) that decode: the first
        drafter that has any. The more want some, the fewer each gets."""
        wanted: dict[Request, list[int]] = {}
        for request, room in decoding:
            lengths = [min(pace.next(), room) for pace in self._paces_of(request).values()]
            if max(lengths) > 0:
                wanted[request] = lengths
        if not wanted:
            return {}
        share = max(1, self._max_verified // len(wanted) - 1)
        drafts: dict[Request, Draft] = {}
        for rank, (drafter, _) in enumerate(self._sources):
            missing = [
                (request, min(lengths[rank], share))
                for request, lengths in wanted.items()
                if lengths[rank] > 0 and request not in drafts
            ]
            for (request, _), tokens in zip(missing, drafter.propose(missing), strict=True):
                if not len(tokens):
                    self._paces[request][drafter.name].learn(0, 0)
                tokens = request.possible(tokens)
                if len(tokens):
                    drafts[request] = Draft(tokens, drafter.name)
        return self._as_fits(drafts)

    def may_guess(self, decoding: Iterable[Request]) -> bool:
        """Whether any of them is to be drafted for in its next step."""
        paces = (pace for request in decoding for pace in self._paces_of(request).values())
        return not all(pace.is_resting for pace in paces)

    def pass_over(self, decoding: Iterable[Request]) -> None:
        """A step of those that ``may_guess`` denied, made without ``propose``."""
        for request in decoding:
            for pace in self._paces_of(request).values():
                pace.next()

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
        self._paces_of(request)[draft.source].learn(len(draft.tokens), num_accepted)
        counts = request.drafts
        assert counts is not None
        counts.count(draft.source, len(draft.tokens), num_accepted)

    def forget(self, request: Request) -> None:
        """``request`` has ended."""
        self._paces.pop(request, None)
        for drafter, _ in self._sources:
            drafter.forget(request)

    def _paces_of(self, request: Request) -> dict[str, Pace | Odds]:
        """By drafter, in the order in which they are asked."""
        paces = self._paces.get(request)
        if paces is None:
            paces = {drafter.name: make_pace() for drafter, make_pace in self._sources}
            self._paces[request] = paces
            request.drafts = request.drafts or DraftCounts()
        return paces
