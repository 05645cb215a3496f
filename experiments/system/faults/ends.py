"""Faults that end a server: messages to its clients, its exit code, and its remains."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from http.client import HTTPException

from experiments.system.faults.server import Broken, is_gone, read_answer

LIMIT_S = 120.0


def _end(server: Broken, engine: int) -> int:
    """Return the server's exit code. Its engine must have ended too."""
    code = server.process.wait(LIMIT_S)
    deadline = time.monotonic() + LIMIT_S
    while not is_gone(engine):
        assert time.monotonic() < deadline, "the engine still runs without its server"
        time.sleep(0.05)
    return code


def terminated(server: Broken) -> None:
    """Send SIGTERM under load. Running requests get a whole answer or an error, and the exit code
    is 0."""
    engine, connections = server.engine, [server.stream(100, number) for number in range(8)]
    server.wait_until(2)
    server.process.send_signal(signal.SIGTERM)
    for connection in connections:
        body = read_answer(connection)[1]
        assert body.endswith("data: [DONE]\n\n") or "The engine stopped" in body, body[-200:]
        connection.close()
    assert _end(server, engine) == 0


def killed_engine(server: Broken) -> None:
    """Send SIGKILL to the engine under load. Every stream gets an error, and the exit code is 1."""
    engine, connections = server.engine, [server.stream(1500, number) for number in range(8)]
    server.wait_until(2)
    os.kill(engine, signal.SIGKILL)
    for connection in connections:
        assert "was ended by SIGKILL" in read_answer(connection)[1]
        connection.close()
    assert _end(server, engine) == 1
    assert "engine serve: The engine's process was ended by SIGKILL" in server.log.read_text()


def killed_server(server: Broken) -> None:
    """Send SIGKILL to the server under load. Its engine ends, and connections of clients close."""
    engine, connections = server.engine, [server.stream(1500, number) for number in range(4)]
    server.wait_until(2)
    server.process.kill()
    for connection in connections:
        with contextlib.suppress(HTTPException, OSError):
            assert "data: [DONE]" not in read_answer(connection)[1]
        connection.close()
    assert _end(server, engine) == -signal.SIGKILL


ENDS: dict[str, Callable[[Broken], None]] = {
    "SIGTERM under load": terminated,
    "SIGKILL of the engine": killed_engine,
    "SIGKILL of the server": killed_server,
}
