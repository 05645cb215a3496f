"""Anthropic's messages and OpenAI's responses, translated to and from chats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.config import MIB_SIZE, PluginConfig, setting


@dataclass(frozen=True, slots=True)
class DialectsConfig(PluginConfig):
    """Memory of responses."""

    plugin: ClassVar[str] = "dialects"
    title: ClassVar[str] = "responses"

    responses_mib: float = setting(
        64.0,
        "memory for responses that a later request can continue (/v1/responses), MiB",
        limits=MIB_SIZE,
    )
