"""Tests of the engine's interfaces for plugins, logit rules and dialects."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient

from engine import Engine, EngineConfig, SamplingParams
from engine.interfaces import Plugin
from engine.requests.logit_rules import (
    Draws,
    LogitRule,
    Ruling,
    packed,
)
from engine.server.app import PARTS
from engine.server.context import Dialect
from engine.server.schemas import TokenizeRequest
from hybridcache.scheduling.cache_manager import CacheManager
from tests.oracle import OracleRunner, OracleSampler


class Recording(Plugin):
    """Plugin that records the calls of its hooks."""

    name = "recording"
    pending = 0

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.calls: list[str] = []

    def open_manager(self, manager: CacheManager, runner: Any) -> None:
        self.calls.append("open_manager")

    def attach(self, engine: Any, manager: CacheManager) -> None:
        self.calls.append("attach")

    @property
    def has_work(self) -> bool:
        return self.pending > 0

    def before_step(self) -> None:
        self.pending = max(0, self.pending - 1)
        self.calls.append("before_step")

    def after_step(self, plan: Any, seconds: float) -> None:
        assert seconds >= 0
        self.calls.append("after_step")

    def on_step_failed(self) -> None:
        self.calls.append("on_step_failed")

    def on_cache_emptied(self, *, was_lost: bool) -> None:
        self.calls.append(f"on_cache_emptied {was_lost}")

    def on_idle(self) -> float | None:
        return 0.25

    def stop_accepting(self) -> None:
        self.calls.append("stop_accepting")

    def disconnect(self) -> None:
        self.calls.append("disconnect")

    def close(self) -> None:
        self.calls.append("close")

    def report(self) -> Mapping[str, Any]:
        return {"draft_index_bytes": 7}


def make_engine(monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, Recording]:
    config = EngineConfig(max_running=4, token_budget=128)
    plugin = Recording(config)
    monkeypatch.setattr("engine.engine.engine_plugins", lambda config: (plugin,))
    runner = OracleRunner(num_kv_tokens=2048, num_slots=8)
    engine = Engine(config, runner=runner, sampler=OracleSampler(runner.vocab_size))
    return engine, plugin


LOADED = """
import json, sys
def loaded():
    parts = [m.split(".") for m in sys.modules if m.startswith("engine.plugins.")]
    return sorted({part[2] for part in parts if len(part) > 3})  # not for settings only
"""
SCRIPT = LOADED + (
    """
from engine import Engine, EngineConfig, SamplingParams
engine = Engine(EngineConfig(cache_gib=0.02, max_running=2))
engine.generate(["one"], SamplingParams(max_tokens=2))
seen = [loaded()]
has_triton = "triton.language" in sys.modules
from engine.async_engine import AsyncEngine
from engine.command import cli
from engine.server.app import create_app
from engine.server.serve import check
from engine.server.settings import ServerConfig
cli._parser(["serve"])
check(ServerConfig())
app = create_app(AsyncEngine(engine), ServerConfig())
seen.append(loaded())
from fastapi.testclient import TestClient
head = {"model": "builtin", "max_tokens": 2}
chat = head | {"messages": [{"role": "user", "content": "one"}]}
with TestClient(app) as client:
    bodies = {"/v1/completions": head | {"prompt": "one"}, "/v1/chat/completions": chat}
    for path, body in (bodies | {"/v1/messages": chat, "/v1/none": {}}).items():
        seen.append([client.post(path, json=body).status_code, loaded()])
    seen.append([client.get("/").status_code, loaded()])
    seen.append(sorted(client.get("/openapi.json").json()["paths"]))
print(json.dumps([*seen, has_triton]))
"""
)


def test_plugins_and_triton_are_imported_at_first_use() -> None:
    """Check that neither an engine nor a server loads a plugin without its settings, paths or
    requests."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    of_engine, of_server, text, chat, messages, unknown, page, paths, has_triton = json.loads(
        done.stdout.splitlines()[-1]
    )
    assert of_engine == of_server == [] and not has_triton
    assert text == [200, []]
    assert chat == [200, ["diagnostics", "tool_calls"]]
    assert messages == [200, ["diagnostics", "dialects", "tool_calls"]]
    assert unknown == [404, messages[1]]
    assert page == [200, ["diagnostics", "dialects", "observe", "tool_calls"]]
    assert {path for path in PARTS.extensions if not path.endswith("/")} < {*paths}


class OnlyToken(LogitRule):
    """Rule that allows only one token."""

    def __init__(self, token: int) -> None:
        self._mask = packed([token], 320)

    def apply(self, draws: Draws, rulings: Any) -> list[Ruling]:
        return [Ruling(self._mask, None, is_final=True) for _ in rulings]


def test_a_custom_rule_restricts_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = make_engine(monkeypatch)
    build = engine._intake._rules
    monkeypatch.setattr(engine._intake, "_rules", lambda *given: [*build(*given), OnlyToken(42)])
    [output] = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5))
    assert output.token_ids == [42] * 5


def test_a_dialect_adds_a_path_with_a_body_and_an_answer() -> None:
    async def answer(request: Request, body: TokenizeRequest) -> Response:
        return Response(f"{request.url.path} {body.prompt}")

    class Reader:
        async def read(self, request: Request, model: type[Any]) -> Any:
            return model(**await request.json())

    app = FastAPI()
    Dialect("/v9/words", TokenizeRequest, answer, "words").add_to(app, Reader())  # type: ignore[arg-type]
    with TestClient(app) as client:
        assert client.post("/v9/words", json={"prompt": "hi"}).text == "/v9/words hi"
        operation = client.get("/openapi.json").json()["paths"]["/v9/words"]["post"]
    assert operation["operationId"].startswith("words")
