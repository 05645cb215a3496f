"""Server for fault injection: ``engine serve`` with the built-in model.

Files trigger a failing step of its engine and jumps of its clock.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from experiments.provenance import ROOT
from experiments.system.flood import server_port

FAILS = """
import os
import engine.worker.process_channel as client
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
from engine.command.cli import main
sys.exit(main(sys.argv[1:]))
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
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                if parts_of(stat)[1] == str(self.process.pid):
                    return int(stat.parent.name)
        raise RuntimeError(f"Process {self.process.pid} has no child that is its engine.")

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
        deadline = time.monotonic() + 120
        while self.report()["num_running"] < num_running:
            if time.monotonic() > deadline:
                raise AssertionError(f"fewer than {num_running} requests run after 120 s")
            time.sleep(0.02)


def parts_of(stat: Path) -> list[str]:
    """Return the fields of /proc/PID/stat: state, parent, ..."""
    return stat.read_text().rpartition(")")[2].split()


def is_gone(pid: int) -> bool:
    """Return True if the process has ended, even if its exit code was not read."""
    try:
        return parts_of(Path(f"/proc/{pid}/stat"))[0] == "Z"
    except OSError:
        return True


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
    return body.count('"choices": [{')


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
