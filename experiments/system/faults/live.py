"""Faults that a server must survive."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable

from experiments.system.faults.server import Broken, num_events, read_answer, reset

SLOW_BYTES = 4096
"""Receive buffer of a slow reader."""


def killed_clients(server: Broken) -> None:
    """Reset the connections of eight clients in the middle of their answers."""
    connections = [server.stream(1500, number) for number in range(8)]
    server.wait_until(4)
    for connection in connections:
        reset(connection)


def slow_readers(server: Broken) -> None:
    """Keep four clients from reading for a second. Another client is not delayed, and no token is
    lost."""
    connections = [server.connect(SLOW_BYTES) for _ in range(4)]
    for connection in connections:
        server.ask(connection, 300, stream=True)
    assert server.answer(20)[0] == 200
    time.sleep(1)
    for connection in connections:
        with contextlib.closing(connection):
            status, body = read_answer(connection)
        assert status == 200 and body.endswith("data: [DONE]\n\n"), body[-200:]
        assert num_events(body) >= 1 and '"finish_reason": "length"' in body


def half_open_sockets(server: Broken) -> None:
    """Open a silent connection, half a head, half a body, and a connection that closes after its
    request."""
    silent, head, body, closing = (server.connect() for _ in range(4))
    head.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localho")
    body.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b'Content-Length: 999\r\n\r\n{"prompt": "x'
    )
    server.ask(closing, 4)
    assert server.answer()[0] == 200
    status, text = read_answer(body)
    assert status == 408 and "did not arrive in time" in text, (status, text)
    for connection in (silent, head, body, closing):
        reset(connection)


def out_of_memory_in_a_step(server: Broken) -> None:
    """Make a step run out of memory. Its requests get an error, and later requests are served."""
    connections = [server.stream(1500, number) for number in range(4)]
    server.wait_until(2)
    server.fails.touch()
    while server.fails.exists():
        time.sleep(0.02)
    bodies = [read_answer(connection)[1] for connection in connections]
    for connection in connections:
        connection.close()
    assert sum("The engine failed on this request" in body for body in bodies) >= 2, bodies
    assert server.answer()[0] == 200


def clock_jumps(server: Broken) -> None:
    """Move the wall clock by two days every second. Answers and their times are not affected."""
    if not server.jumps:
        return
    server.jumping.touch()
    try:
        started = time.monotonic()
        connections = [server.stream(200, number) for number in range(4)]
        for connection in connections:
            with contextlib.closing(connection):
                assert '"finish_reason": "length"' in read_answer(connection)[1]
        time.sleep(1.1)
        assert server.answer()[0] == 200 and time.monotonic() - started < 300
        for line in server.get("/metrics").decode().splitlines():
            if line.startswith("engine_e2e_seconds_sum"):
                assert 0 <= float(line.split()[1]) < 3600, line
    finally:
        server.jumping.unlink()


def stopped_engine(server: Broken) -> None:
    """Stop the engine's process for a second. The server still answers /health, and no token is
    lost."""
    connection = server.stream(300)
    server.wait_until(1)
    engine = server.engine
    os.kill(engine, signal.SIGSTOP)
    try:
        assert b"ok" in server.get("/health")
        time.sleep(1)
    finally:
        os.kill(engine, signal.SIGCONT)
    with contextlib.closing(connection):
        assert '"finish_reason": "length"' in read_answer(connection)[1]


LIVE: dict[str, Callable[[Broken], None]] = {
    "killed clients": killed_clients,
    "slow readers": slow_readers,
    "half-open sockets": half_open_sockets,
    "out of memory in a step": out_of_memory_in_a_step,
    "clock jumps": clock_jumps,
    "a stopped engine": stopped_engine,
}
