"""Guided answers: answers that match a schema, an expression, a choice or a grammar."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from engine.config import SECONDS, PluginConfig, setting


@dataclass(frozen=True, slots=True)
class GuidedConfig(PluginConfig):
    """Time limit for the work on one grammar."""

    plugin: ClassVar[str] = "guided"
    title: ClassVar[str] = "grammars"

    grammar_budget_s: float = setting(
        10.0,
        "seconds of background work for the grammar of one request, without 5 ms for each token "
        "of the answer; after them the request fails",
        limits=SECONDS,
    )
