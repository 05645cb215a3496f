"""Server processes of benchmarks, and single requests to them."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

TIMEOUT_S = 600.0
"""Time limit for the start of a server and for each of its messages, in seconds."""


def free_port() -> int:
    """Return a port that no server uses."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


@contextmanager
def running(command: Sequence[str], port: int, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, wait until it is ready, and yield its process, which ends with the context,
    by force after a minute. ``options`` are those of ``Popen``.

    Raises:
        ValueError: The server ended, or is not ready within ``TIMEOUT_S``.
    """
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, **options)
    is_ready, last_s = False, time.monotonic() + TIMEOUT_S
    try:
        while not is_ready:
            if server.poll() is not None or time.monotonic() > last_s:
                raise ValueError(f"{command[0]} did not become ready; see its output above.")
            time.sleep(0.1)
            with suppress(OSError, http.client.HTTPException):
                exchange(port, "GET", "/health")
                is_ready = True
        yield server
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def send(port: int, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
    """Send one request with a JSON ``body``. Returns its answer; closing it closes the
    connection."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    payload = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Connection": "close"}
    connection.request(method, path, payload, headers)
    return connection.getresponse()


def exchange(port: int, method: str, path: str, body: Any = None) -> Any:
    """Return the JSON of an answer, or None if it is empty. Raises OSError or HTTPException if the
    request fails."""
    with send(port, method, path, body) as answer:
        text = answer.read()
    if answer.status != 200:
        raise http.client.HTTPException(
            f"{method} {path}: status {answer.status}, {text[:300].decode()!r}"
        )
    return json.loads(text or "null")
