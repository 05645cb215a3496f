"""One step as data: a batch of segments with its results, the hooks around steps, and drafts."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct, structs

from engine.requests.request import Request
from engine.text.outputs import SampledToken
from hybridcache.allocators.moves import Transfer
from hybridcache.tokens import Tokens

KEPT = "kept"
"""Target of write-through copies to disk: the entry also stays in its tier."""


class BytesLost(RuntimeError):
    """Data that a batch had to load is missing, so its rows must not be read."""


UNKNOWN: Tokens = np.zeros(1, np.int32)
"""Tokens of a segment whose one token is drawn but has not reached the host."""


NO_TOKENS: Tokens = np.empty(0, np.int32)
NO_TOKENS.setflags(write=False)


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens proposed as a continuation of a request."""

    tokens: Tokens
    """int32[d] with d of 1 or more."""
    source: str
    """Name of the drafter."""


class PendingTokens(Protocol):
    """Tokens that the device may still be computing."""

    tokens: Any
    """Argument of ``Runner.forward``, before the tokens have arrived."""

    def wait(self) -> Sequence[SampledToken]:
        """Wait until the tokens are computed, and return them."""
        ...


class Segment(Struct, frozen=True):
    """One request's tokens in one step. Other processes receive the fields up to
    ``num_drafts``."""

    row: int
    """Row in the RequestTable, which already lists a KV index for every position up to ``end``."""
    slot: int | None
    """State slot of the request, read and written in place; None for attention-only models."""
    token_ids: npt.NDArray[np.int32]
    """The tokens to compute, int32[length]."""
    start: int
    """Absolute position of the first token; in a prefill a multiple of the grid. A segment that
    starts at 0 starts with a zero state."""
    is_decode: bool
    """True for one token, and its drafts, on the recurrent path. A prefill segment of one token
    still takes the chunked path, for exactness."""
    exports: tuple[tuple[int, int], ...] = ()
    """Checkpoints to save in this step: (absolute position, slot), positions on the grid in (start,
    end]."""
    logits: Literal["last", "all", "none"] = "last"
    """Positions that need logits."""
    namespace: Hashable = None
    """Namespace of the request's prefixes. Only a runner that verifies its reads uses it."""
    num_drafts: int = 0
    """Number of draft tokens at the end of a decode. ``Runner.commit`` writes its state and its
    exports."""
    request: Request = None  # type: ignore[assignment]
    """Request of the tokens; set in every segment that the scheduler makes."""
    lease: object = None
    """Lease of the request when the step was planned. If the request has lost it in the meantime,
    the results of the step do not apply to it."""
    samples: bool = False
    """True if the logits of the last position give the next token."""
    drafter: str = ""
    """Name of the source of the drafts."""

    @classmethod
    def of(
        cls,
        request: Request,
        end: int,
        exports: tuple[tuple[int, int], ...],
        draft: Draft | None = None,
    ) -> Segment:
        """Make the segment that computes ``request`` from its scheduled length up to ``end``, and
        ``draft``."""
        lease, row = request.claims
        start = request.scheduled_len
        is_decode = start >= request.prefill_len
        samples = end == request.known_len < request.max_len
        token_ids = request.tokens[start:end] if end <= request.num_tokens else UNKNOWN
        scores = not is_decode and request.wants_scores
        return cls(
            row,
            lease.state_slot,
            token_ids if draft is None else np.concatenate([token_ids, draft.tokens]),
            start,
            is_decode,
            exports,
            "all" if scores or draft else "last" if samples else "none",
            request.namespace,
            0 if draft is None else len(draft.tokens),
            request,
            lease,
            samples,
            "" if draft is None else draft.source,
        )

    def __reduce__(self) -> tuple[type[Segment], tuple[object, ...]]:
        return Segment, tuple(getattr(self, name) for name in self.__struct_fields__[:9])

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def scores(self) -> bool:
        """True if the logits of all positions are needed, for the prompt's log-probabilities."""
        return self.logits == "all" and not self.num_drafts

    @property
    def drafts(self) -> Tokens:
        return self.token_ids[-self.num_drafts :] if self.num_drafts else NO_TOKENS

    def run_of(self, sampled: Iterator[SampledToken]) -> list[SampledToken]:
        """Return the tokens that the step gave the request: the accepted drafts and one more.

        Consumes all tokens that were drawn for the segment. Each was drawn as if the drafts before
        it were accepted.
        """
        if not self.samples:
            return []
        run = [next(sampled)]
        if not self.num_drafts:
            return run
        drawn = [next(sampled) for _ in range(self.num_drafts)]
        for guess, token in zip(self.drafts.tolist(), drawn, strict=True):
            if run[-1].token_id != guess:
                break
            run.append(token)
        return run

    @property
    def num_logits(self) -> int:
        """Number of rows of logits."""
        return len(self.token_ids) if self.logits == "all" else int(self.logits == "last")


@dataclass(slots=True)
class Batch:
    """One step: decode segments without drafts, then those with drafts, then prefill segments; and
    its results. Other processes receive it without results.

    Before the forward pass, ``moves``, ``row_writes`` and ``restores`` are executed, in this order.
    A batch without segments is executed for its moves only. A batch with neither segments nor moves
    is never executed and must contain no copies (AssertionError).
    """

    segments: tuple[Segment, ...]
    restores: tuple[tuple[int, int], ...] = ()
    """State copies before the forward pass: (checkpoint slot, request slot)."""
    row_writes: tuple[tuple[int, int, npt.NDArray[np.int32]], ...] = ()
    """RequestTable updates before the forward pass: (row, start, KV indices)."""
    late_tokens: tuple[tuple[int, int], ...] = ()
    """Decode tokens that are only on the device so far: (segment, row among the tokens drawn by the
    previous step)."""
    moves: tuple[Transfer, ...] = ()
    """Moves of arena rows and transfers between tiers, in this order; see
    ``hybridcache.allocators.moves``."""
    drawn: PendingTokens | None = None
    """Next token of each segment that samples, and one after each of its drafts; None if no segment
    samples, and before they are drawn."""
    scores: Sequence[PendingTokens] = ()
    """Prompt tokens with their log-probabilities, for each segment that scores."""

    def __reduce__(self) -> tuple[type[Batch], tuple[object, ...]]:
        inputs = self.segments, self.restores, self.row_writes, self.late_tokens, self.moves
        return Batch, inputs

    def __post_init__(self) -> None:
        copies = self.restores or self.row_writes
        assert self.segments or self.moves or not copies, "copies in a batch that is not executed"

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments)

    @property
    def num_decode_tokens(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments if segment.is_decode)

    @property
    def has_drafts(self) -> bool:
        return any(segment.num_drafts for segment in self.segments)

    @property
    def saved_by_decodes(self) -> list[tuple[int, int]]:
        """(own slot, checkpoint slot) of decodes that have no drafts and end at a checkpoint."""
        return [
            (segment.slot, slot)
            for segment in self.segments
            if segment.is_decode and not segment.num_drafts and segment.slot is not None
            for position, slot in segment.exports
            if position == segment.end
        ]


def pieces(batch: Batch, max_exports: int) -> list[Batch]:
    """Split a batch so that prefills export at most ``max_exports`` checkpoints (1 or more) in each
    part.

    The parts are executed one after the other. A prefill is cut after a checkpoint, which is on the
    grid, so no bit changes. The rows of logits of all parts together are those of ``batch``.
    """
    parts: list[list[Segment]] = [[]]
    room = max_exports
    for segment in batch.segments:
        rest = structs.replace(segment, exports=tuple(sorted(segment.exports)))
        while not rest.is_decode and len(rest.exports) > room:
            if room:
                position, _ = rest.exports[room - 1]
                first, rest = _cut(rest, position)
                parts[-1].append(first)
            parts.append([])
            room = max_exports
        parts[-1].append(rest)
        room -= 0 if rest.is_decode else len(rest.exports)
    if len(parts) == 1:
        return [batch]
    return [replace(batch, segments=tuple(parts[0])), *(Batch(tuple(part)) for part in parts[1:])]


def _cut(segment: Segment, position: int) -> tuple[Segment, Segment]:
    """Split a prefill at ``position``."""
    tokens, exports = segment.token_ids, segment.exports
    first = structs.replace(
        segment,
        token_ids=tokens[: position - segment.start],
        exports=tuple(export for export in exports if export[0] <= position),
        logits="all" if segment.logits == "all" else "none",
    )
    rest = structs.replace(
        segment,
        token_ids=tokens[position - segment.start :],
        start=position,
        exports=tuple(export for export in exports if export[0] > position),
    )
    return first, rest


def logit_rows(segments: Sequence[Segment]) -> npt.NDArray[np.int64]:
    """Return the rows of hidden states that need logits."""
    rows: list[npt.NDArray[np.int64]] = []
    offset = 0
    for segment in segments:
        end = offset + len(segment.token_ids)
        if segment.logits != "none":
            first = offset if segment.logits == "all" else end - 1
            rows.append(np.arange(first, end))
        offset = end
    return np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)


class Newest(NamedTuple):
    """Newest token of a request, which is not computed yet, and where the device stores the tokens
    before it."""

    row: int
    """Row in the request table."""
    slot: int
    """State slot."""
    token_id: int
    position: int
    """Position of the token, 1 or more."""


EMPTY = Batch(())
"""Step without work: the runner is not called."""


class StepHooks:
    """Hooks around the steps of one engine, called in its thread. Each does nothing by default."""

    @property
    def has_work(self) -> bool:
        """True if ``before_step`` has something to do although no request waits or runs."""
        return False

    def before_step(self) -> None:
        """Process events since the last step, in a bounded time."""

    def wait(self) -> None:
        """Sleep briefly, or until ``before_step`` has work, because nothing can be computed."""

    def on_step_failed(self, *, was_lost: bool) -> None:
        """End work that depends on the step, which failed with unknown results. ``was_lost``: the
        contents of all rows are unknown too, and the cache is emptied next."""

    def on_cache_emptied(self, *, was_lost: bool) -> None:
        """Update the plugin after the cache was emptied. ``was_lost``: its rows were lost, and no
        caller requested it."""

    def on_idle(self) -> float | None:
        """Do background work. Returns the seconds until the next task is due, or None if there is
        none."""
        return None

    def disconnect(self, *, at_once: bool) -> None:
        """Accept no more work from other processes. End all work done for them or requested from
        them ``at_once``, or finish it. May be called repeatedly."""

    def close(self) -> None:
        """Complete pending writes and end other processes, after the last step."""

    def report(self) -> Mapping[str, Any]:
        """Return fields of ``CacheReport``."""
        return {}


class DraftPlanner(StepHooks):
    """Decides which decoding requests get drafts, and how long the drafts are. By default, none
    do."""

    @property
    def requests(self) -> Set[Request]:
        """Requests with private state."""
        return frozenset()

    def propose(self, decoding: Iterable[tuple[Request, int]]) -> dict[Request, Draft]:
        """Return drafts for some of the decoding (request, maximum number of tokens that still
        fit). Called once per step."""
        return {}

    def may_guess(self, running: Iterable[Request]) -> bool:
        """Return True if any of them may get a draft in its next step."""
        return False

    def learn(self, segment: Segment, num_accepted: int, num_new: int) -> None:
        """Record how many drafts of ``segment`` were accepted. ``num_new`` tokens of the step are
        part of the answer, which may have ended inside the draft."""

    def forget(self, request: Request) -> None:
        """Drop the state of a request that has ended."""
