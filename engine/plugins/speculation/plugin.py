"""Speculative decoding: drafts for decoding requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.config import EngineConfig
from engine.interfaces import Runner
from engine.plugin import Plugin
from engine.plugins.speculation.draft_manager import Drafting
from engine.plugins.speculation.suffix import IndexMemory
from engine.schedule.drafter import DraftPlanner


class EnginePlugin(Plugin):
    """Plans drafts (setting ``draft``)."""

    name = "speculation"

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._memory = IndexMemory(int(config.draft_index_mib * 2**20))

    def model_follower(self) -> Callable[..., Any] | None:
        """See ``Plugin``."""
        from engine.plugins.speculation.mtp_head import Predictor

        return Predictor

    def draft_planner(self, runner: Runner, *, shares: bool) -> DraftPlanner | None:
        """See ``Plugin``."""
        words, room = self.config.drafters, self.config.num_step_states
        return Drafting.of(words, room, runner.guess, shares=shares, memory=self._memory)

    def report(self) -> Mapping[str, Any]:
        """See ``StepHooks``."""
        return {"draft_index_bytes": self._memory.used_bytes}
