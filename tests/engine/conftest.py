"""Engines on small real models, and decisions of an engine that do not depend on its speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import Engine, EngineConfig
from engine.engine import load_runner
from engine.plugins.guided import guides
from engine.plugins.tiers.staging import MeasuredExchange
from engine.runner.sampler import Sampler
from hybridcache.geometry.units import GIB
from tests.engine.small_models import checkpoint, drivers, oracles, pytest_generate_tests
from tests.engine.test_hits_change_nothing import HYBRID, MakeEngine

__all__ = ["checkpoint", "drivers", "oracles", "pytest_generate_tests"]


@pytest.fixture(autouse=True)
def patient_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give grammars more time than any machine needs."""
    monkeypatch.setattr(guides, "REQUEST_S", 600.0)


@pytest.fixture
def make_engine(tmp_path: Path) -> MakeEngine:
    """Return a function that makes an engine on seeded weights, with memory in tokens and slots.

    The arena begins as NaNs in every format, so reads of unwritten memory show.
    """

    def make(
        model: dict[str, object] = HYBRID,
        kv_tokens: int = 4096,
        slots: int = 32,
        **settings: object,
    ) -> Engine:
        (tmp_path / "config.json").write_text(json.dumps(model))
        settings = {"model": str(tmp_path), "load_format": "dummy", "device": "cpu"} | settings
        sizes = load_runner(EngineConfig(**settings, cache_gib=0.02)).geometry
        cache_bytes = kv_tokens * sizes.kv_bytes_per_token + slots * max(sizes.state_bytes, 1)
        config = EngineConfig(**settings, cache_gib=cache_bytes / GIB, check=True)
        runner = load_runner(config)
        runner.tensors.rows.fill_(255)
        return Engine(config, runner=runner, sampler=Sampler())

    return make


@pytest.fixture
def always_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load every offloaded prefix, even if computing it again would be faster."""

    def saved(_: object, cached_len: int, position: int, *__: object) -> float:
        return position - cached_len

    monkeypatch.setattr(MeasuredExchange, "seconds_saved", saved)
