"""Refused requests get the same status and body wherever the refusal happens.

It may happen in the server's process, in the engine's process or in a replica, in every dialect,
streamed or not.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from engine import AsyncEngine, Engine, EngineConfig, RequestSpec, SamplingParams
from engine.errors import (
    ContextOverflow,
    DuplicateId,
    EngineStopped,
    InvalidRequest,
    QueueFull,
    RequestError,
    StepFailed,
)
from engine.front.server.app import create_app
from engine.front.server.settings import ServerConfig
from engine.front.worker import replicas as fleet
from engine.front.worker.process_channel import start_engine
from engine.front.worker.spawn import spawn
from engine.requests.request import Request
from engine.text.tokenizer_files import HFTokenizer
from tests.engine.front.worker.test_fleet import LocalFleet, serve
from tests.oracle import OracleSampler

from .conftest import SlowRunner
from .dialects import bodies

ERRORS: dict[str, tuple[Exception, int, str | None]] = {
    "invalid": (InvalidRequest("This cannot be served: ask for less."), 400, None),
    "value error": (ValueError("This is out of range: ask for less."), 400, None),
    "too long": (ContextOverflow(900, 16, 800), 400, "context_length_exceeded"),
    "duplicate id": (DuplicateId("mine"), 409, "duplicate_request_id"),
    "full queue": (QueueFull(7), 429, "queue_full"),
    "stopped": (EngineStopped("The engine has failed: restart it."), 503, "stopped"),
    "failed step": (StepFailed("the step failed"), 500, None),
    "unexpected": (KeyError("what"), 500, None),
}
"""Raised error, and status and code of the answer, by a phrase in the prompt."""
ANTHROPIC = {400: "invalid_request_error", 409: "invalid_request_error", 429: "rate_limit_error"}
ANTHROPIC |= {500: "api_error", 503: "overloaded_error"}


def make_engine(config: EngineConfig, **options: Any) -> Engine:
    """Return an engine on the oracle that raises the error named in a prompt, with steps slow
    enough to fill its queue."""
    runner = SlowRunner(65536, 16, max_model_len=20_000)
    runner.step_s = 0.01
    engine = Engine(
        config, runner=runner, sampler=OracleSampler(), tokenizer=HFTokenizer(), **options
    )
    made = engine.make

    def make(spec: RequestSpec) -> Request:
        text = "".join(map(chr, spec.prompt))
        for phrase, (error, _, _) in ERRORS.items():
            if f"raise {phrase}." in text:
                raise error
        return made(spec)

    engine.make = make
    return engine


BOOT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
import engine.front.worker.process_channel as worker
from tests.engine.front.server.test_refusals import make_engine
worker.Engine = make_engine
worker.screen_rows = lambda made, address: [("oracle", address)]
sys.exit(worker.main(*sys.argv[2:]))
"""


class PickledFleet(LocalFleet):
    """Fleet with results that are pickled, as between processes."""

    copy = staticmethod(lambda result: pickle.loads(pickle.dumps(result)))


@asynccontextmanager
async def serving(kind: str, config: EngineConfig) -> AsyncIterator[tuple[Any, httpx.AsyncClient]]:
    """Yield an engine of this ``kind`` behind the server's application, and a client."""
    engine: AsyncEngine
    if kind == "thread":
        engine = AsyncEngine(make_engine(config))
    elif kind == "process":
        spawned = spawn(config, "here", BOOT)
        engine, _ = await asyncio.to_thread(start_engine, config, spawned)
    else:
        engine = await serve(PickledFleet(config), 1, "text")
    app = create_app(engine, ServerConfig())
    if kind != "replicas":
        engine.start()
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            yield engine, client
    finally:
        await asyncio.to_thread(engine.stop)
        await engine.drain()


async def metric(client: httpx.AsyncClient, name: str) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


async def wait_until_idle(engine: AsyncEngine) -> None:
    """Wait for the end of all requests; a replica ends one later than its reader."""
    fleet = getattr(engine.channel, "_fleet", None)
    fronts = [each.replica._async for each in fleet.replicas.values()] if fleet else []
    while (report := await engine.report()).num_running + report.num_waiting or any(
        front.num_open for front in fronts
    ):
        await asyncio.sleep(0.01)
    assert report.kv.held == 0


async def check_status_and_body_of_refusals(
    engine: AsyncEngine, client: httpx.AsyncClient, kind: str
) -> None:
    for phrase, (error, status, code) in ERRORS.items():
        for path, body in bodies(f"raise {phrase}.").items():
            for stream in (False, True):
                answer = await client.post(path, json=body | {"stream": stream})
                assert answer.status_code == status, (kind, path, stream, phrase)
                assert answer.headers["content-type"] == "application/json"
                assert ("retry-after" in answer.headers) == (status in (429, 503))
                answer_error = answer.json()["error"]
                if path == "/v1/messages":
                    assert answer_error["type"] == ANTHROPIC[status]
                else:
                    assert answer_error["code"] == code
                if phrase == "unexpected":
                    assert answer_error["message"].endswith(": KeyError: 'what'.")
                elif phrase == "too long" and path == "/v1/messages":
                    assert answer_error["message"] == "prompt is too long: 900 tokens > 799 maximum"
                else:
                    assert str(error) in answer_error["message"]
    num_requests = len(bodies("")) * 2
    assert await metric(client, "engine_rejected_requests_total") == num_requests
    failed = sum(status >= 500 for _, status, _ in ERRORS.values())
    num_failed = await metric(client, 'engine_requests_total{finish_reason="error"}')
    assert num_failed == failed * num_requests
    assert not await metric(client, 'engine_requests_total{finish_reason="abort"}')
    assert bool(await metric(client, "engine_process_")) == (kind != "replicas")


async def check_queue_is_full(engine: AsyncEngine, client: httpx.AsyncClient, kind: str) -> None:
    """Check the 429 of a full queue."""
    before = await metric(client, "engine_rejected_requests_total")
    streams = []
    for token in (1, 2):
        streams.append(engine.submit(RequestSpec([token], ENDLESS)))
        await anext(streams[0])
    answers = []
    for path, body in bodies("one too many").items():
        for stream in (False, True):
            answers.append(await client.post(path, json=body | {"stream": stream}))
    assert {answer.status_code for answer in answers} == {429}
    assert all("1 request is waiting already" in answer.text for answer in answers)
    assert {answer.headers["retry-after"] for answer in answers} == {"1"}
    assert await metric(client, "engine_rejected_requests_total") == before + len(answers)
    for stream in streams:
        stream.abort()
        finals = [output.finish_reason async for output in stream]
        assert finals[-1] == "abort", "an abort is reported"


async def check_duplicate_id_is_refused(
    engine: AsyncEngine, client: httpx.AsyncClient, kind: str
) -> None:
    """Check that the engine refuses it, too, and that only its own reader can end a request."""
    short = SamplingParams(max_tokens=9, ignore_eos=True)
    aborted = engine.submit(RequestSpec([1], ENDLESS, request_id="mine"))
    aborted.abort()  # Before it began.
    assert [output.finish_reason async for output in aborted][-1] == "abort"
    await wait_until_idle(engine)
    first = engine.submit(RequestSpec([1], ENDLESS, request_id="mine"))
    await anext(first)
    for _ in range(2):
        with pytest.raises(DuplicateId, match="'mine' is being answered already"):
            engine.submit(RequestSpec([2], short, request_id="mine"))
    assert (await anext(first)).finish_reason is None
    first.abort()
    assert [output.finish_reason async for output in first][-1] == "abort"
    await wait_until_idle(engine)
    for _ in range(2):
        reused = engine.submit(RequestSpec([2], short, request_id="mine"))
        first.abort()
        assert len([output async for output in reused][-1].output) == 9


ENDLESS = SamplingParams(max_tokens=15_000, ignore_eos=True)
SCENARIOS = (check_status_and_body_of_refusals, check_queue_is_full, check_duplicate_id_is_refused)


@pytest.mark.full("thread", "replicas")
@pytest.mark.parametrize("kind", ["thread", "process", "replicas"])
def test_refusals_of_each_kind_of_engine(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All scenarios share one engine, because a process is slow to start."""
    monkeypatch.setattr(fleet, "Engine", make_engine)
    monkeypatch.setattr(fleet, "screen_rows", lambda engine, address: [("oracle", address)])

    async def main() -> None:
        async with serving(kind, EngineConfig(max_running=1, max_queue=1)) as (engine, client):
            for scenario in SCENARIOS:
                await asyncio.wait_for(scenario(engine, client, kind), 300)
                await wait_until_idle(engine)
                answer = await client.post("/v1/completions", json={"prompt": "x", "max_tokens": 3})
                assert answer.status_code == 200

    asyncio.run(main())


def test_errors_survive_serialisation() -> None:
    for error, _, _ in ERRORS.values():
        original = RequestError.of(error)
        copy = RequestError.from_wire(original.to_wire())
        assert (type(copy), str(copy), vars(copy)) == (
            type(original),
            str(original),
            vars(original),
        )
        assert isinstance(copy, ValueError) == isinstance(error, ValueError)
