"""A proxy that changes nothing, and a trace that the laboratory reads."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import gzip
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
import uvicorn
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from engine.plugins.record import trace_writer as trace
from engine.plugins.record.chats import Chats
from engine.plugins.record.command import record
from engine.plugins.record.proxy import create_proxy
from engine.plugins.record.trace_writer import TraceWriter
from engine.text.tokenizer import ByteTokenizer, Tokenizer
from experiments.system.agents.scripted import ScriptedEngine
from hybridcache import open_trace, simulate
from hybridcache.lab.report import stats_table
from hybridcache.lab.trace_stats import trace_stats
from hybridcache.tokens import common_prefix_len

ROOT = Path(__file__).resolve().parents[2]
SECRET = "what nobody else should read, said at some length "
CALL = '<tool_call>\n{"name": "read", "arguments": {"path":"a"}}\n</tool_call><|im_end|>'
TOOL = {"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}


@contextlib.contextmanager
def proxied(
    path: Path, keeps_text: bool, tokenizer: Tokenizer | None = None
) -> Iterator[tuple[openai.OpenAI, ScriptedEngine]]:
    engine = ScriptedEngine()
    with engine.serving() as upstream, path.open("w+b") as file:
        writer = TraceWriter(file, keeps_text=keeps_text, tokenizer=tokenizer)
        app = create_proxy(upstream, writer)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            url = f"http://127.0.0.1:{port}/v1"
            yield openai.OpenAI(base_url=url, api_key="none", max_retries=0), engine
        finally:
            server.should_exit = True
            thread.join(30)


def converse(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    """Two turns, the second streamed, the first one with a call."""
    messages: list[Any] = [{"role": "user", "content": SECRET * 6}]
    model = engine.engine.model_name
    ids = engine.tokenizer.encode(CALL)
    first = client.chat.completions.create(
        model=model, messages=messages, tools=[TOOL], seed=engine.sampler.add(ids), max_tokens=99
    )
    [call] = first.choices[0].message.tool_calls or ()
    messages += [
        first.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "alpha"},
    ]
    ids = engine.tokenizer.encode("It is alpha.<|im_end|>")
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        tools=[TOOL],
        seed=engine.sampler.add(ids),
        max_tokens=99,
        stream=True,
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert said == "It is alpha."


def converse_in_messages(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    """The same on /v1/messages."""
    url = str(client.base_url).removesuffix("/v1/")
    claude = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": SECRET * 6}]
    tool: Any = {"name": "read", "input_schema": {"type": "object"}}
    asked: Any = {"model": engine.engine.model_name, "tools": [tool], "max_tokens": 99}
    engine.sampler.add(engine.tokenizer.encode(CALL))
    first = claude.messages.create(messages=messages, **asked)
    [call] = [block for block in first.content if block.type == "tool_use"]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "alpha"}
    messages += [
        {
            "role": "assistant",
            "content": [block.model_dump(exclude_none=True) for block in first.content],
        },
        {"role": "user", "content": [result]},
    ]
    engine.sampler.add(engine.tokenizer.encode("It is alpha.<|im_end|>"))
    with claude.messages.stream(messages=messages, **asked) as stream:
        assert stream.get_final_text() == "It is alpha."


def converse_in_responses(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    """The same on /v1/responses, the second going on from the first."""
    tool: Any = {"type": "function", **TOOL["function"], "strict": False}
    asked: Any = {"model": engine.engine.model_name, "tools": [tool], "max_output_tokens": 99}
    engine.sampler.add(engine.tokenizer.encode(CALL))
    first = client.responses.create(input=SECRET * 6, **asked)
    [call] = [item for item in first.output if item.type == "function_call"]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "alpha"}
    engine.sampler.add(engine.tokenizer.encode("It is alpha.<|im_end|>"))
    events = client.responses.create(
        input=[result], previous_response_id=first.id, stream=True, **asked
    )
    said = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(said) == "It is alpha."


DIALECTS = {
    "chat": converse,
    "messages": converse_in_messages,
    "responses": converse_in_responses,
}


def lines_of(path: Path, number: int) -> list[dict[str, Any]]:
    """The requests of a trace, once all are there: a line comes after its answer."""
    deadline = time.monotonic() + 20
    while len(lines := path.read_text().splitlines()) < 1 + number:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [json.loads(line) for line in lines[1:]]


@pytest.mark.parametrize("keeps_text", [False, True])
@pytest.mark.parametrize("tokenizer", [None, ByteTokenizer()], ids=["pieces", "tokens"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_conversation_becomes_a_trace_that_the_laboratory_reads(
    tmp_path: Path, keeps_text: bool, tokenizer: Tokenizer | None, dialect: str
) -> None:
    path = tmp_path / "log.jsonl"
    with proxied(path, keeps_text, tokenizer) as (client, engine):
        assert client.models.list().data[0].id == engine.engine.model_name
        DIALECTS[dialect](client, engine)
        lines = lines_of(path, 2)
    text = path.read_text()
    assert (SECRET in text) == keeps_text and ("alpha" in text) == keeps_text
    first, second = list(open_trace(str(path)))
    assert first.session == second.session and first.namespace == second.namespace
    shared = common_prefix_len(first.tokens, second.tokens)
    assert shared >= len(first.tokens) - 8 and len(second.tokens) > shared
    assert len(second.output) > 2
    if tokenizer is not None and keeps_text:
        said = tokenizer.decode(lines[1]["output"])
        assert said == "It is alpha.\n"
    result = simulate(str(path), gib=[1.0], processes=1)
    assert result.runs[0].requests == 2


def test_what_is_passed_on_but_not_written_is_counted_by_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from starlette.testclient import TestClient

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(400 if b"bad" in request.content else 200, json={})

    upstream = functools.partial(httpx.AsyncClient, transport=httpx.MockTransport(answer))
    monkeypatch.setattr("engine.plugins.record.proxy.httpx.AsyncClient", upstream)
    with (tmp_path / "log").open("w+b") as file:
        writer = TraceWriter(file, keeps_text=False, tokenizer=None)
        with TestClient(create_proxy("http://upstream", writer)) as client:
            for path, body in (
                ("chat/completions", {"messages": "bad"}),
                ("completions", {"prompt": ["a", "b"]}),
                ("completions", {"prompt": [[1], [2]]}),
                ("completions", {"prompt": "a"}),
                ("completions", {"prompt": [1, 2]}),
            ):
                client.post(f"/v1/{path}", json=body)
            client.get("/v1/responses/resp_1")
    assert writer.num_requests == 2
    assert list(writer.skipped.values()) == [2]
    [said] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "several prompts" in said


def test_what_can_not_be_recorded_to_is_told_before_anything_is_passed_on(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.touch()
    for upstream, out, match in (
        ("localhost:8000", tmp_path / "new", "is not an address"),
        ("http://localhost:1", there, "cannot be created"),
    ):
        with pytest.raises(ValueError, match=match):
            record(upstream, out, host="127.0.0.1", port=0, keeps_text=False, tokenizer=None)


def test_a_server_that_is_not_there_is_a_502(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    with (tmp_path / "log").open("w+b") as file:
        writer = TraceWriter(file, keeps_text=False, tokenizer=None)
        with TestClient(create_proxy("http://127.0.0.1:9", writer)) as client:
            answer = client.post("/v1/chat/completions", json={"messages": []})
    assert answer.status_code == 502 and "does not answer" in answer.text
    assert writer.num_requests == 0


class Upstream:
    """A server that notes every request as it came, and answers when it is told to.

    A body's ``"wait"`` names the event that its answer waits for; its first event is sent before.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[str, bytes, dict[bytes, list[bytes]], bytes]] = []
        self.may_end: dict[str, asyncio.Event] = {}
        self.num_left = 0

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
        self.seen.append((scope["method"], target, headers, body))
        said = json.loads(body) if body.startswith(b"{") else {}
        status = said.get("status", 404 if target.startswith(b"/nowhere") else 200)
        more = [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"x-odd", b"\xe9")]
        start = {"type": "http.response.start", "status": status, "headers": more}
        name = said.get("wait")
        if name is not None and not said.get("stream") and not await self._wait(name, receive):
            return
        await send(start)
        for word in ("one", "two"):
            event = {"choices": [{"index": 0, "text": word}]}
            data = b"data: " + json.dumps(event).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})
            if said.get("stream") and not await self._wait(name, receive):
                return
        if not said.get("breaks"):
            await send({"type": "http.response.body", "body": b""})

    async def _wait(self, name: str, receive: Any) -> bool:
        """Until the answer may end; False: its client has gone."""
        may_end = self.may_end.setdefault(name, asyncio.Event())
        tasks = [asyncio.ensure_future(one) for one in (may_end.wait(), receive())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        self.num_left += not may_end.is_set()
        return may_end.is_set()


class Serving:
    """An ASGI application behind a port of this machine, in a thread of its own."""

    def __init__(self, app: Any, **settings: Any) -> None:
        quiet = {"log_level": "critical", "lifespan": "auto", "server_header": False}
        config = uvicorn.Config(app, port=0, **quiet | settings)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        until(lambda: self.server.started)
        self.port: int = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


def until(is_true: Callable[[], object]) -> None:
    for _ in range(4000):
        if is_true():
            return
        time.sleep(0.005)
    raise AssertionError("it never became true")


class Setup:
    """A recording proxy in front of an ``Upstream``, its trace, and clients."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "trace.jsonl"
        self.file = self.path.open("x+b")
        self.upstream = Upstream()
        self.behind = Serving(self.upstream, lifespan="off")
        self.writer = TraceWriter(self.file, keeps_text=True, tokenizer=None)
        self.proxy = create_proxy(self.behind.url, self.writer)
        self.front = Serving(self.proxy, timeout_graceful_shutdown=1)
        self.clients = ThreadPoolExecutor(200)
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.Client(limits=limits, timeout=60, trust_env=False)
        self.url = f"{self.front.url}/v1/completions"

    def ask(self, prompt: str, **body: Any) -> Future[httpx.Response]:
        """Begin a request, and wait until upstream has it."""
        before = len(self.upstream.seen)
        asked = {"prompt": prompt, **body}
        future = self.clients.submit(self.client.post, self.url, json=asked)
        until(lambda: len(self.upstream.seen) > before)
        return future

    def end(self, name: str) -> None:
        """Let the answers that wait for ``name`` end."""
        event = self.upstream.may_end.setdefault(name, asyncio.Event())
        self.behind.server.servers[0].get_loop().call_soon_threadsafe(event.set)

    def prompts(self) -> list[str]:
        """What is in the file now, as another process would find it."""
        lines = self.path.read_text().splitlines()
        return [json.loads(line)["request"]["prompt"] for line in lines[1:]]

    def stop(self) -> None:
        self.front.stop()
        self.behind.stop()
        self.clients.shutdown()
        self.client.close()
        self.file.close()


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    made = Setup(tmp_path)
    yield made
    made.stop()


def test_lines_stand_in_order_of_arrival_and_at_once(setup: Setup) -> None:
    """A long request holds nothing back: what has ended is in the file, should the process be
    killed; and when it ends, its line comes where it belongs."""
    long = setup.ask("long", wait="long")
    for number in range(3):
        assert setup.ask(f"short {number}").result().status_code == 200
    until(lambda: len(setup.prompts()) == 3)
    middle = setup.ask("middle", wait="middle", stream=True)
    assert setup.ask("late").result().status_code == 200
    until(lambda: setup.prompts() == ["short 0", "short 1", "short 2", "late"])
    setup.end("middle")
    assert middle.result().text.count("data:") == 2
    until(lambda: setup.prompts() == ["short 0", "short 1", "short 2", "middle", "late"])
    setup.end("long")
    assert long.result().status_code == 200
    until(lambda: setup.prompts() == ["long", "short 0", "short 1", "short 2", "middle", "late"])
    until(lambda: setup.writer.num_requests == 6)


@pytest.mark.full("0")
@pytest.mark.parametrize("seed", range(3))
def test_a_log_of_overlapping_requests_is_replayed(setup: Setup, seed: int) -> None:
    """Whatever overlaps: the laboratory reads it without a warning, every request in its place."""
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
    until(lambda: setup.writer.num_requests == 24)
    assert setup.prompts() == order
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        times = [request.timestamp_s for request in open_trace(str(setup.path))]
        result = simulate(str(setup.path), gib=[1.0], processes=1)
    assert times == sorted(times) and result.runs[0].requests == 24


def test_what_is_cut_short_is_written_with_what_was_answered(setup: Setup) -> None:
    """By a client that leaves, by upstream, and by the end of the recording."""
    with httpx.stream(
        "POST", setup.url, json={"prompt": "leaves", "wait": "never", "stream": True}, timeout=30
    ) as leaving:
        assert "one" in next(leaving.iter_text())
    until(lambda: setup.prompts() == ["leaves"])
    until(lambda: setup.upstream.num_left == 1)  # Upstream computes for nobody.
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(setup.url, json={"prompt": "breaks", "breaks": True}, timeout=30)
    running = setup.ask("runs", wait="runs", stream=True)
    silent = setup.ask("silent", wait="silent")
    assert setup.ask("whole").result().status_code == 200
    until(lambda: setup.prompts() == ["leaves", "breaks", "whole"])
    setup.front.stop()
    assert setup.prompts() == ["leaves", "breaks", "runs", "whole"]
    lines = setup.path.read_text().splitlines()[1:]
    answers = [json.loads(line)["answer"]["content"] for line in lines]
    assert answers == ["one", "onetwo", "one", "onetwo"]
    assert list(setup.writer.skipped.values()) == [1], "upstream never answered it"
    with pytest.raises(httpx.RemoteProtocolError):
        running.result()
    assert silent.result().status_code == 503


TARGETS = (
    "/v1/models/%2e%2e/%2E%2e/health",
    "/v1/models/../x/./y",
    "/v1/responses/a%2Fb%3Fc",
    "//evil.example/v1/models",
    "/%00",
    "/%0a",
    "/v1/%ff?x=%ff&y=%C3%A9&&=",
    "/v1/models#fragment",
    "/@evil.example/",
    "/http://evil.example/",
    "/a%20b+c;d=e?",
)


def test_a_path_reaches_the_server_byte_for_byte(setup: Setup) -> None:
    for target in TARGETS:
        raw(setup.front.port, target)
        assert setup.upstream.seen[-1][1].decode() == target.removesuffix("?"), target


def raw(port: int, target: str, *headers: str) -> bytes:
    """The answer to a GET of ``target``, sent as it is."""
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        lines = [f"GET {target} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]
        connection.sendall("\r\n".join(lines).encode("latin-1"))
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


def test_odd_paths_are_answered_by_a_real_server_with_4xx(tmp_path: Path) -> None:
    """As if nothing stood between."""
    engine = ScriptedEngine()
    with engine.serving() as upstream, (tmp_path / "log").open("x+b") as file:
        writer = TraceWriter(file, keeps_text=False, tokenizer=None)
        front = Serving(create_proxy(upstream, writer), date_header=False)
        port = int(upstream.rsplit(":", 1)[1].split("/")[0])
        for target in TARGETS:
            through, direct = (raw(each, target) for each in (front.port, port))
            statuses = [answer.split(b"\r\n")[0] for answer in (through, direct)]
            assert statuses[0] == statuses[1], target
            assert b" 4" in statuses[0][:12] or target not in ("//evil.example/v1/models", "/%00")
            assert through.split(b"\r\n\r\n")[1] == direct.split(b"\r\n\r\n")[1], target
        front.stop()


def test_headers_pass_as_they_came_and_cookies_stay_with_their_client(setup: Setup) -> None:
    answer = httpx.get(f"{setup.front.url}/x", headers={"x-mine": "1", "accept-encoding": "gzip"})
    assert answer.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert answer.headers["x-odd"].encode("latin-1") == b"\xe9"
    httpx.get(f"{setup.front.url}/x")
    _, _, headers, _ = setup.upstream.seen[-1]
    assert b"cookie" not in headers, "another client's"
    raw(setup.front.port, "/x", "X-Twice: 1", "X-Twice: 2", "User-Agent: mine")
    _, _, headers, _ = setup.upstream.seen[-1]
    assert headers[b"x-twice"] == [b"1", b"2"] and headers[b"user-agent"] == [b"mine"]
    packed = gzip.compress(json.dumps({"prompt": "packed"}).encode())
    httpx.post(setup.url, content=packed, headers={"content-encoding": "gzip"})
    _, _, headers, body = setup.upstream.seen[-1]
    assert body == packed and headers[b"content-encoding"] == [b"gzip"]
    until(lambda: setup.writer.skipped.total() == 1)  # It is no JSON as it stands.


@pytest.mark.full
def test_more_than_a_hundred_streams_pass_at_once(setup: Setup) -> None:
    """Each waits for all others to have begun."""
    streams = [setup.ask(f"{number}", wait="all", stream=True) for number in range(120)]
    setup.end("all")
    assert {stream.result().status_code for stream in streams} == {200}


@contextlib.contextmanager
def recording(to: str, out: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(a process that records, its address), started as by a shell that ignores SIGINT."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "import engine.plugins.record.command as r; r.GRACE_S = 1;"
        "from engine.command.cli import main;"
        f"sys.exit(main({['record', '--to', to, '--out', str(out), '--port', '0', *flags]!r}))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().split()[0]


@pytest.mark.full("SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_recording_with_its_summary(tmp_path: Path, number: int) -> None:
    """With a stream in progress."""
    upstream, path = Upstream(), tmp_path / "trace.jsonl"
    behind = Serving(upstream, lifespan="off")
    with recording(behind.url, path) as (process, url):
        body = {"prompt": "abcdefgh", "wait": "never", "stream": True}
        httpx.post(f"{url}/completions", json={"prompt": "first"}, timeout=30)
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=30) as stream:
            next(stream.iter_text())
            process.send_signal(number)
            said = process.stdout.read()
        assert process.wait(30) == 0
    behind.stop()
    assert f"2 requests; hybridcache simulate --trace {path}" in said
    assert "tokens counted by: 4 characters as a token, an estimate" in said
    trace = open_trace(str(path))
    assert "an estimate" in trace.counted_by
    assert "counted by: 4 characters as a token" in stats_table(trace_stats(trace))
    assert [len(request.tokens) for request in trace] == [2, 2]


def test_a_signal_that_comes_before_the_first_request_ends_the_recording(tmp_path: Path) -> None:
    """Even before the proxy listens to signals."""
    flags = ("--tokenizer", "builtin")
    with recording("http://127.0.0.1:9", tmp_path / "trace.jsonl", *flags) as (process, _):
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        said = process.stdout.read()
        command = f"hybridcache simulate --trace {tmp_path / 'trace.jsonl'} --model builtin"
        assert f"0 requests; {command}\n" in said
        assert "tokens counted by: the tokenizer of builtin" in said
        assert process.wait(30) == 0


def test_a_port_in_use_leaves_no_file(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, path = taken.getsockname()[1], tmp_path / "trace.jsonl"
        with pytest.raises(ValueError, match="choose another --port"):
            record(
                "http://127.0.0.1:9",
                path,
                host="127.0.0.1",
                port=port,
                keeps_text=False,
                tokenizer=None,
            )
    assert not path.exists()


class LinesMachine(RuleBasedStateMachine):
    """Lines that come in any order stand in that of their places, after every one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.file = tempfile.TemporaryFile()  # noqa: SIM115
        self.lines = trace.OrderedLines(self.file)
        self.open: list[int] = []
        self.written: dict[int, bytes] = {}

    @rule()
    def take(self) -> None:
        place = self.lines.take_place()
        assert place not in self.written and (not self.open or place > max(self.open))
        self.open.append(place)

    @precondition(lambda self: self.open)
    @rule(at=st.integers(0, 50), size=st.integers(0, 40))
    def put(self, at: int, size: int) -> None:
        place = self.open.pop(at % len(self.open))
        line = f"{place}:".encode() + b"x" * size + b"\n"
        assert self.lines.put(place, line)
        assert not self.lines.put(place, line), "once"
        self.written[place] = line

    @precondition(lambda self: self.open)
    @rule(at=st.integers(0, 50))
    def give_up(self, at: int) -> None:
        place = self.open.pop(at % len(self.open))
        self.lines.give_up(place)
        self.lines.give_up(place)
        assert not self.lines.put(place, b"late\n")

    @invariant()
    def all_is_there_in_order(self) -> None:
        self.file.seek(0)
        assert self.file.read() == b"".join(self.written[place] for place in sorted(self.written))

    def teardown(self) -> None:
        self.file.close()


@pytest.mark.parametrize("block_bytes", [7, 1 << 20])
def test_lines_come_in_any_order(block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "BLOCK_BYTES", block_bytes)
    run_state_machine_as_test(LinesMachine)


def test_a_request_that_took_too_long_is_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace, "MAX_TAIL", 3)
    with (tmp_path / "log").open("x+b") as file:
        writer = TraceWriter(file, keeps_text=False, tokenizer=None)
        recorded = trace.Recorded(1.0, {"prompt": "abcd"}, {"content": ""})
        slow = writer.take_place()
        for _ in range(5):
            writer.write(writer.take_place(), recorded)
        writer.write(slow, recorded)
    assert writer.num_requests == 5 and writer.skipped.total() == 1
    assert len(list(open_trace(str(tmp_path / "log")))) == 5


def test_a_full_disk_costs_the_line_that_did_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, pwrite = tmp_path / "log", os.pwrite
    with path.open("x+b") as file:
        lines = trace.OrderedLines(file)
        first, second, third = (lines.take_place() for _ in range(3))
        assert lines.put(third, b"third\n")

        def full(descriptor: int, data: bytes, place: int) -> int:
            if len(data) > 2:
                return pwrite(descriptor, data[:2], place)
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(OSError, match="No space"):
                lines.put(first, b"first\n")
        assert path.read_bytes() == b"third\n"
        lines.give_up(first)
        assert lines.put(second, b"second\n")
    assert path.read_bytes() == b"second\nthird\n"


def test_an_event_may_hold_any_character_and_an_answer_may_end_anywhere() -> None:
    said = "a\u2028b\x85c\x0bd"
    event = json.dumps({"choices": [{"index": 0, "text": said}]}, ensure_ascii=False)
    raw = f"data: {event}\r\n\r\ndata: {event}\n\ndata: [DONE]\n\n".encode()
    for end in range(len(raw) + 1):
        _, answer = Chats().read("/v1/completions", {}, raw[:end])
        assert answer["content"] in ("", said, said + said)
    assert answer["content"] == said + said
    calls = [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "tool_use"}},
        {"type": "content_block_delta", "index": 0, "delta": {"partial_json": '{"a": 1'}},
    ]
    cut = "".join(f"data: {json.dumps(call)}\n\n" for call in calls).encode()
    _, answer = Chats().read("/v1/messages", {}, cut)
    assert "a" in answer["tool_calls"][0]["function"]["arguments"]


def test_what_an_answer_is_made_of_is_the_same_whole_and_in_events() -> None:
    """Thoughts, text and calls of each dialect."""
    said = {
        "role": "assistant",
        "content": "so",
        "reasoning_content": "hm",
        "tool_calls": [
            {"type": "function", "function": {"name": "read", "arguments": '{"path": "a"}'}}
        ],
    }
    call = {"name": "read", "arguments": '{"path": "a"}'}
    item = {"type": "function_call", **call}
    output = [
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "so"}]},
        item,
    ]
    blocks = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": "so"},
        {"type": "tool_use", "name": "read", "input": {"path": "a"}},
    ]
    begun = [{"type": "thinking"}, {"type": "text", "text": ""}, {**blocks[2], "input": {}}]
    deltas = [{"thinking": "hm"}, {"text": "so"}, {"partial_json": '{"path": "a"}'}]
    chunks: list[Any] = [
        {"reasoning_content": "hm"},
        {"content": "s"},
        {"content": "o"},
        {"tool_calls": [{"index": 0, "function": {"name": "read", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"path": "a"}'}}]},
    ]
    ways: dict[str, tuple[Any, list[Any]]] = {
        "/v1/chat/completions": (
            {"choices": [{"message": {**said, "tool_calls": [{"function": call}]}}]},
            [{"choices": [{"index": 0, "delta": delta}]} for delta in chunks],
        ),
        "/v1/messages": (
            {"content": blocks},
            [
                event
                for at, (block, delta) in enumerate(zip(begun, deltas, strict=True))
                for event in (
                    {"type": "content_block_start", "index": at, "content_block": block},
                    {"type": "content_block_delta", "index": at, "delta": delta},
                )
            ],
        ),
        "/v1/responses": (
            {"id": "a", "output": output},
            [{"response": {"id": "a", "output": []}}, {"response": {"id": "a", "output": output}}],
        ),
    }
    for path, (whole, events) in ways.items():
        lines = [f"event: x\ndata: {json.dumps(event)}\n\n" for event in events]
        for raw in (json.dumps(whole), "".join(lines) + "data: [DONE]\n\n"):
            read = Chats().read(path, {"input": "hello"}, raw.encode())
            assert read[1] == said, path
