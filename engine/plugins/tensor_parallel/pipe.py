"""Messages between the first rank and another one of the same machine, over a pair of sockets."""

from __future__ import annotations

import pickle
import select
import socket
import time
from typing import Any


class Line:
    """One end. Both are processes of one engine, so what comes is trusted as its own memory is."""

    def __init__(self, end: socket.socket, timeout_s: float | None = None) -> None:
        """``timeout_s``: of a message, sent or waited for; None: for ever."""
        self._socket = end
        end.settimeout(timeout_s)

    def send(self, message: object) -> None:
        """OSError: the other end has gone, or takes nothing (TimeoutError)."""
        data = pickle.dumps(message)
        self._socket.sendall(len(data).to_bytes(8, "little") + data)

    def receive(self, spin_s: float = 0.0) -> Any:
        """The next message, asked for again and again for ``spin_s`` before it is waited for:
        being woken costs more than a small step. EOFError: there will be none; TimeoutError: none
        came."""
        if spin_s:
            end, poll = time.perf_counter() + spin_s, select.poll()
            poll.register(self._socket, select.POLLIN)
            while not poll.poll(0) and time.perf_counter() < end:
                pass
        size = int.from_bytes(self._read(8), "little")
        return pickle.loads(self._read(size))

    def set_timeout(self, timeout_s: float | None) -> None:
        """Of messages from now on."""
        self._socket.settimeout(timeout_s)

    def _read(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            try:
                part = self._socket.recv(count - len(parts))
            except ConnectionError:
                part = b""
            if not part:
                raise EOFError("the other end has gone")
            parts += part
        return bytes(parts)

    def fileno(self) -> int:
        """Of the socket, which closes where the other end does."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()
