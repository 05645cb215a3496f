"""Messages between two engines: a TCP connection on which a short JSON object goes at a time, with
bytes behind it where it has some.

torch.distributed moves tensors whose size both sides know between processes that found each other.
What comes before that (who asks, for which tokens, what is coming, that somebody has gone) is said
here.
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
    """Of one engine, since its start. Any thread may add."""

    prefixes: int = 0
    """That went over whole."""
    failed: int = 0
    """That did not: their requests computed here, or their askers there."""
    tokens: int = 0
    """Whose KV went over."""
    needed_bytes: int = 0
    """KV and states of the prefixes that went over whole."""
    wire_bytes: int = 0
    """Everything sent and received: these, messages, and what was in vain."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **counts: int) -> None:
        """Add to the counts named."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def as_dict(self) -> dict[str, int]:
        """By name."""
        names = [one.name for one in dataclasses.fields(self) if one.name[0] != "_"]
        with self._lock:
            return {name: getattr(self, name) for name in names}


FRAME = struct.Struct("!II")
MAX_JSON, MAX_BYTES = 1 << 20, 1 << 28
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""Seconds of silence before the system probes the other side, seconds between probes, and probes
without an answer after which the connection is gone. Idle connections have no other time limit."""


class TransferError(RuntimeError):
    """A transfer that did not come about, in one sentence."""


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
        """Sent and received; whoever moves tensors beside adds theirs."""

    @classmethod
    def connect(cls, address: tuple[str, int], timeout_s: float) -> Wire:
        """TransferError: nobody answers."""
        try:
            return cls(socket.create_connection(address, timeout_s), timeout_s)
        except OSError as error:
            raise TransferError(f"nobody answers ({error})") from error

    @property
    def is_quiet(self) -> bool:
        """Nothing has come that was not received, nor has the other side gone."""
        return not select.select([self._socket], [], [], 0)[0]

    def take_num_bytes(self) -> int:
        """Bytes sent and received since the last time."""
        count, self.num_bytes = self.num_bytes, 0
        return count

    @property
    def own_host(self) -> str:
        """This end's address."""
        return str(self._socket.getsockname()[0])

    def send(self, message: dict[str, Any], data: bytes = b"") -> None:
        """TransferError: the other side has gone, or does not take it in time."""
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
        """Return the next message and the bytes behind it.

        ``idles``: it may be long in coming. ``timeout_s``: of silence, in place of the connection's
        own. TransferError if the other side has gone, is silent for too long, or sends anything
        else."""
        usual_s = self._socket.gettimeout()
        rest_s = usual_s if timeout_s is None else timeout_s
        try:
            self._socket.settimeout(None if idles else rest_s)
            head = self._read(FRAME.size)
            self._socket.settimeout(rest_s)
            num_text, num_data = FRAME.unpack(head)
            if num_text > MAX_JSON or num_data > MAX_BYTES:
                raise TransferError("what came is no message of this protocol")
            message, data = json.loads(self._read(num_text)), self._read(num_data)
            self._socket.settimeout(usual_s)
        except (OSError, ValueError, RecursionError) as error:
            raise TransferError(f"the other side is silent or unclear ({error})") from error
        self.num_bytes += FRAME.size + num_text + num_data
        if not isinstance(message, dict):
            raise TransferError("what came is no message of this protocol")
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
        """Make the thread that sends or receives stop: for any other thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection: for the thread that uses it."""
        self.break_off()
        self._socket.close()


def join(threads: Iterable[threading.Thread], timeout_s: float) -> None:
    """Wait until all ``threads`` have ended, for ``timeout_s`` seconds in all."""
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
