"""Engine in a separate process: a thread receives commands, and each step's outputs are one
message."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import pickle
import shutil
import sys
import threading
from typing import NoReturn

from engine.async_engine import EngineHost
from engine.engine import Engine
from engine.interfaces import RunnerLost
from engine.messages import Ready, Refused, ToEngine
from engine.server.settings import SWITCH_S
from engine.worker.process_channel import Sockets
from engine.worker.screen import start_screen
from hybridcache.command.extras import how_to_install
from hybridcache.command.signals import log_to_stderr

LOST = 3
"""Exit code if the server has gone."""
logger = logging.getLogger(__name__)


class EngineWorker:
    """Serves one engine over sockets. It is made before the model is loaded, so that the end of the
    server is noticed during the load."""

    def __init__(self, folder: str, lifeline: int) -> None:
        """``lifeline``: a pipe with another end that is open while the server lives."""
        self._sockets: Sockets[ToEngine] = Sockets(folder, is_server=False)
        self._folder = folder
        self._lifeline = lifeline
        self._host: EngineHost | None = None
        threading.Thread(target=self._receive, name="server", daemon=True).start()

    def refuse(self, reason: str) -> None:
        """Report to the server that the model cannot be loaded."""
        self._sockets.send(Refused(reason))
        self._sockets.finish()

    def run(self, engine: Engine, screen: str) -> bool:
        """Serve ``engine`` until the server ends it. Returns False if the engine failed."""
        self._host = EngineHost(engine, self._sockets.send)
        self._sockets.send(Ready(self._host.facts, screen))
        self._host.run()
        self._sockets.finish()
        return self._host.failure is None

    def _receive(self) -> None:
        """Pass the server's messages to the host, in a separate thread. End the process if the
        server has gone."""
        try:
            while self._sockets.wait(None, self._lifeline):
                while (message := self._sockets.receive()) is not None:
                    assert self._host is not None
                    self._host.receive(message)
        except BaseException:
            logger.exception("The engine has lost the connection to its server, and ends.")
        shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(LOST)


def main(folder: str, config: str, address: str, log_level: str) -> int:
    """Run the process and return its exit code. ``config`` is pickled, in hexadecimal digits."""
    log_to_stderr(log_level, "engine")
    worker = EngineWorker(folder, sys.stdin.fileno())
    try:
        from engine.runner import build  # noqa: F401  # With torch, whose objects stay.

        gc.freeze()
        engine = Engine(pickle.loads(bytes.fromhex(config)))
        if engine.config.warm_up:
            engine.prepare_grammars()
        screen = start_screen(engine, address)
    except ModuleNotFoundError as error:
        worker.refuse(how_to_install(error, "engine"))
        return 2
    except (ValueError, FileNotFoundError, PermissionError, RunnerLost) as error:
        worker.refuse(str(error))
        return 2
    sys.setswitchinterval(SWITCH_S)
    # The objects of the start stay, so garbage collections need not traverse them.
    gc.collect()
    gc.freeze()
    gc.enable()
    return 0 if worker.run(engine, screen) else 1


def leave(code: int) -> NoReturn:
    """End the process at once, after the exit functions. Otherwise the interpreter would free the
    objects of torch and of the model one by one, which takes more than a second."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
