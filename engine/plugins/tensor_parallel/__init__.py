"""Tensor parallelism: several processes that each compute a part of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from engine.config import COUNT, ConfigError, EngineConfig, PluginConfig


@dataclass(frozen=True, slots=True)
class TensorParallelConfig(PluginConfig):
    """Number of processes."""

    plugin: ClassVar[str] = "tensor_parallel"
    title: ClassVar[str] = "tensor parallelism"

    tp: Annotated[int, COUNT] = 1
    """Processes that compute the model together, each a part of every layer, and each on its own
    device if there are several."""

    @property
    def num_ranks(self) -> int:
        return self.tp

    def check(self, config: EngineConfig) -> None:
        for is_set, what in (
            (config.uses("tiers"), "host and disk tiers: remove --host-gib and --state-dir"),
            (config.drafts.head_len > 0, "the multi-token head: use draft tree, or none"),
            (config.graphs in ("decode", "all"), "graphs: set graphs to auto or off"),
            (config.uses("disaggregation"), "roles: remove --role"),
            (":" in (config.device or ""), "a numbered device: remove the number of --device"),
        ):
            if is_set:
                raise ConfigError(f"--tp does not support {what}.")
