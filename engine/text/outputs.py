"""What comes out of a request, and the text that its tokens make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hybridcache.results import Losses

if TYPE_CHECKING:
    from engine.text.tokenizer import StreamDecoder

FinishReason = Literal["stop", "length", "abort"]


class SampledToken(NamedTuple):
    """One chosen token, and what the model thought of it."""

    token_id: int
    logprob: float | None
    """Natural logarithm of its probability, before penalties and temperature; None: not asked for."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """The most likely (token id, log-probability), best first."""


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


@dataclass(frozen=True, slots=True)
class RequestOutput:
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
    text: str
    cached_len: int
    """Prompt tokens that were not computed."""
    losses: Losses | None
    """Why the others were; sums with ``cached_len`` to the prompt. None: refused or ended before it was scheduled."""
    finish_reason: FinishReason | None
    timings: Timings
    num_preemptions: int
    all_logprobs: Sequence[SampledToken]
    """Shared with the request, which appends to it: read ``logprobs``."""
    prompt_logprobs: tuple[SampledToken | None, ...] | None
    """One per prompt token, None for the first; where the request asked for them, with its first token."""

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

    __slots__ = ("_decoder", "_held", "_stop")

    def __init__(self, decoder: StreamDecoder, stop: Sequence[str] = ()) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token_id: int) -> tuple[str, bool]:
        """(the text that became certain, whether a stop string was met). O(held + new text) per stop string."""
        self._held += self._decoder.push((token_id,))
        return self._release()

    def flush(self) -> tuple[str, bool]:
        """(all that was held, whether it met a stop string): there are no more tokens."""
        self._held += self._decoder.flush()
        text, stopped = self._release()
        if not stopped:
            text, self._held = text + self._held, ""
        return text, stopped

    def _release(self) -> tuple[str, bool]:
        if not self._stop:
            text, self._held = self._held, ""
            return text, False
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            return text, True
        keep = max(_overlap(self._held, stop) for stop in self._stop)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text, False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
