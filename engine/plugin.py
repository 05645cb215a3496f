"""Interface of the engine's optional capabilities.

A plugin is made from the engine's settings before anything is loaded. While the engine is built,
the hooks are called in the order in which they are listed here. Afterwards those of ``StepHooks``
are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.config import EngineConfig
from engine.interfaces import EngineCore, Runner
from engine.schedule.drafter import DraftPlanner
from engine.schedule.fetching import Fetcher
from engine.schedule.plan import StepHooks
from hybridcache.api import PrefixCache
from hybridcache.config import CacheConfig
from hybridcache.scheduling.cache_manager import CacheManager

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer


class Plugin(StepHooks):
    """One optional capability of one engine. Every method does nothing unless it is overridden."""

    name: str
    """Name of the plugin's folder."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.wake: Callable[[], None] = lambda: None
        """Wakes an idle engine because ``before_step`` has work. Safe to call from any thread."""

    def load_runner(self) -> Runner | None:
        """Return a runner that replaces ``ModelRunner``, or None. Imports torch."""
        return None

    def model_follower(self) -> Callable[..., Any] | None:
        """Return the class of a ``ModelFollower``, for a runner with a multi-token head, or None.
        Imports torch."""
        return None

    def size_cache(self, cache: CacheConfig, runner: Runner) -> CacheConfig:
        """Return ``cache`` with the sizes that this plugin requires. Raises ConfigError."""
        return cache

    def open_cache(
        self, cache: PrefixCache, runner: Runner, tokenizer: Tokenizer | None
    ) -> Mapping[str, Any]:
        """Prepare the new ``cache``. Returns options of ``CacheManager``."""
        return {}

    def open_manager(self, manager: CacheManager, runner: Runner) -> Fetcher | None:
        """Prepare the new ``manager``. Returns a fetcher of prefixes, or None."""
        return None

    def draft_planner(self, runner: Runner, *, shares: bool) -> DraftPlanner | None:
        """Return a planner of drafts, or None. ``shares``: drafts may use the text of other
        requests."""
        return None

    def attach(self, engine: EngineCore, manager: CacheManager) -> None:
        """Start work for the complete engine."""

    def start_screen(self) -> Sequence[tuple[str, str]]:
        """Return lines of the start screen: (title, text)."""
        return ()
