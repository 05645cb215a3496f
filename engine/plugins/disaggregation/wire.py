"""Messages between two engines: short JSON objects over a TCP connection, each optionally with
bytes.

torch.distributed moves tensors of known sizes between connected processes. Everything else
(requests, tokens, announcements of data, failures) is exchanged here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class TransferCounts:
    """Counters of one engine since its start. Safe to use from any thread."""

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
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **counts: int) -> None:
        """Add to the named counters."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def as_dict(self) -> dict[str, int]:
        """Return the counters by name."""
        names = [one.name for one in dataclasses.fields(self) if one.name[0] != "_"]
        with self._lock:
            return {name: getattr(self, name) for name in names}


FRAME = struct.Struct("!II")
MAX_JSON, MAX_BYTES = 1 << 20, 1 << 28
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""Seconds of silence before the system probes the other side, seconds between probes, and number of
unanswered probes after which the connection is closed. Idle connections have no other time
limit."""


class TransferError(RuntimeError):
    """The transfer failed; the message is one sentence."""


class Wire:
    """One end of a connection, for one thread at a time."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._socket = connection
        connection.settimeout(timeout_s)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.num_bytes = 0
        """Bytes sent and received. Tensors sent next to it are added by the caller."""

    @classmethod
    def connect(cls, address: tuple[str, int], timeout_s: float) -> Wire:
        """Connect to ``address``. Raises TransferError if there is no answer."""
        try:
            return cls(socket.create_connection(address, timeout_s), timeout_s)
        except OSError as error:
            raise TransferError(f"there is no answer ({error})") from error

    @property
    def is_quiet(self) -> bool:
        """True if no message is waiting and the other side has not gone."""
        return not select.select([self._socket], [], [], 0)[0]

    def take_num_bytes(self) -> int:
        """Return the number of bytes sent and received since the last call."""
        count, self.num_bytes = self.num_bytes, 0
        return count

    @property
    def own_host(self) -> str:
        """Address of this end."""
        return str(self._socket.getsockname()[0])

    def send(self, message: dict[str, Any], data: bytes = b"") -> None:
        """Send a message. Raises TransferError if the other side has gone, or does not receive it
        in time."""
        text = json.dumps(message).encode()
        frame = FRAME.pack(len(text), len(data)) + text + data
        try:
            self._socket.sendall(frame)
        except OSError as error:
            raise TransferError(f"the other side takes nothing ({error})") from error
        self.num_bytes += len(frame)

    def receive(
        self, *, idles: bool = False, timeout_s: float | None = None
    ) -> tuple[dict[str, Any], bytes]:
        """Return the next message and its bytes.

        With ``idles``, wait for the message without a limit. ``timeout_s`` replaces the
        connection's limit of silence. Raises TransferError if the other side has gone, is silent
        for too long, or sends anything else.
        """
        usual_s = self._socket.gettimeout()
        rest_s = usual_s if timeout_s is None else timeout_s
        try:
            self._socket.settimeout(None if idles else rest_s)
            head = self._read(FRAME.size)
            self._socket.settimeout(rest_s)
            num_text, num_data = FRAME.unpack(head)
            if num_text > MAX_JSON or num_data > MAX_BYTES:
                raise TransferError("the message does not follow this protocol")
            message, data = json.loads(self._read(num_text)), self._read(num_data)
            self._socket.settimeout(usual_s)
        except (OSError, ValueError, RecursionError) as error:
            raise TransferError(f"the other side is silent or unclear ({error})") from error
        self.num_bytes += FRAME.size + num_text + num_data
        if not isinstance(message, dict):
            raise TransferError("the message does not follow this protocol")
        return message, data

    def _read(self, num_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < num_bytes:
            piece = self._socket.recv(min(num_bytes - len(data), 1 << 20))
            if not piece:
                raise TransferError("the other side has gone")
            data += piece
        return bytes(data)

    def break_off(self) -> None:
        """Stop the thread that sends or receives. Called in any other thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection. Called in the thread that uses it."""
        self.break_off()
        self._socket.close()


def join(threads: Iterable[threading.Thread], timeout_s: float) -> None:
    """Wait until all ``threads`` have ended, for ``timeout_s`` seconds in total."""
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
