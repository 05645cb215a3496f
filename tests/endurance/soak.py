"""Requests with all features for hours: no growth of memory, and counts that add up.

``engine serve`` runs the built-in model for 16 clients. They use conversations, tools, guided
answers, drafts, several answers at once, disconnects, three API dialects and tenants, while a live
page is connected. At the end requests, prompt tokens and memory must add up. Neither process may
have grown by more than ``GROWTH`` in the second half of the run. Loopback only.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from experiments.benchmarks.serving import serve_command
from tests.endurance.faults import child_of, server_port

NUM_CLIENTS = 16
MIB = {"explain_mib": 2, "replay_mib": 2, "responses_mib": 2}
"""Memory limits, small enough that every store is full and evicts before half of the run."""
ENGINE = {"draft": "tree", "max_model_len": 4096, "cache_gib": 0.1, "max_queue": 64}
FORGOTTEN = "forgotten"
"""Outcome of a request that continues a response which the server no longer stores."""
GROWTH = 1.1
"""Maximum growth of a process, from the mean of the run's third quarter to that of its last."""
PAGE_BYTES = 4096
SAMPLE_S = 10.0
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


class Client:
    """Client with one conversation at a time, and other requests in between."""

    def __init__(self, port: int, seed: int) -> None:
        self._port = port
        self._draw = random.Random(seed)
        self._turns: list[dict[str, Any]] = []
        self._response: str | None = None
        self.num_choices = 0
        """Number of requested choices in admitted requests."""

    async def ask(self) -> str:
        """Send a random kind of request. Returns the kind and the outcome."""
        kinds = (
            (self._turn, 5),
            (self._guided, 2),
            (self._tools, 2),
            (self._several, 1),
            (self._leave, 2),
            (self._message, 1),
            (self._respond, 1),
            (self._tenant, 1),
        )
        requests, weights = zip(*kinds, strict=True)
        work = self._draw.choices(requests, weights)[0]
        try:
            return f"{work.__name__[1:]} {await work()}"
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            return f"{work.__name__[1:]} {type(error).__name__}"

    async def _post(
        self, path: str, body: dict[str, Any], choices: int = 1, leave: bool = False
    ) -> tuple[int, Any]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)
        try:
            data = json.dumps({"max_tokens": self._draw.randrange(4, 16)} | body).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            writer.write(head.encode() + data)
            status = int((await reader.readline()).split()[1])
            self.num_choices += choices if status == 200 else 0
            if leave:
                await reader.readuntil(b"data: ")
                writer.transport.abort()
                return status, None
            answer = (await reader.read()).partition(b"\r\n\r\n")[2]
            return status, json.loads(answer) if not body.get("stream") else answer
        finally:
            writer.close()

    def _words(self) -> str:
        return " ".join(self._draw.choice(("red", "blue", "seven", "to")) for _ in range(8))

    async def _turn(self) -> str:
        """Send the next turn of a conversation. A new conversation begins after a few turns."""
        if len(self._turns) > 8 or not self._turns:
            self._turns = [{"role": "system", "content": f"You are {self._draw.randrange(9)}."}]
        self._turns.append({"role": "user", "content": self._words()})
        status, answer = await self._post("/v1/chat/completions", {"messages": self._turns})
        if status != 200:
            self._turns = []
            return str(status)
        message = answer["choices"][0]["message"]
        self._turns.append({"role": "assistant", "content": message["content"] or "-"})
        return "200"

    def _chat(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self._words()}]

    async def _guided(self) -> str:
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        body = {"messages": self._chat(), "response_format": form, "max_tokens": 24}
        return str((await self._post("/v1/chat/completions", body))[0])

    async def _tools(self) -> str:
        choice = self._draw.choice(("auto", "required"))
        body = {"messages": self._chat(), "tools": [TOOL], "tool_choice": choice, "stream": True}
        return str((await self._post("/v1/chat/completions", body))[0])

    async def _several(self) -> str:
        body = {"prompt": [self._words(), "x"], "n": 2, "logprobs": 2, "temperature": 0.9}
        return str((await self._post("/v1/completions", body, choices=4))[0])

    async def _leave(self) -> str:
        body = {"prompt": self._words(), "stream": True, "max_tokens": 400, "ignore_eos": True}
        return str((await self._post("/v1/completions", body, leave=True))[0])

    async def _message(self) -> str:
        body = {"model": "builtin", "messages": self._chat(), "stream": True}
        return str((await self._post("/v1/messages", body))[0])

    async def _respond(self) -> str:
        body = {"input": self._words(), "previous_response_id": self._response}
        limit = {"max_output_tokens": 8, "max_tokens": None}
        status, answer = await self._post("/v1/responses", body | limit)
        self._response = answer["id"] if status == 200 and self._draw.random() < 0.7 else None
        if status == 400 and answer["error"]["code"] == "previous_response_not_found":
            return FORGOTTEN
        return str(status)

    async def _tenant(self) -> str:
        body = {"messages": self._chat(), "cache_salt": f"tenant {self._draw.randrange(50)}"}
        return str((await self._post("/v1/chat/completions", body))[0])


async def watch(port: int) -> None:
    """Read all events, like the live page."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /v1/cache/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
    try:
        while await reader.read(1 << 16):
            pass
    finally:
        writer.close()


def resident_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * PAGE_BYTES / 2**20, 1)


async def soak(
    port: int, pids: Sequence[int], seed: int, num_requests: int
) -> tuple[Counter[str], int, list[dict[str, Any]]]:
    """Return (outcomes of requests, admitted choices, samples of memory)."""
    clients = [Client(port, seed + number) for number in range(NUM_CLIENTS)]
    outcomes: Counter[str] = Counter()
    samples: list[dict[str, Any]] = []
    numbers = iter(range(num_requests))
    started = time.monotonic()
    page = asyncio.create_task(watch(port))

    def sample() -> None:
        server, engine = map(resident_mib, pids)
        at = {"requests": outcomes.total(), "seconds": round(time.monotonic() - started, 1)}
        samples.append(at | {"server_mib": server, "engine_mib": engine})

    async def keep_sampling() -> None:
        while True:
            sample()
            await asyncio.sleep(SAMPLE_S)

    with tqdm(total=num_requests, unit=" requests", mininterval=5) as bar:

        async def work(client: Client) -> None:
            for _ in numbers:
                outcomes[await client.ask()] += 1
                bar.update()

        sampling = asyncio.create_task(keep_sampling())
        await asyncio.gather(*map(work, clients))
        sampling.cancel()
        sample()
    assert not page.done(), "the page lost its connection"
    page.cancel()
    return outcomes, sum(client.num_choices for client in clients), samples


def totals(port: int) -> dict[str, float]:
    """Return the sums of each metric over its labels, once nothing runs."""
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        found: Counter[str] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] += sample.value
                if "owner" in sample.labels:
                    found[f"{sample.name}.{sample.labels['owner']}"] += sample.value
        if not found["engine_running_requests"] + found["engine_waiting_requests"]:
            return dict(found)
        time.sleep(0.1)


def growth(samples: Sequence[dict[str, Any]], name: str) -> float:
    """Return the mean of the last quarter relative to that of the third."""
    quarter = max(len(samples) // 4, 1)
    third, last = samples[-2 * quarter : -quarter], samples[-quarter:]
    means = [sum(sample[name] for sample in part) / len(part) for part in (third, last)]
    return means[1] / means[0]


def verdict(
    outcomes: Counter[str], num_choices: int, before: dict[str, float], after: dict[str, float]
) -> None:
    """Raise AssertionError if counts do not add up."""
    wrong = {
        end: number
        for end, number in outcomes.items()
        if end.split()[1] not in ("200", "429", FORGOTTEN)
    }
    assert not wrong, f"unexpected answers: {wrong}"
    assert after["engine_requests_total"] == num_choices, (after, num_choices)
    spared = after["engine_cached_tokens_total"] + after["engine_lost_tokens_total"]
    assert after["engine_prompt_tokens_total"] == spared
    for pool in ("kv_tokens", "state_slots", "memory_bytes"):
        assert after[f"engine_{pool}.held"] == 0
    assert after["engine_memory_bytes"] == before["engine_memory_bytes"]


def run(seed: int, num_requests: int) -> dict[str, Any]:
    """Serve ``num_requests``. Returns the outcomes, speed and growth."""
    command = serve_command(ENGINE, {"port": 0, **MIB})
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = server_port(server)
            pids = server.pid, child_of(server.pid)
            before = totals(port)
            outcomes, num_choices, samples = asyncio.run(soak(port, pids, seed, num_requests))
            after = totals(port)
        finally:
            server.terminate()
    verdict(outcomes, num_choices, before, after)
    grown = {name: growth(samples, name) for name in ("server_mib", "engine_mib")}
    if samples[-1]["seconds"] > 60 * SAMPLE_S:
        assert max(grown.values()) < GROWTH, f"memory grew: {grown}"
    return {
        "requests a minute": round(60 * outcomes.total() / samples[-1]["seconds"]),
        "outcomes": dict(sorted(outcomes.items())),
        "growth": {name: round(ratio, 4) for name, ratio in grown.items()},
        "cached tokens": after["engine_cached_tokens_total"],
        "accepted drafts": after.get("engine_accepted_tokens_total", 0),
    }
