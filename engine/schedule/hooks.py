"""Hooks that the engine calls around each step."""

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
        """Process events since the last step, in a bounded time."""

    def wait(self) -> None:
        """Sleep briefly, or until ``before_step`` has work, because nothing can be computed."""

    def after_step(self, plan: Plan, seconds: float) -> None:
        """Record that ``plan`` was computed in ``seconds``. It is committed next."""

    def on_step_failed(self) -> None:
        """End work that depends on the step, which failed with unknown results."""

    def on_cache_lost(self) -> None:
        """End transfers in progress: the contents of all rows are unknown, and the cache is about
        to be emptied."""

    def on_cache_emptied(self, *, was_lost: bool) -> None:
        """Update the plugin after the cache was emptied. ``was_lost``: its rows were lost, and no
        caller requested it."""

    def on_idle(self) -> float | None:
        """Do background work. Returns the seconds until the next task is due, or None if there is
        none."""
        return None

    def stop_accepting(self) -> None:
        """Accept no more work from other processes and finish the work in progress. May be called
        repeatedly."""

    def disconnect(self) -> None:
        """End all work done for other processes or requested from them. May be called
        repeatedly."""

    def close(self) -> None:
        """Complete pending writes after the last step."""

    def report(self) -> Mapping[str, Any]:
        """Return fields of ``CacheReport``."""
        return {}
