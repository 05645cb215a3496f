"""The engine, made from its settings: the composition root of its parts, which imports plugins."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from engine.config import ConfigError, EngineConfig
from engine.core import EngineCore, Plugin
from engine.models import read_model
from engine.requests.logit_rules import LogitRule
from engine.requests.request import Intake
from engine.schedule.report import cache_kind
from engine.schedule.scheduler import Scheduler
from engine.text.grammar import Grammar
from engine.weights.hub import resolve_config
from engine.weights.model_config import read_config
from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.geometry.gguf import is_gguf
from hybridcache.policies.registry import make_admission, parse_placement
from hybridcache.scheduling.cache_manager import CacheManager

if TYPE_CHECKING:
    from engine.plugins.guided.guides import Guides
    from engine.plugins.speculation.drafters import SpeculationPlugin
    from engine.plugins.tiers.plugin import TierPlugin
    from engine.runner.model_runner import ModelRunner
    from engine.runner.sampler import Sampler
    from engine.text.tokenizer import Tokenizer


class Engine(EngineCore):
    """Serves one model with one prefix cache.

    >>> from engine import Engine, EngineConfig, SamplingParams
    >>> engine = Engine(EngineConfig())  # doctest: +SKIP
    >>> params = SamplingParams(max_tokens=8)
    >>> [output] = engine.generate(["Once upon a time"], params)  # doctest: +SKIP
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        runner: ModelRunner | None = None,
        sampler: Sampler | None = None,
        tokenizer: Tokenizer | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Load the model that ``config`` names, or serve with the given ``runner``, ``sampler`` and
        ``tokenizer``. Raises ConfigError for settings that contradict each other, and ValueError if
        loading fails.
        """
        config = config or EngineConfig()
        parse_placement(",".join(config.checkpoints))
        if runner is None:
            config = resolve_config(config, read_model)
        plugins = engine_plugins(config)
        with ExitStack() as unfinished:
            for plugin in plugins.values():
                unfinished.callback(plugin.close)
            if runner is None:
                runner, sampler, tokenizer = load(config)
            if sampler is None:
                raise TypeError("pass a sampler together with a runner.")
            config = config.settled(on_cpu=not runner.is_asynchronous)
            intake = Intake(
                config,
                tokenizer,
                vocab_size=runner.vocab_size,
                max_model_len=min(runner.max_model_len, runner.memory.max_request_len),
                clock=clock,
                grammar_rule=grammar_rules(tokenizer, runner.vocab_size),
            )
            scheduler = assemble(intake, runner, plugins)
            unfinished.pop_all()
        super().__init__(runner, sampler, intake, scheduler, plugins)
        for plugin in plugins.values():
            plugin.attach(self, scheduler.manager)


def engine_plugins(config: EngineConfig) -> dict[str, Plugin]:
    """Return the plugins with settings in ``config`` by name, in the order in which they are
    called."""
    plugins: dict[str, Plugin] = {}
    if config.tp > 1:
        from engine.plugins.tensor_parallel.coordinator import TensorParallelPlugin

        plugins["tensor_parallel"] = TensorParallelPlugin(config)
    if config.draft != "none":
        from engine.plugins.speculation.drafters import SpeculationPlugin

        plugins["speculation"] = SpeculationPlugin(config)
    if config.has_tiers:
        from engine.plugins.tiers.plugin import TierPlugin

        plugins["tiers"] = TierPlugin(config)
    if config.role == "prefill":
        from engine.plugins.disaggregation.prefill_server import PrefillServer

        plugins["disaggregation"] = PrefillServer(config)
    elif config.role == "decode":
        from engine.plugins.disaggregation.prefix_load import DecodePlugin

        plugins["disaggregation"] = DecodePlugin(config)
    return plugins


def load(config: EngineConfig) -> tuple[ModelRunner, Sampler, Tokenizer]:
    """Load the model, the sampler and the tokenizer named by ``config``. Imports torch."""
    from engine.runner.sampler import Sampler

    # Before the weights, which take longer to read.
    tokenizer = load_tokenizer_of(config, read_model(read_config(config.model_dir))[1].vocab_size)
    assert tokenizer is not None
    return load_runner(config), Sampler(), tokenizer


def load_runner(config: EngineConfig) -> ModelRunner:
    """Load the model that ``config`` names, with the parts of its plugins. Raises ModelError."""
    from engine.runner import build

    if config.tp > 1:
        from engine.plugins.tensor_parallel.coordinator import LeadingRunner

        return LeadingRunner.start(config)
    return build.load_runner(config)


def load_tokenizer_of(config: EngineConfig, vocab_size: int | None) -> Tokenizer | None:
    """Load the tokenizer named by ``config``, or an ``IdTokenizer`` for a model without one: None
    if its size is not known yet (``vocab_size``). Raises ValueError, also for a file of the chat
    template that cannot be read."""
    from engine.text.tokenizer import ChatTemplate

    tokenizer, name = _own_tokenizer_of(config, vocab_size), config.chat_template
    if tokenizer is None or name is None:
        return tokenizer
    shipped = Path(__file__).parent / "text" / "tools_first.jinja"
    try:
        source = (shipped if name == "tools-first" else Path(name)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {name} cannot be read ({error.args[-1]}).") from None
    own = tokenizer.chat_template
    tokenizer.chat_template = ChatTemplate(source, None if own is None else own.special_tokens)
    return tokenizer


def _own_tokenizer_of(config: EngineConfig, vocab_size: int | None) -> Tokenizer | None:
    from engine.text.tokenizer import IdTokenizer
    from engine.text.tokenizer_files import HFTokenizer, has_tokenizer, named_eos

    path = Path(config.tokenizer or config.model_dir)
    max_ids = vocab_size if config.tokenizer else None
    if is_gguf(path):
        from engine.text.gguf_tokenizer import load_tokenizer

        if (found := load_tokenizer(path, max_ids)) is not None:
            return found
        if config.tokenizer:
            raise ValueError(f"{path} has no tokenizer: name a directory or GGUF file with one.")
    elif config.tokenizer or has_tokenizer(path):
        return HFTokenizer(path, max_ids)
    eos = frozenset[int]() if is_gguf(path) else named_eos(path)
    return None if vocab_size is None else IdTokenizer(vocab_size, eos)


def grammar_rules(
    tokenizer: Tokenizer | None, vocab_size: int
) -> Callable[[Grammar, Hashable], LogitRule]:
    """Return the function that compiles a grammar, unless its namespace has used it lately, and
    makes the rule of an answer. It raises GrammarError, and may be called from any thread."""

    @cache
    def guides() -> Guides:
        from engine.plugins.guided.guides import Guides

        return Guides(tokenizer, vocab_size)

    return lambda grammar, namespace: guides().rule(grammar, namespace)


def assemble(intake: Intake, runner: ModelRunner, plugins: Mapping[str, Plugin]) -> Scheduler:
    """Make the scheduler, with the cache and its manager. Raises ConfigError."""
    config = intake.config
    settings = cache_config(config, runner)
    tiers = cast("TierPlugin | None", plugins.get("tiers"))
    if tiers is not None:
        settings = tiers.size_cache(settings, runner)
    cache = build_prefix_cache(settings)
    exchange = None if tiers is None else tiers.open_cache(cache, runner, intake.tokenizer)
    caches = config.prefix_cache != "none"
    manager = CacheManager(
        cache,
        parse_placement(",".join(config.checkpoints) if caches else "none"),
        num_rows=config.max_running,
        stateful=runner.memory.is_stateful,
        exact=config.exact,
        owns_states=runner.memory.owns_states,
        exchange=exchange,
    )
    opened = [plugin.open_manager(manager, runner) for plugin in plugins.values()]
    speculation = cast("SpeculationPlugin | None", plugins.get("speculation"))
    return Scheduler(
        manager,
        max_running=config.max_running,
        token_budget=config.token_budget,
        admission=make_admission(config.admission),
        shares=caches,
        drafting=speculation.drafting(runner, shares=caches) if speculation else None,
        loader=next((one for one in opened if one is not None), None),
        clock=intake.clock,
        step_s=config.step_s or math.inf,
    )


def cache_config(config: EngineConfig, runner: ModelRunner) -> CacheConfig:
    """Return the config of the cache for the runner's pools."""
    memory = runner.memory
    return CacheConfig(
        prefix_cache=cache_kind(config.prefix_cache, memory),
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
