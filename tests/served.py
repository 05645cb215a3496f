"""Server in a thread of this process, for HTTP tests that also inspect the engine."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from engine import AsyncEngine, Engine
from engine.front.server.app import Server
from engine.front.server.settings import ServerConfig, bind
from tests.waiting import wait_until


@contextlib.contextmanager
def serving(
    engine: Engine, config: ServerConfig | None = None, port: int = 0
) -> Iterator[tuple[Server, int]]:
    """Serve ``engine`` on 127.0.0.1. Yields the server and its port.

    Port 0 takes any free one. Raises RuntimeError if the server does not stop.
    """
    server = Server(AsyncEngine(engine), config or ServerConfig())
    listener = bind(ServerConfig(port=port))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield server, listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(120)
        listener.close()
        if thread.is_alive():
            raise RuntimeError("The server did not stop within 120 seconds.")
