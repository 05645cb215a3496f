"""Load on a server, and what its clients see: who sends what when, the clock of every answer, and
the sums of a run.

A job is a list of prompts that follow each other, such as the turns of a conversation: each is sent
when the one before has been answered. Jobs start either as soon as one of ``concurrency`` workers
is free, or at random times, ``per_s`` a second on average.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlparse

import httpx
import numpy as np
import numpy.typing as npt

from engine.async_engine import AsyncEngine
from engine.requests.spec import SamplingParams


class Ask(NamedTuple):
    """One request: greedy, and exactly so many tokens long."""

    prompt: npt.NDArray[np.int32]
    num_output: int


Job = Sequence[Ask]


@dataclass(frozen=True, slots=True)
class Piece:
    """One message of a streamed answer."""

    num_tokens: int
    """Tokens generated up to here; 0: this message does not say."""
    cached_len: int | None
    """Prompt tokens the server had; None: this message does not say."""


class Client(Protocol):
    """A server as its load sees it."""

    def answer(self, ask: Ask) -> AsyncIterator[Piece]: ...

    async def reset_cache(self) -> None: ...

    async def close(self) -> None: ...


class HTTPClient:
    """``POST /v1/completions`` of a server on this machine, streamed."""

    def __init__(self, url: str) -> None:
        if urlparse(url).hostname not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(
                f"{url} is not on this machine: load is sent to loopback addresses only."
            )
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(
            base_url=url, limits=limits, timeout=httpx.Timeout(600.0), trust_env=False
        )

    async def wait_until_ready(self, seconds: float) -> None:
        """TimeoutError: the server does not answer by then."""
        async with asyncio.timeout(seconds):
            while True:
                with suppress(httpx.TransportError):
                    if (await self._http.get("/health")).status_code == 200:
                        return
                await asyncio.sleep(0.1)

    async def answer(self, ask: Ask) -> AsyncIterator[Piece]:
        body = {
            "prompt": ask.prompt.tolist(),
            "max_tokens": ask.num_output,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    yield _piece(json.loads(line.removeprefix("data: ")))

    async def reset_cache(self) -> None:
        (await self._http.post("/reset_prefix_cache")).raise_for_status()

    async def close(self) -> None:
        await self._http.aclose()


def _piece(message: dict[str, Any]) -> Piece:
    if "error" in message:
        raise RuntimeError(message["error"]["message"])
    usage = message.get("usage")
    if usage is None:
        return Piece(0, None)
    details = usage.get("prompt_tokens_details") or {}
    return Piece(usage["completion_tokens"], details.get("cached_tokens", 0))


class EngineClient:
    """An engine in this process, for machines without the server's packages."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine: AsyncEngine | None = engine
        engine.start()

    async def answer(self, ask: Ask) -> AsyncIterator[Piece]:
        sampling = SamplingParams(max_tokens=ask.num_output, temperature=0.0, ignore_eos=True)
        assert self._engine is not None
        async with aclosing(self._engine.generate(ask.prompt.tolist(), sampling)) as outputs:
            async for output in outputs:
                yield Piece(len(output.output), output.cached_len)

    async def reset_cache(self) -> None:
        assert self._engine is not None
        await self._engine.reset_prefix_cache()

    async def close(self) -> None:
        """The engine's memory is whoever's else holds it: a client that is still known holds
        none."""
        assert self._engine is not None
        await self._engine.drain()
        self._engine = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as the client saw it; seconds since the start of the run."""

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
        """Mean time per token after the first; None where there is only one."""
        return (self.e2e_s - self.ttft_s) / (self.num_output - 1) if self.num_output > 1 else None

    @property
    def itl_s(self) -> npt.NDArray[np.float64]:
        """Times between messages."""
        return np.diff(self.piece_times_s)


@dataclass(frozen=True, slots=True)
class Load:
    """Start of jobs: a concurrency or a rate."""

    concurrency: int | None = None
    per_s: float | None = None

    def __str__(self) -> str:
        return f"{self.concurrency} at once" if self.per_s is None else f"{self.per_s:g} /s"


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that was answered under one load."""

    answers: Sequence[Answer]
    num_cut: int
    """Requests that were not done when the time was up."""
    errors: Sequence[str]
    seconds: float


async def drive(
    client: Client, jobs: Sequence[Job], load: Load, *, seconds: float, seed: int = 0
) -> Run:
    """Send ``jobs`` until all are answered or ``seconds`` have passed; what is under way then is
    given up."""
    run = _Driver(client)
    tasks = [asyncio.create_task(part) for part in run.parts(jobs, load, seed)]
    _, late = await asyncio.wait(tasks, timeout=seconds)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return Run(run.answers, run.num_open, run.errors, run.now())


class _Driver:
    def __init__(self, client: Client) -> None:
        self._client = client
        self._begin = time.perf_counter()
        self.answers: list[Answer] = []
        self.errors: list[str] = []
        self.num_open = 0

    def now(self) -> float:
        return time.perf_counter() - self._begin

    def parts(self, jobs: Sequence[Job], load: Load, seed: int) -> Iterator[Any]:
        if load.per_s is not None:
            gaps = np.random.default_rng(seed).exponential(1 / load.per_s, len(jobs))
            for start, job in zip(np.cumsum(gaps) - gaps[0], jobs, strict=True):
                yield self._later(float(start), job)
            return
        assert load.concurrency is not None
        waiting = iter(jobs)
        for _ in range(min(load.concurrency, len(jobs))):
            yield self._work(waiting)

    async def _work(self, waiting: Iterator[Job]) -> None:
        for job in waiting:
            await self._send(job)

    async def _later(self, start_s: float, job: Job) -> None:
        await asyncio.sleep(start_s)
        await self._send(job)

    async def _send(self, job: Job) -> None:
        for ask in job:
            self.num_open += 1
            try:
                self.answers.append(await self._answer(ask))
            except (httpx.HTTPError, RuntimeError, ValueError) as error:
                self.errors.append(f"{type(error).__name__}: {error}")
            self.num_open -= 1

    async def _answer(self, ask: Ask) -> Answer:
        sent = self.now()
        times: list[float] = []
        num_output = cached_len = 0
        async with aclosing(self._client.answer(ask)) as pieces:
            async for piece in pieces:
                if piece.cached_len is None or piece.num_tokens > len(times):
                    times.append(self.now())
                num_output = piece.num_tokens or num_output
                cached_len = cached_len if piece.cached_len is None else piece.cached_len
        if not times:
            raise RuntimeError("an answer without tokens")
        return Answer(sent, tuple(times), len(ask.prompt), num_output, cached_len)


class Targets(NamedTuple):
    """Latencies up to which a request counts as good."""

    ttft_s: float
    tpot_s: float


def summary(run: Run, targets: Targets) -> dict[str, Any]:
    """The figures engines publish: mean, median and 99th percentile of each time (ms), rates per
    second, hit rate."""
    answers = run.answers
    prompt = sum(answer.num_prompt for answer in answers)
    output = sum(answer.num_output for answer in answers)
    good = sum(
        answer.ttft_s <= targets.ttft_s and (answer.tpot_s or 0.0) <= targets.tpot_s
        for answer in answers
    )
    gaps = [answer.itl_s for answer in answers]
    return {
        "requests": len(answers),
        "cut": run.num_cut,
        "errors": len(run.errors),
        "seconds": run.seconds,
        "requests_per_s": len(answers) / run.seconds,
        "prompt_tokens_per_s": prompt / run.seconds,
        "output_tokens_per_s": output / run.seconds,
        "goodput_per_s": good / run.seconds,
        "token_hit_rate": sum(answer.cached_len for answer in answers) / prompt if prompt else 0.0,
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
    return {
        "mean": float(ms.mean()),
        "p50": float(np.quantile(ms, 0.5)),
        "p99": float(np.quantile(ms, 0.99)),
    }
