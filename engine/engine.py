"""The engine, made from its settings."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from engine.build import assemble, engine_plugins, grammar_rules, load
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.hub import resolve_config
from engine.interfaces import Runner, TokenSampler
from engine.requests.request import Intake
from engine.schedule.fetching import Fetcher
from engine.schedule.scheduler import DraftPlanner
from hybridcache.policies.registry import parse_placement

if TYPE_CHECKING:
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
        runner: Runner | None = None,
        sampler: TokenSampler | None = None,
        tokenizer: Tokenizer | None = None,
        drafting: DraftPlanner | None = None,
        fetcher: Fetcher | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Load the model that ``config`` names, or serve with the given ``runner``, ``sampler`` and
        ``tokenizer``.

        ``drafting`` replaces the planner of ``config.draft``; ``fetcher`` loads prefixes that the
        cache lacks. Raises ConfigError for settings that contradict each other, and ValueError if
        loading fails.
        """
        config = config or EngineConfig()
        parse_placement(",".join(config.checkpoints))
        if runner is None:
            config = resolve_config(config)
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
            scheduler = assemble(
                config, runner, tokenizer, plugins, drafting=drafting, fetcher=fetcher, clock=clock
            )
            unfinished.pop_all()
        super().__init__(
            config,
            runner=runner,
            sampler=sampler,
            tokenizer=tokenizer,
            intake=intake,
            scheduler=scheduler,
            plugins=plugins,
            clock=clock,
        )
        for plugin in plugins.values():
            plugin.attach(self, scheduler.manager)
