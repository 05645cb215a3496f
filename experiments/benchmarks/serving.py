"""Parts of benchmarks of the server: start it, send it conversations, and print a table.

A server runs with the prefix cache and without, and is loaded over HTTP, at a fixed
concurrency or at a rate. ``experiments.gpu`` uses these parts.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from experiments.benchmarks.serving_load import (
    HTTPClient,
    Job,
    Load,
    Prompt,
    Targets,
    drive,
    summary,
)
from hybridcache import open_trace
from hybridcache.lab.report import text_table

START_S = 300.0
"""Time limit for the start of a server, in seconds."""


async def sweep(
    servers: Mapping[str, AbstractAsyncContextManager[HTTPClient]],
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
async def over_http(flags: Sequence[str]) -> AsyncIterator[HTTPClient]:
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


def conversation_jobs(count: int, *, vocab_size: int, cap: int, num_output: int) -> list[Job]:
    """Return generated conversations with ids below ``vocab_size``, each up to its first prompt
    longer than ``cap`` tokens."""
    jobs: dict[Hashable, list[Prompt]] = {}
    for request in open_trace(f"sharegpt-like?sessions={count}&requests={100 * count}"):
        if len(request.tokens) <= cap:
            tokens, answer = request.tokens % vocab_size, len(request.output)
            jobs.setdefault(request.session, []).append(Prompt(tokens, min(num_output, answer)))
    return list(jobs.values())


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
