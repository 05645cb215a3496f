"""What crosses from the server to a replica and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.requests.spec import RequestSpec
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
