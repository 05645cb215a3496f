"""Faults that a server must survive: each is done to one that goes on serving."""

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
    """Eight clients are gone without a word in the middle of their answers."""
    connections = [server.stream(1500, number) for number in range(8)]
    server.wait_until(4)
    for connection in connections:
        reset(connection)


def slow_readers(server: Broken) -> None:
    """Four clients read nothing for a second, another's answer does not wait for them, and none
    loses a token."""
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
    """A client that says nothing, one that sends half a head, one half a body, and one that closes
    its own side once it has asked."""
    silent, head, body, closing = (server.connect() for _ in range(4))
    head.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localho")
    body.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b'Content-Length: 999\r\n\r\n{"prompt": "x'
    )
    server.ask(closing, 4)
    assert server.answer()[0] == 200
    status, said = read_answer(body)
    assert status == 408 and "did not arrive in time" in said, (status, said)
    for connection in (silent, head, body, closing):
        reset(connection)


def out_of_memory_in_a_step(server: Broken) -> None:
    """The requests that ran are told, and the next ones are served."""
    connections = [server.stream(1500, number) for number in range(4)]
    server.wait_until(2)
    server.fails.touch()
    while server.fails.exists():
        time.sleep(0.02)
    said = [read_answer(connection)[1] for connection in connections]
    for connection in connections:
        connection.close()
    assert sum("The engine failed on this request" in body for body in said) >= 2, said
    assert server.answer()[0] == 200


def clock_jumps(server: Broken) -> None:
    """The wall clock jumps by two days every second; answers take as long as they take."""
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
    """The engine's process stands still for a second; the server answers what it can by itself,
    and nothing is lost."""
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
