"""Tensor parallelism: several processes that each compute a part of every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.config import COUNT, ConfigError, EngineConfig, PluginConfig, setting


@dataclass(frozen=True, slots=True)
class TensorParallelConfig(PluginConfig):
    """Number of processes."""

    plugin: ClassVar[str] = "tensor_parallel"
    title: ClassVar[str] = "tensor parallelism"

    tp: int = setting(
        1,
        "processes that compute the model together, each a part of every layer, and each on its "
        "own device if there are several",
        limits=COUNT,
    )

    @property
    def num_ranks(self) -> int:
        return self.tp

    def check(self, config: EngineConfig) -> None:
        if config.uses("tiers"):
            raise ConfigError(
                "--tp does not support host and disk tiers: remove --host-gib and --state-dir."
            )
        if config.drafts.head_len:
            raise ConfigError(
                "--tp does not support the multi-token head: use draft tree, or none."
            )
        if config.graphs in ("decode", "all"):
            raise ConfigError("--tp does not support graphs: set graphs to auto or off.")
        if config.uses("disaggregation"):
            raise ConfigError("--tp does not support roles: remove --role.")
        if config.device is not None and ":" in config.device:
            raise ConfigError(
                f"--tp gives every rank its own device: remove the number of {config.device}."
            )
