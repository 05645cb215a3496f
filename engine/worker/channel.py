"""Channel between a server and its engine's process: two ZeroMQ sockets, one per direction.

Sending never waits: messages that the other side has not read are queued in memory. Messages arrive
complete or not at all, and in order.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
import zmq

from engine.async_engine import Question
from engine.errors import WireError
from engine.requests.grammar import Grammar
from engine.requests.spec import RequestSpec, SamplingParams
from engine.text.outputs import FinishReason, OutputDelta


class WorkerMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of the messages. The type is encoded in the first field."""


class Submit(WorkerMessage, frozen=True):
    """Submission of a checked request. The fields between the first and the last are those of
    ``RequestSpec``."""

    prompt: bytes
    """int32[n] in the machine's byte order."""
    request_id: str
    sampling: SamplingParams
    namespace: str | None
    boundaries: tuple[int, ...]
    answer_survives: bool
    ends_session: bool
    answer_starts_text: bool
    call_marks: tuple[str, ...]
    save_at: tuple[int, ...]
    prompt_logprobs: int | None
    choice_of: str | None
    grammar: Grammar | None
    arrival_s: float
    """Time by ``time.perf_counter``, which is the same clock in all processes of a machine."""

    @classmethod
    def of(cls, spec: RequestSpec) -> Submit:
        """Return the message for a ``spec`` with an id, token ids and sampling parameters."""
        prompt = np.ascontiguousarray(spec.prompt, np.int32).tobytes()
        options = {name: getattr(spec, name) for name in cls.__struct_fields__[1:-1]}
        return cls(prompt=prompt, arrival_s=time.perf_counter(), **options)

    @property
    def spec(self) -> RequestSpec:
        """The submitted request."""
        options = {name: getattr(self, name) for name in self.__struct_fields__[1:-1]}
        return RequestSpec(np.frombuffer(self.prompt, np.int32), **options)


class Abort(WorkerMessage, frozen=True):
    """The end of a request: its client has disconnected, or the server has read enough."""

    request_id: str
    reason: FinishReason


class AskEngine(WorkerMessage, frozen=True):
    """A question about the engine, answered between two steps."""

    number: int
    """Number of the reply."""
    what: Question
    arguments: tuple[int | str, ...] = ()
    """Arguments of the method, after the number of the view for questions to a view."""


class Compile(WorkerMessage, frozen=True):
    """A grammar to compile, in a separate thread."""

    number: int
    grammar: Grammar


class EndEngine(WorkerMessage, frozen=True):
    """Accept no more requests, and finish those in progress unless ``at_once``."""

    at_once: bool


ToEngine = Submit | Abort | AskEngine | Compile | EndEngine


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


Received = TypeVar("Received")


class ChannelClosed(Exception):
    """Another thread has closed this end of the channel."""


class Channel(Generic[Received]):
    """One end of a channel. Any thread may call ``send``, one thread ``receive``."""

    def __init__(self, folder: str, *, is_server: bool) -> None:
        """``folder``: contains the sockets. The server makes it, and no other user has access."""
        self._context = zmq.Context()
        self._out: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        self._in: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: Any = msgspec.msgpack.Decoder(FromEngine if is_server else ToEngine)
        for socket, is_to_engine in ((self._out, is_server), (self._in, not is_server)):
            socket.set_hwm(0)
            socket.linger = 1000
            address = f"ipc://{folder}/{'to' if is_to_engine else 'from'}"
            socket.bind(address) if is_server else socket.connect(address)

    @property
    def fd(self) -> int:
        """Descriptor that becomes readable when messages arrive. Call ``receive`` until it returns
        None, because the descriptor is signalled only once."""
        return int(self._in.getsockopt(zmq.FD))

    def send(self, message: ToEngine | FromEngine) -> None:
        """Send ``message``. Does nothing if the other side has gone. O(size of the message).

        Raises:
          ValueError: a text in it cannot be encoded in UTF-8.
          OverflowError: an integer in it does not fit into 64 bits.
        """
        data = self._encoder.encode(message)
        with self._lock, suppress(zmq.Again):
            if not self._out.closed:
                self._out.send(data, zmq.NOBLOCK)

    def meet(self, timeout_s: float) -> bool:
        """Wait at most ``timeout_s`` for a connection to the other side. Returns True if there is
        one."""
        return bool(self._out.poll(round(1e3 * timeout_s), zmq.POLLOUT))

    def receive(self) -> Received | None:
        """Return the next message, or None if none has arrived. Raises ChannelClosed if another
        thread has closed this end."""
        try:
            data = self._in.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        except zmq.ContextTerminated:
            self._in.close()
            raise ChannelClosed from None
        message: Received = self._decoder.decode(data)
        return message

    def wait(self, timeout_s: float | None, other_fd: int | None = None) -> bool:
        """Wait for a message, at most ``timeout_s``.

        Returns False if none has arrived or ``other_fd`` is readable. Raises ChannelClosed if
        another thread has closed this end.
        """
        poller = zmq.Poller()
        poller.register(self._in, zmq.POLLIN)
        if other_fd is not None:
            poller.register(other_fd, zmq.POLLIN)
        try:
            ready = dict(poller.poll(None if timeout_s is None else round(1e3 * timeout_s)))
        except zmq.ContextTerminated:
            self._in.close()
            raise ChannelClosed from None
        return self._in in ready

    def close(self) -> None:
        """Close this end; called by the receiving thread."""
        self._in.close()
        self.finish()

    def finish(self) -> None:
        """Close this end from another thread. Returns when sent messages are on their way, after at
        most a second, and the receiving thread has closed its socket."""
        with self._lock:
            self._out.close()
        self._context.term()
