"""Views of a running engine: the page and the trace of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.config import PluginConfig, setting


@dataclass(frozen=True, slots=True)
class ObserveConfig(PluginConfig):
    """File of a trace."""

    plugin: ClassVar[str] = "observe"
    title: ClassVar[str] = "trace"

    trace: str | None = setting(
        None, "file for a trace of steps and requests, for ui.perfetto.dev; at most 1 GiB"
    )
