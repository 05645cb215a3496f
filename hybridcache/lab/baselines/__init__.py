"""Caches of other engines, rebuilt from their published behaviour and replayed next to ours."""

from __future__ import annotations

from functools import partial

from hybridcache.lab.baselines.hicache import HicacheCache
from hybridcache.lab.baselines.lightllm import LightllmCache
from hybridcache.lab.baselines.llama_server import LlamaServerCache
from hybridcache.lab.baselines.marconi import MarconiCache
from hybridcache.lab.baselines.ollama import OllamaCache
from hybridcache.lab.baselines.protocol import (
    Baseline,
    BaselineConfig,
    BaselineFactory,
    PeerSession,
    replay,
)
from hybridcache.lab.baselines.sglang import PlacementWord, SglangCache
from hybridcache.lab.baselines.vllm import VllmCache


def sglang(
    config: BaselineConfig,
    placement: PlacementWord = "extra_buffer",
    max_states_per_path: int | None = None,
) -> Baseline:
    """Return SGLang's cache, with its host pool if there is host memory."""
    make = HicacheCache if config.host_bytes else SglangCache
    return make(config, placement, max_states_per_path)


BASELINES: dict[str, BaselineFactory] = {
    "vllm": VllmCache,
    "vllm-unit32": partial(VllmCache, match_unit=32),
    "vllm-keep-all": partial(VllmCache, retention=None),
    "sglang": sglang,
    "sglang-end": partial(sglang, placement="end"),
    "sglang-cap": partial(sglang, max_states_per_path=2),
    "lightllm": LightllmCache,
    "lightllm-big": partial(LightllmCache, big_page=1024),
    "lightllm-64": partial(LightllmCache, page=64),
    "lightllm-counted": partial(LightllmCache, counted=True),
    "lightllm-big-counted": partial(LightllmCache, big_page=1024, counted=True),
    "llama-server": LlamaServerCache,
    "ollama": OllamaCache,
    "marconi": MarconiCache,
    "marconi-static": partial(MarconiCache, alpha=1.0),
    "marconi-artifact": partial(MarconiCache, reading="artifact"),
    "marconi-repaired": partial(MarconiCache, reading="repaired"),
    "marconi-counted": partial(MarconiCache, alpha=1.0, counted=True),
    "sglang-plus": partial(MarconiCache, leaf_lru=True),
    "sglang-plus-counted": partial(MarconiCache, leaf_lru=True, counted=True),
}
"""Baselines by name. ``sglang-plus`` is the baseline of that name in Marconi's paper. The
``-counted`` variants pay from the budget for memory that the published caches use in addition to
it: LightLLM's states in host memory, and the needs of running requests, which Marconi's artifact
ignores."""


HOST_TIERS = frozenset(
    word
    for word in BASELINES
    if word.startswith(("vllm", "sglang", "llama-server")) and word != "sglang-plus"
) | {"lightllm", "lightllm-64"}
"""Baselines that use host memory in addition to their budget."""


def build_baseline(word: str, config: BaselineConfig) -> Baseline:
    """Return the baseline called ``word``. Raises ValueError, with a list of the names, if there is
    none."""
    try:
        factory = BASELINES[word]
    except KeyError:
        raise ValueError(f"no baseline {word!r}; choose from {', '.join(BASELINES)}") from None
    return factory(config)


__all__ = [
    "BASELINES",
    "HOST_TIERS",
    "Baseline",
    "BaselineConfig",
    "PeerSession",
    "build_baseline",
    "replay",
]
