"""Queries of the Grafana dashboard."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import engine.front.server
from engine.config import EngineConfig
from engine.engine import Engine
from engine.front.server.settings import ServerConfig

from .conftest import serving

DASHBOARD: dict[str, Any] = json.loads(
    (Path(engine.front.server.__file__).parent / "grafana.json").read_text()
)
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
NAME = re.compile(r"\bengine_\w+")
LABELS = re.compile(r"by \(([\w, ]+)\)")


@pytest.fixture(scope="module")
def labels_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Return the labels of each sample by its name, after one request with a key.

    A counter without samples yet gets the labels of its definition.
    """
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("key-1 bob")
    config = EngineConfig(cache_gib=0.05, host_gib=0.01, state_dir=str(keys.parent / "state"))
    with serving(Engine(config), ServerConfig(api_key_file=str(keys))) as live:
        live.headers["Authorization"] = "Bearer key-1"
        live.post("/v1/completions", {"prompt": "a dashboard's request", "max_tokens": 3})
        labels_by_name: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(live.get("/metrics").text):
            suffixes = {"counter": ["_total"], "histogram": ["_bucket"]}.get(family.type, [""])
            for suffix in suffixes:
                labels_by_name[family.name + suffix] = set()
            for sample in family.samples:
                labels_by_name.setdefault(sample.name, set()).update(sample.labels)
        for counter in live.server.app.state.metrics.counters.values():
            labels_by_name.setdefault(f"{counter._name}_total", set()).update(counter._labelnames)
    return labels_by_name


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_panel_uses_existing_metrics_and_labels(
    panel: dict[str, Any], labels_of: dict[str, set[str]]
) -> None:
    for target in panel["targets"]:
        names = NAME.findall(target["expr"])
        assert names
        for name in names:
            assert name in labels_of, name
        for labels in LABELS.findall(target["expr"]):
            assert set(labels.split(", ")) <= set.union(*(labels_of[name] for name in names))
