"""Tests of the recording proxy: requests and answers pass unchanged, and the trace can be read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import resource
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from engine.front.command.cli import main
from engine.front.command.proxy import Proxy, TraceWriter
from engine.text.tokenizer_files import HFTokenizer
from hybridcache import open_trace, simulate
from hybridcache.lab.results.report import stats_table
from hybridcache.lab.traces.statistics import trace_stats
from tests.engine.front.scripted import ScriptedEngine
from tests.engine.front.server.conftest import serving
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[4]
SECRET = "what nobody else should read, said at some length "


@contextlib.contextmanager
def proxied(path: Path, keeps_text: bool) -> Iterator[tuple[openai.OpenAI, ScriptedEngine]]:
    engine = ScriptedEngine()
    with serving(engine.engine) as live, path.open("w+b", buffering=0) as file:
        writer = TraceWriter(file, keeps_text=keeps_text, tokenizer=HFTokenizer())
        front = ServerThread(Proxy(live.url, writer))
        try:
            yield openai.OpenAI(base_url=f"{front.url}/v1", api_key="none", max_retries=0), engine
        finally:
            front.stop()


def lines_of(path: Path, number: int) -> list[dict[str, Any]]:
    """Return the first ``number`` requests of a trace: a line is written after its answer."""
    wait_until(lambda: len(path.read_text().splitlines()) > number)
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


@pytest.mark.parametrize("keeps_text", [False, True])
def test_a_recording_replays_with_the_hits_of_the_engine(tmp_path: Path, keeps_text: bool) -> None:
    """Answers of all lengths around the grid of 64; every fourth one is cut off, and every third
    one is a call."""
    function = {"name": "count", "parameters": {"type": "object", "properties": {}}}
    path, messages, used = tmp_path / "log.jsonl", list[Any](), list[Any]()
    with proxied(path, keeps_text) as (client, engine):
        assert client.models.list().data[0].id == engine.engine.model_name
        for turn in range(12):
            calls = turn % 3 == 2
            if not messages or messages[-1]["role"] == "assistant":
                messages.append({"role": "user", "content": SECRET})
            text = f'<tool_call>\n{{"name": "count", "arguments": {{"of": {turn}}}}}\n</tool_call>'
            text = text if calls else "alpha" * (4 + turn)
            ids = engine.tokenizer.encode(f"{text}<|im_end|>")
            answer = client.chat.completions.create(
                model=engine.engine.model_name,
                messages=messages,
                seed=engine.sampler.add(ids),
                max_tokens=10 if turn % 4 == 3 and not calls else 99,
                tools=[{"type": "function", "function": function}],
            )
            messages.append(answer.choices[0].message.model_dump())
            for call in messages[-1]["tool_calls"] or ():
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": "7"})
            used.append(answer.usage)
        lines = lines_of(path, 12)
    text = path.read_text()
    assert (SECRET in text) == keeps_text and ("alpha" in text) == keeps_text
    assert len({request.session for request in open_trace(str(path))}) == 1
    assert [len(line["tokens"]) for line in lines] == [one.prompt_tokens for one in used]
    assert [len(line["output"]) for line in lines] == [one.completion_tokens for one in used]
    cached = sum(one.prompt_tokens_details.cached_tokens for one in used)
    assert simulate(str(path), gib=[1.0], processes=1).runs[0].cached_tokens == cached > 0


class Upstream:
    """Server that records each request and can be made to wait.

    A body's ``"wait"`` names the event that its answer waits for; its first event is sent before.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, bytes, dict[bytes, list[bytes]], bytes]] = []
        self.may_end: dict[str, asyncio.Event] = {}
        self.num_disconnected = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        body += message["body"]
        target = scope["raw_path"] + (b"?" * bool(scope["query_string"])) + scope["query_string"]
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        self.requests.append((scope["method"], target, headers, body))
        options = json.loads(body) if body.startswith(b"{") else {}
        status = options.get("status", 404 if target.startswith(b"/nowhere") else 200)
        more = [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"x-odd", b"\xe9")]
        more += [(b"content-encoding", b"own")] * ("encoded" in options)
        start = {"type": "http.response.start", "status": status, "headers": more}
        name = options.get("wait")
        if name is not None and not options.get("stream") and not await self._wait(name, receive):
            return
        await send(start)
        for text in ("one", "two"):
            event = {"choices": [{"index": 0, "delta": {"content": text}}]}
            data = b"data: " + json.dumps(event).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})
            if options.get("stream") and not await self._wait(name, receive):
                return
        if not options.get("breaks"):
            await send({"type": "http.response.body", "body": b""})

    async def _wait(self, name: str, receive: Any) -> bool:
        """Wait until the answer may end. Return False if its client has disconnected first."""
        may_end = self.may_end.setdefault(name, asyncio.Event())
        tasks = [asyncio.ensure_future(one) for one in (may_end.wait(), receive())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        self.num_disconnected += not may_end.is_set()
        return may_end.is_set()


class ServerThread:
    """ASGI application on a local port, in its own thread."""

    def __init__(self, app: Any, **settings: Any) -> None:
        quiet = {"log_level": "critical", "lifespan": "auto", "server_header": False}
        config = uvicorn.Config(app, port=0, **quiet | settings)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.port: int = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(120)
        assert not self.thread.is_alive()


def chat(prompt: str, **body: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], **body}


class Setup:
    """Recording proxy in front of an ``Upstream``, with its trace and clients."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "trace.jsonl"
        self.file = self.path.open("x+b", buffering=0)
        self.upstream = Upstream()
        self.behind = ServerThread(self.upstream, lifespan="off")
        self.writer = TraceWriter(self.file, keeps_text=True, tokenizer=None)
        self.proxy = Proxy(self.behind.url, self.writer)
        self.front = ServerThread(self.proxy, timeout_graceful_shutdown=1)
        self.clients = ThreadPoolExecutor(200)
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.Client(limits=limits, timeout=120, trust_env=False)
        self.url = f"{self.front.url}/v1/chat/completions"

    def ask(self, prompt: str, **body: Any) -> Future[httpx.Response]:
        """Begin a request, and wait until upstream has received it."""
        before = len(self.upstream.requests)
        content = chat(prompt, **body)
        future = self.clients.submit(self.client.post, self.url, json=content)
        wait_until(lambda: len(self.upstream.requests) > before)
        return future

    def end(self, name: str) -> None:
        """Release the answers that wait for ``name``."""
        event = self.upstream.may_end.setdefault(name, asyncio.Event())
        self.behind.server.servers[0].get_loop().call_soon_threadsafe(event.set)

    def prompts(self) -> list[str]:
        """Return the prompts in the file now, as another process would read them."""
        lines = self.path.read_text().splitlines()
        return [json.loads(line)["request"]["messages"][0]["content"] for line in lines[1:]]

    def stop(self) -> None:
        self.front.stop()
        self.behind.stop()
        self.clients.shutdown()
        self.client.close()
        self.file.close()


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setup]:
    with monkeypatch.context() as environment:
        environment.setenv("http_proxy", "http://127.0.0.1:9")
        made = Setup(tmp_path)
    yield made
    made.stop()


@pytest.mark.full("0")
@pytest.mark.parametrize("seed", range(3))
def test_a_trace_of_overlapping_requests_can_be_replayed(setup: Setup, seed: int) -> None:
    """Check that the trace is read without a warning, with every request in its place."""
    choose = random.Random(seed)
    open_: dict[str, Future[httpx.Response]] = {}
    order = []
    for number in range(24):
        name = f"{number:02d} " + "x" * choose.randrange(4000)
        order.append(name)
        open_[name] = setup.ask(name, wait=name, stream=choose.random() < 0.5)
        while len(open_) > 6 or (open_ and choose.random() < 0.4):
            ended = choose.choice(sorted(open_))
            setup.end(ended)
            assert open_.pop(ended).result().status_code == 200
    for name in choose.sample(sorted(open_), len(open_)):
        setup.end(name)
        assert open_.pop(name).result().status_code == 200
    wait_until(lambda: setup.writer.num_requests == 24)
    assert setup.prompts() == order
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        times = [request.timestamp_s for request in open_trace(str(setup.path))]
        result = simulate(str(setup.path), gib=[1.0], processes=1)
    assert times == sorted(times) and result.runs[0].requests == 24


def test_equal_chats_of_different_keys_or_salts_share_nothing(setup: Setup) -> None:
    """No key is in the file. Header or body, and the name of the header, make no difference."""
    key, other = {"Authorization": "Bearer first-key"}, {"Authorization": "bearer other-key"}
    salt, as_salt = {"x-cache-salt": "my-salt"}, {"cache_salt": "my-salt"}
    sent: list[tuple[dict[str, str], dict[str, str]]] = [
        (key, {}), (other, {}), (key | salt, {}), ({}, {}),
        ({"x-api-key": "first-key"}, {}), (key, as_salt),
    ]  # fmt: skip
    for headers, more in sent:
        httpx.post(setup.url, json=chat("equal", **more), headers=headers, timeout=120)
    lines = lines_of(setup.path, len(sent))
    for name in ("session", "namespace"):
        first = [line[name] for line in lines]
        assert len({*first}) == 4 and first[4:] == [first[0], first[2]]
    assert "first-key" not in setup.path.read_text() and b"first-key".hex() not in str(lines)


def test_the_address_of_a_client_is_passed_on(setup: Setup) -> None:
    """Those of this machine need none: the proxy is there too."""
    for client, added in (("::ffff:10.0.0.7", [b"10.0.0.7"]), ("::1", [])):
        scope = {"method": "GET", "raw_path": b"/", "query_string": b"", "client": (client, 1)}
        sent = setup.proxy._request(scope | {"headers": [(b"x-forwarded-for", b"1.1.1.1")]}, b"")
        found = [value for name, value in sent.headers.raw if name.lower() == b"x-forwarded-for"]
        assert found == [b"1.1.1.1", *added]


def test_interrupted_answers_are_recorded_as_far_as_they_went(setup: Setup) -> None:
    """Cover answers cut off by the client, by upstream, and by the end of the recording."""
    with httpx.stream(
        "POST", setup.url, json=chat("client", wait="never", stream=True), timeout=120
    ) as leaving:
        assert "one" in next(leaving.iter_text())
    wait_until(lambda: setup.prompts() == ["client"])
    wait_until(lambda: setup.upstream.num_disconnected == 1)  # Upstream does not compute on.
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(setup.url, json=chat("upstream", breaks=True), timeout=120)
    other = setup.url.replace("chat/completions", "messages")
    assert httpx.post(other, json=chat("other")).status_code == 200
    running = setup.ask("running", wait="running", stream=True)
    silent = setup.ask("silent", wait="silent")
    whole = setup.ask("whole", encoded=True).result()
    assert (whole.status_code, whole.headers["content-encoding"]) == (200, "own")
    wait_until(lambda: setup.prompts() == ["client", "upstream"])
    setup.front.stop()
    assert setup.prompts() == ["client", "upstream", "running", "whole"]
    lines = setup.path.read_text().splitlines()[1:]
    answers = [json.loads(line)["answer"]["content"] for line in lines]
    assert answers == ["one", "onetwo", "one", "onetwo"]
    assert sorted(setup.writer.skipped) == [
        "only chat completions are written",
        "requests without an answer are not written",
    ]
    with pytest.raises(httpx.RemoteProtocolError):
        running.result()
    assert silent.result().status_code == 503


@contextlib.contextmanager
def recording(to: str, out: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Yield (recording process, its address). It starts as under a shell that ignores SIGINT."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "import engine.front.command.record as r; r.GRACE_S = 1;"
        "from engine.front.command.cli import main;"
        f"sys.exit(main({['record', '--to', to, '--out', str(out), '--port', '0']!r}))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().split()[0]


def test_a_trace_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    behind, path = ServerThread(Upstream(), lifespan="off"), tmp_path / "trace.jsonl"
    with recording(behind.url, path) as (process, url):
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (300, 300))
        httpx.post(f"{url}/chat/completions", json=chat("first"), timeout=120)
        process.send_signal(signal.SIGINT)
        printed = process.stdout.read()
        assert "not in the trace: 1, since the file cannot be written" in printed
        assert process.wait(120) == 0
    assert "0 requests" in printed and not list(open_trace(str(path)))
    behind.stop()


def test_a_server_that_does_not_answer_leaves_no_file(tmp_path: Path, capsys: Any) -> None:
    flags = ["--to", "http://127.0.0.1:9/v1", "--out", f"{tmp_path / 'trace'}", "--port", "0"]
    assert main(["record", *flags]) == 2 and not [*tmp_path.iterdir()]
    assert "No server answers at http://127.0.0.1:9 (" in capsys.readouterr().err


@pytest.mark.full("SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_recording_with_its_summary(tmp_path: Path, number: int) -> None:
    """Send the signal during a stream."""
    upstream, path = Upstream(), tmp_path / "trace.jsonl"
    behind = ServerThread(upstream, lifespan="off")
    with recording(behind.url, path) as (process, url):
        body = chat("abcdefgh", wait="never", stream=True)
        httpx.post(f"{url}/chat/completions", json=chat("first"), timeout=120)
        with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=120) as stream:
            next(stream.iter_text())
            process.send_signal(number)
            printed = process.stdout.read()
        assert process.wait(120) == 0
    behind.stop()
    assert f"2 requests; hybridcache simulate --trace {path}" in printed
    assert "tokens counted by: 4 characters as a token, an estimate" in printed
    trace = open_trace(str(path))
    assert "an estimate" in trace.counted_by
    assert "counted by: 4 characters as a token" in stats_table(trace_stats(trace))
    assert [len(request.tokens) for request in trace] == [16, 16]
