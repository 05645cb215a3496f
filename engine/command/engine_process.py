"""The engine of ``engine serve``, in a separate process, so that no step waits for the interpreter
of the HTTP server.

The process is a new interpreter, not a fork, because neither torch nor a device survives a fork. It
blocks the signals that end a server, which terminals and service managers send to both. It ends
when the server sends a request to stop, or is gone.
"""

from __future__ import annotations

import gc
import json
import logging
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable

from engine.build import load_tokenizer_of, names_tokenizer
from engine.config import EngineConfig
from engine.errors import describe_exit
from engine.interfaces import RunnerLost
from engine.worker.channel import Channel, FromEngine, Ready, Refused, make_folder, remove_folder
from engine.worker.engine_client import ProcessEngine
from hybridcache.lab.extras import how_to_install

BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from engine.command.engine_process import main; sys.exit(main(*sys.argv[2:]))"
)
POLL_S = 0.1
MEET_S = 10.0
"""Seconds from the first message of the process until it can receive one. It takes milliseconds,
except on a machine that swaps."""


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
    folder = make_folder()
    try:
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
    finally:
        remove_folder(folder)


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
                "loaded; "
                "see its output above."
            )


def main(folder: str, config: str, address: str, log_level: str) -> int:
    """Run the process and return its exit code. ``config`` is pickled, in hexadecimal digits."""
    logging.getLogger("engine").setLevel(log_level.upper())
    from engine.command.screen import start_screen
    from engine.engine import Engine
    from engine.server.workers import SWITCH_S
    from engine.worker.engine_worker import Host

    host = Host(folder, sys.stdin.fileno())
    try:
        engine = Engine(pickle.loads(bytes.fromhex(config)))
        if engine.config.warm_up:
            engine.prepare_grammars()
        screen = start_screen(engine, address)
    except ModuleNotFoundError as error:
        host.refuse(how_to_install(error, "engine"))
        return 2
    except (ValueError, FileNotFoundError, RunnerLost) as error:
        host.refuse(str(error))
        return 2
    sys.setswitchinterval(SWITCH_S)
    # The objects of the start stay, so garbage collections need not traverse them.
    gc.collect()
    gc.freeze()
    return 0 if host.run(engine, screen) else 1
