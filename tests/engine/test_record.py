"""A proxy that changes nothing, and a trace that the laboratory reads."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from engine.command.record import record
from engine.record.proxy import create_proxy
from engine.record.trace import TraceWriter
from engine.text.byte_tokenizer import ByteTokenizer
from engine.text.tokenizer import Tokenizer
from experiments.agents.scripted import ScriptedEngine
from hybridcache import open_trace, simulate
from hybridcache.tokens import common_prefix_len

SECRET = "what nobody else should read, said at some length "
CALL = '<tool_call>\n{"name": "read", "arguments": {"path":"a"}}\n</tool_call><|im_end|>'
TOOL = {"type": "function", "function": {"name": "read", "parameters": {"type": "object"}}}


@contextlib.contextmanager
def proxied(
    path: Path, keeps_text: bool, tokenizer: Tokenizer | None = None
) -> Iterator[tuple[openai.OpenAI, ScriptedEngine]]:
    engine = ScriptedEngine()
    with engine.serving() as upstream, path.open("w", encoding="utf-8") as file:
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


def lines_of(path: Path, number: int) -> list[dict[str, Any]]:
    """The requests of a trace, once all are there: a line comes after its answer."""
    deadline = time.monotonic() + 20
    while len(lines := path.read_text().splitlines()) < 1 + number:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [json.loads(line) for line in lines[1:]]


@pytest.mark.parametrize("keeps_text", [False, True])
@pytest.mark.parametrize("tokenizer", [None, ByteTokenizer()], ids=["pieces", "tokens"])
def test_a_conversation_becomes_a_trace_that_the_laboratory_reads(
    tmp_path: Path, keeps_text: bool, tokenizer: Tokenizer | None
) -> None:
    path = tmp_path / "log.jsonl"
    with proxied(path, keeps_text, tokenizer) as (client, engine):
        assert client.models.list().data[0].id == engine.engine.model_name
        converse(client, engine)
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
    monkeypatch.setattr("engine.record.proxy.httpx.AsyncClient", upstream)
    with (tmp_path / "log").open("w") as file:
        writer = TraceWriter(file, keeps_text=False, tokenizer=None)
        with TestClient(create_proxy("http://upstream", writer)) as client:
            for path, body in (
                ("responses", {"input": "hello"}),
                ("responses", {"input": "hello"}),
                ("responses", {"input": "bad"}),
                ("messages", {"messages": []}),
                ("completions", {"prompt": ["a", "b"]}),
                ("completions", {"prompt": [[1], [2]]}),
                ("completions", {"prompt": "a"}),
                ("completions", {"prompt": [1, 2]}),
            ):
                client.post(f"/v1/{path}", json=body)
            client.get("/v1/responses/resp_1")
    assert writer.num_requests == 2
    assert list(writer.skipped.values()) == [2, 1, 2]
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 3 and "/v1/responses" in said[0] and "/v1/messages" in said[1]


def test_what_can_not_be_recorded_to_is_told_before_anything_is_passed_on(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.touch()
    for upstream, out, match in (
        ("localhost:8000", tmp_path / "new", "is no address"),
        ("http://localhost:1", there, "can not be made"),
    ):
        with pytest.raises(ValueError, match=match):
            record(upstream, out, host="127.0.0.1", port=0, keeps_text=False, tokenizer=None)


def test_a_server_that_is_not_there_is_a_502(tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    with (tmp_path / "log").open("w") as file:
        writer = TraceWriter(file, keeps_text=False, tokenizer=None)
        with TestClient(create_proxy("http://127.0.0.1:9", writer)) as client:
            answer = client.post("/v1/chat/completions", json={"messages": []})
    assert answer.status_code == 502 and "does not answer" in answer.text
    assert writer.num_requests == 0
