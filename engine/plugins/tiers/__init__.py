"""Host and disk tiers for KV and states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from engine.config import GIB_SIZE, ConfigError, Limits, PluginConfig, check_fields
from hybridcache.geometry.units import GIB

HOST_SIZE = Limits("a number of GiB of 0 or more, at most 1,048,576", 0, 2**20)


@dataclass(frozen=True, slots=True)
class TierConfig(PluginConfig):
    """Sizes of the tiers."""

    plugin: ClassVar[str] = "tiers"
    title: ClassVar[str] = "host and disk tiers"

    host_gib: Annotated[float | None, HOST_SIZE] = None
    """Host memory for entries that are evicted from the device, GiB; by default they are lost, or
    stay on disk (--state-dir); 0: none."""
    state_dir: str | None = None
    """Folder on disk that keeps a copy of the cache for the next start, even after a kill; also the
    lowest tier; by default nothing is written."""
    state_dir_mismatch: Literal["refuse", "empty"] = "refuse"
    """If --state-dir has entries of another model, format or kernel: refuse to start, or delete
    them."""
    disk_gib: Annotated[float | None, GIB_SIZE] = None
    """Maximum size of --state-dir, GiB; by default 2.5 times device and host memory, and at most 90
    % of the free disk."""

    @property
    def host_bytes(self) -> Mapping[str, int]:
        return {} if self.host_gib is None else {"host_gib": int(self.host_gib * GIB)}

    def __post_init__(self) -> None:
        if self.host_gib == 0:
            object.__setattr__(self, "host_gib", None)
        check_fields(self)
        if self.disk_gib is not None and self.state_dir is None:
            raise ConfigError("disk_gib requires state_dir.")
