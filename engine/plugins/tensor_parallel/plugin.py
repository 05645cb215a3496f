"""Tensor parallelism: several processes compute the model together."""

from __future__ import annotations

from collections.abc import Sequence

from engine.interfaces import Plugin, Runner


class TensorParallelPlugin(Plugin):
    """Replaces the runner by one that coordinates several ranks (setting ``tp``)."""

    name = "tensor_parallel"

    def load_runner(self) -> Runner | None:
        from engine.plugins.tensor_parallel.coordinator import LeadingRunner

        return LeadingRunner.start(self.config)

    def start_screen(self) -> Sequence[tuple[str, str]]:
        number = self.config.num_ranks
        words = f"{number}, each with its part of every layer; memory is what one of them has"
        return [("ranks", words)]
