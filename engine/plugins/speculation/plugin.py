"""Speculative decoding: drafts for decoding requests."""

from __future__ import annotations

from collections.abc import Sequence

from engine.config import EngineConfig
from engine.interfaces import Plugin, Runner
from engine.plugins.speculation import SpeculationConfig
from engine.plugins.speculation.draft_manager import Drafting
from engine.schedule.batch import DraftPlanner
from hybridcache.geometry.units import counted, format_bytes

RUNNING_ON_CPU = 4
"""Maximum number of decoding requests with drafts where each token of a step costs time."""


class SpeculationPlugin(Plugin):
    """Plans drafts (setting ``draft``)."""

    name = "speculation"

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.settings = config.of(SpeculationConfig)

    def draft_planner(self, runner: Runner, *, shares: bool) -> DraftPlanner | None:
        words, room = self.settings.drafters, self.config.num_step_states
        self._state_bytes = getattr(getattr(runner, "loaded", None), "step_state_bytes", 0)
        limit = self.settings.draft_running or (None if runner.is_asynchronous else RUNNING_ON_CPU)
        return Drafting.of(words, room, runner.guess, shares=shares, max_decoding=limit)

    def start_screen(self) -> Sequence[tuple[str, str]]:
        longest, number = self.config.drafts.max_len, self.config.num_step_states
        states = f", whose states take {format_bytes(self._state_bytes)}"
        words = (
            f"{self.settings.draft}: up to {counted(longest, 'token')} a request; up to {number} "
            f"verified a step{states if self._state_bytes else ''}"
        )
        return [("drafts", words)]
