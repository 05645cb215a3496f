"""What comes out of a request, and the text that its tokens make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from hybridcache.api import Losses

if TYPE_CHECKING:
    from engine.text.stream_decoders import StreamDecoder

FinishReason = Literal["stop", "length", "abort", "error"]


NO_TOKEN = -1


class SampledToken(NamedTuple):
    """One chosen token, and what the model thought of it."""

    token_id: int
    """``NO_TOKEN`` where the logits were NaN or infinite."""
    logprob: float | None
    """Natural logarithm of its probability, before penalties and temperature; None: not asked
    for."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The most likely (token id, log-probability), best first."""


@dataclass(slots=True)
class DraftCounts:
    """What became of one request's drafts."""

    num_verified: int = 0
    """Steps that verified a draft of it."""
    drafted: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Tokens by (source, place in the draft, from 1)."""
    accepted: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Those of them that the model chose too."""

    @property
    def acceptance_len(self) -> float | None:
        """Mean tokens that a verification gave: those accepted, and the one that is never a guess;
        None before the first."""
        if not self.num_verified:
            return None
        return 1 + self.accepted.total() / self.num_verified

    def count(self, source: str, num_drafted: int, num_accepted: int) -> None:
        """One draft, of whose tokens the first ``num_accepted`` were accepted."""
        self.num_verified += 1
        self.drafted.update((source, place) for place in range(1, num_drafted + 1))
        self.accepted.update((source, place) for place in range(1, num_accepted + 1))


class Timings(NamedTuple):
    """Where one request's time went; seconds. None: not reached yet."""

    queue_s: float | None
    """From submit until its first tokens were scheduled."""
    ttft_s: float | None
    """From submit until its first token."""
    e2e_s: float | None
    """From submit until it finished."""

    def tpot_s(self, num_output_tokens: int) -> float | None:
        """Mean time per output token after the first; None before two tokens or the end."""
        if self.e2e_s is None or self.ttft_s is None or num_output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (num_output_tokens - 1)


class Transferred(NamedTuple):
    """What went between engines for one request."""

    tokens: int
    """Whose KV came into the cache; 0: the prefix did not come whole."""
    needed_bytes: int
    """Of that KV, and of the state that came with it."""
    wire_bytes: int
    """All that was sent and received: these, messages, and what was in vain."""


class RequestOutput(Struct, frozen=True):
    """What one step did for one request: the news, and all of it so far."""

    request_id: str
    prompt_token_ids: npt.NDArray[np.int32]
    new_token_ids: tuple[int, ...]
    new_text: str
    """Text that is certain: it never holds what may still become a stop string."""
    new_logprobs: tuple[SampledToken, ...]
    """One per new token where the request asked for log-probabilities."""
    output: npt.NDArray[np.int32]
    """All generated tokens, int32[m]: a view, never written again."""
    all_text: Sequence[str]
    """Pieces of its text, shared with the request, which appends to them: read ``text``."""
    num_pieces: int
    """So many of them are of this step and of those before it."""
    cached_len: int
    """Prompt tokens that were not computed."""
    losses: Losses | None
    """Why the others were; sums with ``cached_len`` to the prompt. None: refused or ended before it
    was scheduled."""
    finish_reason: FinishReason | None
    error: str | None
    """Why it ended with ``finish_reason`` "error", in a few words; else None."""
    is_refused: bool
    """The ``error`` is of what was asked for, not of the engine."""
    timings: Timings
    num_preemptions: int
    all_logprobs: Sequence[SampledToken]
    """Shared with the request, which appends to it: read ``logprobs``."""
    prompt_logprobs: tuple[SampledToken | None, ...] | None
    """One per prompt token, None for the first; where the request asked for them, with its first
    token."""
    drafts: DraftCounts | None
    """The request's own, which grow with it; None: nothing is drafted."""
    transferred: Transferred | None
    """None: nothing was asked of another engine."""

    @property
    def text(self) -> str:
        """All text that is certain. O(its length)."""
        return "".join(self.all_text[: self.num_pieces])

    @property
    def token_ids(self) -> list[int]:
        """All generated tokens."""
        return [int(token) for token in self.output]

    @property
    def logprobs(self) -> list[SampledToken] | None:
        """One per generated token; None: not asked for."""
        return list(self.all_logprobs[: len(self.output)]) or None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None


class TextStream:
    """Text of one request as its tokens come, cut before the first stop string.

    What could still become a stop string is held back, so that nothing sent is ever taken back.
    """

    __slots__ = ("_decoder", "_held", "_keeps_stop", "_stops")

    def __init__(
        self, decoder: StreamDecoder, stop: Sequence[str] = (), keeps_stop: bool = False
    ) -> None:
        """``keeps_stop``: it is cut behind the stop string."""
        self._decoder = decoder
        self._keeps_stop = keeps_stop
        self._stops = tuple(map(_Stop, stop))
        self._held = ""

    def push(self, token_id: int, may_stop: bool = True) -> tuple[str, bool]:
        """(the text that became certain, whether a stop string was met, which one that begins
        before it ``may_stop`` is not). O(new text) per stop string, over an answer."""
        new = self._decoder.push(token_id)
        return self._read(new) if self._stops and may_stop else (new, False)

    def flush(self) -> tuple[str, bool]:
        """(all that was held, whether it met a stop string): there are no more tokens."""
        text, stopped = self._read(self._decoder.flush())
        if not stopped:
            text, self._held = text + self._held, ""
        return text, stopped

    def _read(self, new: str) -> tuple[str, bool]:
        found = [
            (start, len(stop.text)) for stop in self._stops if (start := stop.read(new)) is not None
        ]
        num_before = len(self._held)
        text = self._held + new
        if found:
            self._held = ""
            start, length = min(found)
            return text[: num_before + start + length * self._keeps_stop], True
        cut = len(text) - max((stop.matched for stop in self._stops), default=0)
        self._held = text[cut:]
        return text[:cut], False


class _Stop:
    """Looks for one stop string in a text that comes in pieces (Knuth, Morris, Pratt).

    ``borders[i]`` is the length of the longest proper beginning of ``text[: i + 1]`` that is also
    its end: where to go on when the next character does not fit. It is worked out as far as the
    text was ever matched.
    """

    __slots__ = ("borders", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.borders = [0]
        self.matched = 0
        """Length of the longest end of what was read that is a beginning of ``text``, and not all
        of it."""

    def read(self, new: str) -> int | None:
        """Where the stop string begins, counted from the beginning of ``new``, once it is complete;
        below 0: before it. O(len(new)), spread over all calls."""
        text = self.text
        at = 0
        while at < len(new):
            if not self.matched:
                at = new.find(text[0], at)
                if at < 0:
                    return None
            while self.matched and new[at] != text[self.matched]:
                self.matched = self._border(self.matched)
            if new[at] == text[self.matched]:
                self.matched += 1
            at += 1
            if self.matched == len(text):
                return at - len(text)
        return None

    def _border(self, length: int) -> int:
        """The longest proper beginning of ``text[:length]`` that is also its end."""
        text, borders = self.text, self.borders
        while len(borders) < length:
            border = borders[-1]
            letter = text[len(borders)]
            while border and text[border] != letter:
                border = borders[border - 1]
            borders.append(border + (text[border] == letter))
        return borders[length - 1]
