"""Invariants of the tree at the start of each step of any test of the scheduler."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(autouse=True)
def check_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm", reason="needs vLLM: make vllm, or make vllm-scheduler")
    from hybridcache.vllm.scheduler import HybridManager

    plain = HybridManager.new_step_starts

    def new_step_starts(self: Any) -> None:
        plain(self)
        self.tree.check()

    monkeypatch.setattr(HybridManager, "new_step_starts", new_step_starts)
