"""Messages between two engines over ZeroMQ.

A prefill engine has one ROUTER socket. A decode engine opens a DEALER socket for each prefix, sends
a ``PrefixRequest``, and receives frames of ``Data``: the KV of all tokens in order, then the state,
or ``Failed``. It confirms each with ``Taken``, and closes the connection at the end.
``PrefixBuffer`` converts between bytes and memory: the arena rows of tokens, and those of the state
at the end of a prefix, both with the parts of a multi-token head.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
import torch
import zmq

from engine.errors import WireError
from engine.messages import plain, prompt_of
from engine.requests.request import RequestSpec
from engine.runner.device import HostCopy
from engine.runner.model_runner import ModelRunner
from hybridcache.allocators.moves import Indices
from kernels.upload import upload

IO_THREADS = 2
"""Number of ZeroMQ's threads per engine, to which connections are distributed."""
MAX_ASK_BYTES = 1 << 26
"""Maximum size of a message to a prefill engine."""
MAX_UNREAD = 32
"""Maximum number of messages of one connection that are received and not read."""
LINGER_S = 0.5
"""Maximum time in which a closed connection sends its last messages."""
IS_LOST = (
    zmq.EVENT_CLOSED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
Position = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class TransferError(RuntimeError):
    """The transfer failed; the message is one sentence."""


class TransferMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of the messages. The type is encoded in the first field."""


class PrefixRequest(TransferMessage, frozen=True):
    """Request for a prefix."""

    identity: dict[str, str]
    """See ``identity``."""
    start: Position
    """First position without KV."""
    spec: RequestSpec
    """The request that computes the prefix: its prompt has one more token."""


class Taken(TransferMessage, frozen=True):
    """Confirmation of all bytes received so far."""

    num_bytes: Annotated[int, msgspec.Meta(ge=0)]


class Data(TransferMessage, frozen=True):
    """The next rows, or at last the state. The bytes follow in a second frame."""


class Alive(TransferMessage, frozen=True):
    """The prefix is still being computed."""


class Failed(TransferMessage, frozen=True):
    """The prefix was refused, or could not be computed."""

    error: WireError


ToPrefill = PrefixRequest | Taken
ToDecode = Data | Alive | Failed
ENCODER = msgspec.msgpack.Encoder(enc_hook=plain)
FOR_PREFILL = msgspec.msgpack.Decoder(ToPrefill, dec_hook=prompt_of)
FOR_DECODE: msgspec.msgpack.Decoder[ToDecode] = msgspec.msgpack.Decoder(ToDecode)


@dataclass(slots=True)
class TransferCounts:
    """Counters of one engine since its start. Each is changed by one thread only."""

    prefixes: int = 0
    """Number of complete transfers."""
    failed: int = 0
    """Number of failed transfers. The decode engines computed these prompts."""
    tokens: int = 0
    """Number of tokens of transferred KV."""
    needed_bytes: int = 0
    """Bytes of KV and states of complete transfers."""
    wire_bytes: int = 0
    """All bytes sent and received, including messages and failed transfers."""


def open_socket(
    context: zmq.Context[zmq.Socket[bytes]], kind: int, host: str, timeout_s: float
) -> zmq.Socket[bytes]:
    """Return a new socket for ``host``. Connections that do not complete ZeroMQ's handshake, or do
    not answer its heartbeat, within ``timeout_s`` are closed."""
    made: zmq.Socket[bytes] = context.socket(kind)
    made.linger = round(1e3 * LINGER_S)
    made.rcvhwm = MAX_UNREAD
    made.set(zmq.IPV6, ":" in host)
    made.handshake_ivl = made.heartbeat_ivl = max(1, round(1e3 * timeout_s))
    made.set(zmq.RECONNECT_IVL, 1 << 30)  # Never; with -1, unread messages would be dropped.
    return made


def endpoint(host: str, port: int) -> str:
    """Return the address in ZeroMQ's form."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


class Connection:
    """A decode engine's connection for one prefix. Only ``wait`` waits."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: tuple[str, int],
        *,
        timeout_s: float,
        max_bytes: int,
    ) -> None:
        """Start to connect. ``max_bytes``: maximum size of a message. Raises TransferError if there
        is no such address."""
        self._timeout_s, self._heard_s = timeout_s, time.monotonic()
        self.num_bytes = 0
        """Bytes sent and received."""
        self._socket = open_socket(context, zmq.DEALER, address[0], timeout_s)
        self._socket.maxmsgsize = max_bytes
        self._events = self._socket.get_monitor_socket(IS_LOST)
        try:
            self._socket.connect(endpoint(*address))
        except zmq.ZMQError as error:
            self.close()
            raise TransferError(f"there is no such address ({error})") from error

    def send(self, message: ToPrefill) -> None:
        """Send a message. Raises TransferError if the other side has gone."""
        data = ENCODER.encode(message)
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            raise TransferError("the other side has gone") from None
        self.num_bytes += len(data)

    def wait(self, timeout_s: float) -> None:
        """Sleep until there is something to receive."""
        self._socket.poll(round(1e3 * timeout_s))

    def receive(self) -> tuple[ToDecode, memoryview] | None:
        """Return the next message and its bytes, which keep ZeroMQ's memory alive, or None if
        nothing has arrived. Raises TransferError if nothing will arrive."""
        is_lost = int(self._events.get(zmq.EVENTS)) & zmq.POLLIN  # Read before the messages.
        now = time.monotonic()
        try:
            head, *rest = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            if is_lost:
                raise TransferError("there is no answer, or the other side has gone") from None
            if now - self._heard_s > self._timeout_s:
                raise TransferError(f"it was silent for {self._timeout_s:g} seconds") from None
            return None
        self._heard_s = now
        data = rest[0].buffer if rest else memoryview(b"")
        self.num_bytes += len(head) + len(data)
        try:
            return FOR_DECODE.decode(head.buffer), data
        except ValueError as error:
            raise TransferError(f"the other side is unclear ({error})") from error

    def close(self) -> None:
        # In this order: a thread of ZeroMQ would wait for ever to report an event to ``_events``.
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._events.close()
            self._socket.close()

    def __del__(self) -> None:
        """Close a connection that an exception has left open."""
        with suppress(AttributeError):  # The exception was in ``__init__``.
            self.close()


PROTOCOL = "8"
"""Version of the messages between two engines."""
PIECE_BYTES = 4 << 20
"""Maximum size of one message, except for a state and the KV of a single token."""


def identity(runner: ModelRunner) -> dict[str, str]:
    """Describe all properties that two engines must share. O(bytes of the weights)."""
    return {"transfer protocol": PROTOCOL, **runner.identity()}


class PrefixBuffer:
    """Reads and writes a runner's memory. For the thread that computes, between two steps."""

    def __init__(self, runner: ModelRunner) -> None:
        self._settle, self._slab_rows = runner.settle, runner.memory.slab_rows
        self._rows = runner.tensors.rows.view(runner.dtype)
        self.row_bytes, self.state_bytes = runner.memory.row_bytes, runner.memory.slot_bytes

    def slot_rows(self, slot: int) -> Indices:
        """Return the rows of the slab in which a checkpoint is stored."""
        first = slot * self._slab_rows
        return np.arange(first, first + self._slab_rows, dtype=np.int32)

    @torch.inference_mode()
    def read_rows(self, rows: Indices) -> HostCopy:
        """Read rows, int32[n]."""
        self._settle()
        return HostCopy(self._rows[self._index(rows)])

    @torch.inference_mode()
    def write_rows(self, rows: Indices, data: torch.Tensor) -> None:
        """Write the bytes of ``read_rows``, uint8, to other rows."""
        self._settle()
        values = data.view(self._rows.dtype).view(len(rows), -1)
        self._rows[self._index(rows)] = upload(values, values.dtype, self._rows.device)

    def _index(self, rows: Indices) -> torch.Tensor:
        return upload(rows.astype(np.int64), torch.int64, self._rows.device)
