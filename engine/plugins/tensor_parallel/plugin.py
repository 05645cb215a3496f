"""Tensor parallelism: several processes compute the model together."""

from __future__ import annotations

from collections.abc import Sequence

from engine.interfaces import Plugin


class TensorParallelPlugin(Plugin):
    """Line of the start screen for several ranks (setting ``tp``). ``LeadingRunner`` coordinates
    them."""

    name = "tensor_parallel"

    def start_screen(self) -> Sequence[tuple[str, str]]:
        number = self.config.num_ranks
        words = f"{number}, each with its part of every layer; memory is what one of them has"
        return [("ranks", words)]
