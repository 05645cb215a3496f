"""The start screen of an engine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import lcm
from typing import TYPE_CHECKING, Any, cast

from engine.config import BUILTIN_PROMPTS
from engine.engine import Engine
from engine.schedule.report import CacheReport
from engine.text.tokenizer import IdTokenizer
from hybridcache.geometry.units import counted, format_bytes
from hybridcache.scheduling.memory_sizes import MemorySizes

if TYPE_CHECKING:
    from engine.runner.model_runner import ModelRunner


def start_screen(engine: Engine, address: str) -> str:
    """Return the start screen: model, memory, cache, kernels, the page and the address."""
    return screen_text(screen_rows(engine, address))


def screen_text(rows: Iterable[tuple[str, str]]) -> str:
    """Return rows (name, words) as lines."""
    return "\n".join(f"  {name:<13}{words}" for name, words in rows)


def screen_rows(engine: Engine, address: str) -> list[tuple[str, str]]:
    """Return the rows (name, words) of the start screen."""
    config, report = engine.config, engine.report()
    runner = cast("ModelRunner", engine.runner)
    geometry = runner.geometry
    rows = [
        (
            "model",
            f"{engine.model_name}: {geometry.num_full_layers} full-attention and "
            f"{geometry.num_linear_layers} linear layers",
        ),
        ("weights", runner.loaded.weights_note),
        ("device", f"{runner.device.describe()}, {_dtype_words(runner)}"),
        ("kernels", _kernel_words(runner.kernels.words()) + _build_words(runner)),
        ("exactness", runner.exactness.sentence),
        ("warm-up", _warm_up_words(runner)),
        *_said_of_text(engine),
        ("context", _context_words(engine)),
        ("memory", _memory_words(runner.memory, report)),
        (
            "KV",
            f"{report.kv.total:,} tokens at most, {format_bytes(geometry.kv_bytes_per_token)} each",
        ),
    ]
    if report.slots.total:
        rows.append(
            (
                "states",
                f"{report.slots.total:,} at most, {format_bytes(geometry.state_bytes)} each, as "
                f"much as the KV of {geometry.state_tokens:,.0f} tokens",
            )
        )
    if runner.loaded.own_state_bytes:
        beside = format_bytes(runner.loaded.own_state_bytes)
        rows.append(
            ("checkpoints", f"in {config.checkpoint_dtype}; running states beside: {beside}")
        )
    rows += [
        ("prefix cache", _cache_words(engine)),
        *_smallest_prefix(engine),
        (
            "requests",
            f"{config.max_running} running, {config.max_queue:,} waiting, "
            f"{counted(config.most_step_tokens, 'token')} a step at most",
        ),
        *(line for plugin in engine.plugins.values() for line in plugin.start_screen()),
        *_first_steps(engine, address),
        ("page", f"{address.removesuffix('/v1')}/"),
        ("address", address),
    ]
    return rows


def _warm_up_words(runner: ModelRunner) -> str:
    if runner.warmed is not None:
        return runner.warmed.describe()
    return "none needed on a CPU" if runner.device.is_cpu else "none, because of --no-warm-up"


def _dtype_words(runner: ModelRunner) -> str:
    """Return the number format, and that of the model if it is another one."""
    own, files = str(runner.dtype).removeprefix("torch."), runner.loaded.config.dtype
    return own if own == files else f"{own} (the model's is {files})"


def _first_steps(engine: Engine, address: str) -> list[tuple[str, str]]:
    """Return prompts to try, and a request to paste into a terminal."""
    is_builtin = engine.config.model is None
    rows = []
    if is_builtin:
        first, *others = (f'"{prompt}"' for prompt in BUILTIN_PROMPTS)
        rows += [
            ("purpose", "to try this server out: the built-in model solves small word problems"),
            ("it solves", first),
            *(("", prompt) for prompt in others),
        ]
    prompt = BUILTIN_PROMPTS[0] if is_builtin else "Hello!"
    path = "chat/completions"
    body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
    if engine.tokenizer is None or engine.tokenizer.chat_template is None:
        path, body = "completions", {"prompt": prompt, "max_tokens": 32}
    if isinstance(engine.tokenizer, IdTokenizer):
        body = {"prompt": [1, 2, 3], "max_tokens": 32}
    header = "Content-Type: application/json"
    command = f"curl {address}/{path} -H '{header}' -d '{json.dumps(body)}'"
    return [*rows, ("try", command)]


def _context_words(engine: Engine) -> str:
    """Return the longest request, and the reason if it is not that of the model."""
    longest = cast("ModelRunner", engine.runner).config.max_len
    words = counted(engine.max_model_len, "token")
    if engine.max_model_len > longest:
        return f"{words}, but the model was made for {longest:,}: later tokens may make no sense"
    if engine.max_model_len < longest and engine.config.max_model_len is None:
        return f"{words}, limited by the memory (--cache-gib); the model's is {longest:,}"
    return words


def _memory_words(memory: MemorySizes, report: CacheReport) -> str:
    where = "one arena for KV and states" if memory.slab_rows else "one arena"
    free, cached, held = map(
        format_bytes, (report.bytes.free, report.bytes.cached, report.bytes.held)
    )
    total = format_bytes(memory.total_bytes)
    return f"{where}, {total}: {free} free, {cached} cached, {held} held"


def _said_of_text(engine: Engine) -> list[tuple[str, str]]:
    """Return lines about an absent tokenizer and about sampling defaults of the model."""
    rows = []
    if isinstance(engine.tokenizer, IdTokenizer):
        rows.append(("tokenizer", "none: prompts and answers are token ids, as numbers"))
    if engine.sampling_defaults:
        words = ", ".join(f"{name} {value:g}" for name, value in engine.sampling_defaults.items())
        rows.append(("sampling", f"{words}, unless a request sets them (generation_config.json)"))
    return rows


def _cache_words(engine: Engine) -> str:
    config = engine.config
    if config.prefix_cache == "none":
        return "none"
    words = [config.prefix_cache, f"evicts by {config.eviction}"]
    if engine.report().slots.total:
        words.append(f"checkpoints at {', '.join(config.checkpoints)} (grid {config.grid})")
    if config.exact:
        words.append("reuses prefilled tokens only")
    return "; ".join(words)


def _smallest_prefix(engine: Engine) -> list[tuple[str, str]]:
    """Return the length of the shortest prefix that can be reused, unless fixed rules decide."""
    config = engine.config
    if config.prefix_cache == "none":
        return []
    is_stateful = engine.report().slots.total > 0
    if is_stateful and config.checkpoints != ("adaptive",):
        return []
    smallest = lcm(config.grid, config.page_size) if is_stateful else config.page_size
    if smallest >= engine.max_model_len:
        return [("smallest hit", f"none: a hit of {smallest:,} tokens fills the context")]
    every = f", and then every {smallest:,}" if smallest > 1 else ""
    words = f"{counted(smallest, 'token')} of a longer prompt{every}"
    return [("smallest hit", words)]


def _build_words(runner: ModelRunner) -> str:
    """Return the build of the native library, if a kernel uses it."""
    if "native" not in runner.kernels.words().values():
        return ""
    from kernels.native import kernel_choices  # Imports torch, which servers of replicas do not.

    build = kernel_choices()["build"]
    return f" (compiled for {'this processor' if build == 'native' else build})"


def _kernel_words(chosen: dict[str, str]) -> str:
    """Return each backend with its kernels, or only its name if there is one."""
    backends: dict[str, list[str]] = {}
    for kernel, backend in chosen.items():
        backends.setdefault(backend, []).append(kernel)
    if len(backends) == 1:
        return next(iter(backends))
    return "; ".join(f"{backend}: {', '.join(names)}" for backend, names in backends.items())
