"""Messages between a server and its engine's process: plain data in MessagePack.

Messages contain only numbers, texts and bytes, so reading one executes no code of the sender.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from engine.errors import WireError
from engine.requests.grammar import Grammar
from engine.requests.spec import SamplingParams
from engine.text.outputs import OutputDelta


class WorkerMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of the messages. The type is encoded in the first field."""


class Submit(WorkerMessage, frozen=True):
    """Submission of a checked prompt."""

    request_id: str
    prompt: bytes
    """int32[n] in the machine's byte order."""
    sampling: SamplingParams
    namespace: str | None
    boundaries: tuple[int, ...]
    answer_survives: bool
    ends_session: bool
    call_marks: tuple[str, ...]
    prompt_logprobs: int | None
    grammar: Grammar | None
    arrival_s: float
    """Time by ``time.perf_counter``, which is the same clock in all processes of a machine."""


class Abort(WorkerMessage, frozen=True):
    """The client of a request has disconnected."""

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
    """A question about the engine, answered between two steps."""

    number: int
    """Number of the reply."""
    what: Question
    argument: int = 0
    """Number of the view for questions to a view."""
    node: int = 0
    request_id: str = ""
    """Newest request of the session that ends."""


class Compile(WorkerMessage, frozen=True):
    """A grammar to compile, in a separate thread."""

    number: int
    grammar: Grammar


class End(WorkerMessage, frozen=True):
    """Accept no more requests, and finish those in progress unless ``at_once``."""

    at_once: bool


ToEngine = Submit | Abort | Ask | Compile | End


class Ready(WorkerMessage, frozen=True):
    """The model is loaded."""

    vocab_size: int
    max_model_len: int
    model_name: str
    screen: str
    """Text of the start screen."""


class Refused(WorkerMessage, frozen=True):
    """The model cannot be loaded; ``reason`` is one sentence."""

    reason: str


class RequestFailed(msgspec.Struct, frozen=True, array_like=True):
    """A request that failed; no further output follows."""

    request_id: str
    error: WireError


class Outputs(WorkerMessage, frozen=True):
    """All outputs of one step."""

    num_received: int
    """Number of prompts received so far."""
    num_waiting: int
    news: tuple[OutputDelta, ...]
    ended: tuple[RequestFailed, ...]


class Reply(WorkerMessage, frozen=True):
    """Reply to an ``Ask`` or ``Compile``."""

    number: int
    value: Any = None
    error: WireError | None = None


FromEngine = Ready | Refused | Outputs | Reply
