"""Input of one step, built by the scheduler and read by the model runner."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from msgspec import Struct, structs

from hybridcache.allocators.moves import Transfer

KEPT = "kept"
"""Target of write-through copies to disk: the entry also stays in its tier."""


class BytesLost(RuntimeError):
    """Data that a batch had to load is missing, so its rows must not be read."""


class Segment(Struct, frozen=True):
    """One request's tokens in one step."""

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

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def num_logits(self) -> int:
        """Number of rows of logits."""
        return len(self.token_ids) if self.logits == "all" else int(self.logits == "last")


@dataclass(frozen=True, slots=True)
class Batch:
    """Input of one step: decode segments without drafts, then those with drafts, then prefill
    segments.

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

    def __post_init__(self) -> None:
        copies = self.restores or self.row_writes
        assert self.segments or self.moves or not copies, "copies in a batch that is not executed"

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments)

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
