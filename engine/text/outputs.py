"""Outputs of a request, their wire format, and the conversion of its tokens to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Struct, structs

from engine.errors import RequestError, WireError
from hybridcache.api import Losses

if TYPE_CHECKING:
    from engine.text.tokenizer import StreamDecoder

Counts = dict[tuple[str, int], int]
FinishReason = Literal["stop", "length", "abort", "error"]


NO_TOKEN = -1


class SampledToken(NamedTuple):
    """One sampled token with its log-probabilities."""

    token_id: int
    """Token id, or ``NO_TOKEN`` if the logits were NaN or infinite."""
    logprob: float | None
    """Natural logarithm of its probability, before penalties and temperature. None if not
    requested."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """Most likely (token id, log-probability), best first."""


class DraftCounts(Struct, array_like=True):
    """Statistics on the drafts of one request."""

    num_verified: int = 0
    """Number of steps that verified a draft of the request."""
    drafted: Counts = {}
    """Number of draft tokens by (source, place in the draft, from 1)."""
    accepted: Counts = {}
    """Number of accepted draft tokens, by the same keys."""

    def copy(self) -> DraftCounts:
        """Return the present counts, which do not change with the request."""
        return DraftCounts(self.num_verified, {**self.drafted}, {**self.accepted})

    def count(self, source: str, num_drafted: int, num_accepted: int) -> None:
        """Count one draft with ``num_accepted`` accepted tokens at its beginning."""
        self.num_verified += 1
        for counts, number in ((self.drafted, num_drafted), (self.accepted, num_accepted)):
            for place in range(1, number + 1):
                counts[source, place] = counts.get((source, place), 0) + 1


class Timings(NamedTuple):
    """Times of one request in seconds, or None if not reached yet."""

    queue_s: float | None
    """Time from submission until its first tokens were scheduled."""
    ttft_s: float | None
    """Time from submission until its first token."""
    e2e_s: float | None
    """Time from submission until it finished."""

    def tpot_s(self, num_output_tokens: int) -> float | None:
        """Return the mean time per output token after the first, or None before two tokens or
        before the end."""
        if self.e2e_s is None or self.ttft_s is None or num_output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (num_output_tokens - 1)


class Transferred(NamedTuple):
    """Statistics on transfers between engines for one request."""

    tokens: int
    """Number of tokens of KV that were loaded into the cache. 0 if the prefix did not arrive
    completely."""
    needed_bytes: int
    """Bytes of that KV and of its state."""
    wire_bytes: int
    """All bytes sent and received, including messages and incomplete transfers."""


class Answer:
    """Everything that was generated for one request so far. It only grows, so that the outputs of
    earlier steps stay as they are."""

    __slots__ = ("logprobs", "prompt", "prompt_logprobs", "text", "tokens")

    def __init__(self, prompt: npt.NDArray[np.int32]) -> None:
        self.prompt = prompt
        self.tokens = np.empty(64, np.int32)
        """Generated tokens, and room for further ones."""
        self.text: list[str] = []
        """Pieces of the text."""
        self.logprobs: list[SampledToken] = []
        self.prompt_logprobs: tuple[SampledToken | None, ...] | None = None

    def add(self, output: RequestOutput) -> RequestOutput:
        """Append the new part of ``output``, which another process has sent, and return the output
        with this answer. O(new tokens), amortised."""
        end, new = output.num_tokens, output.new_token_ids
        if end > len(self.tokens):
            self.tokens = np.concatenate((self.tokens, np.empty(end, np.int32)))
        self.tokens[end - len(new) : end] = new
        if output.new_text:
            self.text.append(output.new_text)
        self.logprobs.extend(output.new_logprobs)
        if output.new_prompt_logprobs is not None:
            self.prompt_logprobs = output.new_prompt_logprobs
        return structs.replace(output, answer=self)


class RequestOutput(Struct, frozen=True, array_like=True):
    """Output of one step for one request: the new part, and the whole ``answer`` so far. Other
    processes are sent only the new part; see ``Answer.add``."""

    request_id: str
    new_token_ids: tuple[int, ...] = ()
    """Tokens that this step generated."""
    new_text: str = ""
    """New text that is certain: it contains no possible beginning of a stop string."""
    new_logprobs: tuple[SampledToken, ...] = ()
    """One per new token if the request has log-probabilities."""
    new_prompt_logprobs: tuple[SampledToken | None, ...] | None = None
    """Log-probabilities of the prompt, with the first tokens only. See ``prompt_logprobs``."""
    num_tokens: int = 0
    """Number of tokens generated so far."""
    num_chars: int = 0
    """Length of the text so far."""
    cached_len: int = 0
    """Number of prompt tokens that were not computed."""
    losses: Losses | None = None
    """Number of other prompt tokens by loss cause; with ``cached_len`` they sum to the prompt. None
    if the request ended before it was scheduled."""
    finish_reason: FinishReason | None = None
    """None if the request goes on."""
    failure: WireError | None = None
    """Reason of ``finish_reason`` "error", else None."""
    timings: Timings = Timings(None, None, None)
    num_preemptions: int = 0
    """Number of times that the request gave up its memory for an older one."""
    drafts: DraftCounts | None = None
    """None if no step could have drafts."""
    transferred: Transferred | None = None
    """None if no other engine was involved."""
    answer: Any = None
    """The ``Answer`` so far. Other processes are sent None."""

    @property
    def prompt_token_ids(self) -> npt.NDArray[np.int32]:
        """Tokens of the prompt, int32[n]."""
        return self.answer.prompt  # type: ignore[no-any-return]

    @property
    def output(self) -> npt.NDArray[np.int32]:
        """All generated tokens, int32[m]: a view that is never overwritten."""
        return self.answer.tokens[: self.num_tokens]  # type: ignore[no-any-return]

    @property
    def token_ids(self) -> list[int]:
        """All generated tokens."""
        return [int(token) for token in self.output]

    @property
    def text(self) -> str:
        """All text that is certain. O(its length)."""
        return "".join(self.answer.text)[: self.num_chars]

    @property
    def logprobs(self) -> list[SampledToken] | None:
        """One per generated token, or None if not requested."""
        return self.answer.logprobs[: self.num_tokens] or None

    @property
    def prompt_logprobs(self) -> tuple[SampledToken | None, ...] | None:
        """One per prompt token, None for the first; set from the first token on if the request has
        them."""
        return self.answer.prompt_logprobs  # type: ignore[no-any-return]

    @classmethod
    def failed(cls, request_id: str, error: RequestError) -> RequestOutput:
        """Return the last output of a request that failed with ``error``."""
        return cls(request_id, finish_reason="error", failure=error.to_wire())

    @property
    def error(self) -> str | None:
        """Short reason of ``finish_reason`` "error", else None."""
        return None if self.failure is None else self.failure.message

    @property
    def is_finished(self) -> bool:
        """True if the request has ended."""
        return self.finish_reason is not None


def begin_of(text: str, mark: str) -> int:
    """Return the first position from which the rest of ``text`` may begin ``mark``; the end of the
    text if there is none."""
    at = text.find(mark[0], max(0, len(text) - len(mark) + 1))
    while at >= 0 and not mark.startswith(text[at:]):
        at = text.find(mark[0], at + 1)
    return at if at >= 0 else len(text)


class TextStream:
    """Converts the tokens of one request to text, which is cut before the first stop string.

    Text that may be the beginning of a stop string is held back, so that no text is ever retracted.

    >>> from engine.text.tokenizer import StreamDecoder
    >>> pieces = [b"so ", b"</e", b"n ", b"</end> x"]
    >>> stream = TextStream(StreamDecoder(lambda token, _: pieces[token]), ["</end>"])
    >>> [stream.push(token) for token in range(4)]
    [('so ', False), ('', False), ('</en ', False), ('', True)]
    """

    __slots__ = ("_decoder", "_held", "_keeps_stop", "_stop")

    def __init__(
        self, decoder: StreamDecoder, stop: Sequence[str] = (), keeps_stop: bool = False
    ) -> None:
        """``keeps_stop``: the text is cut after the stop string instead."""
        self._decoder, self._stop, self._keeps_stop = decoder, stop, keeps_stop
        self._held = ""

    def push(self, token_id: int, may_stop: bool = True) -> tuple[str, bool]:
        """Return (the text that is certain now, True if a stop string was found).

        Without ``may_stop`` no stop string is found. O(new text) per stop string, over an answer,
        except for texts that repeat its beginning.
        """
        new = self._decoder.push(token_id)
        return self._read(new) if self._stop and may_stop else (new, False)

    def flush(self) -> tuple[str, bool]:
        """Return (the text held back, True if it contains a stop string), after the last token."""
        new = self._decoder.flush()
        if not self._stop:
            return new, False
        text, has_stopped = self._read(new)
        return text if has_stopped else text + self._held, has_stopped

    def _read(self, new: str) -> tuple[str, bool]:
        text, self._held = self._held + new, ""
        stops = [stop for stop in self._stop if stop[0] in text]
        found = [(at, len(stop), stop) for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            start, _, stop = min(found)
            return text[:start] + stop * self._keeps_stop, True
        cut = min((begin_of(text, stop) for stop in stops), default=len(text))
        self._held = text[cut:]
        return text[:cut], False
