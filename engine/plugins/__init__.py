"""Registry of the engine's optional capabilities.

Every plugin imports the core. The core imports this registry only, which loads a plugin when it is
first needed: by a setting that differs from its default, a request, a path or a command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import threading

    from engine.config import EngineConfig
    from engine.interfaces import EngineCore, EngineWatch, StepTrace
    from engine.plugin import Plugin
    from engine.requests.grammar import Grammar
    from engine.requests.logit_rules import GrammarCompiler
    from engine.server.config import ServerConfig
    from engine.text.answer_events import CallForm
    from engine.text.tokenizer import Tokenizer

SETTINGS = {
    "tensor_parallel": ("tp",),
    "speculation": ("draft",),
    "tiers": ("host_gib", "state_dir"),
    "disaggregation": ("role",),
}
"""Plugins of the engine -> settings; a plugin is loaded if one of its settings is not the default.
Its module ``plugin`` has the class ``EnginePlugin``."""

SERVER = ("dialects", "diagnostics", "observe")
"""Plugins of every server: their module ``server`` has the class ``Extension``."""

VERBS = {
    "top": ("observe", "[options]", "watch a server's cache in this terminal"),
    "record": (
        "record",
        "--to URL --out FILE [options]",
        "pass requests on to any OpenAI-compatible server and write them as a trace",
    ),
}
"""Verbs of the command ``engine`` -> plugin, usage and help. The module ``command`` of the plugin
has ``add_flags`` and ``run``."""


def _find(plugin: str, module: str, name: str) -> Any:
    return getattr(import_module(f"{__name__}.{plugin}.{module}"), name)


def engine_plugins(config: EngineConfig) -> tuple[Plugin, ...]:
    """Return the plugins with settings in ``config``, in the order of ``SETTINGS``."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    return tuple(
        _find(plugin, "plugin", "EnginePlugin")(config)
        for plugin, names in SETTINGS.items()
        if any(getattr(config, name) != defaults[name] for name in names)
    )


def grammar_compiler(
    tokenizer: Tokenizer | None, vocab_size: int, budget_s: float, news: threading.Event
) -> GrammarCompiler:
    """Return the compiler of grammars for one engine."""
    compiler: GrammarCompiler = _find("guided", "guides", "Guides")(
        tokenizer, vocab_size, budget_s, news
    )
    return compiler


def call_form(template: str) -> CallForm | None:
    """Return the form of tool calls that a chat template shows; None if it shows no known one."""
    form: CallForm | None = _find("tool_calls", "forms", "call_form")(template)
    return form


def call_grammar(tools: Sequence[Mapping[str, Any]], choice: str, form: str, **how: Any) -> Grammar:
    """Return the grammar of an answer that must call one of ``tools``; see ``grammar_of_calls``."""
    make = _find("tool_calls", "call_grammars", "grammar_of_calls")
    grammar: Grammar = make(tools, choice, form, **how)
    return grammar


def strict_call_grammar(
    tools: Sequence[Mapping[str, Any]], form: str, *, may_think: bool
) -> Grammar:
    """Return the grammar of an answer that may call strict tools; see
    ``grammar_of_strict_calls``."""
    make = _find("tool_calls", "call_grammars", "grammar_of_strict_calls")
    grammar: Grammar = make(tools, form, may_think=may_think)
    return grammar


def cache_watch(engine: EngineCore) -> EngineWatch:
    """Return a new view of ``engine`` for the page. Called in the engine's thread. Raises
    ValueError if its tree is too large to show."""
    watch: EngineWatch = _find("observe", "cache_watch", "Watch")(engine)
    return watch


def start_trace(engine: EngineCore, path: str) -> StepTrace:
    """Write the steps of ``engine`` as a trace to ``path`` from here on. Raises ValueError."""
    trace: StepTrace = _find("observe", "step_trace", "start_trace")(engine, path)
    return trace


def server_extensions() -> list[Any]:
    """Return the extensions of every server: subclasses of ``ServerExtension``."""
    return [_find(plugin, "server", "Extension") for plugin in SERVER]


def chat_hooks(tokenizer: Tokenizer, config: ServerConfig) -> Any:
    """Return the ``ChatHooks`` of one server."""
    return _find("diagnostics", "server", "Hooks")(tokenizer, config)


def plugin_verbs() -> dict[str, tuple[str, str]]:
    """Return (usage, help) of each verb that a plugin adds to the command line."""
    return {verb: (usage, help) for verb, (_, usage, help) in VERBS.items()}


def plugin_verb(verb: str) -> Any:
    """Return the module of a verb, with ``add_flags(parser)`` and ``run(arguments)``."""
    return import_module(f"{__name__}.{VERBS[verb][0]}.command")


def start_replicas(config: EngineConfig, server: ServerConfig, address: str) -> tuple[Any, str]:
    """Return (replicas that have loaded, as a ``ServedEngine``; the start screen). Raises
    ValueError."""
    started: tuple[Any, str] = _find("replicas", "start_replicas", "start_replicas")(
        config, server, address
    )
    return started
