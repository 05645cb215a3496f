"""Disaggregation: prefill engines compute the prompts of decode engines."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from engine.config import ConfigError, EngineConfig
from engine.interfaces import EngineCore, Plugin, Runner
from engine.plugins.disaggregation import DisaggregationConfig
from engine.plugins.disaggregation.wire import TransferCounts
from engine.schedule.batch import StepHooks
from engine.schedule.fetching import Fetcher
from hybridcache.scheduling.cache_manager import CacheManager

if TYPE_CHECKING:
    from engine.plugins.disaggregation.prefill_server import PrefillServer
    from engine.runner.model_runner import ModelRunner


class DisaggregationPlugin(Plugin):
    """Serves prefixes to other engines, or loads them from there (setting ``role``)."""

    name = "disaggregation"

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.settings = config.of(DisaggregationConfig)
        self.counts = TransferCounts()
        self.server: PrefillServer | None = None
        """Server of a prefill engine, else None."""

    def open_manager(self, manager: CacheManager, runner: Runner) -> Fetcher | None:
        """See ``Plugin``. Imports torch."""
        if self.settings.role != "decode":
            return None
        from engine.plugins.disaggregation.prefix_buffer import PrefixBuffer, identity
        from engine.plugins.disaggregation.prefix_fetch import PeerFetcher

        own_runner = model_runner(runner)
        buffer, own = PrefixBuffer.of(own_runner), identity(self.config, own_runner)
        return PeerFetcher(manager, buffer, self.settings, own, self.counts)

    def attach(self, engine: EngineCore, manager: CacheManager) -> StepHooks | None:
        """See ``Plugin``. A prefill engine listens from now on. Raises ConfigError if the address
        is not available. Imports torch."""
        settings = self.settings
        if settings.role != "prefill":
            return None
        from engine.plugins.disaggregation.prefill_server import PrefillServer
        from engine.plugins.disaggregation.prefix_buffer import PrefixBuffer, identity

        runner = model_runner(engine.runner)
        buffer, own = PrefixBuffer.of(runner), identity(self.config, runner)
        try:
            self.server = PrefillServer(
                engine, manager, buffer, settings, own, self.counts, wake=lambda: self.wake()
            )
        except OSError as error:
            why = str(error.strerror or error)
            if error.errno == errno.EADDRNOTAVAIL:
                why = "this machine does not have that address; use 0.0.0.0 to listen on all"
            raise ConfigError(f"--transfer-at {settings.transfer_at}: {why}.") from error
        runner.watch_layers(self.server.send_layer)
        return self.server

    def report(self) -> Mapping[str, Any]:
        return {"transfers": asdict(self.counts)}

    def start_screen(self) -> Sequence[tuple[str, str]]:
        if self.server is not None:
            return [("role", "prefill, for decode engines at {}:{}".format(*self.server.address))]
        return [("role", f"decode, with prefill at {', '.join(self.settings.prefill)}")]


def model_runner(runner: Runner) -> ModelRunner:
    """Return ``runner``, with memory that can be read and written between two steps. Raises
    ConfigError for another kind of runner."""
    from engine.runner.model_runner import ModelRunner

    if not isinstance(runner, ModelRunner):
        raise ConfigError("a role requires a ModelRunner, because its memory is read.")
    return runner
