"""Work of the engine's thread between steps: the hooks that an engine calls around each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.schedule.plan import Plan


class StepHooks:
    """Hooks around the steps of one engine, called in its thread. Each does nothing by default."""

    @property
    def has_work(self) -> bool:
        """True if ``before_step`` has something to do although no request waits or runs."""
        return False

    def before_step(self) -> None:
        """Take in events since the last step, in a bounded time."""

    def wait(self) -> None:
        """Sleep briefly, or until ``before_step`` has something to do: nothing can be computed."""

    def after_step(self, plan: Plan, seconds: float) -> None:
        """Note that ``plan`` was computed in ``seconds``. It is committed next."""

    def on_step_failed(self) -> None:
        """End work that depends on the step: it broke off, and its results are unknown."""

    def on_cache_lost(self) -> None:
        """End transfers in progress: the contents of all rows are unknown, and the cache is about
        to be emptied."""

    def on_cache_emptied(self, *, was_lost: bool) -> None:
        """Follow the cache, which was emptied: on request, or since its rows were lost."""

    def on_idle(self) -> float | None:
        """Do background work. Returns seconds until there is more of it; None if there is not."""
        return None

    def stop_accepting(self) -> None:
        """Accept no more work from other processes and finish the work in progress. May be called
        again."""

    def disconnect(self) -> None:
        """End all work for and by other processes. May be called again."""

    def close(self) -> None:
        """Complete pending writes: the last step is done."""

    def report(self) -> Mapping[str, Any]:
        """Return fields of ``CacheReport``."""
        return {}
