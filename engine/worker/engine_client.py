"""Start of an engine in a separate process, and its client: the counterpart of ``AsyncEngine``.

No step of that engine waits for the interpreter of the HTTP server. The process is a new
interpreter, not a fork, because neither torch nor a device survives a fork. It blocks the signals
that end a server, which terminals and service managers send to both. It ends when the server sends
a request to stop, or is gone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from engine.async_engine import FAILED, STOPPED, STOPPING, Question, RequestStream, ServedEngine
from engine.build import load_tokenizer_of, names_tokenizer
from engine.config import EngineConfig
from engine.errors import DuplicateId, EngineStopped, QueueFull, RequestError, describe_exit
from engine.requests.grammar import Grammar
from engine.requests.request import Intake
from engine.requests.spec import Prompt, RequestSpec
from engine.schedule.report import CacheReport
from engine.text.outputs import FinishReason, OutputAccumulator
from engine.worker.channel import (
    Abort,
    AskEngine,
    Channel,
    Compile,
    EndEngine,
    FromEngine,
    Outputs,
    Ready,
    Refused,
    Reply,
    Submit,
)

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer


logger = logging.getLogger(__name__)
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from engine.worker.engine_worker import main; sys.exit(main(*sys.argv[2:]))"
)
POLL_S = 0.1
MEET_S = 10.0
"""Seconds from the first message of the process until it can receive one. It takes milliseconds,
except on a machine that swaps."""
PATIENCE_S = 5.0
"""Time that a process may take to end after the stop command, before it is killed."""


def start_engine(
    config: EngineConfig,
    address: str,
    boot: str | None = None,
    meanwhile: Callable[[], object] | None = None,
    log_level: str = "warning",
) -> tuple[ProcessEngine, str]:
    """Start an engine and return (the engine, its start screen).

    ``boot`` is the code for the new interpreter, by default ``BOOT``. ``meanwhile`` is called while
    the model is loaded. Raises ValueError if the model cannot be loaded.
    """
    # The folder is removed when both sides are connected, so that no other process can connect.
    with TemporaryDirectory(prefix="engine-", ignore_cleanup_errors=True) as folder:
        channel: Channel[FromEngine] = Channel(folder, is_server=True)
        facts = [folder, pickle.dumps(config).hex(), address, log_level]
        process = _spawn([sys.executable, "-c", boot or BOOT, json.dumps(sys.path), *facts])
        try:
            # The process loads the model during this time.
            if meanwhile is not None:
                meanwhile()
            tokenizer = load_tokenizer_of(config, 0) if names_tokenizer(config) else None
            ready = _wait_for(process, channel)
            tokenizer = tokenizer or load_tokenizer_of(config, ready.vocab_size)
            return ProcessEngine(config, process, channel, ready, tokenizer), ready.screen
        except BaseException:
            process.kill()
            process.communicate()
            channel.close()
            raise


def _spawn(command: list[str]) -> subprocess.Popen[bytes]:
    """Start ``command`` with SIGINT and SIGTERM blocked from its first instruction."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        return subprocess.Popen(command, stdin=subprocess.PIPE)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait_for(process: subprocess.Popen[bytes], channel: Channel[FromEngine]) -> Ready:
    while True:
        has_ended = process.poll() is not None
        message = channel.receive() if channel.wait(0.0 if has_ended else POLL_S) else None
        match message:
            case Ready():
                if channel.meet(MEET_S):
                    return message
                process.kill()
            case Refused():
                raise ValueError(message.reason)
        if has_ended:
            raise ValueError(
                f"the engine's process {describe_exit(process.returncode)} before the model was "
                "loaded; see its output above."
            )


class ProcessEngine(ServedEngine):
    """A loaded engine in a separate process. After ``start``, everything except ``compile`` and
    ``stop`` belongs to one event loop."""

    def __init__(
        self,
        config: EngineConfig,
        process: subprocess.Popen[bytes],
        channel: Channel[FromEngine],
        facts: Ready,
        tokenizer: Tokenizer,
    ) -> None:
        """Take over ``process`` and ``channel``, which ``stop`` or ``drain`` ends."""
        self.config = config
        self.tokenizer: Tokenizer | None = tokenizer
        self.model_name = facts.model_name
        self.max_model_len = facts.max_model_len
        self.pid = process.pid
        self.failure: str | None = None
        """Reason of an unexpected end of the process, or None."""
        self._process, self._channel = process, channel
        self._intake = Intake(
            config,
            tokenizer,
            vocab_size=facts.vocab_size,
            max_model_len=facts.max_model_len,
        )
        self.sampling_defaults = self._intake.sampling_defaults
        self._streams: dict[str, tuple[RequestStream, OutputAccumulator]] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count(1)
        self._num_sent = self._num_received = self._num_waiting = 0
        self._is_open = True
        self._ended = threading.Event()
        self._was_killed = self._is_released = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_alive(self) -> bool:
        """True while the process runs."""
        return not self._ended.is_set()

    def start(self) -> None:
        """Follow the process in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._closed = asyncio.Event()
        self._fd = self._channel.fd
        self._loop.add_reader(self._fd, self._read)
        self._read()
        threading.Thread(target=self._wait, name="engine process", daemon=True).start()

    def submit(self, prompt: Prompt | RequestSpec) -> RequestStream:
        """See ``AsyncEngine.submit``."""
        spec = self._intake.check(RequestSpec.of(prompt, None, {}))
        if self.failure is not None:
            raise EngineStopped(self.failure)
        if not self._is_open:
            raise EngineStopped(STOPPING)
        request_id = spec.request_id or f"request-{self._num_sent}"
        if request_id in self._streams:
            raise DuplicateId(request_id)
        if self._num_waiting + self._num_sent - self._num_received >= self.config.max_queue:
            raise QueueFull(self.config.max_queue)
        tokens = np.ascontiguousarray(spec.prompt, np.int32)
        stream = RequestStream(request_id, self._abort)
        self._send(Submit.of(replace(spec, prompt=tokens, request_id=request_id)))
        self._num_sent += 1
        self._streams[request_id] = stream, OutputAccumulator(request_id, tokens)
        return stream

    def _send(self, message: Submit | Abort | AskEngine | Compile | EndEngine) -> None:
        try:
            self._channel.send(message)
        except UnicodeEncodeError:
            raise ValueError(
                "a text of this request cannot be encoded in UTF-8: remove lone surrogates "
                "(\\ud800 to \\udfff)."
            ) from None
        except OverflowError:
            raise ValueError(
                "an integer of this request does not fit into 64 bits: use a smaller one."
            ) from None

    def _abort(self, request_id: str, reason: FinishReason) -> None:
        if request_id in self._streams:
            self._send(Abort(request_id, reason))

    def compile(self, grammar: Grammar) -> None:
        """See ``Engine.compile``. Must not be called in the event loop's thread."""
        assert self._loop is not None
        compiled = self._question(Compile(next(self._numbers), grammar))
        asyncio.run_coroutine_threadsafe(compiled, self._loop).result()

    async def _question(self, message: AskEngine | Compile) -> Any:
        """Return the value of the reply. Raises the RequestError in the reply, if any."""
        if self._ended.is_set():
            raise EngineStopped(self.failure or "The engine has stopped.")
        assert self._loop is not None
        reply = self._replies[message.number] = self._loop.create_future()
        try:
            self._send(message)
            return await reply
        finally:
            self._replies.pop(message.number, None)

    async def ask(self, what: Question, *arguments: Any) -> Any:
        return await self._question(AskEngine(next(self._numbers), what, arguments))

    async def report(self) -> CacheReport:
        """See ``Engine.report``."""
        return msgspec.convert(await self.ask("report"), CacheReport)

    async def drain(self) -> None:
        """Accept no more requests, finish those in progress, and end the process."""
        self._is_open = False
        if self._loop is None:
            self._kill()
            return
        self._send(EndEngine(at_once=False))
        await self._closed.wait()
        self._loop.remove_reader(self._fd)
        self._release()

    def stop(self) -> None:
        """Accept no more requests and end the process after its step. Safe to call from any thread.

        The process is killed if that takes longer than ``PATIENCE_S``. Unfinished requests fail
        with EngineStopped.
        """
        self._is_open = False
        if self._loop is None:
            self._kill()
            return
        self._send(EndEngine(at_once=True))
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
        self._channel.close()
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
        """Fail all pending requests and questions after the end of the process."""
        try:
            self._read()
        except Exception:
            logger.exception("The last messages of the engine's process cannot be read.")
        if code and not self._was_killed:
            self.failure = _death(code)
        self._is_open = False
        ended = EngineStopped(self.failure or STOPPED)
        for stream, _ in self._streams.values():
            stream.put(ended)
        self._streams.clear()
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(ended)
        self._closed.set()

    def _read(self) -> None:
        """Process all messages that have arrived."""
        while (message := self._channel.receive()) is not None:
            match message:
                case Outputs():
                    self._take(message)
                case Reply():
                    self._answered(message)

    def _take(self, outputs: Outputs) -> None:
        self._num_received, self._num_waiting = outputs.num_received, outputs.num_waiting
        for news in outputs.news:
            followed = self._streams.get(news.request_id)
            if followed is not None:
                stream, answer = followed
                stream.put(answer.add(news))
                if news.finish_reason is not None:
                    del self._streams[news.request_id]
        for ended in outputs.ended:
            followed = self._streams.pop(ended.request_id, None)
            if followed is not None:
                followed[0].put(RequestError.from_wire(ended.error))

    def _answered(self, said: Reply) -> None:
        reply = self._replies.get(said.number)
        if reply is None or reply.done():
            return
        if said.error is not None:
            reply.set_exception(RequestError.from_wire(said.error))
        else:
            reply.set_result(said.value)


def _death(code: int) -> str:
    """Return the error message for an engine process with exit code ``code``, not 0."""
    if code > 0:
        return FAILED  # The process has logged the reason.
    return f"The engine's process {describe_exit(code)}: restart the server."
