"""Calls to a replica, facts about it, and the answers that it sends."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import structs

from engine.requests.spec import RequestSpec
from engine.text.output_delta import OutputAccumulator
from engine.text.outputs import RequestOutput
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


class ReplicaAnswer(OutputAccumulator):
    """Answer of one request, as a replica sends it."""

    @property
    def broken_off(self) -> str:
        """Message for a client whose replica died."""
        return (
            f"the replica that computed it died after {counted(self.num_tokens, 'token')} of the "
            "answer; send the request again"
        )

    def aborted(self, first: RequestOutput) -> RequestOutput:
        """Return the last output of an answer that its reader ended. ``first`` stands for it if
        there was none."""
        return structs.replace(
            self.last or first,
            new_token_ids=(),
            new_text="",
            new_logprobs=(),
            finish_reason="abort",
        )
