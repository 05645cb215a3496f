"""Start of the engine's process, before the server is imported: imports little."""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from tempfile import TemporaryDirectory, gettempdir
from typing import NamedTuple

from engine.config import EngineConfig

BOOT = (
    "import gc, json, sys; gc.disable(); sys.path[:] = json.loads(sys.argv[1]); "
    "from engine.front.worker.process_channel import main, leave; leave(main(*sys.argv[2:]))"
)
"""Code of the process. Collections would traverse the objects of torch again and again while it is
imported; ``main`` enables them."""
ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
"""Signals that end a server. A terminal sends them to all of its processes."""
MAX_FOLDER_BYTES = 80
"""Maximum length of the name of the directory for temporary files. With the names of our folder and
of a socket, it must fit into the 104 bytes that every system allows; else the folder is in /tmp."""


FEWEST_FILES = 64
"""Open files that the sockets of a server and of its engine, and a few connections, need."""


class Spawned(NamedTuple):
    """A process that loads a model; see ``process_channel.start_engine``."""

    process: subprocess.Popen[bytes]
    """It ends when its standard input closes."""
    folder: TemporaryDirectory[str]
    """Folder of the sockets."""

    def end(self) -> None:
        """Kill the process, unless it has ended, and remove the folder. May be called again."""
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()


def spawn(
    config: EngineConfig,
    address: str,
    boot: str | None = None,
    log_level: str = "warning",
    log_format: str = "text",
) -> Spawned:
    """Start a new interpreter with ``boot``, by default ``BOOT``, which loads the model of
    ``config``. Signals that end the server are blocked in it from its first instruction. Raises
    OSError if there is no folder for its sockets, or if too few files can be open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit < FEWEST_FILES:
        raise OSError(
            f"only {limit} files can be open, and a server needs {FEWEST_FILES}: raise the limit "
            "with ulimit -n 1024."
        )
    try:
        place = gettempdir() if len(os.fsencode(gettempdir())) <= MAX_FOLDER_BYTES else "/tmp"
        folder = TemporaryDirectory(prefix="engine-", dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        raise OSError(
            f"no folder for the sockets of the engine can be made ({error.strerror}): set TMPDIR "
            "to a folder in which this user may write."
        ) from None
    facts = [folder.name, pickle.dumps(config).hex(), address, log_level, log_format]
    command = [sys.executable, "-c", boot or BOOT, json.dumps(sys.path), *facts]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        return Spawned(subprocess.Popen(command, stdin=subprocess.PIPE), folder)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
