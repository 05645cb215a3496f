"""Speculative decoding: drafters, draft lengths and acceptance statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from engine.config import COUNT, ConfigError, DraftSizes, PluginConfig, check_fields

DRAFT_LENS = {"tree": (8, 32), "mtp": (3, 4)}
"""Drafter -> (default, maximum) number of tokens drafted for a sequence in one step."""


@dataclass(frozen=True, slots=True)
class SpeculationConfig(PluginConfig):
    """Drafters."""

    plugin: ClassVar[str] = "speculation"
    title: ClassVar[str] = "speculative decoding"

    draft: str = "none"
    """Draft tokens and verify them together, so that a step may produce several: tree:8 (text that
    followed earlier, in the cache or in the request itself; at most 8 tokens), mtp:3 (the model's
    own multi-token head), tree,mtp (the head if the tree has no draft), or none."""
    draft_running: Annotated[int | None, COUNT] = None
    """Maximum number of requests that decode in a step with drafts (default: 4 on a CPU, where more
    requests lose speed with drafts; no limit on a device)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.draft_running is not None and not self.is_used:
            raise ConfigError("--draft-running requires --draft.")
        _ = self.drafters

    @property
    def is_used(self) -> bool:
        return self.draft != "none"

    @property
    def drafters(self) -> dict[str, int]:
        """Drafters in the order in which they are tried -> maximum number of tokens that each
        drafts for a sequence in one step."""
        lengths: dict[str, int] = {}
        for word in self.draft.split(",") if self.is_used else ():
            name, colon, number = word.partition(":")
            usual, limit = DRAFT_LENS.get(name, (0, 0))
            most = usual if not colon else int(number) if number.isdecimal() else 0
            if name in lengths or not 1 <= most <= limit:
                known = " and ".join(
                    f"{name} (1 to {limit} tokens, as in {name}:{usual})"
                    for name, (usual, limit) in DRAFT_LENS.items()
                )
                raise ConfigError(
                    f"draft must be none, or drafters joined by a comma, each once: {known}; not "
                    f"{self.draft!r}."
                )
            lengths[name] = most
        return lengths

    @property
    def drafts(self) -> DraftSizes:
        lengths = self.drafters
        return DraftSizes(max(lengths.values(), default=0), lengths.get("mtp", 0))
