"""Bounded memory of earlier chats, for explanations of cache misses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.config import MIB_SIZE, PluginConfig, setting


@dataclass(frozen=True, slots=True)
class DiagnosticsConfig(PluginConfig):
    """Memory of chats."""

    plugin: ClassVar[str] = "diagnostics"
    title: ClassVar[str] = "memory of chats"

    explain_mib: float = setting(
        64.0,
        "memory for earlier requests, to explain why a later one missed the cache, MiB",
        limits=MIB_SIZE,
    )
