"""Disaggregation: prefill engines compute the prompts of decode engines."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.config import ConfigError, EngineConfig
from engine.interfaces import EngineCore, Plugin, Runner
from engine.plugins.disaggregation import DisaggregationConfig
from engine.plugins.disaggregation.wire import TransferCounts
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
        from engine.plugins.disaggregation.prefix_fetch import Peer, PeerFetcher

        settings, buffer = self.settings, PrefixBuffer.of(model_runner(runner))
        own = identity(self.config, model_runner(runner))
        peers = [Peer(address, own, settings.transfer_timeout_s) for address in settings.addresses]
        return PeerFetcher(manager, buffer, peers, self.counts, fetch_above=settings.fetch_above)

    def attach(self, engine: EngineCore, manager: CacheManager) -> None:
        """See ``Plugin``. A prefill engine listens from now on. Raises ConfigError if the address
        is not available. Imports torch."""
        config, settings = self.config, self.settings
        if settings.role != "prefill":
            return
        from engine.plugins.disaggregation.prefill_server import PrefillServer
        from engine.plugins.disaggregation.prefix_buffer import PrefixBuffer, identity

        runner = model_runner(engine.runner)
        buffer = PrefixBuffer.of(runner)
        try:
            self.server = PrefillServer(
                manager,
                buffer,
                settings.addresses[0],
                identity(config, runner),
                self.counts,
                timeout_s=settings.transfer_timeout_s,
                prepare=engine.prepare,
                enqueue=engine.enqueue,
                abort=engine.abort,
                wake=lambda: self.wake(),
            )
        except OSError as error:
            why = str(error.strerror or error)
            if error.errno == errno.EADDRNOTAVAIL:
                why = "this machine does not have that address; use 0.0.0.0 to listen on all"
            raise ConfigError(f"--transfer-at {settings.transfer_at}: {why}.") from error
        runner.watch_layers(self.server.send_layer)

    @property
    def has_work(self) -> bool:
        """See ``StepHooks``."""
        return self.server is not None and self.server.has_work

    def before_step(self) -> None:
        """See ``StepHooks``."""
        if self.server is not None:
            self.server.advance()

    def wait(self) -> None:
        """See ``StepHooks``."""
        if self.server is not None:
            self.server.wait()

    def on_step_failed(self) -> None:
        """See ``StepHooks``."""
        if self.server is not None:
            self.server.give_up()

    def stop_accepting(self) -> None:
        """See ``StepHooks``."""
        if self.server is not None:
            self.server.stop_accepting()

    def disconnect(self) -> None:
        """See ``StepHooks``."""
        if self.server is not None:
            self.server.close()

    def report(self) -> Mapping[str, Any]:
        """See ``StepHooks``."""
        return {"transfers": self.counts.as_dict()}

    def start_screen(self) -> Sequence[tuple[str, str]]:
        """See ``Plugin``."""
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
