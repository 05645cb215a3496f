"""Faults of clients, sockets, processes, memory, clock and disk, injected into a server.

``engine serve`` runs the built-in model. Faults that it survives follow one after the other, then
faults that end it. After every survived fault, ``free + cached + held == total`` is read from
/metrics for KV rows, state slots and bytes. After a fault that ends the server, a new server must
have all memory. Loopback only.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.selection import ROOT
from tests.waiting import wait_until

FAILS = """
import os
import engine.front.worker.spawn as client
client.BOOT = '''
import os
import engine.runner.model_runner as runner
forward = runner.ModelRunner.forward
def failing(self, *arguments):
    if os.path.exists({trigger!r}):
        os.remove({trigger!r})
        raise MemoryError("no memory for this step")
    return forward(self, *arguments)
runner.ModelRunner.forward = failing
''' + client.BOOT
import sys
from dataclasses import replace
from engine.front.command import cli
serve = cli.serve_engine
cli.serve_engine = lambda engine, server: serve(engine, replace(server, body_timeout_s=2))
sys.exit(cli.main(sys.argv[1:]))
"""
"""Source of ``engine`` with a step that runs out of memory when a file exists."""
CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static long jump(void) {
    static int (*real)(clockid_t, struct timespec *);
    struct timespec now;
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    if (access(TRIGGER, F_OK)) return 0;
    real(CLOCK_MONOTONIC, &now);
    return now.tv_sec % 2 ? 86400 : -86400;
}
int clock_gettime(clockid_t clock, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, at);
    if (clock == CLOCK_REALTIME) at->tv_sec += jump();
    return failed;
}
int gettimeofday(struct timeval *at, void *zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""
"""Source of a library that moves the wall clock while a file exists.

The clock is a day ahead in odd seconds and a day behind in even ones.
"""
FLAGS = ("--max-running", "8")
FORMATS = {"default": FLAGS, "int4": (*FLAGS, "--quantization", "int4")}
"""Flags of servers, by the format of their weights."""
NUM_STOPPED, MAX_STOPPED_BYTES = 1000, 256 << 10
"""Connections that are not read, and the most memory of the server for each."""
BODY = {"ignore_eos": True, "temperature": 0}


@dataclass
class Broken:
    """Running server with functions for its clients."""

    process: subprocess.Popen[str]
    port: int
    folder: Path
    """Folder of the files that trigger faults."""
    log: Path
    jumps: bool
    """True if its clock can be moved."""

    @property
    def fails(self) -> Path:
        return self.folder / "fail"

    @property
    def jumping(self) -> Path:
        return self.folder / "jump"

    @property
    def engine(self) -> int:
        """Process id of its engine."""
        return child_of(self.process.pid)

    def get(self, path: str) -> bytes:
        url = f"http://127.0.0.1:{self.port}{path}"
        with urllib.request.urlopen(url, timeout=120) as answer:
            data: bytes = answer.read()
        return data

    def connect(self, receive_bytes: int | None = None) -> socket.socket:
        connection = socket.socket()
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(120)
        connection.connect(("127.0.0.1", self.port))
        return connection

    def ask(self, connection: socket.socket, max_tokens: int, **fields: Any) -> None:
        """Send a request with a prompt of 200 tokens, without reading the answer."""
        body = json.dumps({"prompt": "x" * 200, "max_tokens": max_tokens} | BODY | fields).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)

    def stream(self, max_tokens: int, number: int = 0) -> socket.socket:
        """Send a streaming request, without reading the answer."""
        connection = self.connect()
        self.ask(connection, max_tokens, stream=True, prompt=f"{number} " + "x" * 200)
        return connection

    def answer(self, max_tokens: int = 4) -> tuple[int, str]:
        """Return (status, body) of a whole answer."""
        with contextlib.closing(self.connect()) as connection:
            self.ask(connection, max_tokens)
            return read_answer(connection)

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.get("/v1/cache"))
        return report

    def wait_until(self, num_running: int) -> None:
        """Wait until at least ``num_running`` requests run."""
        wait_until(lambda: self.report()["num_running"] >= num_running)


def server_port(server: subprocess.Popen[str]) -> int:
    """Return the port that ``engine serve`` prints. Raises RuntimeError if the server ends
    before."""
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"address .*:(\d+)/v1", line):
            return int(found[1])
    raise RuntimeError("engine serve ended before it was ready.")


def child_of(pid: int) -> int:
    """Return the process id of a server's engine. Raises RuntimeError if it has none."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            renders = b"sandbox.py" in (stat.parent / "cmdline").read_bytes()
            if parts_of(stat)[1] == str(pid) and not renders:
                return int(stat.parent.name)
    raise RuntimeError(f"Process {pid} has no child that is its engine.")


def parts_of(stat: Path) -> list[str]:
    """Return the fields of /proc/PID/stat: state, parent, ..."""
    return stat.read_text().rpartition(")")[2].split()


def is_gone(pid: int) -> bool:
    """Return True if the process has ended, even if its exit code was not read."""
    try:
        return parts_of(Path(f"/proc/{pid}/stat"))[0] == "Z"
    except OSError:
        return True


def resident_bytes(pid: int) -> int:
    """Return the memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def read_answer(connection: socket.socket) -> tuple[int, str]:
    """Return (status, body), possibly cut if the connection closes early."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    try:
        return answer.status, answer.read().decode()
    except http.client.IncompleteRead as cut:
        return answer.status, cut.partial.decode(errors="replace")


def num_events(body: str) -> int:
    """Return the number of events of a streamed answer that contain a choice."""
    return body.count('"choices":[{')


def reset(connection: socket.socket) -> None:
    """Close the connection with a reset, like a killed client's machine."""
    linger = struct.pack("ii", 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    connection.close()


def memory_of(metrics: bytes) -> dict[str, dict[str, float]]:
    """Return the free, cached and held part of each pool, and its total, from /metrics."""
    pools: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(metrics.decode()):
        if family.name in ("engine_kv_tokens", "engine_state_slots", "engine_memory_bytes"):
            for sample in family.samples:
                pools.setdefault(family.name, {})[sample.labels["owner"]] = sample.value
    return pools


@contextlib.contextmanager
def broken_server(folder: Path, *flags: str) -> Iterator[Broken]:
    """Start a server with ``flags`` and yield it. The server is killed afterwards."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    compiler, library = shutil.which("cc"), folder / "clock.so"
    if compiler is not None:
        source = folder / "clock.c"
        source.write_text(f"#define TRIGGER {json.dumps(str(folder / 'jump'))}\n{CLOCK}")
        build = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
        subprocess.run(build, check=True)
        environment["LD_PRELOAD"] = str(library)
    command = [sys.executable, "-c", FAILS.format(trigger=str(folder / "fail")), "serve"]
    command += ["--port", "0", "--cache-gib", "0.1", "--max-model-len", "4096", *flags]
    log = folder / "log"
    with log.open("a") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
    try:
        port = server_port(process)
        yield Broken(process, port, folder, log, compiler is not None)
    finally:
        process.kill()
        process.communicate()


def settled(server: Broken) -> dict[str, dict[str, float]]:
    """Return the memory of an idle server. Raises AssertionError if memory is still held or
    lost."""
    wait_until(lambda: not sum(server.report()[name] for name in ("num_running", "num_waiting")))
    pools = memory_of(server.get("/metrics"))
    for name, pool in pools.items():
        assert pool["held"] == 0, f"{name}: {pool}"
    assert server.report()["bytes"]["total"] == sum(pools["engine_memory_bytes"].values())
    return pools


def killed_clients(server: Broken) -> None:
    """Reset the connections of eight clients in the middle of their answers."""
    connections = [server.stream(1500, number) for number in range(8)]
    server.wait_until(4)
    for connection in connections:
        reset(connection)


def slow_readers(server: Broken) -> None:
    """Keep four clients from reading for a second. Another client is not delayed, and no token is
    lost."""
    connections = [server.connect(4096) for _ in range(4)]
    for connection in connections:
        server.ask(connection, 300, stream=True)
    assert server.answer(20)[0] == 200
    time.sleep(1)
    for connection in connections:
        with contextlib.closing(connection):
            status, body = read_answer(connection)
        assert status == 200 and body.endswith("data: [DONE]\n\n"), body[-200:]
        assert num_events(body) >= 1 and '"finish_reason":"length"' in body


def thousand_stopped_readers(server: Broken) -> None:
    """Open a thousand connections that send a request and never read. Others are answered, and the
    server's memory stays bounded."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    connections: list[socket.socket] = []
    before = resident_bytes(server.process.pid)
    try:
        for number in range(NUM_STOPPED):
            connections.append(server.connect(4096))
            prompt = f"{number} " + "x" * 20
            server.ask(connections[-1], 16, stream=True, prompt=prompt)
        assert b"ok" in server.get("/health")
        status, body = server.answer()
        assert status in (200, 429), (status, body)
        grown = resident_bytes(server.process.pid) - before
        assert grown < NUM_STOPPED * MAX_STOPPED_BYTES, f"{grown >> 20} MiB"
    finally:
        for connection in connections:
            reset(connection)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


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
    """Make a step run out of memory. It is repeated, and no request notices."""
    connections = [server.stream(1500, number) for number in range(4)]
    server.wait_until(2)
    server.fails.touch()
    wait_until(lambda: not server.fails.exists())
    _end_whole(*connections)


def _end_whole(*connections: socket.socket) -> None:
    """Read the answers to their ends, which the limit of tokens sets."""
    for connection in connections:
        with contextlib.closing(connection):
            assert '"finish_reason":"length"' in read_answer(connection)[1]


def clock_jumps(server: Broken) -> None:
    """Move the wall clock by two days every second. Answers and their times are not affected."""
    if not server.jumps:
        return
    server.jumping.touch()
    try:
        started = time.monotonic()
        _end_whole(*[server.stream(200, number) for number in range(4)])
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
    connection = server.stream(1500)
    server.wait_until(1)
    engine = server.engine
    os.kill(engine, signal.SIGSTOP)
    try:
        assert b"ok" in server.get("/health")
        time.sleep(1)
    finally:
        os.kill(engine, signal.SIGCONT)
    _end_whole(connection)


def _end(server: Broken, engine: int) -> int:
    """Return the server's exit code. Its engine must have ended too."""
    code = server.process.wait(120)
    wait_until(lambda: is_gone(engine))
    return code


def terminated(server: Broken) -> None:
    """Send SIGTERM under load. Running requests get a whole answer or an error, and the exit code
    is 0."""
    engine, connections = server.engine, [server.stream(1500, number) for number in range(8)]
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


LIVE = (
    out_of_memory_in_a_step,
    killed_clients,
    slow_readers,
    half_open_sockets,
    clock_jumps,
    stopped_engine,
    thousand_stopped_readers,
)
"""Faults that a server must survive."""
ENDS = (terminated, killed_engine, killed_server)
"""Faults that end a server."""


def run(seed: int, num_faults: int, only: str = "") -> dict[str, dict[str, float]]:
    """Inject the first ``num_faults`` faults, with each format of weights or with ``only`` one.
    Returns the seconds of each. No fault is random."""
    return {name: inject(num_faults, *FORMATS[name]) for name in FORMATS if only in ("", name)}


def inject(num_faults: int, *flags: str) -> dict[str, float]:
    """Inject faults into servers with ``flags``. Returns the seconds of each."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, broken_server(Path(folder), *flags) as server:
        total = sum(settled(server)["engine_memory_bytes"].values())
        for fault in LIVE[:num_faults]:
            started = time.monotonic()
            fault(server)
            memory = settled(server)["engine_memory_bytes"]
            assert sum(memory.values()) == total, f"after {fault.__name__}: {memory}"
            assert server.answer()[0] == 200
            seconds[fault.__name__] = round(time.monotonic() - started, 2)
    for fault in ENDS[: max(num_faults - len(LIVE), 0)]:
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            with broken_server(Path(folder), *flags) as server:
                fault(server)
            seconds[fault.__name__] = round(time.monotonic() - started, 2)
            with broken_server(Path(folder), *flags) as server:
                assert server.answer()[0] == 200
                assert sum(settled(server)["engine_memory_bytes"].values()) == total
    return seconds
