"""Disconnects, full queues, cache resets, failures, shutdown, metrics and logs of a live server."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import json
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.front.server import transport
from engine.front.server.settings import ServerConfig
from engine.messages import Exactness
from hybridcache.command.signals import JsonFormatter
from tests.waiting import wait_until

from .conftest import Live, Serve, oracle_engine, serving
from .dialects import bodies

ENDLESS = {"max_tokens": 3000, "ignore_eos": True, "temperature": 0}


def _metrics(live: Live) -> dict[str, float]:
    """Return samples by name, followed by a dot and the label values if there are any."""
    samples = {}
    for family in text_string_to_metric_families(live.get("/metrics").text):
        for sample in family.samples:
            label = ".".join(sample.labels.values())
            samples[f"{sample.name}.{label}" if label else sample.name] = sample.value
    return samples


@pytest.mark.parametrize("has_left", [True, False])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", bodies(""))
def test_disconnect_frees_memory(
    serve_oracle: Serve, stream: bool, path: str, has_left: bool
) -> None:
    """A client that only closes its sending side counts as gone: the server closes the rest."""
    live = serve_oracle(step_s=0.005)
    body = bodies("x" * 200, 3000)[path] | {"stream": stream, "temperature": 0}
    connection = live.send(path, body)
    live.wait_for(lambda report: report["kv"]["held"] > 0 or report["num_running"] == 1)
    received = b""
    while stream and received.count(b"data: ") < 9:
        received += connection.recv(4096)
    if not has_left:
        connection.shutdown(socket.SHUT_WR)
        while piece := connection.recv(4096):
            received += piece
        assert stream or not received
    connection.close()
    live.wait_until_idle()
    live.check_conserved()
    metrics = _metrics(live)
    assert metrics["engine_requests_total.abort"] == 1
    if stream:  # The server counts the tokens that it sent.
        assert metrics["engine_prompt_tokens_total"] == live.report()["usage"]["prompt_tokens"]
        assert metrics["engine_generated_tokens_total"] > 3
        assert metrics["engine_ttft_seconds_count"] == 1


@pytest.mark.parametrize("path", bodies(""))
def test_events_written_at_once_are_those_of_the_slow_way(
    serve_oracle: Serve, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """HTTP/1.0 has no chunks, so its events take the slow way. Ids add events without text."""
    live, num_direct, bodies_read = serve_oracle(step_s=0.002), list[int](), list[str]()
    write = transport.SentEvents.write
    monkeypatch.setattr(
        transport.SentEvents, "write", lambda *a: (num_direct.append(1), write(*a))[1]
    )
    for version, more in (("1.1", {}), ("1.0", {}), ("1.1", {"return_token_ids": True})):
        body = bodies("x", 40)[path] | {"stream": True, "temperature": 0} | more
        if more and path not in ("/v1/chat/completions", "/v1/completions"):
            continue
        num_direct.clear()
        read = http_answer(live.send(path, body, version))
        assert (len(num_direct) > 20) == (version == "1.1")
        read = re.sub(r'[0-9a-f]{32}|"created(_at)?":\d+|,"(prompt_)?token_ids":[^]]*.', "", read)
        empty = '"delta":{},"logprobs":null,"finish_reason":null}'
        bodies_read.append("\n\n".join(one for one in read.split("\n\n") if empty not in one))
    assert len({*bodies_read}) == 1


def test_client_that_stops_reading_is_disconnected(
    serve_oracle: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its request is aborted and its memory freed. A slow reader still gets its answer."""
    monkeypatch.setattr(transport, "UNREAD_S", 0.5)
    accept = H11Protocol.connection_made

    def with_small_buffers(self: H11Protocol, made: Any) -> None:
        client = made.get_extra_info("socket")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
        accept(self, made)

    monkeypatch.setattr(H11Protocol, "connection_made", with_small_buffers)
    live = serve_oracle(step_s=0.002)  # The answer must not end in UNREAD_S.
    body = {"prompt": "say much", "max_tokens": 3000, "ignore_eos": True, "stream": True}
    silent = live.send("/v1/completions", body | {"logprobs": 20})
    aborted = 'engine_requests_total{finish_reason="abort"} 1.0'
    wait_until(lambda: aborted in live.get("/metrics").text)
    read = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := silent.recv(1 << 20):
            read += piece
    assert b"[DONE]" not in read
    late = live.send("/v1/completions", body | {"max_tokens": 20})
    time.sleep(1)
    assert "[DONE]" in http_answer(late)
    live.check_conserved()


def test_metrics_agree_with_the_report(serve_oracle: Serve) -> None:
    live = serve_oracle(num_kv_tokens=1024)
    for number in (0, 0, 1, 2, 3, 4, 5, 0):
        live.post(
            "/v1/completions", {"prompt": f"{number} " * 150, "max_tokens": 3, "ignore_eos": True}
        )
    live.wait_until_idle()
    metrics, report = _metrics(live), live.report()
    lost = sum(
        value for name, value in metrics.items() if name.startswith("engine_lost_tokens_total.")
    )
    assert (
        metrics["engine_prompt_tokens_total"]
        == 8 * 300
        == metrics["engine_cached_tokens_total"] + lost
    )
    assert metrics["engine_cached_tokens_total"] == report["usage"]["cached_tokens"] > 0
    assert metrics["engine_lost_tokens_total.kv_evicted"] == report["usage"]["kv_evicted"] > 0
    assert metrics["engine_generated_tokens_total"] == 8 * 3
    assert metrics["engine_requests_total.length"] == 8
    assert metrics["engine_requests_total.error"] == 0, "it exists before the first error"
    assert metrics["engine_evicted_tokens_total"] == report["usage"]["evicted_tokens"] > 0
    for name in ("ttft", "tpot", "queue", "e2e"):
        assert metrics[f"engine_{name}_seconds_count"] == 8
    owners = [metrics[f"engine_kv_tokens.{owner}"] for owner in ("free", "cached", "held")]
    assert sum(owners) == 1024
    assert metrics["engine_running_requests"] == metrics["engine_waiting_requests"] == 0
    assert metrics["engine_process_resident_memory_bytes"] > 10**7
    assert abs(metrics["engine_process_start_time_seconds"] - time.time()) < 10**6
    assert any(name.startswith("engine_build_info") for name in metrics)


def test_failed_engine_answers_with_errors(serve_oracle: Serve) -> None:
    live = serve_oracle(step_s=0.002)
    with pytest.raises(openai.APIError, match="engine"):
        events = live.client.completions.create(
            model="builtin",
            prompt="x",
            max_tokens=3000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for number, _ in enumerate(events):
            if number == 3:
                live.engine.runner.forward = None
    assert live.get("/health").status_code == 200
    with pytest.raises(openai.InternalServerError, match="has failed; see its log"):
        live.client.completions.create(model="builtin", prompt="y", max_tokens=3)
    wait_until(lambda: live.get("/health").status_code == 503)
    answer = live.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    assert answer.status_code == 503 and answer.json()["error"]["type"] == "server_error"
    assert live.get("/v1/cache").status_code == live.get("/metrics").status_code == 503


def test_failed_step_fails_only_its_running_requests(serve_oracle: Serve) -> None:
    live = serve_oracle(max_running=2, step_s=0.002)
    forward = live.engine.runner.forward

    def fail_once(*given: object) -> object:
        live.engine.runner.forward = forward
        raise RuntimeError("a broken kernel")

    running = [
        live.send("/v1/completions", {"prompt": "x" * n, "stream": n == 1, **ENDLESS})
        for n in (1, 2)
    ]
    live.wait_for(lambda report: report["num_running"] == 2)
    waiting = live.send("/v1/completions", {"prompt": "later", "max_tokens": 2})
    live.wait_for(lambda report: report["num_waiting"] == 1)
    live.engine.runner.forward = fail_once
    stream, whole = (http_answer(connection) for connection in running)
    assert "The engine failed on this request" in stream.split("data: ")[-1]
    assert whole.startswith("HTTP/1.1 500") and "The engine failed on this request" in whole
    assert http_answer(waiting).startswith("HTTP/1.1 200")
    assert live.get("/health").status_code == 200
    live.check_conserved()


def http_answer(connection: socket.socket) -> str:
    """Return the status line and the whole body of an answer."""
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    head = f"HTTP/1.1 {answer.status}\r\n"
    body = answer.read().decode()
    connection.close()
    return head + body


@pytest.mark.parametrize("drain_s", [0.2, 500.0], ids=["in time", "until a second signal"])
def test_requests_unfinished_after_a_drain_get_an_error(
    serve_oracle: Serve, caplog: pytest.LogCaptureFixture, drain_s: float
) -> None:
    """The operator finds them in the log."""
    caplog.set_level(logging.INFO, "engine.front.server")
    live = serve_oracle(ServerConfig(drain_s=drain_s, log_requests=True), step_s=0.005)

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=live.url, timeout=120) as client:
            tasks = [
                asyncio.create_task(
                    client.post(
                        "/v1/completions", json={"prompt": "x", "stream": is_streamed, **ENDLESS}
                    )
                )
                for is_streamed in (True, False)
            ]
            await asyncio.to_thread(live.wait_for, lambda report: report["num_running"] == 2)
            if drain_s < 1:
                live.server.should_exit = True
            else:
                live.server.handle_exit(signal.SIGINT, None)
                live.server.handle_exit(signal.SIGINT, None)
            return await asyncio.gather(*tasks)

    stream, whole = asyncio.run(ask())
    assert stream.status_code == 200 and whole.status_code == 503
    error = json.loads(stream.text.split("data: ")[-1])["error"]
    assert error == whole.json()["error"]
    assert error["message"] == "The engine stopped before the answer was done."
    assert int(whole.headers["Retry-After"]) >= 1
    logged = _answer_lines(caplog, 2)
    assert len(logged) == 2 and all(line.endswith(error["message"]) for line in logged)
    messages = [
        record.getMessage() for record in caplog.records if record.name == "engine.front.server.app"
    ]
    stopping, broken_off = messages
    assert "2 requests" in stopping and broken_off.startswith("2 requests not ended")
    live.engine.check()


@pytest.mark.parametrize("path", bodies(""))
@pytest.mark.parametrize("keep_alive_s", [None, 0.05])
def test_silent_streams_send_headers_and_comments(
    serve_oracle: Serve, path: str, keep_alive_s: float | None
) -> None:
    live = serve_oracle(ServerConfig(keep_alive_s=keep_alive_s))
    forward, pauses = live.engine.runner.forward, threading.Semaphore(0)

    def wait_for_a_pause(*given: Any) -> object:
        assert keep_alive_s is None or pauses.acquire(timeout=120)
        return forward(*given)

    live.engine.runner.forward = wait_for_a_pause
    text, num_pauses = "", 0
    with live.http.stream("POST", path, json=bodies("hello")[path] | {"stream": True}) as answer:
        assert answer.status_code == 200
        for piece in answer.iter_text():
            text += piece
            while num_pauses < text.count(": waiting"):
                num_pauses += 1
                pauses.release()
    events = [part for part in text.split("\n\n") if part]
    comments = [part for part in events if part.startswith(":")]
    assert set(comments) == (set() if keep_alive_s is None else {": waiting"})
    assert events[0].startswith(":") == (keep_alive_s is not None)
    assert ("x-cache-hit-tokens" in answer.headers) == (keep_alive_s is None)
    assert any(part.startswith(("data:", "event:")) for part in events)
    assert "event: error" not in text


def test_no_comment_is_written_into_a_stream_whose_events_follow_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Events are written directly, at more than half of the longest silence. The clock is still
    while they are awaited."""
    clock, sent = SimpleNamespace(now=0.0), list[bytes]()
    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=lambda: clock.now))
    connection = SimpleNamespace(transport=SimpleNamespace(write=sent.append))

    async def events() -> AsyncGenerator[bytes]:
        for _ in range(4):
            clock.now += 0.006
            answer.write(b"direct")
            await asyncio.sleep(0.02)  # The response looks for a silence.
        yield b"last"

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    answer = transport.SentEvents(events(), keep_alive_s=0.01)
    scope = {"type": "http", "state": {"connection": connection}}
    asyncio.run(answer(scope, asyncio.Event().wait, send))
    assert [piece for piece in sent if piece] == [*[b"6\r\ndirect\r\n"] * 4, b"last"]


@pytest.mark.parametrize("fault", [None, "1.0", "disconnected", "closing", "paused"])
def test_events_are_written_at_once_while_the_client_reads_chunks(fault: str | None) -> None:
    connection = SimpleNamespace(
        cycle=SimpleNamespace(
            scope={"http_version": "1.0" if fault == "1.0" else "1.1"},
            disconnected=fault == "disconnected",
        ),
        transport=SimpleNamespace(is_closing=lambda: fault == "closing"),
        flow=SimpleNamespace(write_paused=fault == "paused"),
    )
    ready = list[bool]()

    async def events() -> AsyncGenerator[bytes]:
        ready.append(answer.is_ready)
        yield b"last"

    async def send(message: Any) -> None:
        pass

    answer = transport.SentEvents(events())
    scope = {"type": "http", "state": {"connection": connection}}
    asyncio.run(answer(scope, asyncio.Event().wait, send))
    assert ready == [fault is None]


ENDED = {"metadata": {"session_end": "true"}}


@pytest.mark.parametrize(
    ("path", "fields", "num_live"),
    [
        *((path, {}, 1) for path in bodies("")),
        *((path, ENDED, 0) for path in bodies("")),
        ("/v1/chat/completions", {"metadata": {"session_end": "false"}}, 1),
        *(("/v1/completions", {"metadata": {"session_end": one}}, 0) for one in (True, "True")),
        ("/v1/messages", {"metadata": {"user_id": "me"}}, 1),
    ],
)
def test_client_can_end_its_session(
    serve_oracle: Serve, path: str, fields: dict[str, Any], num_live: int
) -> None:
    live = serve_oracle()
    answer = live.post(path, bodies("hello", 4)[path] | fields)
    assert answer.status_code == 200, answer.text
    live.wait_for(lambda report: report["queue"]["live_sessions"] == num_live)
    metrics = live.get("/metrics").text
    assert f"engine_live_sessions {num_live}.0" in metrics
    assert "engine_waiting_sessions 0.0" in metrics
    assert 'engine_admission{figure="debt_s"} -5.0' in metrics
    assert 'policy="sessions",reason="no request is withheld: oldest first"' in metrics


@pytest.mark.parametrize("path", bodies(""))
def test_client_can_promise_its_next_turn(serve_oracle: Serve, path: str) -> None:
    live = serve_oracle()
    body = bodies("hello " * 40, 24)[path]
    for wrong in ("soon", "-1", "inf"):
        answer = live.post(path, body | {"metadata": {"returns_within_s": wrong}})
        assert answer.status_code == 400 and "metadata.returns_within_s must be" in answer.text
    for promised, expected in ((None, None), ("2.5", 2.5)):
        metadata = {} if promised is None else {"returns_within_s": promised}
        answer = live.post(path, body | {"metadata": metadata})
        assert answer.status_code == 200, answer.text
        live.wait_until_idle()
        tips = [node.checkpoint for node in live.engine.cache.iter_nodes() if node.checkpoint]
        promises = [tip.promise for tip in tips if tip.promise is not None]
        found = [round(promise.until_s - promise.made_s, 6) for promise in promises]
        assert tips and found == ([] if expected is None else [expected])


@pytest.mark.parametrize("method", ["arrived", "order", "left"])
def test_server_outlives_an_admission_policy_that_raises(serve_oracle: Serve, method: str) -> None:
    """Each request is answered once: with its text, or with an error if the policy raised."""
    live = serve_oracle(admission=f"tests.policies.test_user:Raises({method!r})", max_running=2)
    body = bodies("hello", 4)["/v1/completions"]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: live.post("/v1/completions", body), range(8)))
    statuses = [answer.status_code for answer in found]
    assert set(statuses) <= {200, 500} and statuses.count(500) <= 2, statuses
    if method == "arrived":
        assert statuses.count(500) == 1
        [refused] = [answer.text for answer in found if answer.status_code == 500]
        assert "the admission policy failed" in refused
    assert live.post("/v1/completions", body).status_code == 200
    assert live.get("/metrics").status_code == 200
    live.check_conserved()


def _answer_lines(caplog: pytest.LogCaptureFixture, number: int) -> list[str]:
    """Wait for the lines of ``number`` requests for answers; a line is written after its answer.

    The reports that a test waits for have lines too, and their number depends on the machine.
    """

    def found() -> list[str]:
        records = [
            record
            for record in caplog.records
            if record.name == "engine.front.server.access.requests"
        ]
        lines = [record.getMessage() for record in records if record.levelno == logging.INFO]
        return [line for line in lines if line.startswith("POST ")]

    wait_until(lambda: len(found()) >= number)
    return found()


def test_statuses_are_counted_and_logged_as_json(
    tmp_path: Path, serve_oracle: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Also those of refusals."""
    caplog.set_level(logging.INFO, "engine.front.server.access.requests")
    (tmp_path / "keys").write_text("first\nsecond\n")
    config = ServerConfig(log_requests=True, api_key_file=str(tmp_path / "keys"))
    live = serve_oracle(config)
    key = {"Authorization": "Bearer second"}
    for status, path, body, headers in (
        (200, "/v1/completions", {"prompt": "x", "max_tokens": 1}, key),
        (400, "/v1/completions", {"prompt": 7}, key),
        (401, "/v1/completions", {"prompt": "x"}, {}),
        (404, "/v1/none", {}, key),
        (413, "/v1/completions", {"prompt": "x" * (5 << 20)}, key),
    ):
        assert httpx.post(live.url + path, json=body, headers=headers).status_code == status
    text = httpx.get(live.url + "/metrics").text
    counted = re.findall(r'engine_http_requests_total{status="(\d+)"} ([\d.]+)', text)
    assert dict(counted) == dict.fromkeys(("200", "400", "401", "404", "413"), "1.0")
    records = [one for one in caplog.records if one.name.endswith("access.requests")]
    lines = [json.loads(JsonFormatter().format(one)) for one in records]
    assert [one["status"] for one in lines] == [200, 400, 401, 404, 413]
    assert all(one["request_id"] for one in lines)
    name = hashlib.sha256(b"second").hexdigest()[:8]  # The same after a change of the file.
    assert (lines[0]["key"], lines[0]["client"]) == (name, "127.0.0.1") and lines[2]["key"] is None
    assert f"key {name}" in records[0].getMessage()
    assert all(f"key {name}" in one.getMessage() for one in (records[1], records[3], records[4]))
    assert lines[0]["answer_tokens"] == 1 and datetime.fromisoformat(lines[0]["time"]).tzinfo
    assert "prompt" in lines[1]["error"] and "message" not in lines[0]
    warning = logging.LogRecord("engine", logging.WARNING, "", 0, "Two %s", ("words",), None)
    assert json.loads(JsonFormatter().format(warning))["message"] == "Two words"


def test_request_log_has_disconnected_requests(
    serve_oracle: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "engine.front.server.access.requests")
    live = serve_oracle(ServerConfig(log_requests=True), step_s=0.005)
    connection = live.send("/v1/completions", {"prompt": "x", **ENDLESS, "stream": True})
    connection.recv(4000)
    connection.close()
    [line] = _answer_lines(caplog, 1)
    assert re.fullmatch(
        r"POST /v1/completions 200  prompt 1  cached 0  answer \d+  \d+ ms  cmpl-\w+  "
        "from 127.0.0.1  not sent completely",
        line,
    )


def test_request_log_has_499_for_a_stream_that_was_left_while_it_waited(
    serve_oracle: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "engine.front.server.access.requests")
    live = serve_oracle(ServerConfig(log_requests=True), step_s=0.005, max_running=1)
    body = {"prompt": "x", **ENDLESS, "stream": True}
    running = live.send("/v1/completions", body)
    running.recv(4000)
    waiting = live.send("/v1/completions", body)
    live.wait_for(lambda report: report["num_waiting"] == 1)
    waiting.close()
    [line] = _answer_lines(caplog, 1)
    assert line.startswith("POST /v1/completions 499 ") and line.endswith("not sent completely")
    running.close()


def test_health_and_answers_say_whether_hits_are_exact() -> None:
    engine = oracle_engine()
    engine.runner.exactness = Exactness("ab" * 16, ("hits",))
    with serving(engine) as live:
        found = live.get("/health").json()
        assert found == {"status": "ok", "exactness": engine.runner.exactness.sentence}
        assert "NOT exact" in found["exactness"] and "hits" in found["exactness"]
        create = live.client.completions.create
        answer = create(model="builtin", prompt="x", max_tokens=1)
        [*chunks] = create(model="builtin", prompt="x", max_tokens=1, stream=True)
        chat = live.client.chat.completions.create(
            model="builtin", messages=[{"role": "user", "content": "x"}], max_tokens=1
        )
        said = {one.system_fingerprint for one in (answer, *chunks, chat)}
        assert said == {"inexact-abababababab"}
