"""Delay and slowdown that one hostile client causes for another.

``engine serve`` runs the built-in model. One client reads an endless answer while attacks follow
one after another: bodies at or above the size limits, grammars of up to 1 kB that are slow to
follow, connections with endless headers, and long prompts with drafts.

For each attack the output has the longest time between two tokens of the first client, its tokens
per second, and the loss relative to a control. The control of a grammar is the same request without
it, that of a prompt with drafts is the same on a server without drafts just before. For other
attacks it is the time before.

Other processes of the machine influence both. Each figure is therefore also given net, without the
time in which the involved threads waited for a processor (as reported by Linux). The limits apply
to net figures. Loss is judged if the control is the same work. An attack over a limit is repeated,
and its median decides. Loopback only.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
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

LIMIT_S, LIMIT_LOSS = 0.1, 0.1
"""Limits for the delay of another client's token, and for the loss of its speed."""
ROUNDS_TO_FAIL = 5
"""Minimum number of rounds before a median over the limit counts as a failure."""
MAX_CONNECTIONS = 100
"""Maximum number of connections of the attacked server."""
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
    mib: float
    status: int
    seconds: float
    median_ms: float
    """Median time between two tokens of the other client during the attack."""
    worst_ms: float
    net_ms: float
    """Longest time without waiting for a processor."""
    tokens_per_s: float
    """Net speed of the other client during the attack."""
    control_per_s: float
    """Net speed of the other client during the control."""
    is_judged: bool
    """True if the control is the same work, so there should be no loss."""

    @property
    def loss(self) -> float:
        """Lost share of the other client's speed."""
        return 1 - self.tokens_per_s / self.control_per_s

    @property
    def is_over(self) -> bool:
        """True if a limit is exceeded."""
        return self.net_ms > 1e3 * LIMIT_S or (self.is_judged and self.loss > LIMIT_LOSS)


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
AMBIGUOUS = 'start: e\ne: e e | /[a-z]/ | e "+" e | e e e e | '
WIDE = (
    f"start: /[a-z]{{5}}/ {'a ' * 60}\na: {' | '.join(f'b{i}' for i in range(30))} |\n"
    + "\n".join(f'b{i}: a a | "x" |' for i in range(30))
)
OPTIONAL = {
    "type": "object",
    "properties": {f"p{i}": {"anyOf": [{"type": "array"}, {"type": "string"}]} for i in range(14)},
}
SLOW_TEXT = {"type": "string", "pattern": "^(.|\\n)*e(.|\\n){14}e(.|\\n)*$"}
HOSTILE_TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"x": SLOW_TEXT}}}
GRAMMARS: dict[str, dict[str, Any]] = {
    "ambiguous": {"structured_outputs": {"grammar": AMBIGUOUS}},
    "ambiguous, n=4": {"structured_outputs": {"grammar": AMBIGUOUS}, "n": 4},
    "ambiguous, eight at once": {
        "structured_outputs": {"grammar": "start: e\ne: e e e e e e e e | /[a-z]/ | "}
    },
    "ambiguous behind text": {
        "structured_outputs": {"grammar": AMBIGUOUS.replace("start:", "start: /[a-z]{50}/")}
    },
    "empty rules": {
        "structured_outputs": {"grammar": 'start: (a? b? c?)*\na: "a"?\nb: "b"*\nc: ("a"|"b")*'},
        "n": 4,
    },
    "60 x 30 empty rules": {"structured_outputs": {"grammar": WIDE}},
    "palindromes, n=4": {
        "structured_outputs": {"grammar": "start: p\np: /[a-z]/ p /[a-z]/ | /[a-z]/ |"},
        "n": 4,
    },
    "GBNF": {"structured_outputs": {"grammar": "root ::= e\ne ::= e e | [a-z] | e e e e"}},
    "2^16 states": {"structured_outputs": {"regex": r"(.|\n)*e(.|\n){16}e(.|\n)*"}},
    "words": {"structured_outputs": {"regex": r"(\w+\s?){60}\p{L}{50}"}},
    "14 optional names": {"structured_outputs": {"json": OPTIONAL}, "n": 4},
}
"""Grammars of at most 1 kB."""


def _guided(fields: dict[str, Any]) -> Hostile:
    name = next(name for name, grammar in GRAMMARS.items() if grammar is fields)
    plain = {"prompt": "import os\n" * 10, "max_tokens": 400, "temperature": 1, "seed": 3}
    plain |= {"ignore_eos": True, "n": fields.get("n", 1)}
    return Hostile(f"grammar: {name}", COMPLETIONS, _body(**plain | fields), _body(**plain))


_numbers = itertools.count()


def _unique_grammar(**fields: Any) -> Callable[[], bytes]:
    """Return a function that makes bodies with a different grammar each time."""

    def make() -> bytes:
        grammar = AMBIGUOUS.replace('"+"', f'"{next(_numbers)}"')
        return json.dumps(fields | {"structured_outputs": {"grammar": grammar}}).encode()

    return make


def _called(name: str, strict: bool, **fields: Any) -> Hostile:
    """Return an attack by a tool with a schema that is slow to follow."""
    function = HOSTILE_TOOL | {"strict": strict}
    chat = {"messages": [USER], "max_tokens": 400, "temperature": 1, "ignore_eos": True}
    tools = {"tools": [{"type": "function", "function": function}]}
    return Hostile(f"grammar: {name}", CHAT, _body(**chat | tools | fields), _body(**chat))


SLOW_TO_FOLLOW = (
    *map(_guided, GRAMMARS.values()),
    _called("a demanded call", False, tool_choice="required", n=4),
    _called("a strict call", True),
    Hostile(
        "grammar: ambiguous, behind reasoning",
        CHAT,
        _body(
            messages=[USER], max_tokens=400, structured_outputs={"grammar": AMBIGUOUS},
            ignore_eos=True, n=4, chat_template_kwargs={"enable_thinking": True},
            thinking_token_budget=8,
        ),
        _body(messages=[USER], max_tokens=400, ignore_eos=True, n=4),
    ),
    Hostile(
        "grammar: 24 different ones at once",
        COMPLETIONS,
        _unique_grammar(prompt="import os\n" * 10, max_tokens=400, ignore_eos=True),
        _body(prompt="import os\n" * 10, max_tokens=400, ignore_eos=True),
        num_senders=24,
    ),
)  # fmt: skip
LONG_PROMPT = random.Random(1).choices(range(250), k=30_000)
DRAFTED = tuple(
    Hostile(
        f"30,000 cached ids and {number} more, drafted for",
        COMPLETIONS,
        _body(prompt=[*LONG_PROMPT, *range(number)], max_tokens=200, ignore_eos=True),
    )
    for number in (0, 1, 2)
)
"""Prompts with drafts. The first is computed, the others find it in the cache."""


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


class Piece(NamedTuple):
    """Time of a piece of an answer, and the seconds for which threads had waited for a
    processor."""

    at_s: float
    engine_s: float
    all_s: float
    """Sum of the engine's thread, the server's and the reader's."""


class Reader(threading.Thread):
    """Client that reads an endless answer and records the time of each piece."""

    def __init__(self, port: int, server: int) -> None:
        """Prepare the client of a server with the process id ``server``."""
        super().__init__(daemon=True)
        self._port = port
        self._server, self._engine = server, child_of(server)
        self._ends = False
        self._may_read = threading.Event()
        self._may_read.set()
        self.gaps: list[tuple[Piece, Piece]] = []
        """Pairs of consecutive pieces of one answer."""

    def run(self) -> None:
        fields = {"prompt": "Tell me more.", "max_tokens": 3000, "ignore_eos": True, "stream": True}
        threads = [(self._server, self._server), (os.getpid(), threading.get_native_id())]
        while self._may_read.wait() and not self._ends:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", COMPLETIONS, json.dumps(fields), headers)
            answer = connection.getresponse()
            before: Piece | None = None
            while self._may_read.is_set() and not self._ends and (line := answer.readline()):
                if line.startswith(b"data: {"):
                    engine_s = _waited_s(self._engine, self._engine)
                    others_s = sum(_waited_s(*thread) for thread in threads)
                    piece = Piece(time.perf_counter(), engine_s, engine_s + others_s)
                    if before is not None:
                        self.gaps.append((before, piece))
                    before = piece
            connection.close()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read during the block only."""
        self._may_read.set()
        time.sleep(1)
        yield
        self._may_read.clear()

    def end(self) -> None:
        self._ends = True
        self._may_read.set()
        self.join()

    def tokens_per_s(self, start_s: float, end_s: float) -> float:
        """Return pieces per second between two times, without the engine's waiting for a
        processor."""
        found = [after for _, after in self.gaps if start_s < after.at_s <= end_s]
        if len(found) < 2:
            return 1 / (end_s - start_s)
        waited_s = found[-1].engine_s - found[0].engine_s
        return len(found) / max(found[-1].at_s - found[0].at_s - waited_s, 1e-3)

    def gaps_s(self, start_s: float, end_s: float) -> list[tuple[float, float]]:
        """Return the times between two pieces that overlap the interval, gross and net of waiting
        for a processor."""
        return [
            (gross_s := after.at_s - before.at_s, max(gross_s - (after.all_s - before.all_s), 0.0))
            for before, after in self.gaps
            if after.at_s > start_s and before.at_s < end_s
        ]


def _waited_s(pid: int, thread: int) -> float:
    """Return the seconds that a thread was ready but did not run, or 0 if the system does not
    report it."""
    try:
        with open(f"/proc/{pid}/task/{thread}/schedstat", encoding="utf-8") as figures:
            return int(figures.read().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def attack(
    port: int, reader: Reader, hostile: Hostile, control_per_s: float | None = None
) -> Outcome:
    """Send the bodies of one attack and wait for the answers, after its control.

    With ``control_per_s``, the control has already been measured.
    """
    payloads = [hostile.make() for _ in range(hostile.num_senders)]
    time.sleep(0.2)  # Making the bodies also slowed down the reader, a thread of this process.
    is_judged = control_per_s is not None or hostile.control is not None
    start_s = time.perf_counter()
    if hostile.control is not None:
        _post_all(port, hostile.path, [hostile.control() for _ in payloads])
    elif control_per_s is None:
        time.sleep(1.0)
    control_per_s = control_per_s or reader.tokens_per_s(start_s, time.perf_counter())
    start_s = time.perf_counter()
    status = _post_all(port, hostile.path, payloads) if any(payloads) else 200
    sent = f"{hostile.path} {hostile.name}", sum(map(len, payloads)) / 2**20, status
    return _outcome(reader, sent, start_s, control_per_s, is_judged)


def compare(plain: tuple[int, Reader], drafting: tuple[int, Reader], body: Hostile) -> Outcome:
    """Attack two servers, one after the other. The first is the control; each is given as its port
    and its reader, which reads only meanwhile."""
    speed: float | None = None
    for port, reader in (plain, drafting):
        with reader.reading():
            outcome = attack(port, reader, body, speed)
        speed = outcome.tokens_per_s
    return outcome


def _outcome(
    reader: Reader,
    sent: tuple[str, float, int],
    start_s: float,
    control_per_s: float,
    is_judged: bool,
) -> Outcome:
    """Return the effect of an attack (name, MiB, status) on the reader, over at least a second."""
    end_s = time.perf_counter()
    time.sleep(1.0)
    last_s = max(end_s, start_s + 1.0)
    gross, net = zip(*reader.gaps_s(start_s, last_s), strict=True)
    figures = statistics.median(gross), max(gross), max(net)
    median_ms, worst_ms, net_ms = (round(1e3 * figure, 1) for figure in figures)
    speeds = (round(speed) for speed in (reader.tokens_per_s(start_s, last_s), control_per_s))
    name, mib, status = sent
    seconds = round(end_s - start_s, 2)
    times = seconds, median_ms, worst_ms, net_ms
    return Outcome(name, round(mib, 2), status, *times, *speeds, is_judged)


def _post_all(port: int, path: str, payloads: Sequence[bytes]) -> int:
    """Post all bodies at once. Returns the largest status."""
    with ThreadPoolExecutor(len(payloads)) as senders:
        return max(senders.map(partial(_post, port, path), payloads))


def _post(port: int, path: str, payload: bytes) -> int:
    """Post a body and read its answer, for at most ``ATTACK_S``. Returns the status, or 0 if there
    was none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ATTACK_S)
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
    """Open more connections than allowed, with endless headers. The status is that of the last
    other request."""
    start_s = time.perf_counter()
    time.sleep(1.0)
    control_per_s = reader.tokens_per_s(start_s, time.perf_counter())
    start_s, status, held = time.perf_counter(), 0, []
    for _ in range(5):
        for _ in range(MAX_CONNECTIONS):
            held.append(socket.create_connection(("127.0.0.1", port), timeout=5))
            with suppress(OSError):
                held[-1].sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nX-Half: ")
        other = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        other.request("GET", "/v1/models")
        status = other.getresponse().status
        other.close()
    sent = f"{len(held)} connections whose headers never end", 0.0, status
    outcome = _outcome(reader, sent, start_s, control_per_s, False)
    for connection in held:
        connection.close()
    return outcome


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[int, Reader, subprocess.Popen[str]]]:
    """Start a server. Yields its port, a client that reads from it, and its process."""
    command = [sys.executable, "-m", "engine", "serve", "--port", "0", "--cache-gib", "0.25"]
    # Prefills of other requests slow down every step, so use the smallest token budget.
    command += ["--token-budget", "64", "--max-connections", str(MAX_CONNECTIONS), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = server_port(server)
            reader = Reader(port, server.pid)
            reader.start()
            time.sleep(2)
            yield port, reader, server
            reader.end()
        finally:
            server.terminate()


def measure(attacks: Sequence[Callable[[], Outcome]], num_rounds: int) -> list[list[Outcome]]:
    """Return the outcomes of each attack, round by round.

    An attack over a limit is repeated, because a stall of the machine rarely repeats.
    """
    found: list[list[Outcome]] = [[] for _ in attacks]
    for _ in range(num_rounds):
        for outcomes, make in zip(found, attacks, strict=True):
            outcomes.append(make())
    for outcomes, make in zip(found, attacks, strict=True):
        while len(outcomes) < ROUNDS_TO_FAIL and _median(outcomes).is_over:
            outcomes.append(make())
    return found


def run(seed: int, num_rounds: int, only: str = "") -> dict[str, float]:
    """Attack a server. Returns the largest delay, loss and memory.

    ``only`` selects the attacks with this text in their name. Prints a row for each. Raises
    AssertionError if a limit is exceeded.
    """

    def chosen(attacks: Sequence[Hostile]) -> list[Hostile]:
        return [attack for attack in attacks if only in f"{attack.path} {attack.name}"]

    bodies, drafted = chosen((*BODIES, *SLOW_TO_FOLLOW)), chosen(DRAFTED)
    with serving() as (port, reader, server):
        attacks = [partial(attack, port, reader, body) for body in bodies]
        if only in "connections":
            attacks.append(partial(hold_connections, port, reader))
        found = measure(attacks, num_rounds)
        peak_mib = _peak_mib(server.pid)
    if drafted:
        with serving() as plain, serving("--draft", "tree:8") as drafting:
            servers = plain[:2], drafting[:2]
            for _, reader in servers:
                with reader.reading():
                    pass
            found += measure([partial(compare, *servers, body) for body in drafted], num_rounds)
    rows = [_median(outcomes) for outcomes in found]
    header = f"{'token ms':>9} {'worst ms':>9} {'net ms':>7} {'tokens/s':>9} {'loss':>6}"
    print(f"{'MiB':>5} {'status':>6} {'s':>6} {header}  attack")
    for row in rows:
        loss = f"{row.loss:6.0%}" if row.is_judged else " " * 6
        print(
            f"{row.mib:5.2f} {row.status:6} {row.seconds:6.2f} {row.median_ms:9.1f} "
            f"{row.worst_ms:9.1f} {row.net_ms:7.1f} {row.tokens_per_s:9.0f} {loss}  {row.name}"
        )
    over = [row.name for row in rows if row.is_over]
    assert not over, f"over {1e3 * LIMIT_S:.0f} ms net or {LIMIT_LOSS:.0%} loss: {over}"
    return {
        "worst ms": max(row.worst_ms for row in rows),
        "worst net ms": max(row.net_ms for row in rows),
        "largest loss": round(max((row.loss for row in rows if row.is_judged), default=0.0), 3),
        "peak MiB of the server": round(peak_mib),
    }


FIGURES = ("seconds", "median_ms", "worst_ms", "net_ms", "tokens_per_s", "control_per_s")


def _median(rounds: Sequence[Outcome]) -> Outcome:
    """Return the median of each figure over several rounds, because the machine sometimes
    stalls."""
    first = rounds[0]
    figures = {
        name: statistics.median(getattr(outcome, name) for outcome in rounds) for name in FIGURES
    }
    return first._replace(**figures)


def _peak_mib(pid: int) -> float:
    """Return the peak memory of the process, or 0 if the system does not report it."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0.0
