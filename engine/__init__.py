"""A compact inference engine around the hybrid prefix cache.

``from engine import Engine, EngineConfig, SamplingParams``; importing this loads no torch, making
an ``Engine`` does.
"""

from engine.async_engine import AsyncEngine
from engine.config import ConfigError, EngineConfig
from engine.engine import Engine
from engine.errors import QueueFull
from engine.guided.grammar import Grammar
from engine.requests.sampling_params import SamplingParams
from engine.requests.spec import RequestSpec
from engine.text.outputs import RequestOutput

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
]
