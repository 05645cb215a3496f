"""Caches of other engines, rebuilt from their published behaviour and replayed next to ours."""

from __future__ import annotations

from functools import partial

from hybridcache.lab.rivals.lightllm import LightllmCache
from hybridcache.lab.rivals.llama_cpp import LlamaCppCache
from hybridcache.lab.rivals.marconi import MarconiCache
from hybridcache.lab.rivals.protocol import BaselineFactory
from hybridcache.lab.rivals.sglang import SglangCache
from hybridcache.lab.rivals.snapshots import OllamaCache, TensorRtCache
from hybridcache.lab.rivals.vllm import VllmCache, VllmTtlCache

BASELINES: dict[str, BaselineFactory] = {
    "vllm": VllmCache,
    "vllm-unit32": partial(VllmCache, match_unit=32),
    "vllm-keep-all": partial(VllmCache, keep_all=True),
    "vllm-ttl": VllmTtlCache,
    "sglang": SglangCache,
    "sglang-end": partial(SglangCache, placement="end"),
    "sglang-session": partial(SglangCache, sessions=True),
    "sglang-cap": partial(SglangCache, max_states_per_path=2),
    "lightllm": LightllmCache,
    "lightllm-big": partial(LightllmCache, big_page=1024),
    "lightllm-64": partial(LightllmCache, page=64),
    "marconi": MarconiCache,
    "marconi-64": partial(MarconiCache, grid=64),
    "marconi-static": partial(MarconiCache, alpha=1.0),
    "marconi-static-64": partial(MarconiCache, alpha=1.0, grid=64),
    "marconi-artifact": partial(MarconiCache, reading="artifact"),
    "sglang-plus": partial(MarconiCache, leaf_lru=True),
    "sglang-plus-64": partial(MarconiCache, leaf_lru=True, grid=64),
    "tensorrt-llm": TensorRtCache,
    "llama-cpp": LlamaCppCache,
    "ollama": OllamaCache,
}
"""Baselines by name. Marconi saves at any token, which kernels that compute in chunks cannot; with
``-64``, on the grid. ``sglang-plus`` is the baseline of that name in Marconi's paper."""
UNCHARGED = {
    **dict.fromkeys(("lightllm", "lightllm-big", "lightllm-64"), "512 states in host memory"),
    "llama-cpp": "up to 128 checkpoints in host memory",
}
"""Memory of a system in addition to its size."""
COMPARABLE = tuple(name for name in BASELINES if name not in UNCHARGED)
"""Systems whose whole cache is within their size, so that the upper bound is also theirs."""
