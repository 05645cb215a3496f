"""One answer put together from what a replica sends: the news of each step, without what the other
side has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from msgspec import structs

from engine.requests.spec import RequestSpec
from engine.text.growing import GrowingTokens
from engine.text.outputs import RequestOutput, SampledToken
from hybridcache.geometry.units import counted
from hybridcache.routing.protocol import RouteRequest


@dataclass(frozen=True, slots=True)
class Order:
    """The one argument of every call to a replica."""

    request_id: str = ""
    spec: RequestSpec | None = None
    route: RouteRequest | None = None
    """What the router goes by; None: ``replica`` says where it goes."""
    replica: str | None = None
    sequence: int = 0
    """Of the batch of events that is due."""


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """What a server needs to know of the engines behind it."""

    vocab_size: int
    max_model_len: int
    grid: int
    page_size: int
    kv_bytes: int
    state_bytes: int
    capacity_bytes: int
    stateful: bool
    prefill_tokens_per_s: float
    """Measured at the start, on a prompt of its own."""


NO_TOKENS: npt.NDArray[np.int32] = np.empty(0, np.int32)


def news_of(output: RequestOutput) -> RequestOutput:
    """``output`` without the prompt and what earlier steps gave: what is sent."""
    return structs.replace(
        output,
        prompt_token_ids=NO_TOKENS,
        output=NO_TOKENS,
        all_text=(),
        num_pieces=0,
        all_logprobs=(),
    )


class Answer:
    """What has come of one request's answer."""

    def __init__(self, request_id: str, prompt: npt.NDArray[np.int32]) -> None:
        self._request_id, self._prompt = request_id, prompt
        self._last: RequestOutput | None = None
        self._tokens = GrowingTokens()
        self._text: list[str] = []
        self._logprobs: list[SampledToken] = []

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    @property
    def broken_off(self) -> str:
        """What a client is told whose replica died."""
        return (
            f"the replica that computed it died after {counted(self.num_tokens, 'token')} of the "
            "answer; send the request again"
        )

    def whole(self, output: RequestOutput) -> RequestOutput:
        """The output that ``news_of`` made ``output`` of. O(new tokens), amortised."""
        if output.new_text:
            self._text.append(output.new_text)
        self._logprobs.extend(output.new_logprobs)
        self._last = structs.replace(
            output,
            request_id=self._request_id,
            prompt_token_ids=self._prompt,
            output=self._tokens.extended(output.new_token_ids),
            all_text=self._text,
            num_pieces=len(self._text),
            all_logprobs=self._logprobs,
        )
        return self._last

    def aborted(self, first: RequestOutput) -> RequestOutput:
        """Return the last output of an answer that its reader ended; ``first`` stands for it where
        none has come."""
        return structs.replace(
            self._last or first,
            new_token_ids=(),
            new_text="",
            new_logprobs=(),
            finish_reason="abort",
        )
