"""Faults that end a server: what its clients are told, with what code it ends, and what is left."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from http.client import HTTPException

from experiments.system.faults.server import Broken, is_gone, read_answer

PATIENCE_S = 120.0


def _end(server: Broken, engine: int) -> int:
    """The server's exit code; its engine is gone with it."""
    code = server.process.wait(PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    while not is_gone(engine):
        assert time.monotonic() < deadline, "the engine goes on without its server"
        time.sleep(0.05)
    return code


def terminated(server: Broken) -> None:
    """SIGTERM under load: who runs gets a whole answer, or is told; exit code 0."""
    engine, connections = server.engine, [server.stream(100, number) for number in range(8)]
    server.wait_until(2)
    server.process.send_signal(signal.SIGTERM)
    for connection in connections:
        body = read_answer(connection)[1]
        assert body.endswith("data: [DONE]\n\n") or "The engine stopped" in body, body[-200:]
        connection.close()
    assert _end(server, engine) == 0


def killed_engine(server: Broken) -> None:
    """SIGKILL of the engine's process under load: every stream is told; exit code 1, a sentence."""
    engine, connections = server.engine, [server.stream(1500, number) for number in range(8)]
    server.wait_until(2)
    os.kill(engine, signal.SIGKILL)
    for connection in connections:
        assert "was ended by SIGKILL" in read_answer(connection)[1]
        connection.close()
    assert _end(server, engine) == 1
    assert "engine serve: The engine's process was ended by SIGKILL" in server.log.read_text()


def killed_server(server: Broken) -> None:
    """SIGKILL of the server under load: its engine ends itself, and its clients see it go."""
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
