"""Bounded memory of earlier chats, for replays of their tokens and explanations of cache misses."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from engine.config import MIB_SIZE, PluginConfig, check_fields, setting


@dataclass(frozen=True, slots=True)
class DiagnosticsConfig(PluginConfig):
    """Memory of chats, and lines that change with every request."""

    plugin: ClassVar[str] = "diagnostics"
    title: ClassVar[str] = "memory of chats"

    preserve_thinking: bool = setting(
        False,
        "keep reasoning in the history as it was sampled, even if the chat template or the client "
        "drops it; a request can override this with chat_template_kwargs",
    )
    volatile_line: str | None = setting(
        None,
        "regular expression of lines of the system message that change with every request, such as "
        "^x-anthropic-billing-header:|^Today's date",
    )
    volatile: Literal["move", "drop"] = setting(
        "move",
        "move: such lines are moved to the end of the system message; drop: they are removed",
    )
    replay_mib: float = setting(
        64.0,
        "memory for sampled tokens of answers, which replace an answer that a "
        "client sends back, MiB; with 0 such answers are tokenized again",
        limits=MIB_SIZE,
    )
    explain_mib: float = setting(
        64.0,
        "memory for earlier requests, to explain why a later one missed the cache, MiB",
        limits=MIB_SIZE,
    )

    def __post_init__(self) -> None:
        check_fields(self)
        _ = self.pattern

    @property
    def pattern(self) -> re.Pattern[str] | None:
        """Compiled ``volatile_line``; None if there is none. Raises ValueError."""
        if self.volatile_line is None:
            return None
        try:
            return re.compile(self.volatile_line)
        except re.error as error:
            raise ValueError(
                f"--volatile-line {self.volatile_line!r} is not a regular expression ({error})."
            ) from error
