"""Connection to an engine in a separate process, and the main function of that process.

No step of that engine waits for the interpreter of the HTTP server. The process is a new
interpreter, not a fork, because neither torch nor a device survives a fork. It ends when the server
sends a request to stop, or is gone. Messages go over two sockets of ZeroMQ, one per direction.
Sending never waits: messages that the other side has not read are queued in memory.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import logging
import os
import pickle
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import msgspec
import zmq
from msgspec import structs

from engine.config import EngineConfig
from engine.engine import Engine, load_tokenizer_of
from engine.errors import FAILED, RunnerLost, describe_exit
from engine.front.async_engine import AsyncEngine, EngineChannel, EngineHost, patiently
from engine.front.server.settings import SWITCH_S
from engine.front.worker.screen import screen_rows, screen_text
from engine.front.worker.spawn import Spawned
from engine.messages import EndEngine, EngineFacts, FromEngine, Refused, ToEngine, plain, prompt_of
from engine.text.tokenizer import Tokenizer
from hybridcache.command.extras import how_to_install
from hybridcache.command.signals import log_to_stderr, prepare_streams
from hybridcache.geometry.gguf import said_of

logger = logging.getLogger(__name__)
POLL_S = 0.1
PATIENCE_S = 5.0
"""Time that a process may take to end after the stop command, before it is killed."""


class Sockets:
    """One end of the connection. Any thread may call ``send``, one thread ``receive``."""

    def __init__(self, folder: str, *, is_server: bool) -> None:
        """``folder``: contains the sockets. The server makes it, and no other user has access."""
        # In its own context, the end of which waits until the messages are on their way.
        self._out_context = zmq.Context()
        self._out: zmq.Socket[bytes] = self._out_context.socket(zmq.PUSH)
        self._in: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder(enc_hook=plain)
        kind: Any = FromEngine if is_server else ToEngine
        self._decoder: Any = msgspec.msgpack.Decoder(kind, dec_hook=prompt_of)
        self._unread = b""
        """Message for which there was no memory."""
        for socket, is_to_engine in ((self._out, is_server), (self._in, not is_server)):
            socket.set_hwm(0)
            socket.linger = 1000
            address = f"ipc://{folder}/{'to' if is_to_engine else 'from'}"
            socket.bind(address) if is_server else socket.connect(address)

    @property
    def fd(self) -> int:
        """Descriptor that becomes readable when messages arrive, once for all of them."""
        return int(self._in.getsockopt(zmq.FD))

    def send(self, message: ToEngine | FromEngine) -> None:
        """Send ``message``. Does nothing if the other side has gone. O(size of the message)."""
        data = self._encoder.encode(message)
        with self._lock, suppress(zmq.Again):
            if not self._out.closed:
                self._out.send(data, zmq.NOBLOCK)

    def receive(self) -> Any:
        """Return the next message, or None if none has arrived. After a MemoryError, repeat the
        call: it returns the same message."""
        try:
            data, self._unread = self._unread or self._in.recv(zmq.NOBLOCK), b""
        except zmq.Again:
            return None
        try:
            return self._decoder.decode(data)
        except MemoryError:
            self._unread = data
            raise

    def wait(self, timeout_s: float | None, other_fd: int | None = None) -> bool:
        """Return True if a message arrives in ``timeout_s``, before ``other_fd`` is readable."""
        poller = zmq.Poller()
        poller.register(self._in, zmq.POLLIN)
        if other_fd is not None:
            poller.register(other_fd, zmq.POLLIN)
        return self._in in dict(poller.poll(None if timeout_s is None else round(1e3 * timeout_s)))

    def finish(self) -> None:
        """Send no more. Returns when sent messages are on their way, after at most a second."""
        with self._lock:
            self._out.close()
        self._out_context.term()

    def close(self) -> None:
        """Close this end; called by the receiving thread."""
        self._in.close()
        self.finish()


def start_engine(config: EngineConfig, spawned: Spawned) -> tuple[AsyncEngine, str]:
    """Connect to the process that loads the model of ``config``, and return (the engine, its start
    screen). Raises ValueError if the model cannot be loaded."""
    sockets = Sockets(spawned.folder.name, is_server=True)
    try:
        tokenizer = load_tokenizer_of(config, None)
        facts = _wait_for(spawned.process, sockets)
        tokenizer = tokenizer or load_tokenizer_of(config, facts.vocab_size)
        assert tokenizer is not None
        channel = ProcessChannel(config, tokenizer, facts, spawned, sockets)
        return AsyncEngine(channel), facts.screen
    except BaseException:
        sockets.close()
        spawned.end()
        raise


def _wait_for(process: subprocess.Popen[bytes], sockets: Sockets) -> EngineFacts:
    code = None
    while code is None:
        code = process.poll()
        match sockets.receive() if sockets.wait(POLL_S) else None:
            case EngineFacts() as facts:
                return facts
            case Refused(reason):
                raise ValueError(reason)
    raise ValueError(
        f"Before the model was loaded, the engine's process {describe_exit(code)}; see its output "
        "above."
    )


class ProcessChannel(EngineChannel):
    """Connection to a loaded engine in a separate process, which ``drain`` ends. ``send`` and
    ``stop`` may be called from any thread."""

    def __init__(
        self,
        config: EngineConfig,
        tokenizer: Tokenizer,
        facts: EngineFacts,
        spawned: Spawned,
        sockets: Sockets,
    ) -> None:
        self.config, self.tokenizer, self.facts = config, tokenizer, facts
        self._spawned, self._process, self._sockets = spawned, spawned.process, sockets
        self.pid, self._was_killed = spawned.process.pid, False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: ToEngine) -> None:
        self._sockets.send(message)

    def start(self) -> None:
        """Follow the process in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._closed = asyncio.Event()
        self._fd = self._sockets.fd
        self._loop.add_reader(self._fd, self.read)
        self.read()
        threading.Thread(target=self._wait, name="engine process", daemon=True).start()

    async def drain(self) -> None:
        if self._loop is not None:
            self.send(EndEngine(at_once=False))
            await self._closed.wait()
            self._loop.remove_reader(self._fd)
        self._release()

    def stop(self) -> None:
        """End the process after its step, or kill it after ``PATIENCE_S``."""
        if self._loop is None:  # No caller waits.
            self._release()
            return
        self.send(EndEngine(at_once=True))
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._was_killed = True
            self._process.kill()
            self._process.wait()

    def _release(self) -> None:
        self._sockets.close()
        self._spawned.end()

    def _wait(self) -> None:
        """Wait for the end of the process, in a separate thread."""
        code = self._process.wait()
        assert self._loop is not None
        with suppress(RuntimeError):  # The loop is closed.
            self._loop.call_soon_threadsafe(self._close, code)

    def _close(self, code: int) -> None:
        """Read the last messages of the process, which has ended."""
        while (message := self._sockets.receive()) is not None:
            self.front.receive(message)
        failure = None
        if code and not self._was_killed:
            died = f"The engine's process {describe_exit(code)}: restart the server."
            failure = FAILED if code > 0 else died  # In the first case it has logged it.
        self.front.closed(failure)
        self._closed.set()

    def read(self) -> None:
        """Process a message that has arrived, and the next one in the next turn of the loop."""
        if self._loop is not None and (message := self._sockets.receive()) is not None:
            self.front.receive(message)
            self._loop.call_soon(self.read)


# --- The process ----------------------------------------------------------------------------------

LOST = 3
"""Exit code if the server has gone."""


def _receive(sockets: Sockets, folder: str, hosts: Sequence[EngineHost]) -> None:
    """Pass the server's messages to the host, in a separate thread. End the process if the server
    has gone: the other end of the standard input is open while it lives."""
    try:
        while sockets.wait(None, sys.stdin.fileno()):
            while (message := patiently(sockets.receive)) is not None:
                patiently(partial(hosts[0].receive, message))
    except BaseException:
        logger.exception("The engine has lost the connection to its server, and ends.")
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(LOST)


def main(folder: str, config: str, address: str, log_level: str, log_format: str) -> int:
    """Run the process and return its exit code. ``config`` is pickled, in hexadecimal digits."""
    prepare_streams(is_server=True)
    log_to_stderr(log_level, "engine", is_json=log_format == "json")
    warnings.showwarning = lambda message, *_, **__: logger.warning("%s", message)
    sockets = Sockets(folder, is_server=False)
    hosts: list[EngineHost] = []
    # Before the load, so that the end of the server is noticed meanwhile.
    threading.Thread(target=_receive, args=(sockets, folder, hosts), daemon=True).start()
    try:
        from engine.runner import build  # noqa: F401  # With torch, whose objects stay.

        gc.freeze()
        engine = Engine(pickle.loads(bytes.fromhex(config)))
        if engine.config.warm_up:
            engine.prepare_grammars()
        screen = screen_text(screen_rows(engine, address))
    except (ModuleNotFoundError, ValueError, FileNotFoundError, PermissionError, RunnerLost) as why:
        said = how_to_install(why, "engine") if type(why) is ModuleNotFoundError else said_of(why)
        sockets.send(Refused(said))
        sockets.finish()
        return 2
    sys.setswitchinterval(SWITCH_S)
    # The objects of the start stay, so garbage collections need not traverse them.
    gc.collect()
    gc.freeze()
    gc.enable()
    host = EngineHost(engine, sockets.send)
    hosts.append(host)
    sockets.send(structs.replace(host.facts, screen=screen))
    host.run()
    sockets.finish()
    return 0 if host.failure is None else 1


def leave(code: int) -> NoReturn:
    """End the process at once, after the exit functions. Otherwise the interpreter would free the
    objects of torch and of the model one by one, which takes more than a second."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
