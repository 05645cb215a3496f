"""Tests of the engine's interfaces for plugins, logit rules and dialects."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from engine import Engine, EngineConfig, SamplingParams
from engine.interfaces import Plugin
from engine.requests.logit_rules import (
    Draws,
    LogitRule,
    Ruling,
    packed,
)
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
        return {"transfers": {"prefixes": 7}}


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
from engine.server.serve import check
from engine.server.settings import ServerConfig
cli._parser(["serve"])
check(ServerConfig())
seen.append(loaded())
print(json.dumps([*seen, has_triton]))
"""
)


def test_plugins_and_triton_are_imported_at_first_use() -> None:
    """Check that an engine loads no plugin without its settings, and a server only those of its
    paths."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    of_engine, of_server, has_triton = json.loads(done.stdout.splitlines()[-1])
    assert of_engine == [] and not has_triton
    assert of_server == ["diagnostics", "dialects", "observe"]


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
