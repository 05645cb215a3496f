"""Load on a server: its process, clients, times of answers, and a summary.

A server runs with the prefix cache and without. A job is a conversation: each prompt is sent after
the answer to the previous one, and contains that answer. Each of ``concurrency`` connections takes
one job after another. One thread serves all connections, and reads each message in at most 20 us of
processor time, so it can follow 50,000 messages a second. ``experiments.gpu`` uses these parts.
"""

from __future__ import annotations

import math
import selectors
import socket
import sys
import time
from bisect import bisect_left
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from experiments.benchmarks.server import exchange, free_port, running
from hybridcache import open_trace

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n"
HEAD += b"Content-Type: application/json\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"
READ_BYTES = 1 << 16


class NextTurn(NamedTuple):
    """Tokens that follow the previous answer, and the exact length of the greedy answer."""

    tokens: npt.NDArray[np.int32]
    num_output: int


Job = Sequence[NextTurn]


class StreamedChoice(msgspec.Struct):
    """Tokens in one message of a streamed answer."""

    token_ids: list[int] = []


class StreamedMessage(msgspec.Struct):
    """Fields that a client reads in one message of a streamed answer."""

    choices: list[StreamedChoice] = []
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None


read_message = msgspec.json.Decoder(StreamedMessage).decode


@dataclass(frozen=True, slots=True)
class ClientAnswer:
    """One request as seen by the client. Times are seconds of ``time.monotonic``."""

    sent_s: float
    piece_times_s: tuple[float, ...]
    """Time of each message with tokens."""
    num_prompt: int
    num_output: int
    cached_len: int
    num_seen: int = 0
    """Tokens of its conversation before this prompt, so the most that can be hit."""

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


class LoadConnection:
    """Connection that sends conversations one after another, with one prompt in progress.

    Arriving bytes are only collected; an answer is read once it is complete.
    """

    def __init__(self, port: int, jobs: Iterator[Job]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.num_answers = 0
        self._jobs = jobs
        self._prompts: Iterator[NextTurn] = iter(())
        self._text: list[int] = []
        self._parts: list[bytes] = []
        self._times_s: list[float] = []

    def ask(self) -> bool:
        """Send the next prompt. Returns False if no job is left."""
        while (prompt := next(self._prompts, None)) is None:
            if (job := next(self._jobs, None)) is None:
                return False
            self._prompts, self._text = iter(job), []
        self._num_seen = len(self._text)
        self._text += prompt.tokens.tolist()
        self._parts, self._times_s = [], []
        body = msgspec.json.encode(
            {
                "prompt": self._text,
                "max_tokens": prompt.num_output,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": True,
            }
        )
        self._sent_s = time.monotonic()
        self.socket.sendall(HEAD % len(body) + body)
        return True

    def read(self) -> ClientAnswer | None:
        """Receive bytes once. Returns the answer if it is complete. Raises RuntimeError for an
        error of the server."""
        part = self.socket.recv(READ_BYTES)
        self._times_s.append(time.monotonic())
        self._parts.append(part)
        if not part:
            raise RuntimeError("The server closed the connection of an unfinished answer.")
        if len(self._parts) == 1 and not part.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(part.decode(errors="replace"))
        if len(part) < len(LAST_CHUNK):
            part = b"".join(self._parts[-len(LAST_CHUNK) :])
        return self._answer() if part.endswith(LAST_CHUNK) else None

    def _answer(self) -> ClientAnswer:
        text, ends = b"".join(self._parts), [*accumulate(map(len, self._parts))]
        times: list[float] = []
        num_prompt, cached_len, end = len(self._text), 0, 0
        while (begin := text.find(b"data: {", end)) >= 0:
            end = text.index(b"\n\n", begin)
            message = read_message(text[begin + 6 : end])
            if message.error is not None:
                raise RuntimeError(message.error["message"])
            if message.choices and message.choices[0].token_ids:
                self._text += message.choices[0].token_ids
                times.append(self._times_s[bisect_left(ends, end)])
            if message.usage is not None:
                cached_len = message.usage["prompt_tokens_details"]["cached_tokens"]
        if not times:
            raise RuntimeError("The server sent an answer without tokens.")
        self.num_answers += 1
        num_output = len(self._text) - num_prompt
        return ClientAnswer(
            self._sent_s, tuple(times), num_prompt, num_output, cached_len, self._num_seen
        )


@dataclass(frozen=True, slots=True)
class LoadRun:
    """Answers in the window of one load, and the work of the client."""

    answers: Sequence[ClientAnswer]
    num_cut: int
    """Requests that were not finished at the end."""
    seconds: float
    """Length of the window, or until the last answer if there were no more prompts."""
    client_us: float = 0.0
    """Processor time of the client per message, with the ramp."""
    client_share: float = 0.0
    """Share of a processor that the client used."""


def drive(
    port: int, jobs: Sequence[Job], concurrency: int, *, seconds: float, ramp: int = 0
) -> LoadRun:
    """Send ``jobs`` on ``concurrency`` connections until all are answered or the window ends.

    The window of ``seconds`` begins at once, or when each connection has ``ramp`` answers or no
    job. Only answers that end in it count. Unfinished requests are then cut off. Raises OSError or
    RuntimeError if a request failed.
    """
    started_s, used_s, begin_s = time.monotonic(), time.thread_time(), math.inf
    every, waiting = list[ClientAnswer](), iter(jobs)
    with selectors.DefaultSelector() as selector, ExitStack() as sockets:
        for _ in range(concurrency):
            connection = LoadConnection(port, waiting)
            sockets.enter_context(connection.socket)
            if connection.ask():
                selector.register(connection.socket, selectors.EVENT_READ, connection)
        while at_work := selector.get_map():
            now_s = time.monotonic()
            if begin_s == math.inf and all(of.data.num_answers >= ramp for of in at_work.values()):
                begin_s = now_s
            if now_s >= begin_s + seconds:
                break
            for key, _ in selector.select(0.1):
                if (answer := key.data.read()) is not None:
                    every.append(answer)
                    if not key.data.ask():
                        selector.unregister(key.fileobj)
        num_cut = len(at_work)
    used_s, spent_s = time.thread_time() - used_s, time.monotonic() - started_s
    answers = [answer for answer in every if answer.piece_times_s[-1] >= begin_s]
    num_messages = sum(len(answer.piece_times_s) for answer in every)
    if answers and not num_cut:
        seconds = max(answer.piece_times_s[-1] for answer in answers) - begin_s
    client_us = 1e6 * used_s / max(num_messages, 1)
    return LoadRun(answers, num_cut, seconds, client_us, used_s / spent_s)


class Targets(NamedTuple):
    """Latency limits of a good request."""

    ttft_s: float
    tpot_s: float


def summary(run: LoadRun, targets: Targets) -> dict[str, Any]:
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
        "seconds": run.seconds,
        "requests_per_s": len(answers) / run.seconds,
        "prompt_tokens_per_s": num_prompt / run.seconds,
        "output_tokens_per_s": num_output / run.seconds,
        "goodput_per_s": good / run.seconds,
        "token_hit_rate": sum(answer.cached_len for answer in answers) / max(num_prompt, 1),
        "possible_hit_rate": sum(answer.num_seen for answer in answers) / max(num_prompt, 1),
        "ttft_target_s": targets.ttft_s,
        "tpot_target_s": targets.tpot_s,
        "ttft_ms": _spread([answer.ttft_s for answer in answers]),
        "tpot_ms": _spread([s for answer in answers if (s := answer.tpot_s) is not None]),
        "itl_ms": _spread(np.concatenate(gaps) if gaps else []),
        "e2e_ms": _spread([answer.e2e_s for answer in answers]),
        "client_us_per_message": run.client_us,
        "client_processor_share": run.client_share,
    }


def _spread(seconds: Sequence[float] | npt.NDArray[np.float64]) -> dict[str, float] | None:
    if not len(seconds):
        return None
    ms = np.asarray(seconds) * 1e3
    return dict(
        zip(("mean", "p50", "p99"), (ms.mean(), *np.quantile(ms, (0.5, 0.99))), strict=True)
    )


def measured_load(
    port: int, jobs: Sequence[Job], load: int, targets: Targets, **window: Any
) -> dict[str, Any]:
    """Return the figures of a load, a concurrency, on a server whose cache is emptied before.

    ``window``: options of ``drive``. Raises OSError or RuntimeError if a request failed.
    """
    exchange(port, "POST", "/reset_prefix_cache")
    return summary(drive(port, jobs, load, **window), targets)


SERVE = """
from engine.config import EngineConfig
from engine.front.command.cli import serve_engine
from engine.front.server.settings import ServerConfig
raise SystemExit(serve_engine(EngineConfig(**{}), ServerConfig(**{})))
"""


def serve_command(engine: Mapping[str, object], server: Mapping[str, object]) -> list[str]:
    """Return the command of a server with fields of its two configurations, also of those that are
    no flags of `engine serve`."""
    return [sys.executable, "-c", SERVE.format(dict(engine), dict(server))]


@contextmanager
def over_http(engine: Mapping[str, object]) -> Iterator[int]:
    """Start a server process with fields of its ``EngineConfig``, and yield its port. The server
    ends with the context."""
    port = free_port()
    with running(serve_command(engine, {"port": port}), port):
        yield port


def conversation_jobs(count: int, *, vocab_size: int, cap: int, num_output: int) -> list[Job]:
    """Return generated conversations with ids below ``vocab_size``, each up to its first prompt
    longer than ``cap`` tokens in the trace."""
    jobs: dict[Hashable, list[NextTurn]] = {}
    known: dict[Hashable, int] = {}
    for request in open_trace(f"sharegpt-like?sessions={count}&requests={100 * count}"):
        if len(request.tokens) <= cap:
            new, answer = request.tokens[known.get(request.session, 0) :], len(request.output)
            prompt = NextTurn(new % vocab_size, min(num_output, answer))
            jobs.setdefault(request.session, []).append(prompt)
            known[request.session] = len(request.tokens) + answer
    return list(jobs.values())
