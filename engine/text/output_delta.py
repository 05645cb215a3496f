"""Wire format of a step's output, for processes that serve requests of other processes.

An ``OutputDelta`` omits everything that the receiver already has: prompt, earlier tokens and text.
The worker process and replicas send it; an ``OutputAccumulator`` rebuilds complete outputs from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from engine.text.outputs import (
    DraftCounts,
    FinishReason,
    RequestOutput,
    SampledToken,
    Timings,
    Transferred,
)
from hybridcache.api import Losses
from hybridcache.tokens import Tokens


class DraftDelta(msgspec.Struct, frozen=True, array_like=True):
    """``DraftCounts`` of a request so far."""

    num_verified: int
    drafted: tuple[tuple[str, int, int], ...]
    """(source, place, tokens)."""
    accepted: tuple[tuple[str, int, int], ...]


class OutputDelta(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New output of one step for one request."""

    request_id: str
    new_token_ids: tuple[int, ...]
    new_text: str
    new_logprobs: tuple[SampledToken, ...]
    cached_len: int
    losses: Losses | None
    finish_reason: FinishReason | None
    timings: Timings
    num_preemptions: int
    prompt_logprobs: tuple[SampledToken | None, ...] | None
    """Sent with the first tokens only."""
    drafts: DraftDelta | None
    transferred: Transferred | None


def delta_of(output: RequestOutput) -> OutputDelta:
    """Return ``output`` without the parts that its receiver already has."""
    is_first = len(output.output) == len(output.new_token_ids)
    return OutputDelta(
        output.request_id,
        output.new_token_ids,
        output.new_text,
        output.new_logprobs,
        output.cached_len,
        output.losses,
        output.finish_reason,
        output.timings,
        output.num_preemptions,
        output.prompt_logprobs if is_first else None,
        None if output.drafts is None else _draft_delta(output.drafts),
        output.transferred,
    )


def _draft_delta(counts: DraftCounts) -> DraftDelta:
    drafted, accepted = (
        tuple((source, place, number) for (source, place), number in each.items())
        for each in (counts.drafted, counts.accepted)
    )
    return DraftDelta(counts.num_verified, drafted, accepted)


class GrowingTokens:
    """Growing array of the token ids of an answer."""

    def __init__(self) -> None:
        self._buffer = np.empty(64, np.int32)
        self._num_tokens = 0

    def __len__(self) -> int:
        return self._num_tokens

    def extended(self, new: Sequence[int] | Tokens) -> Tokens:
        """Append ``new`` and return all tokens, int32. Arrays returned before do not change. O(new
        tokens), amortised."""
        end = self._num_tokens + len(new)
        if end > len(self._buffer):
            self._buffer = np.concatenate((self._buffer, np.empty(end, np.int32)))
        self._buffer[self._num_tokens : end] = new
        self._num_tokens = end
        return self._buffer[:end]


class OutputAccumulator:
    """Rebuilds the outputs of one request from deltas."""

    def __init__(self, request_id: str, prompt: npt.NDArray[np.int32]) -> None:
        """``request_id`` replaces the id in the deltas."""
        self._request_id, self._prompt = request_id, prompt
        self._tokens = GrowingTokens()
        self._text: list[str] = []
        self._logprobs: list[SampledToken] = []
        self._prompt_logprobs: tuple[SampledToken | None, ...] | None = None
        self.last: RequestOutput | None = None
        """Newest output, or None before the first."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the answer so far."""
        return len(self._tokens)

    def add(self, delta: OutputDelta) -> RequestOutput:
        """Return the complete output that ``delta`` was made of. O(new tokens), amortised."""
        if delta.new_text:
            self._text.append(delta.new_text)
        self._logprobs.extend(delta.new_logprobs)
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
        self.last = RequestOutput(
            request_id=self._request_id,
            prompt_token_ids=self._prompt,
            new_token_ids=delta.new_token_ids,
            new_text=delta.new_text,
            new_logprobs=delta.new_logprobs,
            output=self._tokens.extended(delta.new_token_ids),
            all_text=self._text,
            num_pieces=len(self._text),
            cached_len=delta.cached_len,
            losses=delta.losses,
            finish_reason=delta.finish_reason,
            error=None,
            is_refused=False,
            timings=delta.timings,
            num_preemptions=delta.num_preemptions,
            all_logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
            drafts=None if delta.drafts is None else _counts(delta.drafts),
            transferred=delta.transferred,
        )
        return self.last


def _counts(delta: DraftDelta) -> DraftCounts:
    return DraftCounts(delta.num_verified, _counter(delta.drafted), _counter(delta.accepted))


def _counter(entries: Iterable[tuple[str, int, int]]) -> Counter[tuple[str, int]]:
    return Counter({(source, place): number for source, place, number in entries})
