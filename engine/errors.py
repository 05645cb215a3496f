"""Reasons why a request gets no answer, their form on the wire, and how a process ended; and the
type of JSON."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import msgspec

logger = logging.getLogger(__name__)
Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""Value that is written as JSON."""
if TYPE_CHECKING:
    JsonObject: TypeAlias = dict[str, Json]
else:
    JsonObject = dict[str, Any]  # For msgspec, which has no recursive types.
STOPPED = "The engine stopped before the answer was done."
STOPPING = "The engine is stopping and takes no more requests."
FAILED = "The engine has failed; see its log for the reason, and restart it."


class RunnerLost(RuntimeError):
    """The runner can compute nothing any more; the message gives the reason in one sentence."""


class WireError(msgspec.Struct, frozen=True, array_like=True):
    """A ``RequestError`` as plain data for MessagePack, JSON and pickle."""

    kind: str
    message: str
    numbers: dict[str, int] = {}


class RequestError(RuntimeError):
    """Base class of the reasons why a request gets no answer. The wire keeps class, message and
    attributes, so that a client gets the same status whichever process refused its request."""

    kind: ClassVar[str] = "failed"
    kinds: ClassVar[dict[str, type[RequestError]]] = {}

    def __init_subclass__(cls) -> None:
        cls.kinds[cls.kind] = cls

    @staticmethod
    def of(error: BaseException) -> RequestError:
        """Return a RequestError, a ValueError as InvalidRequest, others as StepFailed (logged)."""
        if isinstance(error, RequestError):
            return error
        if isinstance(error, ValueError):
            return InvalidRequest(str(error))
        logger.error("A request failed.", exc_info=error)
        return StepFailed(f"{type(error).__name__}: {error}")

    @staticmethod
    def from_wire(wire: WireError) -> RequestError:
        """Return the error that ``to_wire`` described; an unknown kind becomes StepFailed."""
        kind = RequestError.kinds.get(wire.kind, StepFailed)
        error = kind.__new__(kind, wire.message)
        vars(error).update(wire.numbers)
        return error

    def to_wire(self) -> WireError:
        """Return the error as plain data."""
        return WireError(self.kind, str(self), dict(vars(self)))


class InvalidRequest(RequestError, ValueError):
    """The request cannot be served; sending the same request again would fail again."""

    kind = "invalid"


class ContextOverflow(InvalidRequest):
    """The prompt, or the prompt with its answer, does not fit into the context."""

    kind = "context_overflow"

    def __init__(self, prompt_len: int, max_tokens: int, max_model_len: int) -> None:
        """``max_tokens``: requested length of the answer, at least 1 unless it may be empty."""
        self.prompt_len, self.max_tokens = prompt_len, max_tokens
        self.max_model_len = max_model_len
        is_prompt = prompt_len + min(max_tokens, 1) > max_model_len
        advice = "shorten the prompt" if is_prompt else "shorten the prompt or lower max_tokens"
        advice += ", or start the server with a larger --max-model-len"
        answer = f" and its answer needs {max_tokens} more" if max_tokens else ""
        super().__init__(
            f"This model's maximum context length is {max_model_len} tokens. However, the prompt "
            f"has {prompt_len} tokens{answer}: {advice}."
        )


class DuplicateId(InvalidRequest):
    """A request with the same id is in progress."""

    kind = "duplicate_id"

    def __init__(self, request_id: str) -> None:
        super().__init__(
            f"A request with the id {request_id!r} is being answered already: give each request "
            "its own id."
        )


class QueueFull(RequestError):
    """The queue of waiting requests is full."""

    kind = "queue_full"

    def __init__(self, max_queue: int) -> None:
        waiting = f"{max_queue} requests are" if max_queue != 1 else "1 request is"
        super().__init__(f"{waiting} waiting already; try again later.")


class EngineStopped(RequestError):
    """The engine accepts no more requests, ended before this one was done, or has no memory for
    it."""

    kind = "stopped"


class StepFailed(RequestError):
    """The step that computed this request failed; others may go on."""

    kind = "failed"


def describe_exit(code: int) -> str:
    """Return how a process ended, as the end of a sentence. ``code``: negative if by a signal.

    >>> describe_exit(3), describe_exit(-11)
    ('ended with exit code 3', 'was ended by SIGSEGV')
    >>> describe_exit(-35)
    'was ended by signal 35'
    >>> describe_exit(-9)
    'was ended by SIGKILL, as the system does when memory runs out'
    """
    if code >= 0:
        return f"ended with exit code {code}"
    whys: dict[int, str] = {
        signal.SIGKILL: ", as the system does when memory runs out",
        signal.SIGBUS: ", as the system does when a file of weights is cut off",
    }
    names = {int(each): each.name for each in signal.Signals}  # Most real-time signals have none.
    return f"was ended by {names.get(-code, f'signal {-code}')}{whys.get(-code, '')}"
