"""Calls to a replica, facts about it, and its answers."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import structs

from engine.requests.spec import RequestSpec
from engine.text.outputs import FinishReason, OutputAccumulator, RequestOutput
from hybridcache.geometry.units import counted
from hybridcache.routing.protocol import RouteRequest


@dataclass(frozen=True, slots=True)
class Order:
    """The only argument of every call to a replica."""

    request_id: str = ""
    spec: RequestSpec | None = None
    route: RouteRequest | None = None
    """Input of the router. None if ``replica`` names the destination."""
    replica: str | None = None
    sequence: int = 0
    """Number of the batch of events that is requested."""
    reason: FinishReason = "abort"
    """Reason for which a request ends."""


@dataclass(frozen=True, slots=True)
class ReplicaFacts:
    """Facts about the engines for the server."""

    vocab_size: int
    max_model_len: int
    grid: int
    page_size: int
    kv_bytes: int
    state_bytes: int
    capacity_bytes: int
    stateful: bool
    prefill_tokens_per_s: float
    """Measured at the start."""


class ReplicaAnswer(OutputAccumulator):
    """Answer of one request, as a replica sends it."""

    @property
    def broken_off(self) -> str:
        """Message for a client after the replica of its request died."""
        return (
            f"the replica that computed it died after {counted(self.num_tokens, 'token')} of the "
            "answer; send the request again"
        )

    def aborted(self, first: RequestOutput) -> RequestOutput:
        """Return the last output of an aborted answer. ``first`` is used if there was no output
        yet."""
        return structs.replace(
            self.last or first,
            new_token_ids=(),
            new_text="",
            new_logprobs=(),
            finish_reason="abort",
        )
