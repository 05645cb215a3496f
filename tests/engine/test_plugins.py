"""Tests of the engine's interfaces for plugins, logit rules and dialects."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.testclient import TestClient

from engine import Engine, EngineConfig, SamplingParams, engine_config
from engine.build import engine_plugins
from engine.host import EngineHost
from engine.interfaces import Plugin
from engine.plugins import ENGINE, SERVER
from engine.requests.logit_rules import (
    AllowedTokens,
    BansAndBiases,
    Draws,
    LogitRule,
    Ruling,
    packed,
    ruled,
)
from engine.server.app import PARTS
from engine.server.context import Dialect
from engine.server.schemas import TokenizeRequest
from engine.server.settings import ServerConfig
from hybridcache.scheduling.cache_manager import CacheManager
from tests.oracle import OracleRunner, OracleSampler

GREEDY = SamplingParams(max_tokens=3, temperature=0)


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


def take_calls(plugin: Recording) -> list[str]:
    calls, plugin.calls = plugin.calls, []
    return calls


def test_plugins_are_called_in_every_phase_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plugin = make_engine(monkeypatch)
    assert engine.plugins == {"recording": plugin}
    built = ["open_manager", "attach"]
    assert take_calls(plugin) == built

    engine.generate([[1, 2, 3]], GREEDY)
    assert take_calls(plugin) == ["before_step", "after_step"] * 3

    assert not engine.has_work() and engine.run_idle_tasks() == 0.25
    plugin.pending = 1
    assert engine.has_work()
    engine.step()
    assert not engine.has_work() and "before_step" in take_calls(plugin)
    assert engine.report().draft_index_bytes == 7

    engine.reset_prefix_cache()
    assert take_calls(plugin) == ["on_cache_emptied False"]
    engine.stop_accepting()
    engine.close()
    calls = take_calls(plugin)
    assert calls[:2] == ["stop_accepting", "disconnect"] and calls[-1] == "close"


def test_plugins_are_notified_of_a_failed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plugin = make_engine(monkeypatch)
    forward = engine.runner.forward
    engine.submit([1, 2, 3], GREEDY)
    take_calls(plugin)

    def fail(batch: Any, drawn: Any = None) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine.runner, "forward", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        engine.step()
    assert take_calls(plugin)[:2] == ["before_step", "on_step_failed"]
    monkeypatch.setattr(engine.runner, "forward", forward)
    while engine.has_work():
        engine.step()
    engine.check()


def test_a_plugin_can_wake_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plugin = make_engine(monkeypatch)
    loop = EngineHost(engine, lambda message: None)
    woken: list[int] = []
    monkeypatch.setattr(loop._wake, "notify", lambda: woken.append(1))
    plugin.wake()
    assert woken == [1]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, []),
        ({"exact": True, "grid": 128, "max_queue": 7}, []),
        ({"draft": "tree:4"}, ["speculation"]),
        ({"host_gib": 1.0}, ["tiers"]),
        ({"state_dir": "cache"}, ["tiers"]),
        ({"role": "decode", "prefill": ("127.0.0.1:7000",)}, ["disaggregation"]),
        ({"tp": 2, "draft": "tree"}, ["tensor_parallel", "speculation"]),
    ],
)
def test_settings_select_plugins(settings: dict[str, Any], names: list[str]) -> None:
    assert [plugin.name for plugin in engine_plugins(engine_config(**settings))] == names


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


def test_rules_are_applied_to_the_result_of_those_before_them() -> None:
    answer = np.array([1, 2], np.int32)
    drafts = np.array([3], np.int32)
    draws = Draws(2, answer, drafts)
    bans = BansAndBiases(((9, 2.5),), ends=(5,), min_tokens=3, bad_words=((2, 7), (3, 8)))

    first, second = ruled([bans], draws)
    assert first.mask is None and first.added is not None and second.added is not None
    assert first.added[0].tolist() == [9, 5, 7], "the bias, an end before min_tokens, a bad word"
    assert second.added[0].tolist() == [9, 8], "the third token may end the answer"

    ruling, _ = ruled([AllowedTokens([5, 6], 320), bans], draws)
    assert ruling.mask is not None and np.array_equal(ruling.mask, packed([6], 320))
    ruling, _ = ruled([AllowedTokens([5], 320), bans], draws)
    assert ruling.mask is not None and np.array_equal(ruling.mask, packed([5], 320)), (
        "a ban of all allowed tokens is ignored"
    )

    for ruling in ruled([OnlyToken(5), bans], draws):
        assert np.array_equal(ruling.mask, packed([5], 320)) and ruling.added is None, "final"

    twice = BansAndBiases(((9, -1.0), (4, 1.0)), ends=(), min_tokens=0, bad_words=())
    first, _ = ruled([bans, twice], draws)
    ids, numbers = first.added
    assert ids.tolist() == [9, 5, 7, 9, 4] and numbers[[0, 3, 4]].tolist() == [2.5, -1.0, 1.0]


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


PLUGINS = Path(__file__).parents[2] / "engine" / "plugins"


@pytest.mark.parametrize("folder", sorted(path.parent for path in PLUGINS.glob("*/__init__.py")))
def test_the_readme_of_a_plugin_names_flags_that_exist(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    kinds = (EngineConfig, ServerConfig, *ENGINE, *SERVER)
    settings = {field.name for kind in kinds for field in fields(kind)}
    named = {flag.replace("-", "_") for flag in re.findall(r"`--([a-z-]+)", text)}
    assert named <= settings
    assert {"| Flags |", "| Seam |", "| Tests |", "| Limits |"} <= set(
        re.findall(r"\| \w+ \|", text)
    )
    for path in re.findall(r"`(tests/[\w/]+(?:\.py)?)", text):
        assert (PLUGINS.parents[1] / path).exists(), path
    code = "".join(path.read_text() for path in sorted(PLUGINS.parent.rglob("*.py")))
    for name in re.findall(r"`([A-Za-z_.]+)`", text):
        assert re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", code), name
