"""How long does another client wait for its next token, whatever body somebody sends?

Starts ``engine serve`` with the built-in model, streams an answer to one client and meanwhile posts
bodies that were made to be slow, one after another: each as large as the limits let it be, or
larger. Printed: the longest time between two tokens of the first client while each body was read,
refused or answered, and the longest without any. Loopback only.

    python -m experiments.hostile
"""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.command.flags import Parser
from experiments.flood import server_port
from experiments.provenance import RESULTS, write_json_lines

LIMIT_S = 0.1
"""No body may delay another client's token by more."""


class Hostile(NamedTuple):
    """One body: what it is, where it goes, and its bytes."""

    name: str
    path: str
    make: Callable[[], bytes]


class Outcome(NamedTuple):
    """What a body did to its sender and to another client."""

    name: str
    mib: float
    status: int
    seconds: float
    median_ms: float
    """Of the times between two tokens of the other client meanwhile."""
    worst_ms: float


def _body(**fields: Any) -> Callable[[], bytes]:
    return lambda: json.dumps(fields, ensure_ascii=False).encode()


def _raw(before: str, entry: str, number: int, after: str) -> Callable[[], bytes]:
    return lambda: (before + ",".join([entry] * number) + after).encode()


EMPTY, USER = '{"role":"user"}', {"role": "user", "content": "hi"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
ITEM, PART = '{"role":"developer","content":"x"}', '{"type":"text","text":"x"}'
LONG_PART = '{"type":"text","text":"' + "x" * 1_000_000 + '"}'
USE = '{"type":"tool_use","id":"1","name":"f","input":{}}'
TURN = '{"model":"builtin","max_tokens":1,"messages":[{"role":"assistant","content":['
RESULT = TURN.replace("assistant", "user") + '{"type":"tool_result","tool_use_id":"1","content":['
PROMPT = '{"max_tokens":1,"prompt":['
BODIES: tuple[Hostile, ...] = (
    Hostile("no body", COMPLETIONS, lambda: b""),
    Hostile("1.6M numbers for messages", CHAT, _raw('{"messages":[', "1", 1_600_000, "]}")),
    Hostile("65k empty lists for messages", CHAT, _raw('{"messages":[', "[]", 65_000, "]}")),
    Hostile("4,096 numbers for messages", CHAT, _raw('{"messages":[', "1", 4096, "]}")),
    Hostile("4,096 empty messages", CHAT, _raw('{"messages":[', EMPTY, 4096, "]}")),
    Hostile("4,096 empty messages", "/tokenize", _raw('{"messages":[', EMPTY, 4096, "]}")),
    Hostile("100k empty messages", "/tokenize", _raw('{"messages":[', EMPTY, 100_000, "]}")),
    Hostile("32k nested lists for tools", CHAT, lambda: _tools("[[]]", 32_000)),
    Hostile("65k names in a tool", CHAT, lambda: _names(65_000)),
    Hostile("250k names in a call's arguments", CHAT, lambda: _arguments(250_000)),
    Hostile("65k numbers in a tool", CHAT, lambda: _tools("1e5", 65_000)),
    Hostile("300k numbers in a tool", CHAT, lambda: _tools("1e5", 299_000)),
    Hostile("a text that never ends", COMPLETIONS, lambda: b'{"prompt":"' + rb"\"," * 1_300_000),
    Hostile(
        "1.9M empty texts", COMPLETIONS, lambda: b"[]" * 60_000 + b'""' * 1_900_000 + b"[" * 9999
    ),
    Hostile("a text of 3.9 MiB", COMPLETIONS, _body(prompt="hello, world " * 314_000)),
    Hostile("a text of 3.9 MiB", "/tokenize", _body(prompt="hello, world " * 314_000)),
    Hostile("a message of 3.9 MiB", CHAT, _body(messages=[{**USER, "content": "x" * 4_080_000}])),
    Hostile(
        "3.9 MiB of escapes", "/tokenize", lambda: b'{"prompt":"' + rb"\ud800" * 680_000 + b'"}'
    ),
    Hostile("a message of < alone", CHAT, _body(messages=[{**USER, "content": "<" * 4_080_000}])),
    Hostile("3.9 MiB of commas", "/tokenize", _body(prompt="," * 4_080_000)),
    Hostile("a role of 3.9 MiB", CHAT, _body(messages=[{"role": "r" * 4_080_000}])),
    Hostile("reasoning of 3.9 MiB", CHAT, _body(messages=[USER | {"reasoning": "r" * 4_080_000}])),
    Hostile("299k token ids, n=128", COMPLETIONS, _raw('{"n":128,"prompt":[', "65", 299_000, "]}")),
    Hostile("a prompt of 900 ids, n=128", COMPLETIONS, lambda: _prompts(1, 900, n=128)),
    Hostile("1,000 prompts of 20 ids", COMPLETIONS, lambda: _prompts(1000, 20)),
    Hostile("60k empty prompts", COMPLETIONS, _raw(PROMPT, "[]", 60_000, "]}")),
    Hostile("299k prompts of a letter", COMPLETIONS, _raw(PROMPT, '"x"', 299_000, "]}")),
    Hostile("1,900 ids echoed with logprobs, n=4", COMPLETIONS, lambda: _echoed(1900, 4)),
    Hostile("1.6M stop tokens", COMPLETIONS, _raw('{"stop_token_ids":[', '"x"', 1_600_000, "]}")),
    Hostile("64 stops of 1,024", COMPLETIONS, lambda: _stops(64, 1024)),
    Hostile("64 stops of 30,000", COMPLETIONS, lambda: _stops(64, 30_000)),
    Hostile("4,096 empty items", RESPONSES, _raw('{"input":[', ITEM, 4096, "]}")),
    Hostile("20k uses of tools", MESSAGES, _raw(TURN, USE, 20_000, "]}]}")),
    Hostile("16k parts of a result", MESSAGES, _raw(RESULT, PART, 16_000, "]}]}]}")),
    Hostile("results of 3.9 MiB", MESSAGES, _raw(RESULT, LONG_PART, 4, "]}]}]}")),
    Hostile("an item of 3.9 MiB", RESPONSES, _body(input="<" * 4_080_000)),
    Hostile("260k token ids", "/detokenize", _body(tokens=[65] * 260_000)),
    Hostile("1.3M token ids", "/detokenize", _body(tokens=[65] * 1_300_000)),
    Hostile("4 MiB of brackets", COMPLETIONS, lambda: b"[" * 4_190_000),
    Hostile("5 MiB", COMPLETIONS, lambda: b"x" * (5 << 20)),
)


def _tools(entry: str, number: int) -> bytes:
    listed = ",".join([entry] * number)
    tool = f'{{"type":"function","function":{{"name":"f","parameters":{{"enum":[{listed}]}}}}}}'
    return f'{{"max_tokens":1,"messages":[{json.dumps(USER)}],"tools":[{tool}]}}'.encode()


def _names(number: int) -> bytes:
    names = {f"{index:x}": 1 for index in range(number)}
    tool = {"type": "function", "function": {"name": "f", "parameters": names}}
    return json.dumps({"max_tokens": 1, "messages": [USER], "tools": [tool]}).encode()


def _arguments(number: int) -> bytes:
    names = json.dumps({f"{index:x}": 1 for index in range(number)})
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": names}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}, USER]
    return json.dumps({"max_tokens": 1, "messages": messages}).encode()


def _prompts(number: int, length: int, **fields: Any) -> bytes:
    prompts = [[index % 250] * length for index in range(number)]
    return json.dumps({"prompt": prompts, "max_tokens": 1} | fields).encode()


def _echoed(length: int, n: int) -> bytes:
    fields = {"echo": True, "logprobs": 20, "n": n, "max_tokens": 1}
    return json.dumps({"prompt": [65] * length} | fields).encode()


def _stops(number: int, length: int) -> bytes:
    stops = ["a" * (length - 3) + f"{index:03}" for index in range(number)]
    return json.dumps({"prompt": "a" * 500, "stop": stops, "max_tokens": 64}).encode()


class Reader(threading.Thread):
    """A client that reads an endless answer, and notes when each piece of it came."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._ends = False
        self.gaps: list[tuple[float, float]] = []
        """When two neighbouring pieces of one answer came."""

    def run(self) -> None:
        fields = {"prompt": "Tell me more.", "max_tokens": 3000, "ignore_eos": True, "stream": True}
        while not self._ends:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", COMPLETIONS, json.dumps(fields), headers)
            answer = connection.getresponse()
            before_s: float | None = None
            while not self._ends and (line := answer.readline()):
                if line.startswith(b"data: {"):
                    now_s = time.perf_counter()
                    if before_s is not None:
                        self.gaps.append((before_s, now_s))
                    before_s = now_s
            connection.close()

    def end(self) -> None:
        self._ends = True
        self.join()

    def gaps_s(self, start_s: float, end_s: float) -> list[float]:
        """Times between two pieces, of those that were not over at ``start_s`` and had begun at
        ``end_s``."""
        return [after - before for before, after in self.gaps if after > start_s and before < end_s]


def attack(port: int, reader: Reader, hostile: Hostile) -> Outcome:
    """Send one body and wait for its answer, and a moment longer."""
    payload = hostile.make()
    time.sleep(0.2)  # what making it cost the reader, which is of this process, is over
    start_s = time.perf_counter()
    status = 200
    if payload:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        headers = {"Content-Type": "application/json"}
        try:
            connection.request("POST", hostile.path, payload, headers)
            answer = connection.getresponse()
            status = answer.status
            answer.read()
        except (BrokenPipeError, ConnectionResetError):
            status = 413  # refused before all of it was sent
        connection.close()
    end_s = time.perf_counter()
    time.sleep(1.0)
    gaps = reader.gaps_s(start_s, max(end_s, start_s + 1.0))
    name = f"{hostile.path} {hostile.name}"
    middle_ms, worst_ms = (round(1e3 * f(gaps), 1) for f in (statistics.median, max))
    return Outcome(
        name, round(len(payload) / 2**20, 2), status, round(end_s - start_s, 2), middle_ms, worst_ms
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m experiments.hostile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--only", default="", metavar="TEXT", help="bodies whose name has it")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "hostile.jsonl", help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    bodies = [body for body in BODIES if options.only in f"{body.path} {body.name}"]
    command = [sys.executable, "-m", "engine", "serve", "--port", "0", "--cache-gib", "0.25"]
    # What is computed for others takes its share of every step; here the smallest there is.
    command += ["--token-budget", "64"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = server_port(server)
            reader = Reader(port)
            reader.start()
            time.sleep(2)
            outcomes = [
                [attack(port, reader, body) for body in bodies] for _ in range(options.rounds)
            ]
            reader.end()
            peak_mib = _peak_mib(server.pid)
        finally:
            server.terminate()
    rows = [_middle(rounds) for rounds in zip(*outcomes, strict=True)]
    print(f"{'MiB':>5} {'answer':>6} {'s':>6} {'token ms':>9} {'worst ms':>9}  body")
    for row in rows:
        print(
            f"{row.mib:5.2f} {row.status:6} {row.seconds:6.2f} {row.median_ms:9.1f} "
            f"{row.worst_ms:9.1f}  {row.name}"
        )
    worst = max(row.worst_ms for row in rows)
    print(f"longest wait for a token {worst:.0f} ms; peak memory of the server {peak_mib:.0f} MiB")
    record = {"rounds": options.rounds, "worst_ms": worst, "peak_mib": round(peak_mib)}
    write_json_lines(options.out, [record, *(row._asdict() for row in rows)])
    return 0 if worst <= 1e3 * LIMIT_S else 1


def _middle(rounds: Sequence[Outcome]) -> Outcome:
    """Of several rounds with one body: the median of each figure, since the machine stalls now and
    then by itself."""
    first = rounds[0]
    figures = {
        name: statistics.median(getattr(outcome, name) for outcome in rounds)
        for name in ("seconds", "median_ms", "worst_ms")
    }
    return first._replace(**figures)


def _peak_mib(pid: int) -> float:
    """Most memory that the process had at once; 0 where the system does not say."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0.0


if __name__ == "__main__":
    sys.exit(main())
