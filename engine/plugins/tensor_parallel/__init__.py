"""Tensor parallelism: processes that each compute a part of every layer. Its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.config import ConfigError, EngineConfig, PluginConfig, check_positive_int, setting


@dataclass(frozen=True, slots=True)
class TensorParallelConfig(PluginConfig):
    """Number of processes."""

    plugin: ClassVar[str] = "tensor_parallel"
    title: ClassVar[str] = "tensor parallelism"

    tp: int = setting(
        1,
        "processes that compute the model together, each with its part of every layer, and on a "
        "device of its own where there are any",
    )

    def __post_init__(self) -> None:
        check_positive_int("tp", self.tp)

    @property
    def num_ranks(self) -> int:
        """See ``PluginConfig``."""
        return self.tp

    def check(self, config: EngineConfig) -> None:
        """See ``PluginConfig``."""
        if config.uses("tiers"):
            raise ConfigError("host_gib and state_dir are for one device: leave them out with tp.")
        if config.drafts.head_len:
            raise ConfigError(
                "--tp is served without the multi-token head: use draft tree, or none."
            )
        if config.graphs in ("decode", "all"):
            raise ConfigError("--tp is served without graphs: leave graphs at auto or off.")
        if config.uses("disaggregation"):
            raise ConfigError("--tp is served without roles: leave --role out.")
        if config.device is not None and ":" in config.device:
            raise ConfigError(
                f"--tp gives every rank a device of its own: leave out the number of "
                f"{config.device}."
            )
