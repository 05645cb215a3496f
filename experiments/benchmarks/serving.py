"""Load on a server: its process, schedules of requests, times of answers, and a table.

A server runs with the prefix cache and without. A job is a list of prompts, such as the turns of a
conversation. Each prompt is sent after the answer to the previous one. Jobs start as soon as one of
``concurrency`` workers is free, or at random times, ``per_s`` per second on average.
``experiments.gpu`` uses these parts.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx
import numpy as np
import numpy.typing as npt

from hybridcache import open_trace

START_S = 300.0
"""Time limit for the start of a server, in seconds."""


class Prompt(NamedTuple):
    """One greedy request with exactly ``num_output`` output tokens."""

    tokens: npt.NDArray[np.int32]
    num_output: int


Job = Sequence[Prompt]


class Piece(NamedTuple):
    """One message of a streamed answer."""

    num_tokens: int = 0
    """Tokens generated so far, or 0 if the message does not report them."""
    cached_len: int | None = None
    """Reused prompt tokens, or None if the message does not report them."""

    @classmethod
    def read(cls, message: dict[str, Any]) -> Piece:
        """Return the piece in a message of the server. Raises RuntimeError for an error."""
        if "error" in message:
            raise RuntimeError(message["error"]["message"])
        usage = message.get("usage")
        if usage is None:
            return cls()
        details = usage.get("prompt_tokens_details") or {}
        return cls(usage["completion_tokens"], details.get("cached_tokens", 0))


class HTTPClient:
    """Streaming client of ``POST /v1/completions`` on this machine."""

    def __init__(self, url: str) -> None:
        limits, timeout = httpx.Limits(max_connections=None), httpx.Timeout(600.0)
        self._http = httpx.AsyncClient(
            base_url=url, limits=limits, timeout=timeout, trust_env=False
        )

    async def wait_until_ready(self, seconds: float) -> None:
        """Wait until the server answers. Raises TimeoutError after ``seconds``."""
        async with asyncio.timeout(seconds):
            while True:
                with suppress(httpx.TransportError):
                    if (await self._http.get("/health")).status_code == 200:
                        return
                await asyncio.sleep(0.1)

    async def answer(self, prompt: Prompt) -> AsyncIterator[Piece]:
        body = {
            "prompt": prompt.tokens.tolist(),
            "max_tokens": prompt.num_output,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    yield Piece.read(json.loads(line.removeprefix("data: ")))

    async def reset_cache(self) -> None:
        (await self._http.post("/reset_prefix_cache")).raise_for_status()

    async def close(self) -> None:
        await self._http.aclose()


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as seen by the client. Times are seconds since the start of the run."""

    sent_s: float
    piece_times_s: tuple[float, ...]
    """Time of each message with tokens."""
    num_prompt: int
    num_output: int
    cached_len: int

    @property
    def ttft_s(self) -> float:
        return self.piece_times_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.piece_times_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first, or None if there is only one token."""
        return (self.e2e_s - self.ttft_s) / (self.num_output - 1) if self.num_output > 1 else None


@dataclass(frozen=True, slots=True)
class Load:
    """Start rule of jobs: a concurrency or a rate."""

    concurrency: int | None = None
    per_s: float | None = None

    def __str__(self) -> str:
        return f"{self.concurrency} at once" if self.per_s is None else f"{self.per_s:g} /s"


@dataclass(frozen=True, slots=True)
class Run:
    """Answers and errors under one load."""

    answers: Sequence[Answer]
    num_cut: int
    """Requests that were not finished at the time limit."""
    errors: Sequence[str]
    seconds: float


async def drive(
    client: HTTPClient, jobs: Sequence[Job], load: Load, *, seconds: float, seed: int = 0
) -> Run:
    """Send ``jobs`` until all are answered or ``seconds`` have passed. Unfinished requests are then
    cancelled."""
    begin, answers, errors, num_sent = time.perf_counter(), list[Answer](), list[str](), 0

    async def send(job: Job, start_s: float = 0.0) -> None:
        nonlocal num_sent
        await asyncio.sleep(start_s)
        for prompt in job:
            num_sent += 1
            try:
                answers.append(await _answer(client, prompt, begin))
            except (httpx.HTTPError, RuntimeError, ValueError) as error:
                errors.append(f"{type(error).__name__}: {error}")

    async def work(waiting: Iterator[Job]) -> None:
        for job in waiting:
            await send(job)

    if load.per_s is not None:
        gaps = np.random.default_rng(seed).exponential(1 / load.per_s, len(jobs))
        starts = np.cumsum(gaps) - gaps[0]
        parts = [send(job, float(start)) for start, job in zip(starts, jobs, strict=True)]
    else:
        assert load.concurrency is not None
        waiting = iter(jobs)
        parts = [work(waiting) for _ in range(min(load.concurrency, len(jobs)))]
    tasks = [asyncio.create_task(part) for part in parts]
    _, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    num_cut = num_sent - len(answers) - len(errors)
    return Run(answers, num_cut, errors, time.perf_counter() - begin)


async def _answer(client: HTTPClient, prompt: Prompt, begin: float) -> Answer:
    """Return the answer to one prompt. ``begin`` is the start of the run on the clock."""
    sent = time.perf_counter() - begin
    times: list[float] = []
    num_output = cached_len = 0
    async with aclosing(client.answer(prompt)) as pieces:
        async for piece in pieces:
            if piece.cached_len is None or piece.num_tokens > len(times):
                times.append(time.perf_counter() - begin)
            num_output = piece.num_tokens or num_output
            cached_len = cached_len if piece.cached_len is None else piece.cached_len
    if not times:
        raise RuntimeError("The server sent an answer without tokens.")
    return Answer(sent, tuple(times), len(prompt.tokens), num_output, cached_len)


class Targets(NamedTuple):
    """Latency limits of a good request."""

    ttft_s: float
    tpot_s: float


def summary(run: Run, targets: Targets) -> dict[str, Any]:
    """Return the usual figures of serving benchmarks.

    Mean, median and 99th percentile of each time in ms, rates per second, and the token hit rate.
    """
    answers = run.answers
    num_prompt = sum(answer.num_prompt for answer in answers)
    num_output = sum(answer.num_output for answer in answers)
    good = sum(
        answer.ttft_s <= targets.ttft_s and (answer.tpot_s or 0.0) <= targets.tpot_s
        for answer in answers
    )
    gaps = [np.diff(answer.piece_times_s) for answer in answers]
    return {
        "requests": len(answers),
        "cut": run.num_cut,
        "errors": len(run.errors),
        "seconds": run.seconds,
        "requests_per_s": len(answers) / run.seconds,
        "prompt_tokens_per_s": num_prompt / run.seconds,
        "output_tokens_per_s": num_output / run.seconds,
        "goodput_per_s": good / run.seconds,
        "token_hit_rate": (
            sum(answer.cached_len for answer in answers) / num_prompt if num_prompt else 0.0
        ),
        "ttft_target_s": targets.ttft_s,
        "tpot_target_s": targets.tpot_s,
        "ttft_ms": _spread([answer.ttft_s for answer in answers]),
        "tpot_ms": _spread([s for answer in answers if (s := answer.tpot_s) is not None]),
        "itl_ms": _spread(np.concatenate(gaps) if gaps else []),
        "e2e_ms": _spread([answer.e2e_s for answer in answers]),
    }


def _spread(seconds: Sequence[float] | npt.NDArray[np.float64]) -> dict[str, float] | None:
    if not len(seconds):
        return None
    ms = np.asarray(seconds) * 1e3
    return dict(
        zip(("mean", "p50", "p99"), (ms.mean(), *np.quantile(ms, (0.5, 0.99))), strict=True)
    )


def sweep(
    servers: Mapping[str, AbstractAsyncContextManager[HTTPClient]],
    jobs: Sequence[Job],
    loads: Sequence[Load],
    targets: Targets,
    seconds: float,
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield (name, work) of every load on every server, each on an empty cache. A server starts
    with the first of its works that is done. A work raises ValueError if a request failed."""
    with asyncio.Runner() as runner:
        for cache, server in servers.items():
            started: list[HTTPClient] = []

            async def measure(
                load: Load,
                cache: str = cache,
                server: AbstractAsyncContextManager[HTTPClient] = server,
                started: list[HTTPClient] = started,
            ) -> dict[str, Any]:
                if not started:
                    started.append(await server.__aenter__())
                    first, one = [[jobs[0][0]]], Load(concurrency=1)
                    await drive(started[0], first, one, seconds=seconds)
                await started[0].reset_cache()
                run = await drive(started[0], jobs, load, seconds=seconds)
                if run.errors:
                    failed = len(run.errors)
                    raise ValueError(f"{failed} requests failed, first: {run.errors[0]}")
                return {"cache": cache, "load": str(load)} | summary(run, targets)

            try:
                for load in loads:
                    yield f"{cache}, {load}", lambda: runner.run(measure(load))  # noqa: B023
            finally:
                if started:
                    runner.run(server.__aexit__(None, None, None))


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
