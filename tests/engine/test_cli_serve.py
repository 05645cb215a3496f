"""``engine serve`` as a process: how it starts, drains, and ends when a part of it is killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

ENGINE = (sys.executable, "-m", "engine")
SMALL = ("--cache-gib", "0.05", "--max-model-len", "2048")


@pytest.fixture
def server() -> subprocess.Popen[str]:
    """``engine serve`` as a process of its own, listening."""
    process = subprocess.Popen(
        [*ENGINE, "serve", "--port", "0", *SMALL],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    yield process
    process.kill()
    process.communicate()


def _address(server: subprocess.Popen[str]) -> tuple[str, str]:
    """(all that start-up printed, the address)."""
    assert server.stdout is not None
    lines = []
    for line in server.stdout:
        lines.append(line)
        if found := re.search(r"address +(http://\S+)/v1", line):
            return "".join(lines), found[1]
    raise AssertionError(server.stderr.read() if server.stderr else "")


@pytest.mark.full("--volatile-line-(")
@pytest.mark.parametrize(
    ("flag", "value"), [("--api-key-file", "/nowhere/key"), ("--volatile-line", "(")]
)
def test_what_the_server_refuses_is_said_before_a_model_is_shown(flag: str, value: str) -> None:
    done = subprocess.run(
        [*ENGINE, "serve", "--port", "0", *SMALL, flag, value],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{flag} " in done.stderr and "can not be read" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_serve_starts_with_one_screen_and_drains_on_sigterm(server: subprocess.Popen[str]) -> None:
    screen, url = _address(server)
    for word in (
        "MiB of weights in",
        "one arena for KV and states, 51.2 MiB: 51.2 MiB free, 0 B cached",
        "tokens at most",
        "hybrid",
        "2,048 tokens",
        "MiB",
        "kernels",
        "cpu",
    ):
        assert word in screen
    assert len(screen.splitlines()) <= 24
    deadline = time.monotonic() + 30
    while True:
        try:
            assert httpx.get(url + "/health").json() == {"status": "ok"}
            break
        except httpx.ConnectError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    body = {"prompt": "drain me", "max_tokens": 300, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as answer:
        events = answer.iter_lines()
        first = next(events)
        os.killpg(server.pid, signal.SIGTERM)  # to both processes, as service managers do
        rest = [line for line in events if line]
    assert first.startswith("data: ") and rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert server.wait(30) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health")


def _is_gone(pid: int) -> bool:
    """Ended, whether or not somebody has asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _engine_of(server: subprocess.Popen[str]) -> int:
    """The process of its engine."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[1] == str(server.pid):
                return int(stat.parent.name)
    raise AssertionError("the server has no engine")


LONG = {"prompt": "go on", "max_tokens": 1500, "ignore_eos": True, "stream": True}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_a_killed_engine_ends_every_stream_and_the_server_with_one_sentence(
    server: subprocess.Popen[str],
) -> None:
    _, url = _address(server)
    with httpx.stream("POST", url + "/v1/completions", json=LONG, timeout=60) as answer:
        events = answer.iter_lines()
        next(events)
        os.kill(_engine_of(server), signal.SIGKILL)
        rest = [line for line in events if line]
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert "The engine's process was ended by SIGKILL" in error["message"]
    assert server.wait(30) == 1
    assert server.stderr is not None
    said = server.stderr.read()
    assert said.startswith("engine serve: The engine's process") and said.count("\n") == 1


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_the_engine_of_a_killed_server_ends_itself(server: subprocess.Popen[str]) -> None:
    _, url = _address(server)
    engine = _engine_of(server)
    with (
        pytest.raises(httpx.HTTPError),
        httpx.stream("POST", url + "/v1/completions", json=LONG, timeout=60) as answer,
    ):
        for number, _ in enumerate(answer.iter_lines()):
            if number == 2:
                server.kill()
    server.wait(30)
    deadline = time.monotonic() + 30
    while not _is_gone(engine):
        assert time.monotonic() < deadline, "the engine goes on without its server"
        time.sleep(0.02)
