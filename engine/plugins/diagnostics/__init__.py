"""Bounded memory of earlier chats: replays of their tokens, and explanations of cache misses.
Their settings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from engine.config import PluginConfig, check_mib, setting


@dataclass(frozen=True, slots=True)
class DiagnosticsConfig(PluginConfig):
    """Memory of chats, and lines that change with every request."""

    plugin: ClassVar[str] = "diagnostics"
    title: ClassVar[str] = "memory of chats"

    preserve_thinking: bool = setting(
        False,
        "keep reasoning in history, as it was sampled, also where the chat template or the client "
        "drops it; a request says otherwise with chat_template_kwargs",
    )
    volatile_line: str | None = setting(
        None,
        "regular expression of lines of the system message that change with every request, such as "
        "^x-anthropic-billing-header:|^Today's date",
    )
    volatile: Literal["move", "drop"] = setting(
        "move", "what becomes of such lines: moved to the system message's end"
    )
    replay_mib: float = setting(
        64.0,
        "memory for the tokens that were sampled for answers: they stand for an answer that a "
        "client sends back, MiB; 0: it is tokenized anew",
    )
    explain_mib: float = setting(
        64.0,
        "memory for what is remembered of requests, to say why a later one missed the cache, MiB",
    )

    def __post_init__(self) -> None:
        check_mib("replay_mib", self.replay_mib)
        check_mib("explain_mib", self.explain_mib)
        if self.volatile not in ("move", "drop"):
            raise ValueError(f"--volatile must be move or drop, not {self.volatile!r}.")
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
