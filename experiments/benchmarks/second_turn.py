"""Count the prompt tokens that a server computes a second time, for this engine and llama-server.

    make llama                                              # builds llama-server, some minutes
    python -m experiments.benchmarks.second_turn --size small        # about a minute
    python -m experiments.benchmarks.second_turn --size published    # the plan of docs/results.md
    python -m experiments.benchmarks.second_turn --model FILE.gguf --tokens 2000 16000 --at-once 1 4

Every server has the same GGUF file and receives the same conversations over the OpenAI protocol.
*Read again* is the number of prompt tokens that an earlier request had computed, as prompt or as
answer, and that are computed once more: the longest common prefix with the rendered ids of earlier
requests, less the cached tokens that the server reports. Each report is checked against those ids.
Answers repeat one token (`logit_bias`), so that all servers get the same prompts.

The records of a case are written when it ends, in place of earlier ones of the same case.
``--resume`` leaves out cases that were measured at the same commit. Counts are valid on a busy
machine, times are not: TTFT is left out if other processes used more than ``MAX_OTHERS`` of the
processors.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import os
import random
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.config import BUILTIN_DIR
from engine.weights.model_config import read_config
from experiments import provenance
from experiments.benchmarks import llama_cpp as rival
from experiments.studies.common import Records, grouped, positive, rounded
from experiments.tables import Cell, Column, Table
from experiments.texts import KEYS, NAMES, THINGS
from hybridcache import ModelGeometry
from hybridcache.geometry.units import GIB
from hybridcache.radix.tokens import common_prefix_len

Message = dict[str, Any]
Steps = Generator["ClientRequest", Message, None]
"""Requests of a client. Each receives the answer as a message."""
LLAMA_SERVER = rival.FOLDER / "bin" / "llama-server"
MAX_OTHERS = 0.05
"""Largest share of the processors in use by other processes at which times are kept."""
MODELS = provenance.ROOT / "out" / "models"
"""Folder of written models. They are written once."""
MAX_LEN = 32768
DIRECT = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
"""Formats that are written without llama.cpp."""
WORDS = (*KEYS, *NAMES, *THINGS)


# --- Cases ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """One request of a client."""

    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] | None = None
    row: str = ""
    """Row of the table, or empty if the request is not counted."""
    cut: int | None = None
    """Number of pieces of the answer after which the client closes the connection."""
    restart: bool = False
    """Restart the server first."""
    ends: bool = False
    """Report that no request of this conversation follows."""


class Text:
    """Text of one client, drawn from seeds. ``size``: characters of a prompt."""

    def __init__(self, name: str, client: int, size: int) -> None:
        self.size = size
        self._own, self._common = random.Random(f"{name} {client}"), random.Random(name)
        self.common = self.draw(0.5, self._common)
        """Text that all clients of a case share."""

    def draw(self, share: float, source: random.Random | None = None) -> str:
        """Return words of about ``share`` times the size of a prompt."""
        source = source or self._own
        return " ".join(source.choice(WORDS) for _ in range(max(int(share * self.size / 6), 2)))

    def tools(self) -> list[dict[str, Any]]:
        """Return four tools of a fifth of a prompt."""
        number = {"type": "object", "properties": {"path": {"type": "string"}}}
        return [
            {
                "type": "function",
                "function": {"name": name, "description": self.draw(0.05), "parameters": number},
            }
            for name in ("read", "write", "search", "run")
        ]

    def order(self, count: int, turns: int) -> list[int]:
        """Return each of ``count`` numbers ``turns`` times in random order."""
        order = list(range(count)) * turns
        self._own.shuffle(order)
        return order


@dataclass
class ClientChat:
    """One conversation as its client keeps it."""

    text: Text
    system: str = ""
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] | None = None
    messages: list[Message] = field(default_factory=list)
    num_calls: int = 0

    def ask(self, row: str = "", **options: Any) -> Generator[ClientRequest, Message, Message]:
        """Send the messages and append the answer, which is returned."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        sent = [*head, *map(dict, self.messages)]
        answer = yield ClientRequest(sent, self.tools, self.variables, row, **options)
        self.messages.append(answer)
        return answer

    def turn(
        self, share: float, row: str = "", **options: Any
    ) -> Generator[ClientRequest, Message, Message]:
        """Send one more message of the user."""
        self.messages.append({"role": "user", "content": self.text.draw(share)})
        return (yield from self.ask(row, **options))

    def step(self, share: float, row: str = "") -> Generator[ClientRequest, Message, Message]:
        """Let the last answer call a tool and send its result of ``share``."""
        self.num_calls += 1
        call = {"name": "read", "arguments": json.dumps({"path": f"{self.num_calls}.txt"})}
        name = f"call_{self.num_calls}"
        self.messages[-1]["tool_calls"] = [{"id": name, "type": "function", "function": call}]
        result = {"role": "tool", "tool_call_id": name, "content": self.text.draw(share)}
        self.messages.append(result)
        return (yield from self.ask(row))

    def fork(self) -> ClientChat:
        """Return a copy that goes on by itself."""
        return ClientChat(
            self.text, self.system, self.tools, self.variables, [*map(dict, self.messages)]
        )


def opened(text: Text, **options: Any) -> ClientChat:
    """Return a chat with a system message of half a prompt."""
    return ClientChat(text, system=text.draw(0.5), **options)


def next_turn(text: Text, count: int) -> Steps:
    chat = opened(text)
    yield from chat.turn(0.5)
    yield from chat.turn(0.2, "next turn")


def tool_result(text: Text, count: int) -> Steps:
    chat = opened(text, tools=text.tools())
    yield from chat.turn(0.3)
    yield from chat.step(0.1, "tool call and result")


def thoughts(text: Text, count: int) -> Steps:
    chat = opened(text, variables={"enable_thinking": True})
    for row in ("", "", "thoughts stripped, third turn"):
        yield from chat.turn(0.2, row)


def edits(text: Text, count: int) -> Steps:
    chat = opened(text)
    yield from chat.turn(0.5)
    longer = ClientChat(text, chat.system, messages=[dict(chat.messages[0])])
    longer.messages[0]["content"] += " please"
    yield from longer.ask("last message edited at its end")
    yield from ClientChat(text, chat.system).turn(0.5, "last message rewritten")
    yield from chat.turn(0.1, "back to the original after an edit")


def early_edit(text: Text, count: int) -> Steps:
    chat = opened(text)
    for _ in range(5):
        yield from chat.turn(0.1)
    chat.messages = chat.messages[:5]
    chat.messages[4]["content"] += " again"
    yield from chat.ask("edit at turn 3 of 5")


def steered(text: Text, count: int) -> Steps:
    chat = opened(text)
    yield from chat.turn(0.5, cut=6)
    yield from chat.turn(0.05, "abort and steer")


def subagent(text: Text, count: int) -> Steps:
    chat = opened(text, tools=text.tools())
    yield from chat.turn(0.2)
    yield from chat.step(0.1)
    child = ClientChat(text, chat.system, chat.tools)
    yield from child.turn(0.2, "subagent with the same system prompt")
    yield from child.step(0.1)
    yield from chat.step(0.1, "back to the parent")


def branches(text: Text, count: int) -> Steps:
    chat = opened(text)
    yield from chat.turn(0.5)
    both = chat.fork(), chat.fork()
    for row in ("", "two branches in turn", "two branches in turn"):
        for branch in both:
            yield from branch.turn(0.1, row)


def twelve(text: Text, count: int) -> Steps:
    chats = [opened(text) for _ in range(max(12 // count, 1))]
    for row in ("", "", "twelve conversations, third turn"):
        for chat in chats:
            yield from chat.turn(0.2, row)


def restarted(text: Text, count: int) -> Steps:
    chat = opened(text)
    yield from chat.turn(0.5)
    yield from chat.turn(0.1, "after a restart", restart=True)


def dated_session(text: Text, count: int) -> Steps:
    rest = text.draw(0.5)
    for minute in (10, 11):
        chat = ClientChat(text, system=f"{minute} o'clock, Monday. {rest}")
        yield from chat.turn(0.2, "new session, date at its start" if minute == 11 else "")


def dated_turns(text: Text, count: int) -> Steps:
    chat = opened(text)
    rest = chat.system
    for minute in (10, 11, 12):
        chat.system = f"{minute} o'clock, Monday. {rest}"
        yield from chat.turn(0.2, "date first, new at each turn" if minute == 12 else "")


def tools_behind(text: Text, count: int) -> Steps:
    shared, tools = text.draw(0.4), text.tools()
    for folder, which in (("alpha", ""), ("beta", "second"), ("gamma", "third")):
        chat = ClientChat(text, f"{shared} Directory: {folder}.", tools)
        yield from chat.turn(0.2, which and f"{which} folder, tools behind the system text")


def many(row: str, text: Text, count: int, reports_ends: bool = False) -> Steps:
    number = max(NUM_MANY // count, 1)
    chats = [opened(text) for _ in range(number)]
    for chat in chats:
        yield from chat.turn(0.3)
    left = text.order(number, 2)
    while left:
        index = left.pop(0)
        yield from chats[index].turn(0.1, row, ends=reports_ends and index not in left)


def long_run(text: Text, count: int) -> Steps:
    chat = opened(text, tools=text.tools())
    yield from chat.turn(0.2)
    for step in range(1, 61):
        yield from chat.step(0.05, "agent run of 60 steps")
        if step == 30:  # The client replaces its history by a summary.
            yield from chat.turn(0.02, "compaction: the summary")
            chat.messages = []
            yield from chat.turn(0.2, "compaction: the new context")


def one_folder(text: Text, count: int) -> Steps:
    tools = Text("tools", 0, text.size).tools()
    chat = ClientChat(text, f"{text.common} Directory: alpha.", tools)
    yield from chat.turn(0.2, "two agents in one folder, first request")
    for _ in range(2):
        yield from chat.step(0.1, "two agents in one folder, later requests")


NUM_MANY, NUM_FITTING = 32, 8
"""Conversations of the cases with scarce memory, and how many of them fit."""
SCARCE, TIERED = f"{NUM_MANY} conversations, memory for {NUM_FITTING}", "with a host tier"
ENDED = "ends reported"


class ClientCase(NamedTuple):
    """Clients that do the same with texts of their own."""

    steps: Callable[[Text, int], Steps]
    """Receives the number of clients too, to divide conversations among them."""
    least: int = 1
    """Smallest number of clients."""
    needs: str = ""
    """``scarce`` memory, ``tiered`` for scarce memory with a host tier, or ``state`` for a copy of
    the cache that outlives the server."""
    drawn_as: str = ""
    """Case with the same texts and order, or empty."""


CASES: dict[str, ClientCase] = {
    "next turn": ClientCase(next_turn),
    "tool result": ClientCase(tool_result),
    "thoughts": ClientCase(thoughts),
    "edits": ClientCase(edits),
    "early edit": ClientCase(early_edit),
    "steer": ClientCase(steered),
    "subagent": ClientCase(subagent),
    "branches": ClientCase(branches),
    "twelve": ClientCase(twelve),
    "restart": ClientCase(restarted, needs="state"),
    "dated session": ClientCase(dated_session),
    "dated turns": ClientCase(dated_turns),
    "tools behind": ClientCase(tools_behind),
    "scarce": ClientCase(partial(many, SCARCE), needs="scarce"),
    "ended": ClientCase(
        partial(many, f"{SCARCE}, {ENDED}", reports_ends=True), 1, "scarce", "scarce"
    ),
    "tiered": ClientCase(partial(many, f"{SCARCE}, {TIERED}"), needs="tiered"),
    "long run": ClientCase(long_run),
    "one folder": ClientCase(one_folder, least=2),
}


# --- Client ---------------------------------------------------------------------------------------


@dataclass
class Sent:
    """One request with its answer. Times are seconds of ``time.perf_counter``."""

    ask: ClientRequest
    sent_s: float
    first_s: float = 0.0
    """Time of the first piece of the answer."""
    end_s: float = 0.0
    text: str = ""
    thoughts: str = ""
    num_prompt: int | None = None
    """Length of the prompt as the server reports it, or None if the request was cut."""
    cached_len: int = 0
    ids: npt.NDArray[np.int32] | None = None
    """Rendered ids of the prompt, if the server returned them."""
    answer_ids: list[int] = field(default_factory=list)
    name: str = ""
    """Id of the answer."""

    @property
    def body(self) -> dict[str, Any]:
        """Messages, tools and variables of the request."""
        body: dict[str, Any] = {"messages": list(self.ask.messages)}
        body |= {"tools": list(self.ask.tools)} if self.ask.tools else {}
        body |= {"metadata": {"session_end": "true"}} if self.ask.ends else {}
        return body | ({"chat_template_kwargs": self.ask.variables} if self.ask.variables else {})

    def read(self, told: Mapping[str, Any]) -> bool:
        """Add one message of the stream. Returns True if it has a piece of the answer."""
        if "error" in told:
            raise RuntimeError(told["error"]["message"])
        if (ids := told.get("prompt_token_ids")) is not None:
            self.ids = np.asarray(ids, np.int32)
        if usage := told.get("usage"):
            self.num_prompt = usage["prompt_tokens"]
            self.cached_len = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        self.name = told.get("id") or self.name
        before = len(self.text) + len(self.thoughts) + len(self.answer_ids)
        for choice in told.get("choices") or ():
            delta = choice.get("delta") or {}
            self.text += delta.get("content") or ""
            self.thoughts += delta.get("reasoning_content") or delta.get("reasoning") or ""
            self.answer_ids += choice.get("token_ids") or []
        return len(self.text) + len(self.thoughts) + len(self.answer_ids) > before


@dataclass
class Client:
    """OpenAI client with one connection per request."""

    port: int
    max_tokens: int = 8
    answer_id: int | None = None
    """The only token of answers."""
    sent: list[Sent] = field(default_factory=list)

    def exchange(self, method: str, path: str, body: Any = None) -> Any:
        """Return the JSON of an answer. Raises RuntimeError for a status other than 200."""
        with self._open(method, path, body) as answer:
            text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{method} {path}: status {answer.status}, {text[:300]!r}")
        return json.loads(text)

    def chat(self, ask: ClientRequest) -> Message:
        """Send one request and return its answer as the client sends it back."""
        sent = Sent(ask, time.perf_counter())
        options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
        options |= {"return_token_ids": True, "max_tokens": 200 if ask.cut else self.max_tokens}
        if self.answer_id is not None:
            options["logit_bias"] = {str(self.answer_id): 100}
        pieces = 0
        with self._open("POST", "/v1/chat/completions", sent.body | options) as answer:
            for line in answer:
                if answer.status != 200:
                    raise RuntimeError(f"status {answer.status}, {line[:300]!r}")
                if line.startswith(b"data: {") and sent.read(json.loads(line[6:])):
                    sent.first_s = sent.first_s or time.perf_counter()
                    pieces += 1
                    if pieces == ask.cut:
                        break
        sent.end_s = time.perf_counter()
        sent.first_s = sent.first_s or sent.end_s
        self.sent.append(sent)
        return {"role": "assistant", "content": sent.text}

    def _open(self, method: str, path: str, body: Any) -> http.client.HTTPResponse:
        """Send a request. Returns its answer; closing it closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        payload = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Connection": "close"}
        connection.request(method, path, payload, headers)
        return connection.getresponse()


def drive(client: Client, steps: Sequence[Steps], restart: Callable[[], None]) -> list[Sent]:
    """Run the clients of a case at the same time. Returns their requests."""
    client.sent = []
    failures: list[Exception] = []

    def run(script: Steps) -> None:
        try:
            answer = None
            with contextlib.suppress(StopIteration):
                while True:
                    ask = script.send(answer)
                    if ask.restart:
                        gate.wait()
                    answer = client.chat(ask)
        except Exception as error:
            failures.append(error)
            gate.abort()

    gate = threading.Barrier(len(steps), restart)  # All clients wait for a restart.
    threads = [threading.Thread(target=run, args=(script,)) for script in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return client.sent


# --- Counts ---------------------------------------------------------------------------------------

Ids = Callable[[Sent], tuple[npt.NDArray[np.int32], Sequence[int]]]
"""Returns the rendered ids of a request's prompt, and those of its answer."""


def counts(sent: Sequence[Sent], ids_of: Ids) -> Iterator[dict[str, Any]]:
    """Yield the counts of each row, and check the server's reports against the rendered ids."""
    prompts, computed = [], []
    for one in sent:
        ids, answer = ids_of(one)
        prompts.append(ids)
        # The last token of an answer is sampled, but not computed, unless the client left before.
        answered = np.asarray(answer if one.ask.cut else answer[:-1], np.int32)
        computed.append(np.concatenate((ids, answered)))
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for at, one in enumerate(sent):
        if not one.ask.row:
            continue
        known = possible = 0
        for other, ids in zip(sent, computed, strict=True):
            if other is not one and other.sent_s < one.end_s:
                shared = common_prefix_len(ids, prompts[at])
                possible = max(possible, shared)
                known = max(known, shared) if other.end_s <= one.sent_s else known
        faults = []
        if one.num_prompt != len(prompts[at]):
            faults.append(f"{one.num_prompt} prompt tokens reported, {len(prompts[at])} rendered")
        if one.cached_len > possible:
            faults.append(f"{one.cached_len} cached tokens reported, {possible} known")
        rows[one.ask.row].append(
            {
                "prompt": len(prompts[at]),
                "known": known,
                "cached": one.cached_len,
                "read_again": max(known - one.cached_len, 0),
                "ttft_s": one.first_s - one.sent_s,
                "faults": faults,
            }
        )
    for row, found in rows.items():
        again = [one["read_again"] for one in found]
        yield {
            "row": row,
            "requests": len(found),
            **{name: sum(one[name] for one in found) for name in ("prompt", "known", "cached")},
            "read_again": sum(again),
            "read_again_mean": statistics.fmean(again),
            "read_again_most": max(again),
            "ttft_s": statistics.median(one["ttft_s"] for one in found),
            "faults": [fault for one in found for fault in one["faults"]],
        }


# --- Servers --------------------------------------------------------------------------------------


class ServerMemory(NamedTuple):
    """Memory for ``NUM_FITTING`` conversations, and a host tier for all."""

    num_tokens: int
    num_bytes: int
    """KV of these tokens, and two states of each conversation."""
    host_bytes: int

    @classmethod
    def of(cls, model: Path, prompt_len: int) -> ServerMemory:
        """Return the memory for conversations that begin with ``prompt_len`` tokens."""
        geometry = ModelGeometry.from_config(read_config(model), kv_dtype="bfloat16")
        length = prompt_len * 11 // 10
        one = length * geometry.kv_bytes_per_token + 2 * geometry.state_bytes
        return cls(NUM_FITTING * length, NUM_FITTING * one, NUM_MANY * one)


@dataclass
class Side:
    """One server with some options."""

    name: str
    flags: Sequence[str] = ()
    is_llama: bool = False
    threads: int = 1
    process: subprocess.Popen[bytes] | None = None
    client: Client = field(default_factory=partial(Client, 0))
    command: Sequence[str] = ()

    def start(self, model: Path, needs: str, num_tokens: int, folder: Path) -> None:
        """Start the server with what a case of prompts of ``num_tokens`` needs."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.client = Client(free.getsockname()[1])
        options = ["--port", str(self.client.port), *self.flags]
        if needs in ("scarce", "tiered"):
            options += self._scarce(ServerMemory.of(model, num_tokens), needs == "tiered")
        if self.is_llama:
            command = [str(LLAMA_SERVER), "-m", str(model), "-t", str(self.threads)]
        else:
            command = [sys.executable, "-m", "engine", "serve", "--model", str(model)]
            options += ["--device", "cpu"]
            options += ["--state-dir", str(folder)] if needs == "state" else []
        self.command = [*command, *options]
        self._run()

    def _scarce(self, memory: ServerMemory, has_tier: bool) -> list[str]:
        """Return the options for little memory. llama-server's checkpoints are outside of it."""
        if self.is_llama:
            mib = str(memory.host_bytes // 2**20 + 1 if has_tier else 0)
            slots = ["-np", str(NUM_FITTING), "-kvu", "-c", str(memory.num_tokens)]
            return [*slots, "--cache-ram", mib]
        host = ["--host-gib", f"{memory.host_bytes / GIB:.6f}"] if has_tier else []
        return ["--cache-gib", f"{memory.num_bytes / GIB:.6f}", *host]

    def reset(self) -> None:
        """Empty the cache; restart a server that cannot."""
        if self.is_llama:
            self.restart()
        else:
            self.client.exchange("POST", "/reset_prefix_cache")

    def _run(self) -> None:
        from experiments.benchmarks.serving import start_server

        variables = {"PYTHONPATH": str(provenance.ROOT), "OMP_NUM_THREADS": str(self.threads)}
        options = {"env": os.environ | variables, "stderr": subprocess.DEVNULL}
        self.process = start_server(
            self.command, self.client.port, start_new_session=True, **options
        )

    def stop(self) -> None:
        """End the server, if it runs."""
        from experiments.benchmarks.serving import end_server

        if self.process is not None:
            end_server(self.process)
            self.process = None

    def restart(self) -> None:
        """End the server and start it with the same options."""
        self.stop()
        self._run()

    def resident_bytes(self) -> int | None:
        """Return the memory of the server's processes, or None if it is not known."""
        total = 0
        for folder in Path("/proc").glob("[0-9]*") if self.process is not None else ():
            with contextlib.suppress(OSError, ValueError):
                if os.getsid(int(folder.name)) == self.process.pid:  # type: ignore[union-attr]
                    text = (folder / "smaps_rollup").read_text()
                    total += int(text.split("\nPss:")[1].split()[0]) * 1024
        return total or None

    def ids_of(self, sent: Sent) -> tuple[npt.NDArray[np.int32], Sequence[int]]:
        """Return the rendered ids of a prompt and its answer; llama-server has endpoints for it."""
        if sent.ids is not None:
            return sent.ids, sent.answer_ids
        text = self.client.exchange("POST", "/apply-template", sent.body)["prompt"]
        options = {"add_special": True, "parse_special": True}
        prompt, whole = (
            self.client.exchange("POST", "/tokenize", {"content": part, **options})["tokens"]
            for part in (text, text + sent.thoughts + sent.text)
        )
        return np.asarray(prompt, np.int32), whole[len(prompt) :]


def make_model(name: str, format: str) -> Path:
    """Return the GGUF file ``name``, or write that of the built-in model or of a larger one with
    random weights, which has the built-in model's tokenizer, unless ``MODELS`` has it."""
    from experiments.benchmarks import llama  # The results page needs no torch.
    from tests import gguf_files

    if name not in ("builtin", *llama.GEOMETRIES):
        return Path(name)
    path = MODELS / f"{name}-{format}.gguf"
    if path.exists():
        return path
    modules = rival.load()
    assert modules is not None, rival.ABSENT
    MODELS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODELS) as folder:
        source, whole, part = BUILTIN_DIR, Path(folder) / "whole.gguf", Path(folder) / path.name
        if name != "builtin":
            source = Path(folder)
            config = llama.GEOMETRIES[name] | {"max_position_embeddings": MAX_LEN}
            llama.make_checkpoint(config, folder)
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(BUILTIN_DIR / file, source)
        is_direct = format in DIRECT
        vocabulary = gguf_files.vocabulary(source, "gpt-2")
        kind, target = (format, part) if is_direct else ("BF16", whole)
        gguf_files.write_gguf(modules[1], source, target, kind, vocabulary)
        if not is_direct:
            rival.quantize(modules[0], whole, part, format)
        part.replace(path)
    return path


# --- Results --------------------------------------------------------------------------------------


class CasePlan(NamedTuple):
    """Cases of one model and size."""

    model: str
    """Name for ``make_model``, or path of a GGUF file."""
    format: str
    num_tokens: int
    """Length of a prompt."""
    at_once: int
    """Number of clients."""
    cases: Sequence[str]

    @property
    def fields(self) -> dict[str, Any]:
        """Fields of its records."""
        names = {"model": Path(self.model).stem, "format": self.format}
        return names | {"tokens": self.num_tokens, "at_once": self.at_once}


SHORT = (
    *("subagent", "edits", "branches", "restart", "next turn", "tool result", "thoughts"),
    *("early edit", "steer", "dated session"),
)
LONG = (
    "scarce",
    "ended",
    "tiered",
    "twelve",
    "long run",
    "one folder",
    "dated turns",
    "tools behind",
)
COUNTED = CasePlan("builtin", "Q8_0", 600, 1, LONG)
"""Cases of many requests, for counts. Their times are those of a tiny model."""
PUBLISHED = (
    CasePlan("530m", "Q4_K_M", 2000, 1, SHORT),
    CasePlan("1b-moe", "Q4_K_M", 2000, 1, ("subagent", "branches")),
    CasePlan("530m", "Q4_K_M", 2000, 4, ("subagent",)),
    COUNTED,
    CasePlan("530m", "Q4_K_M", 16000, 1, ("subagent",)),
)
"""Plans of the published table, in order."""
RIVALS = ("engine", "llama-server")
"""Servers of the published table."""


def measure(side: Side, name: str, plan: CasePlan) -> Iterator[dict[str, Any]]:
    """Run one case on a server that was started with what it needs."""
    case = CASES[name]
    clients = max(plan.at_once, case.least)
    sample = Text("sample", 0, 2000).draw(1)
    size = plan.num_tokens * len(sample) // len(tokenized(side.client, sample))
    side.client.answer_id = tokenized(side.client, " pear")[-1]
    drawn_as = case.drawn_as or name
    steps = [case.steps(Text(drawn_as, at, size), clients) for at in range(clients)]
    sent = drive(side.client, steps, side.restart)
    resident = side.resident_bytes()
    for found in counts(sent, side.ids_of):
        named = {"side": side.name, "case": name, **plan.fields}
        yield {**named, **found, "resident_bytes": resident}


def compare(side: Side, model: Path, plan: CasePlan, names: Sequence[str]) -> list[dict[str, Any]]:
    """Run cases with the same needs on one server, which is emptied between them.

    Times are None if the machine was not idle.
    """
    found: list[dict[str, Any]] = []
    begin, used, own = time.perf_counter(), used_s(), own_s()
    with tempfile.TemporaryDirectory() as folder:
        try:
            side.start(model, CASES[names[0]].needs, plan.num_tokens, Path(folder))
            for name in names:
                if name != names[0]:
                    side.reset()
                found += measure(side, name, plan)
        finally:
            side.stop()
    processors = (time.perf_counter() - begin) * (os.cpu_count() or 1)
    others = (used_s() - used - (own_s() - own)) / processors
    for one in found:
        one["others"] = others
        one["ttft_s"] = one["ttft_s"] if others <= MAX_OTHERS else None
    return found


def used_s() -> float:
    """Return the processor time of all processes of the machine, in seconds."""
    ticks = [*map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])]
    return (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")  # Without idle and iowait.


def own_s() -> float:
    """Return the processor time of this process and of its ended children, in seconds."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def tokenized(client: Client, text: str) -> list[int]:
    """Return the ids of a text by the server's endpoint, whose field has one of two names."""
    for name in ("content", "prompt"):
        with contextlib.suppress(RuntimeError):
            body = {name: text, "add_special_tokens": False}
            tokens: list[int] = client.exchange("POST", "/tokenize", body)["tokens"]
            return tokens
    raise RuntimeError("The server has no endpoint /tokenize.")


class Results:
    """Result file whose records are replaced case by case."""

    def __init__(self, path: Path) -> None:
        self.path, self.commit = path, provenance.provenance()["commit"]
        try:
            _, self.records = provenance.read_json_lines(path)
        except FileNotFoundError:
            self.records = []

    @staticmethod
    def _case(record: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(record[name] for name in ("side", "case", *CasePlan._fields[:2], *SIZES))

    def has(self, side: Side, plan: CasePlan, case: str) -> bool:
        """Return True if this commit has measured a case, with times or in the plan for counts."""
        wanted = self._case({"side": side.name, "case": case, **plan.fields})
        found = [one for one in self.records if self._case(one) == wanted]
        is_for_counts = plan.fields == COUNTED.fields
        has_times = is_for_counts or all(one["ttft_s"] is not None for one in found)
        return bool(found) and has_times and found[0]["commit"] == self.commit

    def add(self, found: Records, settings: Mapping[str, Any]) -> None:
        """Write the records of some cases in place of those of the same cases."""
        new = {self._case(one) for one in found}
        kept = [one for one in self.records if self._case(one) not in new]
        self.records = [*kept, *(rounded({**one, "commit": self.commit}) for one in found)]
        provenance.write_json_lines(self.path, self.records, settings)


SIZES = ("tokens", "at_once")
COLUMNS: dict[Column, Callable[[Mapping[str, Any]], Cell]] = {
    Column("read again", "tokens", ".0f"): lambda one: one["read_again_mean"],
    Column("hits", "%"): lambda one: 100 * one["cached"] / one["prompt"],
    Column("TTFT", "s", ".3g"): lambda one: one["ttft_s"],
    Column("memory", "MiB", ".0f"): lambda one: (one["resident_bytes"] or 0) / 2**20,
}
"""Cells of one server in one row. Memory is that of its processes after the case."""


def table(records: Records, without: str = "") -> Table:
    """Return the columns of each server except ``without``."""
    sides = [*dict.fromkeys((*RIVALS, *(one["side"] for one in records)))]
    shown = {column: read for column, read in COLUMNS.items() if column.name != without}
    rows = []
    for key, of in grouped(records, "row", "model", *SIZES).items():
        found = {one["side"]: one for one in of}
        rows.append([*key])
        for read in shown.values():
            rows[-1] += [read(found[side]) if side in found else None for side in sides]
    columns = [Column(name, form="d") for name in ("case", "model", "prompt", "clients")]
    columns += [one._replace(name=f"{side}: {one.name}") for one in shown for side in sides]
    return Table(columns, rows)


def sides_of(options: argparse.Namespace) -> list[Side]:
    """Return the servers to compare."""
    sides = [Side("engine")]
    if LLAMA_SERVER.is_file():
        best = ["-np", "8", "--ctx-checkpoints", "256", "--checkpoint-min-step", "0"]
        sides.append(Side("llama-server", is_llama=True))
        sides.append(Side("llama-server, best options", flags=best, is_llama=True))
    else:
        print("llama-server is not built. Run `make llama` (some minutes).")
    sides.append(Side("engine, grid 16", flags=["--grid", "16"]))
    return [replace(side, threads=options.threads) for side in sides]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin", help="builtin, 7m, 530m or a GGUF file")
    parser.add_argument("--format", default="Q8_0", help="of a model that is written: Q4_0, ...")
    parser.add_argument("--size", choices=("small", "full", "published"), default="full")
    parser.add_argument("--tokens", type=positive, nargs="+", help="of a prompt: 2000 16000")
    parser.add_argument("--at-once", type=positive, nargs="+", help="clients: 1 4")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="by default all")
    parser.add_argument("--sides", nargs="+", help="names of the servers, by default all")
    parser.add_argument("--threads", type=positive, default=os.cpu_count() or 1)
    parser.add_argument("--resume", action="store_true", help="leave out cases of this commit")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Servers are stopped on the way.
    is_small = options.size == "small"
    tokens = options.tokens or ([600] if is_small else [2000, 16000])
    clients = options.at_once or ([1] if is_small else [1, 4])
    cases = options.cases or list(CASES)
    plans = [CasePlan(options.model, options.format, t, n, cases) for t in tokens for n in clients]
    names = options.sides
    if options.size == "published":
        kept = [[case for case in plan.cases if case in cases] for plan in PUBLISHED]
        plans = [plan._replace(cases=cases) for plan, cases in zip(PUBLISHED, kept, strict=True)]
        names = names or [*RIVALS]
    sides = [side for side in sides_of(options) if not names or side.name in names]
    results = Results(provenance.WRITTEN / "second_turn.jsonl")
    settings = {"threads": options.threads}
    ran: list[dict[str, Any]] = []
    for plan in plans:
        model = make_model(plan.model, plan.format) if plan.cases else Path()
        groups: dict[str, list[str]] = defaultdict(list)
        for name in plan.cases:  # Small ones share a server.
            groups[CASES[name].needs if is_small else name].append(name)
        for group, side in itertools.product(groups.values(), sides):
            left = [one for one in group if not (options.resume and results.has(side, plan, one))]
            if not left:
                continue
            found = compare(side, model, plan, left)
            results.add(found, settings)
            ran += found
            for one in found:
                for fault in one["faults"]:
                    print(f"{side.name}, {one['row']}: {fault}", file=sys.stderr)
            busy = f", no times: others used {found[0]['others']:.0%} of the processors"
            idle = found[0]["others"] <= MAX_OTHERS
            print(f"{plan.model}, {plan.num_tokens} tokens, {plan.at_once} at once, "
                  f"{', '.join(left)}: {side.name}{'' if idle else busy}", flush=True)  # fmt: skip
    print(results.path)
    print(table(ran))


if __name__ == "__main__":
    main()
