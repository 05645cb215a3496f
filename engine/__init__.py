"""A compact inference engine around the hybrid prefix cache.

``from engine import Engine, EngineConfig, SamplingParams``. Names are imported when they are first
used: ``import engine`` needs none of the engine's packages, and only making an ``Engine`` loads
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.async_engine import AsyncEngine
    from engine.config import ConfigError, EngineConfig
    from engine.engine import Engine
    from engine.errors import QueueFull
    from engine.plugins import engine_config, server_config
    from engine.requests.grammar import Grammar
    from engine.requests.request import RequestSpec, SamplingParams
    from engine.text.outputs import RequestOutput

_MODULES = {
    "AsyncEngine": "engine.async_engine",
    "ConfigError": "engine.config",
    "Engine": "engine.engine",
    "EngineConfig": "engine.config",
    "Grammar": "engine.requests.grammar",
    "QueueFull": "engine.errors",
    "RequestOutput": "engine.text.outputs",
    "RequestSpec": "engine.requests.request",
    "SamplingParams": "engine.requests.request",
    "engine_config": "engine.plugins",
    "server_config": "engine.plugins",
}

__all__ = [
    "AsyncEngine",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "Grammar",
    "QueueFull",
    "RequestOutput",
    "RequestSpec",
    "SamplingParams",
    "engine_config",
    "server_config",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
