"""Host and disk tiers for KV and states, and their settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.config import ConfigError, PluginConfig, check_gib, setting


@dataclass(frozen=True, slots=True)
class TierConfig(PluginConfig):
    """Sizes of the tiers."""

    plugin: ClassVar[str] = "tiers"
    title: ClassVar[str] = "host and disk tiers"

    host_gib: float | None = setting(
        None,
        "host memory for what leaves the device's, GiB; none: what is evicted is gone, or "
        "on disk (--state-dir)",
    )
    state_dir: str | None = setting(
        None,
        "folder on disk in which all that is cached is kept too, so that the next start has it, "
        "after a stop or a kill; also the tier below the others; none: nothing is written",
        is_common=True,
    )
    disk_gib: float | None = setting(
        None, "most that --state-dir may take, GiB; none: 2.5 times device and host memory"
    )

    def __post_init__(self) -> None:
        check_gib("host_gib", self.host_gib)
        check_gib("disk_gib", self.disk_gib)
        if self.disk_gib is not None and self.state_dir is None:
            raise ConfigError("disk_gib is the size of a folder: name it with state_dir.")
        if self.state_dir == "":
            raise ConfigError("state_dir must name a folder; leave it out to keep nothing.")
