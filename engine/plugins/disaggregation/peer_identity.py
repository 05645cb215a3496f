"""What two engines must have in common before one resumes from what the other computed."""

from __future__ import annotations

from collections.abc import Mapping

from engine.config import EngineConfig
from engine.runner.identity import digest_of
from engine.runner.model_runner import ModelRunner

PROTOCOL = "2"
"""Version of the messages between two engines; changes with them."""


def identity(config: EngineConfig, runner: ModelRunner) -> dict[str, str]:
    """By what may differ. O(bytes of the weights)."""
    return {
        "transfer protocol": PROTOCOL,
        **runner.identity(),
        "layout of memory": digest_of(runner.unit.layout.encode()),
        "page size": str(config.page_size),
        "checkpoint grid": str(config.grid),
        "exact": str(config.exact),
    }


def difference(own: Mapping[str, str], other: object) -> str | None:
    """What differs and what to do, the end of a sentence; None: nothing."""
    if not isinstance(other, dict):
        return "all, for it says nothing of itself"
    names = ", ".join(name for name in own if own[name] != other.get(name))
    return f"{names}: give both the same" if names else None
