"""Model, tokenizer, cache and manager of an engine, made from its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import BUILTIN_DIR, ConfigError, EngineConfig
from engine.interfaces import Plugin, Runner, TokenSampler
from engine.requests.logit_rules import GrammarCompiler
from hybridcache.api import PrefixCache
from hybridcache.config import CacheConfig
from hybridcache.policies.registry import parse_placement
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.memory_sizes import MemorySizes

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer


def load(
    config: EngineConfig, plugins: Sequence[Plugin] = ()
) -> tuple[Runner, TokenSampler, Tokenizer]:
    """Load the model, the sampler and the tokenizer named by ``config``. Imports torch."""
    from engine.runner.build import load_runner
    from engine.runner.sampler import Sampler

    runner: Runner | None = None
    for plugin in plugins:
        runner = plugin.load_runner() if runner is None else runner
    runner = load_runner(config) if runner is None else runner
    return runner, Sampler(runner.vocab_size), load_tokenizer_of(config, runner.vocab_size)


def load_tokenizer_of(config: EngineConfig, vocab_size: int) -> Tokenizer:
    """Load the tokenizer named by ``config``, or an ``IdTokenizer`` for a model without one. Does
    not import torch itself."""
    from engine.text.hugging_face import load_tokenizer, named_eos
    from engine.text.tokenizer import IdTokenizer

    if config.model and not names_tokenizer(config):
        return IdTokenizer(vocab_size, named_eos(Path(config.model)))
    named = config.tokenizer or config.model
    return load_tokenizer(None if named == str(BUILTIN_DIR) else named)


def make_grammars(tokenizer: Tokenizer | None, vocab_size: int) -> GrammarCompiler:
    """Load the compiler of grammars."""
    from engine.plugins.guided.guides import Guides

    return Guides(tokenizer, vocab_size)


def names_tokenizer(config: EngineConfig) -> bool:
    """Return True if ``config`` names a tokenizer. Otherwise prompts are token ids."""
    from engine.text.hugging_face import has_tokenizer

    named = config.tokenizer is not None or config.model is None
    return named or has_tokenizer(Path(str(config.model)))


def cache_config(config: EngineConfig, runner: Runner) -> CacheConfig:
    """Return the config of the cache for the runner's pools. Raises ConfigError if the model does
    not support it."""
    memory, kind = runner.memory, config.prefix_cache
    if memory.is_stateful and kind == "radix":
        raise ConfigError(
            "prefix_cache=radix keeps KV alone, but this model has linear-attention layers that "
            "need their state too: use hybrid, or none."
        )
    return CacheConfig(
        prefix_cache="radix" if kind == "hybrid" and not memory.is_stateful else kind,
        memory="arena" if memory.slab_rows else "budget",
        total_bytes=memory.total_bytes if memory.slab_rows else None,
        num_kv_tokens=0 if memory.slab_rows else memory.num_kv_tokens,
        num_slots=0 if memory.slab_rows else memory.num_slots,
        page_size=config.page_size,
        grid=config.grid,
        eviction=config.eviction,
        kv_bytes_per_token=memory.row_bytes,
        state_bytes=max(memory.state_bytes, 1),
    )


def make_manager(
    config: EngineConfig,
    cache: PrefixCache,
    memory: MemorySizes,
    options: Mapping[str, Any],
) -> CacheManager:
    """Make the manager of the requests' leases on ``cache``. ``options`` come from plugins."""
    words = "none" if config.prefix_cache == "none" else ",".join(config.checkpoints)
    return CacheManager(
        cache,
        parse_placement(words),
        num_rows=config.max_running,
        stateful=memory.is_stateful,
        exact=config.exact,
        owns_states=memory.owns_states,
        **options,
    )
