"""A compact inference engine around the hybrid prefix cache.

``from engine import Engine, EngineConfig, SamplingParams``. Names are imported when they are first
used: ``import engine`` needs none of the engine's packages, and only making an ``Engine`` loads
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.config import ConfigError as ConfigError
    from engine.config import EngineConfig as EngineConfig
    from engine.engine import Engine as Engine
    from engine.errors import QueueFull as QueueFull
    from engine.front.async_engine import AsyncEngine as AsyncEngine
    from engine.front.command.cli import serve_engine as serve_engine
    from engine.front.server.settings import ServerConfig as ServerConfig
    from engine.requests.request import RequestSpec as RequestSpec
    from engine.requests.request import SamplingParams as SamplingParams
    from engine.text.answers import RequestOutput as RequestOutput
    from engine.text.grammar import Grammar as Grammar

_MODULES = {
    "AsyncEngine": "engine.front.async_engine",
    "ConfigError": "engine.config",
    "Engine": "engine.engine",
    "EngineConfig": "engine.config",
    "Grammar": "engine.text.grammar",
    "QueueFull": "engine.errors",
    "RequestOutput": "engine.text.answers",
    "RequestSpec": "engine.requests.request",
    "SamplingParams": "engine.requests.request",
    "ServerConfig": "engine.front.server.settings",
    "serve_engine": "engine.front.command.cli",
}

__all__ = [*_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    from hybridcache.command.field_texts import describe_fields

    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    describe_fields(__name__)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
