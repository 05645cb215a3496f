"""Messages between a front end and an engine in a thread, a process or a replica."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np

from engine.errors import WireError
from engine.requests.request import RequestSpec
from engine.text.answers import FinishReason, RequestOutput
from engine.text.grammar import Grammar


class EngineMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of the messages. The type is encoded in the first field. A request that its front end
    has validated is a message too: its ``RequestSpec``."""


class Abort(EngineMessage, frozen=True):
    """The end of a request: its client has disconnected, or the server has read enough."""

    request_id: str
    reason: FinishReason


class EndEngine(EngineMessage, frozen=True):
    """Accept no more requests, and finish those in progress unless ``at_once``."""

    at_once: bool


class Question(EngineMessage, frozen=True, kw_only=True):
    """Base of the messages with a ``Reply``. All but ``Compile`` are answered between two steps."""

    number: int = 0
    """Number of the reply, set by the front end that sends the question."""


class Compile(Question, frozen=True):
    """Compile a grammar in advance for requests of a namespace, in a separate thread."""

    grammar: Grammar
    namespace: str | None = None


class Ask(Question, frozen=True):
    """Call ``cache_view``, ``reset_prefix_cache`` or ``disconnect``; ``report`` is for replicas."""

    topic: Literal["report", "cache_view", "reset_cache", "stop_accepting"]


class Alive(Question, frozen=True):
    """Requests without a last output, for a comparison. The reply is (those that the engine does
    not have, number of those that only the engine had and has ended)."""

    request_ids: list[str]


class EndSession(Question, frozen=True):
    """See ``Engine.end_session``."""

    request_id: str


class OpenView(Question, frozen=True):
    """Open a view of the cache and its requests. The reply is its number."""

    replica: int = 1
    """Number of the replica, from 1. One engine ignores it."""


class AskView(Question, frozen=True):
    """Ask a view for the ``whole`` state with which its reader starts, for the changes since the
    last question, or for details of a ``node``; or close it."""

    view: int
    topic: Literal["changes", "whole", "node", "close"]
    node: int = 0


ToEngine = RequestSpec | Abort | EndEngine | Compile | Ask | Alive | EndSession | OpenView | AskView


class Exactness(msgspec.Struct, frozen=True):
    """Result of the check at the start that hits equal cold runs; see ``engine.runner.build``."""

    digest: str = ""
    """Digest of the checked numbers. Empty if nothing was checked."""
    different: tuple[str, ...] = ()
    """Results with different bits: ``hits``, ``batches``, ``logits``."""
    rounded_to: str = ""
    """Format to which checkpoints are rounded, so that hits differ. Empty if they are not."""

    @property
    def sentence(self) -> str:
        if not self.digest:
            return "not checked: Triton's kernels are checked on a GPU, unless warm_up is off"
        if self.different:
            return (
                f"NOT exact with these kernels on this processor: {', '.join(self.different)} "
                "differ from a cold run in the last bits; the server continues"
            )
        if self.rounded_to:
            return (
                f"NOT exact: checkpoints are rounded to {self.rounded_to}, so hits differ slightly "
                "from cold runs; --checkpoint-dtype auto is exact"
            )
        return "hits on prompt tokens equal cold runs bit for bit (checked at the start)"

    @property
    def fingerprint(self) -> str:
        """Value of ``system_fingerprint`` in responses. Engines with equal weights, settings and
        fingerprints compute equal bits."""
        if not self.digest:
            return "unchecked"
        is_exact = not self.different and not self.rounded_to
        return f"{'exact' if is_exact else 'inexact'}-{self.digest[:12]}"


class EngineFacts(EngineMessage, frozen=True):
    """Facts about an engine for its front end. The first message of a process: the model is
    loaded."""

    vocab_size: int
    max_model_len: int
    model_name: str
    exactness: Exactness
    screen: str = ""
    """Text of the start screen of an engine in another process."""


class Refused(EngineMessage, frozen=True):
    """The model cannot be loaded; ``reason`` is one sentence."""

    reason: str


class Outputs(EngineMessage, frozen=True):
    """All outputs of one step."""

    news: tuple[RequestOutput, ...]


class Seen(EngineMessage, frozen=True):
    """State of an engine after a step: ``Engine.cache_view``. Sent without a question."""

    view: Any


class Reply(EngineMessage, frozen=True):
    """Reply to a ``Question``."""

    number: int
    value: Any = None
    error: WireError | None = None


FromEngine = EngineFacts | Refused | Outputs | Seen | Reply


def plain(value: object) -> memoryview:
    """Return the bytes of a prompt: the ``enc_hook`` of msgspec."""
    if isinstance(value, np.ndarray):
        return value.data
    raise TypeError(f"{type(value).__name__} cannot be sent")


def prompt_of(kind: type, data: bytes) -> np.ndarray:
    """Return the prompt with these bytes: the ``dec_hook`` of msgspec. It cannot be written."""
    return np.frombuffer(data, np.int32)
