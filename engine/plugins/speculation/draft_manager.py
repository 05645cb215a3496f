"""Draft manager: selects the requests that get drafts in a step, their drafters and lengths. The
plugin makes it from the settings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from functools import partial
from typing import NamedTuple

from engine.config import EngineConfig
from engine.interfaces import Plugin, Runner
from engine.plugins.speculation import SpeculationConfig
from engine.plugins.speculation.draft_length import (
    MAX_REST,
    DraftLength,
    GlobalAcceptance,
    ProbeSchedule,
)
from engine.plugins.speculation.suffix import (
    Drafter,
    Guess,
    HeadDrafter,
    SuffixDrafter,
    TreeDrafter,
)
from engine.requests.request import Request
from engine.schedule.batch import Draft, DraftPlanner, Segment
from engine.text.outputs import DraftCounts
from hybridcache.geometry.units import counted, format_bytes


class Source(NamedTuple):
    """A drafter, and the factory of its draft lengths."""

    drafter: Drafter
    make_turns: Callable[[], DraftLength]


class _Known:
    """Draft state of one request."""

    __slots__ = ("turns", "wakes")

    def __init__(self, turns: list[DraftLength]) -> None:
        self.turns = turns
        """Draft length of each source, in the order in which they are called."""
        self.wakes = 0
        """First step in which a drafter may be called."""


class Drafting:
    """Calls the drafters, divides the tokens that a step may verify, and keeps draft lengths.

    A step in which no drafter is due costs one look at each request.
    """

    def __init__(
        self, sources: Sequence[Source], *, max_verified: int, max_decoding: int | None = None
    ) -> None:
        """Make a manager for ``sources``.

        ``max_verified``: maximum number of tokens of all requests with drafts in one step,
        including those that are not drafts. ``max_decoding``: a step in which more requests decode
        has no drafts.
        """
        self._sources = sources
        self._max_decoding = max_decoding
        self._ranks = {drafter.name: rank for rank, (drafter, _) in enumerate(sources)}
        self._max_verified = max_verified
        self._known: dict[Request, _Known] = {}
        self._tries = ProbeSchedule()
        self._tried = [0] * len(sources)
        """Newest step with a probe of each source."""
        self._step = 0

    @classmethod
    def of(
        cls,
        words: Mapping[str, int],
        max_verified: int,
        guess: Guess,
        *,
        shares: bool,
        max_decoding: int | None = None,
    ) -> Drafting:
        """Make a manager for the drafters named by ``words``, with their maximum lengths.

        ``guess`` is ``Runner.guess``. ``shares``: drafts may use the texts of other requests.
        """
        sources: list[Source] = []
        for word, most in words.items():
            if word == "mtp":
                shared = GlobalAcceptance()
                sources.append(Source(HeadDrafter(guess), partial(DraftLength, most, shared)))
                continue
            suffixes = SuffixDrafter(shares=shares)
            sources.append(Source(TreeDrafter(), partial(DraftLength, most)))
            sources.append(Source(suffixes, partial(DraftLength, most)))
        return cls(sources, max_verified=max_verified, max_decoding=max_decoding)

    @property
    def requests(self) -> Set[Request]:
        """Requests with draft state."""
        return self._known.keys()

    def propose(self, decoding: Sequence[tuple[Request, int]]) -> dict[Request, Draft]:
        """Return drafts for some of the decoding (request, maximum number of tokens that still
        fit).

        Each draft is from the first drafter that has one. The more requests have a draft, the
        shorter each draft is.
        """
        self._step += 1
        if self._max_decoding is not None and len(decoding) > self._max_decoding:
            return {}
        wanted: dict[Request, list[int]] = {}
        for request, room in decoding:
            known = self._known.get(request) or self._meet(request)
            if known.wakes <= self._step:
                lengths = self._lengths(known, room)
                if max(lengths) > 0:
                    wanted[request] = lengths
        return self._as_fits(self._ask(wanted)) if wanted else {}

    def _ask(self, wanted: Mapping[Request, Sequence[int]]) -> dict[Request, Draft]:
        """Return drafts for the ``wanted`` requests, with the given maximum length for each
        source."""
        share = max(1, self._max_verified // len(wanted) - 1)
        drafts: dict[Request, Draft] = {}
        for rank, (drafter, _) in enumerate(self._sources):
            missing = [
                (request, min(lengths[rank], share))
                for request, lengths in wanted.items()
                if lengths[rank] and request not in drafts
            ]
            if not missing:
                continue
            for (request, _), tokens in zip(missing, drafter.propose(missing), strict=True):
                if not len(tokens):
                    self._known[request].turns[rank].learn(self._step, 0, 0)
                    continue
                tokens = request.possible(tokens)
                if len(tokens):
                    drafts[request] = Draft(tokens, drafter.name)
        return drafts

    def _lengths(self, known: _Known, room: int) -> list[int]:
        """Return the maximum number of tokens of each source in this step. Of several sources with
        a probe, only the one with the oldest probe is included."""
        lengths, trying = [0] * len(known.turns), []
        known.wakes = self._step + MAX_REST
        for rank, turns in enumerate(known.turns):
            due = turns.wakes
            if turns.is_trying and due < self._tries.opens:
                due = self._tries.opens
            if due < known.wakes:
                known.wakes = due
            if due <= self._step:
                lengths[rank] = min(turns.length, room)
                if turns.is_trying:
                    trying.append(rank)
        if len(trying) > 1:
            for rank in sorted(trying, key=self._tried.__getitem__)[1:]:
                lengths[rank] = 0
        return lengths

    def may_guess(self, decoding: Collection[Request]) -> bool:
        """Return True if any of them may get a draft in its next step."""
        if self._max_decoding is not None and len(decoding) > self._max_decoding:
            return False
        for request in decoding:
            known = self._known.get(request) or self._meet(request)
            if known.wakes <= self._step + 1:
                self._lengths(known, 0)
                if known.wakes <= self._step + 1:
                    return True
        return False

    def _as_fits(self, drafts: dict[Request, Draft]) -> dict[Request, Draft]:
        """Return the first of ``drafts`` that fit into a step."""
        room, fitting = self._max_verified, {}
        for request, draft in drafts.items():
            room -= 1 + len(draft.tokens)
            if room >= 0:
                fitting[request] = draft
                rank = self._ranks[draft.source]
                if self._known[request].turns[rank].is_trying:
                    self._tries.take(self._step)
                    self._tried[rank] = self._step
        return fitting

    def learn(self, segment: Segment, num_accepted: int, num_new: int) -> None:
        """See ``DraftPlanner``. Counted are tokens of the answer: one of them is not a draft."""
        known, num_drafts = self._known[segment.request], segment.num_drafts
        turns = known.turns[self._ranks[segment.drafter]]
        if turns.is_trying:
            self._tries.learn(self._step, num_accepted > 0)
        turns.learn(self._step, num_drafts, num_accepted)
        known.wakes = 0
        counts = segment.request.drafts
        assert counts is not None
        counts.count(segment.drafter, num_drafts, max(0, min(num_accepted, num_new - 1)))

    def forget(self, request: Request) -> None:
        """Drop the state of ``request``, which has ended."""
        self._known.pop(request, None)
        for drafter, _ in self._sources:
            drafter.forget(request)

    def reset(self) -> None:
        """Drop the state of ended requests: the cache was emptied."""
        for drafter, _ in self._sources:
            drafter.reset()

    def _meet(self, request: Request) -> _Known:
        known = self._known[request] = _Known([make() for _, make in self._sources])
        request.drafts = request.drafts or DraftCounts()
        return known


RUNNING_ON_CPU = 4
"""Maximum number of decoding requests with drafts where each token of a step costs time."""


class SpeculationPlugin(Plugin):
    """Plans drafts (setting ``draft``)."""

    name = "speculation"

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.settings = config.of(SpeculationConfig)

    def draft_planner(self, runner: Runner, *, shares: bool) -> DraftPlanner | None:
        words, room = self.settings.drafters, self.config.num_step_states
        self._state_bytes = getattr(getattr(runner, "loaded", None), "step_state_bytes", 0)
        limit = self.settings.draft_running or (None if runner.is_asynchronous else RUNNING_ON_CPU)
        return Drafting.of(words, room, runner.guess, shares=shares, max_decoding=limit)

    def start_screen(self) -> Sequence[tuple[str, str]]:
        longest, number = self.config.drafts.max_len, self.config.num_step_states
        states = f", whose states take {format_bytes(self._state_bytes)}"
        words = (
            f"{self.settings.draft}: up to {counted(longest, 'token')} a request; up to {number} "
            f"verified a step{states if self._state_bytes else ''}"
        )
        return [("drafts", words)]
