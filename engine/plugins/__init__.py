"""Optional parts of an engine. Each imports the core, and ``engine/engine.py`` imports it when it
is first needed. A plugin's ``__init__`` has its settings and imports no other module of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from engine.config import EngineConfig, PluginConfig
from engine.plugins.disaggregation import DisaggregationConfig
from engine.plugins.speculation import SpeculationConfig
from engine.plugins.tensor_parallel import TensorParallelConfig
from engine.plugins.tiers import TierConfig

ENGINE: tuple[type[PluginConfig], ...] = (
    TensorParallelConfig,
    SpeculationConfig,
    TierConfig,
    DisaggregationConfig,
)
"""Settings of the plugins of an engine."""


def engine_config(base: EngineConfig | None = None, /, **settings: Any) -> EngineConfig:
    """Return ``base``, by default the default settings, with ``settings``, those of plugins
    included. Raises ConfigError.

    >>> from engine import engine_config
    >>> engine_config(max_running=2, draft="tree:4").plugins
    (SpeculationConfig(draft='tree:4', draft_running=None),)
    """
    base, plugins = base or EngineConfig(), []
    for kind in ENGINE:
        names = [field.name for field in dataclasses.fields(kind)]
        given = {name: settings.pop(name) for name in names if name in settings}
        plugins.append(dataclasses.replace(base.of(kind), **given))
    return dataclasses.replace(base, plugins=tuple(plugins), **settings)
