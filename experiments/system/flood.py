"""Flood a server: ten thousand clients connect at once, and some of them hang up early.

Starts ``engine serve`` with the built-in model, opens all connections at the same time, and lets a
tenth hang up. The server must then be alive, with every KV row and state slot accounted for.
Loopback only.

    python -m experiments.system.flood --requests 10000 [--tight]

The server overlaps steps, and verifies after each that every request reads its own KV rows
(``--check``). A failing step leads to 5xx. Equal prompts must get equal answers. With ``--tight``
the pool has memory for one long prompt, so requests are preempted and steps are empty.
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from engine.config import BUILTIN_DIR
from experiments.provenance import RESULTS, write_json_lines
from hybridcache.command.parser import Parser
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import GIB

TIGHT_TOKENS, TIGHT_SLOTS = 384, 6
Answers = dict[int, set[str]]
"""Answers by prompt."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m experiments.system.flood", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--requests", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--max-queue", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--tight", action="store_true", help="use a pool for one long prompt")
    options = parser.parse_args(arguments)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < options.requests + 100:
        print(f"flood: only {most} open files are allowed; lower --requests.", file=sys.stderr)
        return 2
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    command = [sys.executable, "-m", "engine", "serve", "--port", "0", *_sizes(options.tight)]
    command += ["--max-queue", str(options.max_queue), "--overlap", "on", "--check", "--exact"]
    answers: Answers = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = server_port(server)
            started = time.perf_counter()
            outcomes = asyncio.run(_flood(port, options.requests, answers))
            spent_s = time.perf_counter() - started
            report = _settled(port)
        finally:
            server.terminate()
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:>8,}  {outcome}")
    conserved = all(
        pool["free"] + pool["cached"] == pool["total"] and not pool["held"]
        for pool in (report["kv"], report["slots"])
    )
    num_torn = sum(len(texts) > 1 for texts in answers.values())
    record = {
        "requests": options.requests,
        "tight": options.tight,
        "seconds": round(spent_s, 1),
        "conserved": conserved,
        "prompts": len(answers),
        "prompts_with_two_answers": num_torn,
    }
    write_json_lines(RESULTS / "flood.jsonl", [{**record, "outcomes": dict(outcomes)}])
    print(
        f"{options.requests:,} requests in {spent_s:.1f} s; free + cached + held == total for KV "
        f"and slots: {conserved}; {num_torn} of {len(answers)} prompts got more than one answer"
    )
    has_failed = any(outcome.startswith("answered 5") for outcome in outcomes)
    is_well = conserved and answers and not num_torn and not has_failed
    return 0 if is_well and server.returncode == 0 else 1


def _sizes(tight: bool) -> list[str]:
    """Return the flags for the server's memory.

    With ``tight`` there is KV for the longest prompt, and chunks are so short that a prompt is
    admitted before its end is known to exceed the memory.
    """
    if not tight:
        return ["--cache-gib", "0.1", "--max-model-len", "2048"]
    sizes = ModelGeometry.load(str(BUILTIN_DIR))
    num_bytes = TIGHT_TOKENS * sizes.kv_bytes_per_token + TIGHT_SLOTS * sizes.state_bytes
    return ["--cache-gib", f"{num_bytes / GIB:.9f}", "--token-budget", "64", "--max-running", "3"]


def server_port(server: subprocess.Popen[str]) -> int:
    """Return the port that ``engine serve`` prints. Raises RuntimeError if the server ends
    before."""
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"address .*:(\d+)/v1", line):
            return int(found[1])
    raise RuntimeError("engine serve ended before it was ready.")


async def _flood(port: int, num_requests: int, answers: Answers) -> Counter[str]:
    outcomes: Counter[str] = Counter()
    with tqdm(total=num_requests, unit=" requests", leave=False) as bar:

        async def ask(number: int) -> None:
            outcomes[await _ask(port, number, answers)] += 1
            bar.update()

        await asyncio.gather(*map(ask, range(num_requests)))
    return outcomes


async def _ask(port: int, number: int, answers: Answers) -> str:
    """Send one of fifty prompts with common prefixes. Every tenth client hangs up after a
    moment."""
    family = number % 50
    prompt = "hello, says " + f"{family} " * (20 + 2 * family)
    body = {
        "prompt": prompt,
        "max_tokens": 2 + family % 9,
        "stream": number % 2 == 0,
        "temperature": 0,
    }
    payload = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + payload)
        if number % 10 == 0:
            await asyncio.sleep(0.2)
            writer.close()
            return "hung up"
        answer = await reader.read()
        writer.close()
    except OSError as error:
        return f"connection failed: {error.strerror}"
    status = answer[9:12].decode() or "nothing"
    if status == "200":
        answers.setdefault(family, set()).add(_text(answer))
    has_advice = b"retry-after" in answer.lower()
    return f"answered {status}" + (" with Retry-After" if has_advice else "")


def _text(answer: bytes) -> str:
    """Return the text of a whole answer, or of a stream."""
    found = re.findall(rb'\{"id".*\}', answer)
    return "".join(json.loads(message)["choices"][0]["text"] for message in found)


def _settled(port: int, timeout_s: float = 120) -> dict[str, Any]:
    """Return the report of /v1/cache once no request runs or waits."""
    deadline = time.monotonic() + timeout_s
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/cache", timeout=60) as answer:
            report: dict[str, Any] = json.load(answer)
        if not report["num_running"] + report["num_waiting"] or time.monotonic() > deadline:
            return report
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
