"""How an engine's settings find the parts it is made of."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from engine.config import ConfigError, EngineConfig
from engine.interfaces import Runner, TokenSampler
from engine.plugins.disaggregation.counts import TransferCounts
from engine.plugins.speculation.draft_manager import Drafting
from engine.plugins.speculation.suffix import IndexMemory
from engine.plugins.tiers.cache_tiers import LowerMemory, LowerSizes
from engine.requests.sampling_defaults import read_sampling_defaults
from engine.schedule.fetching import Fetcher, Fetching
from engine.schedule.scheduler import Scheduler
from hybridcache.api import PrefixCache
from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.lease import LeaseLog
from hybridcache.policies.registry import make_admission, parse_placement
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.memory import MemorySizes
from hybridcache.variants import TieredRadixCache

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.plugins.disaggregation.prefill_server import PrefillServer
    from engine.runner.model_runner import ModelRunner
    from engine.text.tokenizer import Tokenizer


class Parts(NamedTuple):
    """What an engine has beside its runner, its sampler and its tokenizer."""

    cache_kind: str
    cache: PrefixCache
    lower: LowerMemory | None
    manager: CacheManager
    transfers: TransferCounts | None
    """None: the engine has no role."""
    fetching: Fetching | None
    scheduler: Scheduler
    drafting: Drafting | None
    draft_memory: IndexMemory
    """Of the indices that drafters keep of texts."""


def make_parts(
    config: EngineConfig,
    runner: Runner,
    tokenizer: Tokenizer | None,
    *,
    log: LeaseLog | None,
    drafting: Drafting | None,
    fetcher: Fetcher | None,
    clock: Callable[[], float],
) -> Parts:
    """What ``config``, which is settled, names; see ``Engine.__init__``."""
    assert config.token_budget is not None
    built = cache_config(config, runner)
    cache = build_prefix_cache(built)
    lower = make_lower(config, cache, runner, tokenizer)
    manager = make_manager(config, cache, runner.memory, log, lower)
    if lower is not None:
        lower.recall(manager.placement)
    transfers = TransferCounts() if config.role is not None else None
    if config.role == "decode":
        fetcher = peer_fetcher(config, runner, manager, transfers)
    elif fetcher is None and lower is not None:
        fetcher = lower.fetcher(manager)
    fetching = None if fetcher is None else Fetching(manager, fetcher)
    shares = config.prefix_cache != "none"
    draft_memory = IndexMemory(int(config.draft_index_mib * 2**20))
    if drafting is None and config.drafters:
        room, guess = config.num_step_states, runner.guess
        drafting = Drafting.of(config.drafters, room, guess, shares=shares, memory=draft_memory)
    scheduler = Scheduler(
        manager,
        max_running=config.max_running,
        token_budget=config.token_budget,
        memory=runner.memory,
        admission=make_admission(config.admission),
        max_share=config.max_share,
        shares=shares,
        drafting=drafting,
        fetching=fetching,
        clock=clock,
    )
    parts = cache, lower, manager, transfers, fetching, scheduler, drafting, draft_memory
    return Parts(built.prefix_cache, *parts)


def load(config: EngineConfig) -> tuple[Runner, TokenSampler, Tokenizer]:
    """Model, sampler and tokenizer that ``config`` names. Imports torch."""
    from engine.plugins.tensor_parallel.coordinator import LeadingRunner
    from engine.runner.model_runner import ModelRunner
    from engine.runner.sampler import Sampler

    runner = ModelRunner(config) if config.tp == 1 else LeadingRunner(config)
    return runner, Sampler(runner.vocab_size), load_tokenizer_of(config, runner.vocab_size)


def load_tokenizer_of(config: EngineConfig, vocab_size: int) -> Tokenizer:
    """The tokenizer that ``config`` names, or token ids as they are. Imports no torch by itself."""
    from engine.text.hugging_face import load_tokenizer, named_eos
    from engine.text.token_ids import IdTokenizer

    if config.model and not names_tokenizer(config):
        return IdTokenizer(vocab_size, named_eos(Path(config.model)))
    return load_tokenizer(config.tokenizer or config.model)


def names_tokenizer(config: EngineConfig) -> bool:
    """Whether ``config`` names a tokenizer; else prompts are token ids."""
    from engine.text.hugging_face import has_tokenizer

    named = config.tokenizer is not None or config.model is None
    return named or has_tokenizer(Path(str(config.model)))


def sampling_defaults(config: EngineConfig) -> dict[str, float]:
    """What requests that say nothing are sampled with, where the model has an opinion."""
    if config.model is None or config.sampling_defaults == "none":
        return {}
    return read_sampling_defaults(Path(config.model))


def cache_config(config: EngineConfig, runner: Runner) -> CacheConfig:
    """What the runner's pools hold, as the cache that ``config`` names. ConfigError: the model does
    not suit it."""
    memory, kind = runner.memory, config.prefix_cache
    lower = LowerSizes.of(config, memory)
    if memory.is_stateful and kind == "radix":
        raise ConfigError(
            "prefix_cache=radix keeps KV alone, but this model has linear-attention layers that "
            "need their state too: "
            "use hybrid, or none."
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
        host_bytes=lower.host,
        disk_bytes=lower.disk,
    )


def make_lower(
    config: EngineConfig, cache: PrefixCache, runner: Runner, tokenizer: Tokenizer | None
) -> LowerMemory | None:
    """The memory below the device's that ``config`` asks for, and what was in it. StoreError: a
    folder that can not be used."""
    if not isinstance(cache, TieredRadixCache):
        return None
    return LowerMemory(config, LowerSizes.of(config, runner.memory), cache, runner, tokenizer)


def make_manager(
    config: EngineConfig,
    cache: PrefixCache,
    memory: MemorySizes,
    log: LeaseLog | None,
    lower: LowerMemory | None = None,
) -> CacheManager:
    """What gives requests their leases on ``cache``."""
    words = "none" if config.prefix_cache == "none" else ",".join(config.checkpoints)
    exchange = None if lower is None else lower.exchange
    keeping = None if lower is None else lower.keeping
    return CacheManager(
        cache,
        parse_placement(words),
        num_rows=config.max_running,
        stateful=memory.is_stateful,
        exact=config.exact,
        log=log,
        owns_states=memory.owns_states,
        exchange=exchange,
        after_reading=None if exchange is None else exchange.after_reading,
        publishing=nullcontext if keeping is None else keeping.publishing,
    )


def peer_fetcher(
    config: EngineConfig, runner: Runner, manager: CacheManager, counts: TransferCounts | None
) -> Fetcher:
    """What a decode engine has its prompts computed by. Imports torch."""
    from engine.plugins.disaggregation.peer_identity import identity
    from engine.plugins.disaggregation.prefix_fetch import Peer, PeerFetcher

    assert counts is not None
    model_runner = _model_runner(runner)
    own = identity(config, model_runner)
    peers = [Peer(address, own, config.transfer_timeout_s) for address in config.addresses]
    return PeerFetcher(manager, model_runner.unit, peers, counts, fetch_above=config.fetch_above)


def prefill_server(
    engine: Engine, manager: CacheManager, counts: TransferCounts | None
) -> PrefillServer | None:
    """What computes prompts for decode engines, where that is the role of ``engine``: it listens
    when this returns. ConfigError: the address can not be listened on. Imports torch."""
    config = engine.config
    if config.role != "prefill" or counts is None:
        return None
    from engine.plugins.disaggregation.peer_identity import identity
    from engine.plugins.disaggregation.prefill_server import PrefillServer

    runner = _model_runner(engine.runner)
    try:
        server = PrefillServer(
            manager,
            runner.unit,
            config.addresses[0],
            identity(config, runner),
            counts,
            timeout_s=config.transfer_timeout_s,
            prepare=engine.prepare,
            enqueue=engine.enqueue,
            abort=engine.abort,
        )
    except OSError as error:
        why = str(error.strerror or error)
        if error.errno == errno.EADDRNOTAVAIL:
            why = "this machine has no such address; give one of its own, or 0.0.0.0 for all"
        raise ConfigError(f"--transfer-at {config.transfer_at}: {why}.") from error
    runner.watch_layers(server.send_layer)
    return server


def _model_runner(runner: Runner) -> ModelRunner:
    """A runner whose memory can be read and written between two steps. ConfigError."""
    from engine.runner.model_runner import ModelRunner

    if not isinstance(runner, ModelRunner):
        raise ConfigError("a role needs the runner of a model, whose memory can be read.")
    return runner
