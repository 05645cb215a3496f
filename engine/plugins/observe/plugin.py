"""Trace of an engine's steps."""

from __future__ import annotations

from engine.interfaces import EngineCore, Plugin
from engine.plugins.observe import ObserveConfig
from engine.plugins.observe.step_trace import Trace, start_trace
from hybridcache.scheduling.cache_manager import CacheManager


class ObservePlugin(Plugin):
    """Writes steps and requests to a file (setting ``trace``)."""

    name = "observe"
    _trace: Trace | None = None

    def attach(self, engine: EngineCore, manager: CacheManager) -> None:
        """See ``Plugin``. Raises ValueError if the file cannot be written."""
        path = self.config.of(ObserveConfig).trace
        self._trace = None if path is None else start_trace(engine, path)

    def close(self) -> None:
        if self._trace is not None:
            self._trace.close()

    def disconnect(self) -> None:
        """See ``StepHooks``: an engine that fails is not closed."""
        self.close()
