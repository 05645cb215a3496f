"""Connection to an engine in a separate process.

No step of that engine waits for the interpreter of the HTTP server. The process is a new
interpreter, not a fork, because neither torch nor a device survives a fork. It blocks the signals
that end a server, which terminals and service managers send to both. It ends when the server sends
a request to stop, or is gone.

Messages go over two sockets of ZeroMQ, one per direction. Sending never waits: messages that the
other side has not read are queued in memory. They arrive complete or not at all, and in order.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from engine.async_engine import AsyncEngine, EngineChannel
from engine.config import EngineConfig
from engine.engine import load_tokenizer_of, names_tokenizer
from engine.errors import FAILED, describe_exit
from engine.messages import (
    EndEngine,
    EngineFacts,
    FromEngine,
    Outputs,
    Ready,
    Refused,
    ToEngine,
    plain,
)
from engine.requests.request import RequestSpec
from engine.text.tokenizer import Tokenizer
from engine.worker.spawn import Spawned

logger = logging.getLogger(__name__)
POLL_S = 0.1
MEET_S = 10.0
"""Seconds from the first message of the process until it can receive one. It takes milliseconds,
except on a machine that swaps."""
PATIENCE_S = 5.0
"""Time that a process may take to end after the stop command, before it is killed."""


Received = TypeVar("Received")
Result = TypeVar("Result")


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


def start_engine(
    config: EngineConfig, spawned: Spawned, meanwhile: Callable[[], Result]
) -> tuple[AsyncEngine, str, Result]:
    """Connect to the process that loads the model of ``config``, and return (the engine, its start
    screen, what ``meanwhile`` returned while the model was loaded).

    Raises ValueError if the model cannot be loaded.
    """
    process = spawned.process
    # The folder is removed when both sides are connected, so that no other process can connect.
    with spawned.folder as folder:
        sockets: Sockets[FromEngine] = Sockets(folder, is_server=True)
        try:
            # The process loads the model during this time.
            result = meanwhile()
            tokenizer = load_tokenizer_of(config, 0) if names_tokenizer(config) else None
            ready = _wait_for(process, sockets)
            tokenizer = tokenizer or load_tokenizer_of(config, ready.facts.vocab_size)
            channel = ProcessChannel(config, tokenizer, ready.facts, process, sockets)
            return AsyncEngine(channel), ready.screen, result
        except BaseException:
            process.kill()
            process.communicate()
            sockets.close()
            raise


def _wait_for(process: subprocess.Popen[bytes], sockets: Sockets[FromEngine]) -> Ready:
    while True:
        has_ended = process.poll() is not None
        message = sockets.receive() if sockets.wait(0.0 if has_ended else POLL_S) else None
        match message:
            case Ready():
                if sockets.meet(MEET_S):
                    return message
                process.kill()
            case Refused():
                raise ValueError(message.reason)
        if has_ended:
            raise ValueError(
                "Before the model was loaded, the engine's process "
                f"{describe_exit(process.returncode)}; see its output above."
            )


class ProcessChannel(EngineChannel):
    """Connection to a loaded engine in a separate process. After ``start``, everything except
    ``send`` and ``stop`` belongs to one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer,
        facts: EngineFacts,
        process: subprocess.Popen[bytes],
        sockets: Sockets[FromEngine],
    ) -> None:
        """Take over ``process`` and ``sockets``, which ``stop`` or ``drain`` ends."""
        self.config, self.tokenizer, self.facts = config, tokenizer, facts
        self._process, self._sockets = process, sockets
        self._num_sent = self._num_received = self._num_waiting = 0
        self._ended = threading.Event()
        self._was_killed = self._is_released = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return not self._ended.is_set()

    @property
    def num_queued(self) -> int:
        return self._num_waiting + self._num_sent - self._num_received

    def connect(self, front: AsyncEngine) -> None:
        self._front = front

    def start(self) -> None:
        """Follow the process in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._closed = asyncio.Event()
        self._fd = self._sockets.fd
        self._loop.add_reader(self._fd, self._read)
        self._read()
        threading.Thread(target=self._wait, name="engine process", daemon=True).start()

    def send(self, message: ToEngine) -> None:
        try:
            self._sockets.send(message)
        except UnicodeEncodeError:
            raise ValueError(
                "a text of this request cannot be encoded in UTF-8: remove lone surrogates "
                "(\\ud800 to \\udfff)."
            ) from None
        except OverflowError:
            raise ValueError(
                "an integer of this request does not fit into 64 bits: use a smaller one."
            ) from None
        self._num_sent += isinstance(message, RequestSpec)

    async def drain(self) -> None:
        if self._loop is None:
            self._kill()
            return
        self.send(EndEngine(at_once=False))
        await self._closed.wait()
        self._loop.remove_reader(self._fd)
        self._release()

    def stop(self) -> None:
        """End the process after its step. It is killed if that takes longer than
        ``PATIENCE_S``."""
        if self._loop is None:
            self._kill()
            return
        self.send(EndEngine(at_once=True))
        if not self._ended.wait(PATIENCE_S):
            self._was_killed = True
            self._process.kill()
            self._ended.wait()

    def _kill(self) -> None:
        """Kill the process before ``start``, while no caller waits."""
        self._process.kill()
        self._process.wait()
        self._ended.set()
        self._release()

    def _release(self) -> None:
        if self._is_released:
            return
        self._is_released = True
        self._sockets.close()
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()

    def _wait(self) -> None:
        """Wait for the end of the process, in a separate thread."""
        code = self._process.wait()
        loop = self._loop
        assert loop is not None
        self._ended.set()
        if not loop.is_closed():
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._close, code)

    def _close(self, code: int) -> None:
        """Read the last messages of the process, which has ended."""
        try:
            self._read()
        except Exception:
            logger.exception("The last messages of the engine's process cannot be read.")
        if code and not self._was_killed:
            self.failure = _death(code)
        self._front.closed(self.failure)
        self._closed.set()

    def _read(self) -> None:
        """Process all messages that have arrived."""
        while (message := self._sockets.receive()) is not None:
            if isinstance(message, Outputs):
                self._num_received = message.num_received
                self._num_waiting = message.num_waiting
            self._front.receive(message)


def _death(code: int) -> str:
    """Return the error message for an engine process with exit code ``code``, not 0."""
    if code > 0:
        return FAILED  # The process has logged the reason.
    return f"The engine's process {describe_exit(code)}: restart the server."
