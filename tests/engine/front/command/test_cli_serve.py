"""Tests of ``engine serve`` as a process: start, draining, and the death of one of its
processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from engine import ServerConfig, serve_engine
from engine.config import BUILTIN_PROMPTS, EngineConfig
from engine.front.worker.spawn import spawn
from tests.documents import ROOT, check_command
from tests.endurance.faults import child_of
from tests.refused import refused
from tests.waiting import wait_until

ENGINE = (sys.executable, "-m", "engine")
SMALL = ("--cache-gib", "0.05", "--max-model-len", "2048")
IMAGES = [
    {
        name: json.loads(words)
        for name, words in re.findall(
            r"^(ENTRYPOINT|CMD|HEALTHCHECK)[^[]*(\[.*\])$", (ROOT / file).read_text(), re.M
        )
    }
    for file in ("Dockerfile", "Dockerfile.cuda")
]
"""Commands of the images by their instruction."""


def _start(*flags: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*ENGINE, "serve", "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **({"env": os.environ | {"OMP_NUM_THREADS": "1"}} | options),
    )


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> subprocess.Popen[str]:
    """Start ``engine serve`` with the parameter's flags, in a folder of its own."""
    os.mkfifo(tmp_path / "keys")
    process = _start(*SMALL, *request.param, cwd=tmp_path)
    if "keys" in request.param:
        (tmp_path / "keys").write_text("old\n")
    yield process
    process.kill()
    process.communicate()


def _address(server: subprocess.Popen[str]) -> tuple[str, str]:
    """Return (output up to the address, address)."""
    assert server.stdout is not None
    lines = []
    for line in server.stdout:
        lines.append(line)
        if found := re.search(r"address +(http://\S+)/v1", line):
            return "".join(lines), found[1]
    raise AssertionError(server.stderr.read() if server.stderr else "")


def _wait_until_ready(url: str) -> None:
    def is_ready() -> bool:
        with contextlib.suppress(httpx.ConnectError):
            return httpx.get(url + "/health", timeout=120).json()["status"] == "ok"
        return False

    wait_until(is_ready)


def test_systems_that_cannot_serve_are_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command line prints these errors without a traceback."""
    config = EngineConfig()
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", None)
        patch.setattr("tempfile._candidate_tempdir_list", lambda: ["/proc"])
        with pytest.raises(OSError, match="set TMPDIR to a folder in which this user may write"):
            spawn(config, "here")
    monkeypatch.setattr("resource.getrlimit", lambda which: (12, 12))
    refused(r"only 12 files can be open, .* ulimit -n 1024", spawn, config, "here", kind=OSError)


def test_a_script_that_serves_lets_waiting_threads_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the command does, before torch is imported."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ValueError):
        serve_engine(EngineConfig(), ServerConfig(port=taken.getsockname()[1]))
    assert os.environ["GOMP_SPINCOUNT"] == "1000"


def test_images_listen_to_other_hosts() -> None:
    """Also the one on the page, whose arguments replace the image's."""
    page = (ROOT / "docs/how-to/deploy.md").read_text().replace("\\\n", " ")
    [arguments] = re.findall(r"^docker run .* engine +(serve .*)$", page, re.M)
    assert IMAGES[0] == IMAGES[1] and IMAGES[0]["ENTRYPOINT"] == ["engine"]
    assert arguments.startswith(" ".join(IMAGES[0]["CMD"]) + " ")
    check_command(f"engine {arguments}")


@pytest.mark.parametrize("server", [("--log-requests", *IMAGES[0]["CMD"][1:])], indirect=True)
def test_serve_starts_with_one_screen_and_drains_on_sigterm(server: subprocess.Popen[str]) -> None:
    screen, url = _address(server)
    for text in (
        "MiB of weights",
        "one arena for KV and states, 51.2 MiB at most, used as",
        "http://HOST:",
        "2,048 tokens",
        "cpu",
    ):
        assert text in screen
    assert len(screen.splitlines()) <= 24 and "left alone" not in screen
    assert all(f'"{prompt}"' in screen for prompt in BUILTIN_PROMPTS)
    _wait_until_ready(url)
    *check, script = IMAGES[0]["HEALTHCHECK"]
    check = [sys.executable, *check[1:], script.replace("8000", url.rpartition(":")[2])]
    assert subprocess.run(check).returncode == 0
    [line] = re.findall(r"^ +try +curl (.*)$", screen, re.M)
    pasted, _, header, _, content = shlex.split(line)
    name, _, value = header.partition(": ")
    answer = httpx.post(pasted, content=content, headers={name: value}, timeout=120).json()
    assert answer["choices"][0]["message"]["content"].endswith("#### 8")
    httpx.get(url + "/nothing", timeout=120)
    body = {"prompt": "drain me", "max_tokens": 100, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=120) as stream:
        events = stream.iter_lines()
        first = next(events)
        os.killpg(server.pid, signal.SIGTERM)  # to both processes, as service managers do
        rest = [line for line in events if line]
    assert first.startswith("data: ") and rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert server.wait(120) == 0
    assert subprocess.run(check, capture_output=True).returncode == 1
    log = server.stderr.read()
    assert re.search(r"are refused(; 1 request may run for 30 s more .*)?\.\n", log)
    assert log.startswith("warning: --host 0.0.0.0 accepts clients of other machines")
    assert re.search(
        r"^\d{4}-\d\d-\d\d [\d:]{8}[+-]\d{4} GET /nothing 404  \d+ ms  from 127.0.0.1  There is",
        log,
        re.M,
    ), log


@pytest.mark.parametrize("server", [("--api-key-file", "keys")], indirect=True)
def test_keys_are_read_again_and_a_killed_engine_is_reported_once(
    server: subprocess.Popen[str], tmp_path: Path
) -> None:
    """Its keys come from a pipe, of which each content can be read once."""
    screen, url = _address(server)
    assert "keys         1 accepted; one of 3 characters can be guessed: openssl" in screen

    def client(key: str) -> httpx.Client:
        return httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=120)

    with client("old") as old, client("new") as new:

        def statuses() -> list[int]:
            return [one.get(url + "/v1/models").status_code for one in (old, new)]

        assert statuses() == [200, 401]
        server.send_signal(HUP)
        (tmp_path / "keys").write_text("new\n")
        wait_until(lambda: statuses() == [401, 200])
        with new.stream("GET", url + "/v1/cache/events") as page:
            next(page.iter_text())
            assert new.get(f"{url}/v1/cache/nodes/{1 << 63}").status_code == 404
            os.kill(child_of(server.pid), signal.SIGKILL)
            assert server.wait(120) == 1
    log = server.stderr.read()
    assert log.count("The engine's process was ended by SIGKILL") == 1, log
    assert "were read again: 1 accepted; one of 3 " in log and "Traceback" not in log


LONG = {"prompt": "go on", "max_tokens": 1500, "ignore_eos": True, "stream": True}


class ServersToStop:
    """Servers with temporary files in ``folder``, and checks that they end cleanly."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.servers: list[subprocess.Popen[str]] = []

    def start(self, *flags: str, ignores_sigint: bool = False) -> subprocess.Popen[str]:
        """Start a server. ``ignores_sigint`` starts it like the background command of a script."""
        env = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(self._folder)}
        handler = signal.SIG_IGN if ignores_sigint else signal.SIG_DFL
        before = signal.signal(signal.SIGINT, handler), signal.signal(HUP, signal.SIG_DFL)
        try:
            server = _start("--cache-gib", "0.05", *flags, env=env)
        finally:
            for each, found in zip((signal.SIGINT, HUP), before, strict=True):
                signal.signal(each, found)
        self.servers.append(server)
        return server

    def stop(self, server: subprocess.Popen[str], number: int) -> None:
        """Send SIGINT and SIGHUP to all processes of a server, as a terminal does, and SIGTERM only
        to the first."""
        if number != signal.SIGTERM:
            os.killpg(server.pid, number)
        else:
            os.kill(server.pid, number)

    def expect_end(self, server: subprocess.Popen[str], *codes: int) -> str:
        """Check that the server ends with one of ``codes`` and without a traceback. Returns its
        log.

        Its other processes have its standard error open, so they have ended too.
        """
        _, log = server.communicate(timeout=120)
        assert "Traceback" not in log
        assert server.returncode in codes, log
        return log

    def close(self) -> None:
        for server in self.servers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.communicate()
        assert not [*self._folder.iterdir()], "files are left"


@pytest.fixture
def servers(tmp_path: Path) -> ServersToStop:
    servers = ServersToStop(tmp_path)
    yield servers
    servers.close()


ROLES = {
    "combined": (),
    "prefill": ("--role", "prefill", "--transfer-at", "127.0.0.1:0"),
    "decode": ("--role", "decode", "--prefill", "127.0.0.1:9"),
}
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
ENDS = [
    *(("combined", phase, INT) for phase in ("loading", "screen", "idle", "serving")),
    *(("combined", phase, TERM) for phase in ("loading", "screen", "idle", "serving")),
    *(("combined", phase, HUP) for phase in ("loading", "idle", "serving")),
    *((role, "idle", INT) for role in ("prefill", "decode")),
    *((role, phase, TERM) for role in ("prefill", "decode") for phase in ("loading", "serving")),
]


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize(
    ("role", "phase", "number"), ENDS, ids=[f"{r}-{p}-{n.name}" for r, p, n in ENDS]
)
def test_a_stopped_server_leaves_no_process_and_no_file(
    servers: ServersToStop, role: str, phase: str, number: signal.Signals
) -> None:
    """Check each phase: every process ends and no file is left."""
    server = servers.start(*ROLES[role], ignores_sigint=phase == "idle")
    if phase == "loading":
        while True:
            with contextlib.suppress(RuntimeError):
                child_of(server.pid)
                break
            assert server.poll() is None
            time.sleep(0.01)
        servers.stop(server, number)
        servers.expect_end(server, 128 + number)
        return
    _, url = _address(server)
    if phase == "serving":
        few = LONG | {"max_tokens": 300}
        with httpx.stream("POST", url + "/v1/completions", json=few, timeout=120) as answer:
            events = answer.iter_lines()
            next(events)
            servers.stop(server, number)
            assert [line for line in events if line][-1] == "data: [DONE]"
    else:
        if phase == "idle":
            _wait_until_ready(url)
        servers.stop(server, number)
    # The server installs its signal handlers late. Before, a signal ends it like any command.
    log = servers.expect_end(server, 0, *([128 + number] if phase == "screen" else []))
    assert phase != "idle" or "Stopping: new requests are refused.\n" in log


@pytest.mark.full
@pytest.mark.parametrize("stopped", ["prefill", "decode"])
def test_a_role_stopped_during_a_transfer_finishes_it(servers: ServersToStop, stopped: str) -> None:
    """Check that the prefix in transfer is finished, and its request answered."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    at = f"127.0.0.1:{port}"
    roles = {"prefill": servers.start("--role", "prefill", "--transfer-at", at)}
    _, prefill_url = _address(roles["prefill"])
    roles["decode"] = servers.start("--role", "decode", "--prefill", at)
    _, url = _address(roles["decode"])
    for one in (prefill_url, url):
        _wait_until_ready(one)
    body = {"prompt": "what is far away " * 400, "max_tokens": 3, "ignore_eos": True}
    with ThreadPoolExecutor() as pool:
        answering = pool.submit(httpx.post, url + "/v1/completions", json=body, timeout=120)

        def is_running() -> bool:
            metrics = httpx.get(prefill_url + "/metrics", timeout=120).text
            return "engine_running_requests 1.0" in metrics or answering.done()

        wait_until(is_running)
        servers.stop(roles[stopped], TERM)
        answer = answering.result().json()
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["usage"]["prompt_tokens_details"]["transferred"]["tokens"] > 6000
    servers.expect_end(roles[stopped], 0)
    other = roles["decode" if stopped == "prefill" else "prefill"]
    assert other.poll() is None
    servers.stop(other, TERM)
    servers.expect_end(other, 0)
