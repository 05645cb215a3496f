"""What crosses between a server and its engine's process: plain data, as MessagePack.

Numbers, texts and bytes alone: reading a message runs no code of the other side.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from engine.errors import WireError
from engine.requests.grammar import Grammar
from engine.requests.sampling_params import SamplingParams
from engine.text.output_delta import OutputDelta


class WorkerMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A frozen record; which one it is stands at its beginning."""


class Submit(WorkerMessage, frozen=True):
    """A prompt, checked."""

    request_id: str
    prompt: bytes
    """int32[n] in the machine's byte order."""
    sampling: SamplingParams
    namespace: str | None
    boundaries: tuple[int, ...]
    answer_survives: bool
    ends_session: bool
    prompt_logprobs: int | None
    grammar: Grammar | None
    arrival_s: float
    """By ``time.perf_counter``, which is one clock for all processes of a machine."""


class Abort(WorkerMessage, frozen=True):
    """Its client has left."""

    request_id: str


Question = Literal[
    "report",
    "view",
    "reset",
    "end session",
    "stop accepting",
    "watch",
    "take",
    "whole",
    "node",
    "unwatch",
]


class Ask(WorkerMessage, frozen=True):
    """A question about the engine, done between two steps."""

    number: int
    """Of its reply."""
    what: Question
    argument: int = 0
    """Which watch is asked; of ``node``: see ``node``."""
    node: int = 0
    request_id: str = ""
    """Newest request of the session that ends."""


class Compile(WorkerMessage, frozen=True):
    """A grammar to make ready; done in a thread of its own."""

    number: int
    grammar: Grammar


class End(WorkerMessage, frozen=True):
    """Take no more requests; finish those there are, or none ``at_once``."""

    at_once: bool


ToEngine = Submit | Abort | Ask | Compile | End


class Ready(WorkerMessage, frozen=True):
    """The model is loaded."""

    vocab_size: int
    max_model_len: int
    model_name: str
    screen: str
    """What is said of it at the start."""


class Refused(WorkerMessage, frozen=True):
    """It can not be loaded, in one sentence."""

    reason: str


class RequestFailed(msgspec.Struct, frozen=True, array_like=True):
    """A request that gets no more news."""

    request_id: str
    error: WireError


class Outputs(WorkerMessage, frozen=True):
    """All that one step made."""

    num_received: int
    """Prompts that came so far."""
    num_waiting: int
    news: tuple[OutputDelta, ...]
    ended: tuple[RequestFailed, ...]


class Reply(WorkerMessage, frozen=True):
    """To an ``Ask`` or ``Compile``."""

    number: int
    value: Any = None
    error: WireError | None = None


FromEngine = Ready | Refused | Outputs | Reply
