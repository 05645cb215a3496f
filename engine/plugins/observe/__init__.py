"""Views of a running engine: the page, the terminal, the trace of its steps. Their settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.config import PluginConfig, setting


@dataclass(frozen=True, slots=True)
class ObserveConfig(PluginConfig):
    """File for a trace."""

    plugin: ClassVar[str] = "observe"
    title: ClassVar[str] = "trace"

    trace: str | None = setting(
        None, "file to write steps and requests to as they go, for ui.perfetto.dev; up to 1 GiB"
    )
