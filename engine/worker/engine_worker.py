"""Engine in a separate process: a thread receives commands, and each step's outputs are one
message."""

from __future__ import annotations

import gc
import logging
import os
import pickle
import shutil
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from engine.async_engine import Answers, EngineLoop
from engine.engine import Engine
from engine.errors import EngineStopped, RequestError
from engine.interfaces import RunnerLost
from engine.server.settings import SWITCH_S
from engine.text.outputs import OutputDelta, RequestOutput, delta_of
from engine.worker.channel import (
    Abort,
    AskEngine,
    Channel,
    ChannelClosed,
    Compile,
    EndEngine,
    Outputs,
    Ready,
    Refused,
    Reply,
    RequestFailed,
    Submit,
    ToEngine,
)
from engine.worker.screen import start_screen
from hybridcache.lab.extras import how_to_install

LOST = 3
"""Exit code if the server has gone."""
logger = logging.getLogger(__name__)


class EngineWorker:
    """Serves one engine over a channel. It is made before the model is loaded, so that the end of
    the server is noticed during the load."""

    def __init__(self, folder: str, lifeline: int) -> None:
        """``lifeline``: a pipe with another end that is open while the server lives."""
        self._channel: Channel[ToEngine] = Channel(folder, is_server=False)
        self._folder = folder
        self._lifeline = lifeline
        self._engine: Engine | None = None
        self._loop: EngineLoop[str] | None = None
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._answers: Answers | None = None
        self._num_refused = 0
        self._last_counts = (0, 0)
        threading.Thread(target=self._receive_commands, name="server", daemon=True).start()

    def refuse(self, reason: str) -> None:
        """Report to the server that the model cannot be loaded."""
        self._channel.send(Refused(reason))
        self._channel.finish()

    def run(self, engine: Engine, screen: str) -> bool:
        """Serve ``engine`` until the server ends it. Returns False if the engine failed."""
        self._engine, self._answers = engine, Answers(engine)
        self._loop = loop = EngineLoop(engine, self._deliver)
        ready = Ready(engine.runner.vocab_size, engine.max_model_len, engine.model_name, screen)
        self._channel.send(ready)
        loop.run()
        self._compiler.shutdown(wait=False, cancel_futures=True)
        self._channel.finish()
        return not loop.has_failed

    def _receive_commands(self) -> None:
        """Execute the server's commands in a separate thread. End the process if the server has
        gone."""
        try:
            while self._channel.wait(None, self._lifeline):
                while (message := self._channel.receive()) is not None:
                    self._execute(message)
        except ChannelClosed:
            return
        except BaseException:
            logger.exception("The engine has lost the connection to its server, and ends.")
        # Left over if the server was killed while the model loaded.
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(LOST)

    def _execute(self, message: ToEngine) -> None:
        assert self._loop is not None and self._engine is not None and self._answers is not None
        match message:
            case Submit():
                self._submit(message, self._engine, self._loop)
            case Abort():
                self._loop.abort(message.request_id, message.reason)
            case AskEngine():
                self._answer(message, self._answers, self._loop)
            case Compile():
                self._compile(message, self._engine)
            case EndEngine():
                self._loop.end(at_once=message.at_once)

    def _submit(self, message: Submit, engine: Engine, loop: EngineLoop[str]) -> None:
        try:
            request = engine.prepare(message.spec)
            request.arrival_s = message.arrival_s
            loop.enqueue(request, message.request_id)
        except Exception as error:
            if not isinstance(error, ValueError | RequestError):
                logger.exception("The request %s could not be submitted.", message.request_id)
            self._num_refused += 1
            ended = RequestFailed(message.request_id, RequestError.of(error).to_wire())
            self._send_outputs((), (ended,))

    def _answer(self, message: AskEngine, answers: Answers, loop: EngineLoop[str]) -> None:
        number = message.number

        def answer() -> None:
            self._reply(number, lambda: answers.answer(message.what, *message.arguments))

        try:
            loop.call_soon(answer)
        except EngineStopped as error:
            self._channel.send(Reply(number, error=error.to_wire()))

    def _compile(self, message: Compile, engine: Engine) -> None:
        def work() -> None:
            self._reply(message.number, lambda: engine.compile(message.grammar))

        with suppress(RuntimeError):  # The engine ends, and with it all questions.
            self._compiler.submit(work)

    def _reply(self, number: int, work: Callable[[], Any]) -> None:
        try:
            self._channel.send(Reply(number, work()))
        except Exception as error:
            if not isinstance(error, ValueError | RequestError):
                logger.exception("A question to the engine failed.")
            self._channel.send(Reply(number, error=RequestError.of(error).to_wire()))

    def _deliver(self, deliveries: Sequence[tuple[str, Any]]) -> None:
        """Send the outputs of a step; called in the engine's thread after each step."""
        news, ended = [], []
        for request_id, output in deliveries:
            if isinstance(output, RequestOutput):
                news.append(delta_of(output))
            else:
                ended.append(RequestFailed(request_id, output.to_wire()))
        self._send_outputs(tuple(news), tuple(ended))

    def _send_outputs(
        self, news: tuple[OutputDelta, ...], ended: tuple[RequestFailed, ...]
    ) -> None:
        assert self._engine is not None and self._loop is not None
        num_received = self._loop.num_arrived + self._num_refused
        counts = num_received, self._engine.num_waiting
        if news or ended or counts != self._last_counts:
            self._last_counts = counts
            self._channel.send(Outputs(*counts, news, ended))


def main(folder: str, config: str, address: str, log_level: str) -> int:
    """Run the process and return its exit code. ``config`` is pickled, in hexadecimal digits."""
    logging.getLogger("engine").setLevel(log_level.upper())
    worker = EngineWorker(folder, sys.stdin.fileno())
    try:
        engine = Engine(pickle.loads(bytes.fromhex(config)))
        if engine.config.warm_up:
            engine.prepare_grammars()
        screen = start_screen(engine, address)
    except ModuleNotFoundError as error:
        worker.refuse(how_to_install(error, "engine"))
        return 2
    except (ValueError, FileNotFoundError, RunnerLost) as error:
        worker.refuse(str(error))
        return 2
    sys.setswitchinterval(SWITCH_S)
    # The objects of the start stay, so garbage collections need not traverse them.
    gc.collect()
    gc.freeze()
    return 0 if worker.run(engine, screen) else 1
