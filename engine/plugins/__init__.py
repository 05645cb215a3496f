"""Registry of the engine's optional capabilities.

Every plugin imports the core. The core imports this registry only, which loads a plugin when it is
first needed: by a setting that differs from its default, a request, a path or a command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from engine.config import EngineConfig, PluginConfig, Settings

if TYPE_CHECKING:
    from engine.server.settings import ServerConfig

    Config = TypeVar("Config", bound=Settings)

ENGINE = {
    "tensor_parallel": "TensorParallelConfig",
    "speculation": "SpeculationConfig",
    "tiers": "TierConfig",
    "disaggregation": "DisaggregationConfig",
    "observe": "ObserveConfig",
}
"""Plugins of an engine -> class of their settings, in the order of their hooks.

The class is in the plugin's ``__init__``, which imports no other module of it. Module ``plugin``
has its class: ``TierPlugin`` next to ``TierConfig``.
"""

SERVER = {
    "replicas": "ReplicasConfig",
    "dialects": "DialectsConfig",
    "diagnostics": "DiagnosticsConfig",
}
"""Plugins of a server -> class of their settings."""

PATHS = {
    "/": "observe",
    "/v1/cache/events": "observe",
    "/v1/cache/nodes/": "observe",
    "/v1/cache/explanations/": "diagnostics",
    "/v1/messages": "dialects",
    "/v1/messages/": "dialects",
    "/v1/responses": "dialects",
    "/tokenize": "dialects",
    "/detokenize": "dialects",
    "/tokenizer_info": "dialects",
    "/version": "dialects",
    "/v1/responses/": "dialects",
}
"""Path of a server -> plugin that serves it. A path that ends with a slash stands for all longer
ones, except ``/``. Module ``server`` of the plugin has its class: ``ObserveExtension``."""

VERBS = {
    "convert": (
        "convert",
        "MODEL OUT --to int8|fp8 [--ignore PATTERN ...]",
        "convert the weights of a model to eight bits",
    ),
    "record": (
        "record",
        "--to URL --out FILE [options]",
        "pass requests on to any OpenAI-compatible server and write them as a trace",
    ),
}
"""Verbs of the command ``engine`` -> plugin, usage and help. The module ``command`` of the plugin
has ``add_flags`` and ``run``."""


def _find(module: str, name: str) -> Any:
    return getattr(import_module(f"{__name__}.{module}"), name)


def _settings(plugins: Mapping[str, str]) -> list[type[PluginConfig]]:
    return [_find(plugin, kind) for plugin, kind in plugins.items()]


def engine_settings() -> list[type[PluginConfig]]:
    """Return the settings of the plugins of an engine."""
    return _settings(ENGINE)


def server_settings() -> list[type[PluginConfig]]:
    """Return the settings of the plugins of a server."""
    return _settings(SERVER)


def engine_config(base: EngineConfig | None = None, /, **settings: Any) -> EngineConfig:
    """Return ``base``, by default the default settings, with ``settings``, those of plugins
    included. Raises ConfigError.

    >>> engine_config(max_running=2, draft="tree:4").plugins
    (SpeculationConfig(draft='tree:4', draft_index_mib=64.0, draft_running=None),)
    """
    return _changed(base or EngineConfig(), engine_settings(), settings)


def server_config(base: ServerConfig | None = None, /, **settings: Any) -> ServerConfig:
    """Return the settings of a server; see ``engine_config``. Raises ValueError."""
    from engine.server.settings import ServerConfig

    return _changed(base or ServerConfig(), server_settings(), settings)


def _changed(base: Config, kinds: Sequence[type[PluginConfig]], settings: dict[str, Any]) -> Config:
    plugins = []
    for kind in kinds:
        names = [field.name for field in dataclasses.fields(kind)]
        given = {name: settings.pop(name) for name in names if name in settings}
        plugins.append(dataclasses.replace(base.of(kind), **given))
    return dataclasses.replace(base, plugins=tuple(plugins), **settings)


def engine_plugins(config: EngineConfig) -> tuple[Any, ...]:
    """Return the ``Plugin`` objects with settings in ``config``, in the order of ``ENGINE``."""
    return tuple(
        _find(f"{plugin}.plugin", settings.removesuffix("Config") + "Plugin")(config)
        for plugin, settings in ENGINE.items()
        if config.uses(plugin)
    )


def plugin_of_path(path: str) -> str | None:
    """Return the plugin that serves a path; None if there is none."""
    folders = (name for name in PATHS if len(name) > 1 and name.endswith("/"))
    name = next(filter(path.startswith, folders), path)
    return PATHS.get(name)


def server_extension(plugin: str) -> Any:
    """Return the class of a plugin's ``ServerExtension``."""
    settings = (ENGINE | SERVER)[plugin]
    return _find(f"{plugin}.server", settings.removesuffix("Config") + "Extension")


def plugin_verbs() -> dict[str, tuple[str, str]]:
    """Return (usage, help) of each verb that a plugin adds to the command line."""
    return {verb: (usage, help) for verb, (_, usage, help) in VERBS.items()}


def plugin_verb(verb: str) -> Any:
    """Return the module of a verb, with ``add_flags(parser)`` and ``run(arguments)``."""
    return import_module(f"{__name__}.{VERBS[verb][0]}.command")
