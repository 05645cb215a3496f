"""Settings of the engine's optional capabilities.

Every plugin imports the core. The composition roots (``engine/engine.py`` for an engine,
``engine/server/app.py`` for a server, ``engine/command/cli.py`` for commands) import a plugin when
it is first needed. A plugin's ``__init__`` has its settings and imports no other module of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from engine.config import EngineConfig, PluginConfig, Settings
from engine.plugins.disaggregation import DisaggregationConfig
from engine.plugins.replicas import ReplicasConfig
from engine.plugins.speculation import SpeculationConfig
from engine.plugins.tensor_parallel import TensorParallelConfig
from engine.plugins.tiers import TierConfig

if TYPE_CHECKING:
    from engine.server.settings import ServerConfig

    Config = TypeVar("Config", bound=Settings)

ENGINE: tuple[type[PluginConfig], ...] = (
    TensorParallelConfig,
    SpeculationConfig,
    TierConfig,
    DisaggregationConfig,
)
"""Settings of the plugins of an engine."""
SERVER: tuple[type[PluginConfig], ...] = (ReplicasConfig,)
"""Settings of the plugins of a server."""


def engine_config(base: EngineConfig | None = None, /, **settings: Any) -> EngineConfig:
    """Return ``base``, by default the default settings, with ``settings``, those of plugins
    included. Raises ConfigError.

    >>> from engine import engine_config
    >>> engine_config(max_running=2, draft="tree:4").plugins
    (SpeculationConfig(draft='tree:4', draft_running=None),)
    """
    return _changed(base or EngineConfig(), ENGINE, settings)


def server_config(base: ServerConfig | None = None, /, **settings: Any) -> ServerConfig:
    """Return the settings of a server; see ``engine_config``. Raises ValueError."""
    from engine.server.settings import ServerConfig

    return _changed(base or ServerConfig(), SERVER, settings)


def _changed(base: Config, kinds: Sequence[type[PluginConfig]], settings: dict[str, Any]) -> Config:
    plugins = []
    for kind in kinds:
        names = [field.name for field in dataclasses.fields(kind)]
        given = {name: settings.pop(name) for name in names if name in settings}
        plugins.append(dataclasses.replace(base.of(kind), **given))
    return dataclasses.replace(base, plugins=tuple(plugins), **settings)
