"""Tensor parallelism: several processes compute the model together."""

from __future__ import annotations

from engine.interfaces import Runner
from engine.plugin import Plugin


class EnginePlugin(Plugin):
    """Replaces the runner by one that leads others (setting ``tp``)."""

    name = "tensor_parallel"

    def load_runner(self) -> Runner | None:
        """See ``Plugin``."""
        from engine.plugins.tensor_parallel.coordinator import LeadingRunner

        return LeadingRunner(self.config) if self.config.tp > 1 else None
