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

import anthropic
import httpx
import openai
import pytest
import uvicorn

from engine.command.record import record
from engine.record.chats import Chats
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
    monkeypatch.setattr("engine.record.proxy.httpx.AsyncClient", upstream)
    with (tmp_path / "log").open("w") as file:
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
