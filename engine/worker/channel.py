"""Two sockets of ZeroMQ between a server and its engine's process, one for each direction.

Sending never waits: what the other side has not read is kept by the library, in memory. A message
comes whole or not at all, and in order.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from contextlib import suppress
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from engine.worker.messages import FromEngine, ToEngine

Received = TypeVar("Received")


class ChannelClosed(Exception):
    """Nothing comes any more."""


class Channel(Generic[Received]):
    """One side's end. ``send`` may be called by any thread, ``receive`` by one."""

    def __init__(self, folder: str, *, is_server: bool) -> None:
        """``folder``: where the sockets are, which the server makes and nobody else may enter."""
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
        """Readable when something may have come; ``receive`` until None then, for it says so
        once."""
        return int(self._in.getsockopt(zmq.FD))

    def send(self, message: ToEngine | FromEngine) -> None:
        """Send ``message``; nothing happens if the other side has gone. O(size of the message).

        Raises:
            ValueError: a text in it has no UTF-8 form.
            OverflowError: an integer in it does not fit into 64 bits.
        """
        data = self._encoder.encode(message)
        with self._lock, suppress(zmq.Again):
            if not self._out.closed:
                self._out.send(data, zmq.NOBLOCK)

    def meet(self, timeout_s: float) -> bool:
        """Whether the other side can be sent to; waits for so long."""
        return bool(self._out.poll(round(1e3 * timeout_s), zmq.POLLOUT))

    def receive(self) -> Received | None:
        """The next message; None: nothing has come. ChannelClosed: another thread has finished with
        this end."""
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
        """Until something comes, for so long at most. False: it did not, or ``other_fd`` is
        readable. ChannelClosed: another thread has finished with this end."""
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
        """For the thread that receives."""
        self._in.close()
        self.finish()

    def finish(self) -> None:
        """Returns when what was sent is on its way, after a second at most, and the thread that
        waits has closed its socket."""
        with self._lock:
            self._out.close()
        self._context.term()


def make_folder() -> str:
    """A folder of this user's alone, for sockets."""
    return tempfile.mkdtemp(prefix="engine-")


def remove_folder(folder: str) -> None:
    """Both sides are connected: nobody else finds the sockets from here on."""
    shutil.rmtree(folder, ignore_errors=True)
