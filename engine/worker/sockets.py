"""Sockets between a server and its engine's process: two of ZeroMQ, one per direction.

Sending never waits: messages that the other side has not read are queued in memory. Messages arrive
complete or not at all, and in order.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from engine.messages import FromEngine, ToEngine, plain

Received = TypeVar("Received")


class SocketsClosed(Exception):
    """Another thread has closed this end of the connection."""


class Sockets(Generic[Received]):
    """One end of the connection. Any thread may call ``send``, one thread ``receive``."""

    def __init__(self, folder: str, *, is_server: bool) -> None:
        """``folder``: contains the sockets. The server makes it, and no other user has access."""
        self._context = zmq.Context()
        self._out: zmq.Socket[bytes] = self._context.socket(zmq.PUSH)
        self._in: zmq.Socket[bytes] = self._context.socket(zmq.PULL)
        self._lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder(enc_hook=plain)
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
        """Return the next message, or None if none has arrived. Raises SocketsClosed if another
        thread has closed this end."""
        try:
            data = self._in.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        except zmq.ContextTerminated:
            self._in.close()
            raise SocketsClosed from None
        message: Received = self._decoder.decode(data)
        return message

    def wait(self, timeout_s: float | None, other_fd: int | None = None) -> bool:
        """Wait for a message, at most ``timeout_s``.

        Returns False if none has arrived or ``other_fd`` is readable. Raises SocketsClosed if
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
            raise SocketsClosed from None
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
