"""Host and disk tiers below the device's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.config import EngineConfig
from engine.interfaces import Plugin, Runner
from engine.plugins.tiers.cache_tiers import CacheTiers, TierSizes
from engine.schedule.batch import Plan
from engine.schedule.fetching import Fetcher
from engine.text.tokenizer import Tokenizer
from hybridcache.allocators.moves import HOST
from hybridcache.api import PrefixCache
from hybridcache.config import CacheConfig
from hybridcache.geometry.units import format_bytes
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.variants import TieredRadixCache


class TierPlugin(Plugin):
    """Keeps evicted and published entries (settings ``host_gib`` and ``state_dir``)."""

    name = "tiers"
    tiers: CacheTiers
    _manager: CacheManager

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._sizes = TierSizes()

    def size_cache(self, cache: CacheConfig, runner: Runner) -> CacheConfig:
        """See ``Plugin``."""
        self._sizes = sizes = TierSizes.of(self.config, runner.memory)
        return replace(cache, host_bytes=sizes.host, disk_bytes=sizes.disk)

    def open_cache(
        self, cache: PrefixCache, runner: Runner, tokenizer: Tokenizer | None
    ) -> Mapping[str, Any]:
        """See ``Plugin``. Raises StoreError for a folder that cannot be used."""
        assert isinstance(cache, TieredRadixCache), "the cache was made with tiers"
        self.tiers = tiers = CacheTiers(self.config, self._sizes, cache, runner, tokenizer)
        cost = tiers.exchange
        options: dict[str, Any] = {"exchange": cost, "after_reading": cost.after_reading}
        if tiers.keeping is not None:
            options["publishing"] = tiers.keeping.publishing
        return options

    def open_manager(self, manager: CacheManager, runner: Runner) -> Fetcher | None:
        """See ``Plugin``."""
        self._manager = manager
        self.tiers.recall(manager.placement)
        return self.tiers.fetcher(manager)

    @property
    def has_work(self) -> bool:
        """See ``StepHooks``: transfers wait for a batch."""
        return self._manager.has_moves

    def after_step(self, plan: Plan, seconds: float) -> None:
        """See ``StepHooks``."""
        self.tiers.step_done(plan, seconds)

    def on_cache_emptied(self, *, was_lost: bool) -> None:
        """See ``StepHooks``."""
        if was_lost:
            self.tiers.start_over()
        else:
            self.tiers.reset()

    def on_idle(self) -> float | None:
        """See ``StepHooks``."""
        return self.tiers.rest()

    def close(self) -> None:
        """See ``StepHooks``."""
        self.tiers.close()

    def start_screen(self) -> Sequence[tuple[str, str]]:
        """See ``Plugin``."""
        lower = self.tiers.report()
        rows = [
            ("host", f"{format_bytes(tier.total)} for entries that leave the device")
            for tier in lower.tiers
            if tier.tier == HOST
        ]
        if (folder := lower.folder) is not None:
            words = (
                f"{format_bytes(folder.kept)} kept of {format_bytes(folder.total)} at most, for "
                f"the next start too, in {self.tiers.folder}"
            )
            rows.append(("disk", words if folder.is_written else f"{words}; read only"))
        return rows

    def report(self) -> Mapping[str, Any]:
        """See ``StepHooks``."""
        return {"lower": self.tiers.report()}
