"""Delay and slowdown that one hostile client causes for another.

``engine serve`` runs the built-in model. One client reads an endless answer while attacks follow
one after another: bodies at or above the size limits, grammars of up to 1 kB that are slow to
follow, and connections with endless headers.

For each attack the output has the longest time between two tokens of the first client, its tokens
per second, and the loss relative to a control. The control of a grammar is the same request without
it. For other attacks it is the time before, and the loss is not judged.

Other processes of the machine influence both. All figures are therefore without the time in which
the involved threads waited for a processor (as reported by Linux). An attack over a limit is
repeated, and its median decides. Loopback only.

The last rows have the longest wait for a monitor's answer, or the first event of a page, while a
server with default flags computes one long prompt.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

from tests.endurance.faults import child_of, server_port

LIMIT_S, LIMIT_LOSS = 0.1, 0.25
"""Limits for the delay of another client's token, and for the loss of its speed. On two cores the
masks of four answers share the processor with the model: 15 to 18 % of its speed."""
ROUNDS_TO_FAIL = 5
"""Minimum number of rounds before a median over the limit counts as a failure."""
NUM_HELD = 100
"""Number of connections that an attacker opens at a time."""
MONITORED = ("/health", "/metrics", "/v1/cache", "/v1/cache/events")
ATTACK_S = 10.0
"""Seconds after which an attacker hangs up."""


class Hostile(NamedTuple):
    """One attack by a body."""

    name: str
    path: str
    make: Callable[[], bytes]
    control: Callable[[], bytes] | None = None
    """Makes the body of the control, or None if the control sends nothing."""
    num_senders: int = 1
    """Number of bodies that are sent at once."""


class Outcome(NamedTuple):
    """Effect of an attack on its sender and on another client."""

    name: str
    status: int
    worst_ms: float
    """Longest time between two tokens of the other client."""
    tokens_per_s: float
    """Speed of the other client during the attack."""
    loss: float | None
    """Lost share of its speed, or None if the control is not the same work."""

    @property
    def is_over(self) -> bool:
        """True if a limit is exceeded."""
        return self.worst_ms > 1e3 * LIMIT_S or (self.loss or 0.0) > LIMIT_LOSS


def _body(**fields: Any) -> Callable[[], bytes]:
    return lambda: json.dumps(fields, ensure_ascii=False).encode()


def _raw(before: str, entry: str, number: int, after: str) -> Callable[[], bytes]:
    return lambda: (before + ",".join([entry] * number) + after).encode()


EMPTY, USER = '{"role":"user"}', {"role": "user", "content": "hi"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
ITEM = '{"role":"developer","content":"x"}'
LONG_PART = '{"type":"text","text":"' + "x" * 1_000_000 + '"}'
USE = '{"type":"tool_use","id":"1","name":"f","input":{}}'
TURN = '{"model":"builtin","max_tokens":1,"messages":[{"role":"assistant","content":['
RESULT = TURN.replace("assistant", "user") + '{"type":"tool_result","tool_use_id":"1","content":['
PROMPT = '{"max_tokens":1,"prompt":['
TOOL = (
    '{"max_tokens":1,"messages":[{"role":"user","content":"hi"}],'
    '"tools":[{"type":"function","function":{"name":"f","parameters":{"enum":['
)
BODIES: tuple[Hostile, ...] = (
    Hostile("1.6M numbers for messages", CHAT, _raw('{"messages":[', "1", 1_600_000, "]}")),
    Hostile("99k empty lists for messages", CHAT, _raw('{"messages":[', "[]", 99_000, "]}")),
    Hostile("4,096 empty messages", CHAT, _raw('{"messages":[', EMPTY, 4096, "]}")),
    Hostile("100k empty messages", "/tokenize", _raw('{"messages":[', EMPTY, 100_000, "]}")),
    Hostile("49k nested lists for tools", CHAT, _raw(TOOL, "[[]]", 49_000, "]}}}]}")),
    Hostile("300k numbers in a tool", CHAT, _raw(TOOL, "1e5", 299_000, "]}}}]}")),
    Hostile("99k names in a tool", CHAT, lambda: _names(99_000)),
    Hostile("99k names in a call's arguments", CHAT, lambda: _arguments(99_000)),
    Hostile("a text that never ends", COMPLETIONS, lambda: b'{"prompt":"' + rb"\"," * 1_300_000),
    Hostile(
        "1.9M empty texts", COMPLETIONS, lambda: b"[]" * 60_000 + b'""' * 1_900_000 + b"[" * 9999
    ),
    Hostile("a text of 3.9 MiB", COMPLETIONS, _body(prompt="hello, world " * 314_000)),
    Hostile(
        "3.9 MiB of escapes", "/tokenize", lambda: b'{"prompt":"' + rb"\ud800" * 680_000 + b'"}'
    ),
    Hostile("a message of < alone", CHAT, _body(messages=[{**USER, "content": "<" * 4_080_000}])),
    Hostile("3.9 MiB of commas", "/tokenize", _body(prompt="," * 4_080_000)),
    Hostile("a role of 3.9 MiB", CHAT, _body(messages=[{"role": "r" * 4_080_000}])),
    Hostile("reasoning of 3.9 MiB", CHAT, _body(messages=[USER | {"reasoning": "r" * 4_080_000}])),
    Hostile("299k token ids, n=128", COMPLETIONS, _raw('{"n":128,"prompt":[', "65", 299_000, "]}")),
    Hostile("900 ids, n=128", COMPLETIONS, _body(prompt=[65] * 900, n=128, max_tokens=1)),
    Hostile("1,000 prompts of 20 ids", COMPLETIONS, lambda: _prompts(1000, 20)),
    Hostile("299k prompts of a letter", COMPLETIONS, _raw(PROMPT, '"x"', 299_000, "]}")),
    Hostile(
        "1,900 ids echoed with logprobs, n=4",
        COMPLETIONS,
        _body(prompt=[65] * 1900, echo=True, logprobs=20, n=4, max_tokens=1),
    ),
    Hostile("1.6M stop tokens", COMPLETIONS, _raw('{"stop_token_ids":[', '"x"', 1_600_000, "]}")),
    Hostile("64 stops of 30,000", COMPLETIONS, lambda: _stops(64, 30_000)),
    Hostile("64 stops of 1,024", COMPLETIONS, lambda: _stops(64, 1024)),
    Hostile("4,096 empty items", RESPONSES, _raw('{"input":[', ITEM, 4096, "]}")),
    Hostile("16k uses of tools", MESSAGES, _raw(TURN, USE, 16_000, "]}]}")),
    Hostile("results of 3.9 MiB", MESSAGES, _raw(RESULT, LONG_PART, 4, "]}]}]}")),
    Hostile("1.3M token ids", "/detokenize", _body(tokens=[65] * 1_300_000)),
    Hostile("4 MiB of brackets", COMPLETIONS, lambda: b"[" * 4_190_000),
    Hostile("5 MiB", COMPLETIONS, lambda: b"x" * (5 << 20)),
)
AMBIGUOUS = 'start: e\ne: e e | /[a-z]/ | e "+" e | e e e e | '
WIDE = (
    f"start: /[a-z]{{5}}/ {'a ' * 60}\na: {' | '.join(f'b{i}' for i in range(30))} |\n"
    + "\n".join(f'b{i}: a a | "x" |' for i in range(30))
)
OPTIONAL = {
    "type": "object",
    "properties": {f"p{i}": {"anyOf": [{"type": "array"}, {"type": "string"}]} for i in range(14)},
}
GRAMMARS: dict[str, dict[str, Any]] = {
    "ambiguous": {"grammar": AMBIGUOUS},
    "ambiguous, eight at once": {"grammar": "start: e\ne: e e e e e e e e | /[a-z]/ | "},
    "ambiguous behind text": {"grammar": AMBIGUOUS.replace("start:", "start: /[a-z]{50}/")},
    "empty rules": {"grammar": 'start: (a? b? c?)*\na: "a"?\nb: "b"*\nc: ("a"|"b")*'},
    "60 x 30 empty rules": {"grammar": WIDE},
    "palindromes": {"grammar": "start: p\np: /[a-z]/ p /[a-z]/ | /[a-z]/ |"},
    "GBNF": {"grammar": "root ::= e\ne ::= e e | [a-z] | e e e e"},
    "2^16 states": {"regex": r"(.|\n)*e(.|\n){16}e(.|\n)*"},
    "words": {"regex": r"(\w+\s?){60}\p{L}{50}"},
    "14 optional names": {"json": OPTIONAL},
}
"""Grammars of at most 1 kB. Each is followed by four answers at once."""
PLAIN = {"prompt": "import os\n" * 10, "max_tokens": 400, "temperature": 1, "seed": 3, "n": 4}
PLAIN |= {"ignore_eos": True}
PLAIN_CHAT = {"messages": [USER], "max_tokens": 400, "temperature": 1, "ignore_eos": True, "n": 4}
SLOW_TEXT = {"type": "string", "pattern": "^(.|\\n)*e(.|\\n){14}e(.|\\n)*$"}
SLOW_TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"x": SLOW_TEXT}}}
SLOW_CHATS: dict[str, dict[str, Any]] = {
    "a demanded call": {"tool_choice": "required"},
    "a strict call": {},
    "ambiguous, behind reasoning": {
        "structured_outputs": {"grammar": AMBIGUOUS},
        "chat_template_kwargs": {"enable_thinking": True},
        "thinking_token_budget": 8,
    },
}
_numbers = itertools.count()


def _new_grammar() -> bytes:
    """Return a body with a different grammar each time."""
    grammar = AMBIGUOUS.replace('"+"', f'"{next(_numbers)}"')
    return json.dumps(PLAIN | {"n": 1, "structured_outputs": {"grammar": grammar}}).encode()


def _slow_to_follow() -> Iterator[Hostile]:
    for name, grammar in GRAMMARS.items():
        guided = _body(**PLAIN, structured_outputs=grammar)
        yield Hostile(f"grammar: {name}", COMPLETIONS, guided, _body(**PLAIN))
    for name, fields in SLOW_CHATS.items():
        tool = {"type": "function", "function": SLOW_TOOL | {"strict": name == "a strict call"}}
        tools = {"tools": [tool]} if name.endswith("call") else {}
        guided = _body(**PLAIN_CHAT | tools | fields)
        yield Hostile(f"grammar: {name}", CHAT, guided, _body(**PLAIN_CHAT))
    plain = _body(**PLAIN | {"n": 1})
    yield Hostile("grammar: 24 different ones at once", COMPLETIONS, _new_grammar, plain, 24)


def _names(number: int) -> bytes:
    names = {f"{index:x}": 1 for index in range(number)}
    tool = {"type": "function", "function": {"name": "f", "parameters": names}}
    return json.dumps({"max_tokens": 1, "messages": [USER], "tools": [tool]}).encode()


def _arguments(number: int) -> bytes:
    names = json.dumps({f"{index:x}": 1 for index in range(number)})
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": names}}
    messages = [USER, {"role": "assistant", "tool_calls": [call]}, USER]
    return json.dumps({"max_tokens": 1, "messages": messages}).encode()


def _prompts(number: int, length: int) -> bytes:
    prompts = [[index % 250] * length for index in range(number)]
    return json.dumps({"prompt": prompts, "max_tokens": 1}).encode()


def _stops(number: int, length: int) -> bytes:
    stops = ["a" * (length - 3) + f"{index:03}" for index in range(number)]
    return json.dumps({"prompt": "a" * 500, "stop": stops, "max_tokens": 64}).encode()


class Reader(threading.Thread):
    """Client that reads an endless answer and records the time of each piece."""

    def __init__(self, port: int, server: int) -> None:
        """Prepare the client of a server with the process id ``server``."""
        super().__init__(daemon=True)
        self._port = port
        self._server, self._engine = server, child_of(server)
        self._ends = False
        self.gaps: list[tuple[float, float]] = []
        """Time of a piece, and the seconds since the one before it in the same answer, without the
        waiting for a processor."""

    def run(self) -> None:
        fields = {"prompt": "Tell me more.", "max_tokens": 3000, "ignore_eos": True, "stream": True}
        threads = [(pid, pid) for pid in (self._server, self._engine)]
        threads.append((os.getpid(), threading.get_native_id()))
        while not self._ends:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", COMPLETIONS, json.dumps(fields), headers)
            answer = connection.getresponse()
            before: tuple[float, float] | None = None
            while not self._ends and (line := answer.readline()):
                if line.startswith(b"data: {"):
                    at_s, waited_s = time.perf_counter(), sum(_waited_s(*one) for one in threads)
                    if before is not None:
                        gap_s = at_s - before[0] - (waited_s - before[1])
                        self.gaps.append((at_s, max(gap_s, 0.0)))
                    before = at_s, waited_s
            connection.close()

    def end(self) -> None:
        self._ends = True
        self.join()

    def gaps_s(self, start_s: float, end_s: float) -> list[float]:
        """Return the seconds between two pieces that overlap the interval."""
        return [gap_s for at_s, gap_s in self.gaps if at_s > start_s and at_s - gap_s < end_s]

    def tokens_per_s(self, start_s: float, end_s: float) -> float:
        found = self.gaps_s(start_s, end_s)
        return len(found) / max(sum(found), 1e-3)


def _waited_s(pid: int, thread: int) -> float:
    """Return the seconds that a thread was ready but did not run, or 0 if the system does not
    report it."""
    try:
        with open(f"/proc/{pid}/task/{thread}/schedstat", encoding="utf-8") as figures:
            return int(figures.read().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def attack(port: int, reader: Reader, hostile: Hostile) -> Outcome:
    """Send the bodies of one attack and wait for the answers, after its control."""
    payloads = [hostile.make() for _ in range(hostile.num_senders)]
    time.sleep(0.2)  # Making the bodies also slowed down the reader, a thread of this process.
    start_s = time.perf_counter()
    if hostile.control is not None:
        _post_all(port, hostile.path, [hostile.control() for _ in payloads])
    control_per_s = reader.tokens_per_s(start_s, time.perf_counter())
    start_s = time.perf_counter()
    status = _post_all(port, hostile.path, payloads)
    name = f"{hostile.path} {hostile.name}"
    return _outcome(reader, name, status, start_s, control_per_s if hostile.control else None)


def _outcome(
    reader: Reader, name: str, status: int, start_s: float, control_per_s: float | None
) -> Outcome:
    """Return the effect of an attack on the reader, over at least a second."""
    end_s = time.perf_counter()
    time.sleep(1.0)
    last_s = max(end_s, start_s + 1.0)
    worst_ms = round(1e3 * max(reader.gaps_s(start_s, last_s)), 1)
    speed = reader.tokens_per_s(start_s, last_s)
    loss = None if control_per_s is None else round(1 - speed / control_per_s, 3)
    return Outcome(name, status, worst_ms, round(speed), loss)


def _post_all(port: int, path: str, payloads: Sequence[bytes]) -> int:
    """Post all bodies at once. Returns the largest status."""
    with ThreadPoolExecutor(len(payloads)) as senders:
        return max(senders.map(partial(_post, port, path), payloads))


def _post(port: int, path: str, payload: bytes, most_s: float = ATTACK_S) -> int:
    """Post a body and read its answer, for at most ``most_s``. Returns the status, or 0 if there
    was none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=most_s)
    status = 0
    try:
        connection.request("POST", path, payload, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        status = answer.status
        answer.read()
    except (BrokenPipeError, ConnectionResetError):
        status = 413  # Refused before the body was sent completely.
    except TimeoutError:
        pass
    finally:
        connection.close()
    return status


def hold_connections(port: int, reader: Reader) -> Outcome:
    """Open many connections with endless headers. The status is that of the last
    other request."""
    start_s, status, held = time.perf_counter(), 0, []
    for _ in range(5):
        for _ in range(NUM_HELD):
            held.append(socket.create_connection(("127.0.0.1", port), timeout=5))
            with suppress(OSError):
                held[-1].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Half: ")
        other = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        other.request("GET", "/v1/models")
        status = other.getresponse().status
        other.close()
    name = f"{len(held)} connections whose headers never end"
    outcome = _outcome(reader, name, status, start_s, None)
    for connection in held:
        connection.close()
    return outcome


def ask_beside_a_prompt(port: int, server: int, path: str) -> Outcome:
    """Ask for ``path`` while a long prompt is computed, until its answer arrives."""
    prompt = _body(prompt=f"{path} " + "lorem ipsum " * 2000, max_tokens=1)()
    worst_s, status = 0.0, 0
    with ThreadPoolExecutor(1) as senders:
        sent = senders.submit(_post, port, COMPLETIONS, prompt, 600.0)
        while not sent.done():
            time.sleep(0.1)
            start_s, waited_s = time.perf_counter(), _waited_s(server, server)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read(1)
            waited_s = _waited_s(server, server) - waited_s
            worst_s = max(worst_s, time.perf_counter() - start_s - waited_s)
            connection.close()
            status = max(status, answer.status)
        assert sent.result() == 200, "the prompt is computed"
    return Outcome(f"{path} beside a long prompt", status, round(1e3 * worst_s, 1), 0, None)


@contextmanager
def serving(*flags: str) -> Iterator[tuple[int, Reader, int]]:
    """Start a server. Yields its port, a client that reads from it, and its process id."""
    command = [sys.executable, "-m", "engine", "serve", "--port", "0", "--cache-gib", "0.25"]
    command += flags
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = server_port(server)
            reader = Reader(port, server.pid)
            reader.start()
            time.sleep(2)
            yield port, reader, server.pid
            reader.end()
        finally:
            server.terminate()


def measure(attacks: Sequence[Callable[[], Outcome]], num_rounds: int) -> list[Outcome]:
    """Return the median outcome of each attack, which runs once a round.

    An attack over a limit is repeated, because a stall of the machine rarely repeats.
    """
    found: list[list[Outcome]] = [[] for _ in attacks]
    for _ in range(num_rounds):
        for outcomes, make in zip(found, attacks, strict=True):
            outcomes.append(make())
    for outcomes, make in zip(found, attacks, strict=True):
        while len(outcomes) < ROUNDS_TO_FAIL and _median(outcomes).is_over:
            outcomes.append(make())
    return [_median(outcomes) for outcomes in found]


def _median(rounds: Sequence[Outcome]) -> Outcome:
    figures = {
        name: statistics.median(getattr(outcome, name) for outcome in rounds)
        for name in ("worst_ms", "tokens_per_s", "loss")
        if getattr(rounds[0], name) is not None
    }
    return rounds[0]._replace(**figures)


def run(seed: int, num_rounds: int, only: str = "") -> dict[str, float]:
    """Attack a server. Returns the largest delay, loss and memory.

    ``only`` selects the attacks with this text in their name. Prints a row for each. Raises
    AssertionError if a limit is exceeded.
    """
    # Prefills of other requests slow down every step, so use the smallest token budget.
    with serving("--token-budget", "64") as (port, reader, pid):
        attacks: list[Callable[[], Outcome]] = [
            partial(attack, port, reader, body)
            for body in (*BODIES, *_slow_to_follow())
            if only in f"{body.path} {body.name}"
        ]
        if only in "connections":
            attacks.append(partial(hold_connections, port, reader))
        rows = measure(attacks, num_rounds)
        peak_mib = _peak_mib(pid)
    if paths := [path for path in MONITORED if only in f"{path} beside a long prompt"]:
        with serving() as (port, reader, pid):
            reader.end()
            asks = [partial(ask_beside_a_prompt, port, pid, path) for path in paths]
            rows += measure(asks, num_rounds)
    print(f"{'status':>6} {'worst ms':>9} {'tokens/s':>9} {'loss':>6}  attack")
    for row in rows:
        loss = " " * 6 if row.loss is None else f"{row.loss:6.0%}"
        print(f"{row.status:6} {row.worst_ms:9.1f} {row.tokens_per_s:9.0f} {loss}  {row.name}")
    over = [row.name for row in rows if row.is_over]
    assert not over, f"over {1e3 * LIMIT_S:.0f} ms or {LIMIT_LOSS:.0%} loss: {over}"
    return {
        "worst ms": max(row.worst_ms for row in rows),
        "largest loss": max(row.loss or 0.0 for row in rows),
        "peak MiB of the server": round(peak_mib),
    }


def _peak_mib(pid: int) -> float:
    """Return the peak memory of the process, or 0 if the system does not report it."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0.0
