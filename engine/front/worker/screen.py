"""The start screen of an engine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from shlex import quote

from engine.config import BUILTIN_PROMPTS
from engine.engine import Engine
from engine.text.tokenizer import IdTokenizer
from hybridcache.geometry.units import counted, format_bytes
from kernels.library import level_name


def screen_text(rows: Iterable[tuple[str, str]]) -> str:
    """Return rows (name, words) as lines."""
    return "\n".join(f"  {name:<13}{words}" for name, words in rows)


def screen_rows(engine: Engine, address: str) -> list[tuple[str, str]]:
    """Return the rows (name, words) of the start screen."""
    # It imports the HTTP library, which an engine without a server does not need.
    from engine.front.server.tool_calls.form import words_of

    template = None if engine.tokenizer is None else engine.tokenizer.chat_template
    config, report, runner = engine.config, engine.report(), engine.runner
    geometry, memory = runner.geometry, runner.memory
    dtype, of_files = str(runner.dtype).removeprefix("torch."), runner.loaded.config.dtype
    note = "" if dtype == of_files else f" (the model's is {of_files})"
    place = runner.device.describe()
    if runner.device.is_cpu and (level := level_name()):
        place += f" with {level}"
    warm_up = "none needed on a CPU" if runner.device.is_cpu else "none, because warm_up is off"
    reuses_none, num_states = config.prefix_cache == "none", report.slots.total
    none_hits = f", no prompt of less than {config.grid:,} tokens can hit" * (config.grid > 1024)
    places = f"; checkpoints at {', '.join(config.checkpoints)} (grid {config.grid}{none_hits})"
    cache = f"{config.prefix_cache}; evicts by {config.eviction}{places if num_states else ''}"
    kernels: dict[str, list[str]] = {}
    for kernel, backend in runner.kernels.words().items():
        kernels.setdefault(backend, []).append(kernel)
    arena = "one arena for KV and states" if memory.slab_rows else "one arena"
    recommended = ", ".join(f"{name} {value:g}" for name, value in engine.sampling_defaults.items())
    rows = {
        "model": f"{engine.model_name}: {geometry.num_full_layers} full-attention and "
        f"{geometry.num_linear_layers} linear layers",
        "weights": runner.loaded.weights_note,
        "device": f"{place}, {dtype}{note}",
        "kernels": "; ".join(f"{name}: {', '.join(of_it)}" for name, of_it in kernels.items()),
        "exactness": "nothing is reused" if reuses_none else runner.exactness.sentence,
        "warm-up": warm_up if runner.warmed is None else runner.warmed.describe(),
        "tokenizer": "none: prompts and answers are token ids, as numbers"
        if isinstance(engine.tokenizer, IdTokenizer)
        else "",
        "tools": "" if template is None else words_of(template),
        "sampling": recommended
        and f"{recommended}, unless a request sets them (generation_config.json)",
        "context": _context_words(engine, runner.config.max_len),
        "memory": f"{arena}, {format_bytes(memory.total_bytes * config.tp)}"
        + " at most, used as the cache fills" * runner.device.is_cpu,
        "KV": f"{report.kv.total:,} tokens at most, {format_bytes(geometry.kv_bytes_per_token)} "
        "each",
        "states": f"{num_states:,} at most, {format_bytes(geometry.state_bytes)} each, as much as "
        f"the KV of {geometry.state_tokens:,.0f} tokens"
        if num_states
        else "",
        "prefix cache": "none"
        if reuses_none
        else cache + "; reuses prefilled tokens only" * config.exact,
        "requests": f"{config.max_running} running, {config.max_queue:,} waiting, "
        f"{counted(config.most_step_tokens, 'token')} a step at most; "
        f"admission by {config.admission}",
    }
    return [
        *((name, words) for name, words in rows.items() if words),
        *(line for plugin in engine.plugins.values() for line in plugin.start_screen()),
        *_first_steps(engine, address),
        ("page", f"{address.removesuffix('/v1')}/"),
        ("address", address),
    ]


def _first_steps(engine: Engine, address: str) -> list[tuple[str, str]]:
    """Return prompts to try, and a request to paste into a terminal."""
    rows, prompt = [], "Hello!"
    if engine.config.model is None:
        prompt = BUILTIN_PROMPTS[0]
        names = ("it solves", *[""] * len(BUILTIN_PROMPTS))
        rows = [(name, f'"{each}"') for name, each in zip(names, BUILTIN_PROMPTS, strict=False)]
    path = "chat/completions"
    body: dict[str, object] = {"messages": [{"role": "user", "content": prompt}]}
    if engine.tokenizer is None or engine.tokenizer.chat_template is None:
        path, body = "completions", {"prompt": prompt, "max_tokens": 32}
    if isinstance(engine.tokenizer, IdTokenizer):
        body = {"prompt": [1, 2, 3], "max_tokens": 32}
    header = "Content-Type: application/json"
    command = f"curl {quote(f'{address}/{path}')} -H '{header}' -d '{json.dumps(body)}'"
    return [*rows, ("try", command)]


def _context_words(engine: Engine, longest: int) -> str:
    """Return the longest request, and the reason if it is not ``longest``, that of the model."""
    words = counted(engine.max_model_len, "token")
    if engine.max_model_len > longest:
        return f"{words}, but the model was made for {longest:,}: later tokens may make no sense"
    if engine.max_model_len < longest and engine.config.max_model_len is None:
        return f"{words}, limited by the memory (--cache-gib); the model's is {longest:,}"
    return words
