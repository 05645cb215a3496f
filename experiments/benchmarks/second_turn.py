"""Count the prompt tokens that a server computes a second time, for this engine and llama-server.

    make llama                                              # builds llama-server, some minutes
    python -m experiments.benchmarks.second_turn            # small: prompts of 600 tokens
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
import itertools
import json
import os
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from experiments.benchmarks.server import exchange, free_port, running, send
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
WORDS = (*KEYS, *NAMES, *THINGS)


# --- Cases ----------------------------------------------------------------------------------------


class ClientRequest(NamedTuple):
    """One request of a client."""

    body: dict[str, Any]
    """Messages, and options such as tools."""
    row: str = ""
    """Row of the table, or empty if the request is not counted."""
    cut: int | None = None
    """Number of pieces of the answer after which the client closes the connection."""
    restart: bool = False
    """Restart the server first."""


class Text:
    """Text drawn from a seed, of one client. ``size``: characters of a prompt."""

    def __init__(self, seed: str, size: int) -> None:
        self.size, self.random = size, random.Random(seed)

    def draw(self, share: float) -> str:
        """Return words of about ``share`` times the size of a prompt."""
        count = max(int(share * self.size / 6), 2)
        return " ".join(self.random.choice(WORDS) for _ in range(count))

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


@dataclass
class ClientChat:
    """One conversation as its client keeps it."""

    text: Text
    system: str
    options: dict[str, Any] = field(default_factory=dict)
    """Fields of each request, such as tools."""
    messages: list[Message] = field(default_factory=list)
    num_calls: int = 0

    def ask(self, row: str = "", **how: Any) -> Steps:
        """Send the messages and append the answer."""
        messages = [{"role": "system", "content": self.system}, *map(dict, self.messages)]
        answer = yield ClientRequest({"messages": messages, **self.options}, row, **how)
        self.messages.append(answer)

    def turn(self, share: float, row: str = "", **how: Any) -> Steps:
        """Send one more message of the user."""
        self.messages.append({"role": "user", "content": self.text.draw(share)})
        yield from self.ask(row, **how)

    def step(self, share: float, row: str = "") -> Steps:
        """Let the last answer call a tool and send its result of ``share``."""
        self.num_calls += 1
        call = {"name": "read", "arguments": json.dumps({"path": f"{self.num_calls}.txt"})}
        name = f"call_{self.num_calls}"
        self.messages[-1]["tool_calls"] = [{"id": name, "type": "function", "function": call}]
        result = {"role": "tool", "tool_call_id": name, "content": self.text.draw(share)}
        self.messages.append(result)
        yield from self.ask(row)

    def fork(self, count: int | None = None) -> ClientChat:
        """Return a copy with the first ``count`` messages, or all, that goes on by itself."""
        return replace(self, messages=[*map(dict, self.messages[:count])], num_calls=0)


def opened(text: Text, **options: Any) -> ClientChat:
    """Return a chat with a system message of half a prompt."""
    return ClientChat(text, text.draw(0.5), options)


def next_turn(text: Text, count: int) -> Steps:
    chat = opened(text)
    yield from chat.turn(0.5)
    yield from chat.turn(0.2, "next turn")


def tool_result(text: Text, count: int) -> Steps:
    chat = opened(text, tools=text.tools())
    yield from chat.turn(0.3)
    yield from chat.step(0.1, "tool call and result")


def thoughts(text: Text, count: int) -> Steps:
    chat = opened(text, chat_template_kwargs={"enable_thinking": True})
    for row in ("", "", "thoughts stripped, third turn"):
        yield from chat.turn(0.2, row)


def edits(text: Text, count: int) -> Steps:
    chat = opened(text)
    yield from chat.turn(0.5)
    longer = chat.fork(1)
    longer.messages[0]["content"] += " please"
    yield from longer.ask("last message edited at its end")
    yield from chat.fork(0).turn(0.5, "last message rewritten")
    yield from chat.turn(0.1, "back to the original after an edit")


def early_edit(text: Text, count: int) -> Steps:
    chat = opened(text)
    for _ in range(5):
        yield from chat.turn(0.1)
    edited = chat.fork(5)
    edited.messages[4]["content"] += " again"
    yield from edited.ask("edit at turn 3 of 5")


def steered(text: Text, count: int) -> Steps:
    chat = opened(text)
    yield from chat.turn(0.5, cut=6)
    yield from chat.turn(0.05, "abort and steer")


def subagent(text: Text, count: int) -> Steps:
    chat = opened(text, tools=text.tools())
    yield from chat.turn(0.2)
    yield from chat.step(0.1)
    child = chat.fork(0)
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
    for minute, row in ((10, ""), (11, "new session, date at its start")):
        yield from ClientChat(text, f"{minute} o'clock, Monday. {rest}").turn(0.2, row)


def dated_turns(text: Text, count: int) -> Steps:
    chat = opened(text)
    rest = chat.system
    for minute, row in ((10, ""), (11, ""), (12, "date first, new at each turn")):
        chat.system = f"{minute} o'clock, Monday. {rest}"
        yield from chat.turn(0.2, row)


def tools_behind(text: Text, count: int) -> Steps:
    shared, tools = text.draw(0.4), text.tools()
    for folder, which in (("alpha", ""), ("beta", "second"), ("gamma", "third")):
        chat = ClientChat(text, f"{shared} Directory: {folder}.", {"tools": tools})
        yield from chat.turn(0.2, which and f"{which} folder, tools behind the system text")


def many(row: str, text: Text, count: int, reports_ends: bool = False) -> Steps:
    chats = [opened(text) for _ in range(max(NUM_MANY // count, 1))]
    for chat in chats:
        yield from chat.turn(0.3)
    left = [*range(len(chats))] * 2
    text.random.shuffle(left)
    while left:
        index = left.pop(0)
        if reports_ends and index not in left:
            chats[index].options["metadata"] = {"session_end": "true"}
        yield from chats[index].turn(0.1, row)


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
    tools, common = (Text(seed, text.size) for seed in ("tools 0", "one folder"))
    system = f"{common.draw(0.5)} Directory: alpha."
    chat = ClientChat(text, system, {"tools": tools.tools()})
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


SHORT: dict[str, ClientCase] = {
    "subagent": ClientCase(subagent),
    "edits": ClientCase(edits),
    "branches": ClientCase(branches),
    "restart": ClientCase(restarted, needs="state"),
    "next turn": ClientCase(next_turn),
    "tool result": ClientCase(tool_result),
    "thoughts": ClientCase(thoughts),
    "early edit": ClientCase(early_edit),
    "steer": ClientCase(steered),
    "dated session": ClientCase(dated_session),
}
LONG: dict[str, ClientCase] = {
    "scarce": ClientCase(partial(many, SCARCE), needs="scarce"),
    "ended": ClientCase(
        partial(many, f"{SCARCE}, {ENDED}", reports_ends=True), 1, "scarce", "scarce"
    ),
    "tiered": ClientCase(partial(many, f"{SCARCE}, {TIERED}"), needs="tiered"),
    "twelve": ClientCase(twelve),
    "long run": ClientCase(long_run),
    "one folder": ClientCase(one_folder, least=2),
    "dated turns": ClientCase(dated_turns),
    "tools behind": ClientCase(tools_behind),
}
"""Cases of many requests, or of few ones with another order of the system message."""
CASES = SHORT | LONG


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
        choice = (told.get("choices") or [{}])[0]
        delta, ids = choice.get("delta") or {}, choice.get("token_ids") or []
        text = delta.get("content") or ""
        thoughts = delta.get("reasoning_content") or delta.get("reasoning") or ""
        self.text, self.thoughts = self.text + text, self.thoughts + thoughts
        self.answer_ids += ids
        return bool(text or thoughts or ids)


@dataclass
class Client:
    """OpenAI client with one connection per request."""

    port: int
    max_tokens: int = 8
    answer_id: int | None = None
    """The only token of answers."""
    sent: list[Sent] = field(default_factory=list)

    def chat(self, ask: ClientRequest) -> Message:
        """Send one request and return its answer as the client sends it back."""
        sent = Sent(ask, time.perf_counter())
        options = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
        options |= {"return_token_ids": True, "max_tokens": 200 if ask.cut else self.max_tokens}
        if self.answer_id is not None:
            options["logit_bias"] = {str(self.answer_id): 100}
        pieces = 0
        with send(self.port, "POST", "/v1/chat/completions", ask.body | options) as answer:
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

    def ids_of(self, sent: Sent) -> tuple[npt.NDArray[np.int32], Sequence[int]]:
        """Return the rendered ids of a prompt and its answer; llama-server has endpoints for it."""
        if sent.ids is not None:
            return sent.ids, sent.answer_ids
        text = exchange(self.port, "POST", "/apply-template", sent.ask.body)["prompt"]
        options = {"add_special": True, "parse_special": True}
        prompt, whole = (
            exchange(self.port, "POST", "/tokenize", {"content": part, **options})["tokens"]
            for part in (text, text + sent.thoughts + sent.text)
        )
        return np.asarray(prompt, np.int32), whole[len(prompt) :]


def drive(client: Client, steps: Sequence[Steps], restart: Callable[[], object]) -> list[Sent]:
    """Run the clients of a case at the same time. Returns their requests."""
    gate = threading.Barrier(len(steps), restart)  # All clients wait for a restart.

    def run(script: Steps) -> None:
        answer = None
        try:
            while True:
                ask = script.send(answer)
                if ask.restart:
                    gate.wait()
                answer = client.chat(ask)
        except (StopIteration, threading.BrokenBarrierError):
            return
        except BaseException:
            gate.abort()
            raise

    with ThreadPoolExecutor(len(steps)) as clients:
        [*clients.map(run, steps)]
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
    for one, prompt in zip(sent, prompts, strict=True):
        if not one.ask.row:
            continue
        known = possible = 0
        for other, ids in zip(sent, computed, strict=True):
            if other is not one and other.sent_s < one.end_s:
                shared = common_prefix_len(ids, prompt)
                possible = max(possible, shared)
                known = max(known, shared) if other.end_s <= one.sent_s else known
        faults = []
        if one.num_prompt != len(prompt):
            faults.append(f"{one.num_prompt} prompt tokens reported, {len(prompt)} rendered")
        if one.cached_len > possible:
            faults.append(f"{one.cached_len} cached tokens reported, {possible} known")
        rows[one.ask.row].append(
            {
                "prompt": len(prompt),
                "known": known,
                "cached": one.cached_len,
                "read_again": max(known - one.cached_len, 0),
                "ttft_s": one.first_s - one.sent_s,
                "faults": faults,
            }
        )
    for row, found in rows.items():
        of = {name: [one[name] for one in found] for name in found[0]}
        yield {
            "row": row,
            "requests": len(found),
            **{name: sum(of[name]) for name in ("prompt", "known", "cached", "read_again")},
            "read_again_mean": statistics.fmean(of["read_again"]),
            "read_again_most": max(of["read_again"]),
            "ttft_s": statistics.median(of["ttft_s"]),
            "faults": [*itertools.chain(*of["faults"])],
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


class Side(NamedTuple):
    """One server with some options."""

    name: str
    flags: Sequence[str] = ()
    is_llama: bool = False

    def command(
        self, model: Path, needs: str, num_tokens: int, folder: Path, threads: int
    ) -> list[str]:
        """Return the command with what a case of prompts of ``num_tokens`` needs."""
        memory = ServerMemory.of(model, num_tokens)
        host_bytes = memory.host_bytes if needs == "tiered" else 0
        is_scarce = needs in ("scarce", "tiered")
        if self.is_llama:  # Its checkpoints are outside of the memory.
            command = [str(LLAMA_SERVER), "-m", str(model), "-t", str(threads)]
            scarce = ["-np", str(NUM_FITTING), "-kvu", "-c", str(memory.num_tokens)]
            scarce += ["--cache-ram", str(host_bytes // 2**20 + 1 if host_bytes else 0)]
        else:
            command = [sys.executable, "-m", "engine", "serve", "--model", str(model)]
            command += ["--device", "cpu"]
            command += ["--state-dir", str(folder)] if needs == "state" else []
            scarce = ["--cache-gib", f"{memory.num_bytes / GIB:.6f}"]
            scarce += ["--host-gib", f"{host_bytes / GIB:.6f}"] if host_bytes else []
        return [*command, *self.flags, *(scarce if is_scarce else ())]


BEST = ("-np", "8", "--ctx-checkpoints", "256", "--checkpoint-min-step", "0")
SIDES = (
    Side("engine"),
    Side("llama-server", is_llama=True),
    Side("llama-server, best options", BEST, is_llama=True),
    Side("engine, grid 16", ("--grid", "16")),
)
RIVALS = ("engine", "llama-server")
"""Servers of the published table."""


def resident_bytes(process: subprocess.Popen[bytes]) -> int | None:
    """Return the memory of the processes of a server, or None if it is not known."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(folder.name)) == process.pid:
                text = (folder / "smaps_rollup").read_text()
                total += int(text.split("\nPss:")[1].split()[0]) * 1024
    return total or None


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
        source, part = BUILTIN_DIR, Path(folder) / path.name
        if name != "builtin":
            source = Path(folder)
            config = llama.GEOMETRIES[name] | {"max_position_embeddings": MAX_LEN}
            llama.make_checkpoint(config, folder)
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                shutil.copy(BUILTIN_DIR / file, source)
        llama.write_file(modules, source, part, format, gguf_files.vocabulary(source, "gpt-2"))
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


KEY = ("side", "case", "model", "format", "tokens", "at_once")
"""Fields that name a case of one server."""
COUNTED = CasePlan("builtin", "Q8_0", 600, 1, tuple(LONG))
"""Cases of many requests, for counts. Their times are those of a tiny model."""
PUBLISHED = (
    CasePlan("530m", "Q4_K_M", 2000, 1, tuple(SHORT)),
    CasePlan("1b-moe", "Q4_K_M", 2000, 1, ("subagent", "branches")),
    CasePlan("530m", "Q4_K_M", 2000, 4, ("subagent",)),
    COUNTED,
    CasePlan("530m", "Q4_K_M", 16000, 1, ("subagent",)),
)
"""Plans of the published table, in order."""


def measure(side: Side, plan: CasePlan, name: str, threads: int) -> list[dict[str, Any]]:
    """Run one case on a server of its own. Times are None if the machine was not idle."""
    case, model = CASES[name], make_model(plan.model, plan.format)
    clients, client = max(plan.at_once, case.least), Client(free_port())
    variables = {"PYTHONPATH": str(provenance.ROOT), "OMP_NUM_THREADS": str(threads)}
    options = {"env": os.environ | variables, "stderr": subprocess.DEVNULL}
    servers: list[subprocess.Popen[bytes]] = []
    begin, used, own = time.perf_counter(), used_s(), own_s()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        command = side.command(model, case.needs, plan.num_tokens, Path(folder), threads)
        command += ["--port", str(client.port)]

        def start() -> None:
            stack.close()
            server = running(command, client.port, start_new_session=True, **options)
            servers.append(stack.enter_context(server))

        def ids(text: str) -> list[int]:
            body = {"content" if side.is_llama else "prompt": text, "add_special_tokens": False}
            found: list[int] = exchange(client.port, "POST", "/tokenize", body)["tokens"]
            return found

        start()
        sample = Text("sample 0", 2000).draw(1)
        size = plan.num_tokens * len(sample) // len(ids(sample))
        client.answer_id = ids(" pear")[-1]
        texts = (Text(f"{case.drawn_as or name} {at}", size) for at in range(clients))
        sent = drive(client, [case.steps(text, clients) for text in texts], start)
        resident = resident_bytes(servers[-1])
        found = [*counts(sent, client.ids_of)]
    processors = (time.perf_counter() - begin) * (os.cpu_count() or 1)
    others = (used_s() - used - (own_s() - own)) / processors
    for one in found:
        one["ttft_s"] = one["ttft_s"] if others <= MAX_OTHERS else None
    named = {"side": side.name, "case": name, **plan.fields}
    return [{**named, **one, "resident_bytes": resident, "others": others} for one in found]


def used_s() -> float:
    """Return the processor time of all processes of the machine, in seconds."""
    ticks = [*map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])]
    return (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")  # Without idle and iowait.


def own_s() -> float:
    """Return the processor time of this process and of its ended children, in seconds."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


class Results:
    """Result file whose records are replaced case by case."""

    def __init__(self, path: Path) -> None:
        self.path, self.commit = path, provenance.provenance()["commit"]
        records = provenance.read_json_lines(path)[1] if path.exists() else []
        self.cases = grouped(records, *KEY)

    def has(self, side: str, plan: CasePlan, case: str) -> bool:
        """Return True if this commit has measured a case, with times or in the plan for counts."""
        named = {"side": side, "case": case, **plan.fields}
        found = self.cases.get(tuple(named[name] for name in KEY), [])
        has_times = plan.fields == COUNTED.fields or all(one["ttft_s"] is not None for one in found)
        return bool(found) and has_times and found[0]["commit"] == self.commit

    def add(self, found: Records, settings: Mapping[str, Any]) -> None:
        """Write the records of some cases in place of those of the same cases."""
        self.cases |= grouped([rounded({**one, "commit": self.commit}) for one in found], *KEY)
        records = itertools.chain(*self.cases.values())
        provenance.write_json_lines(self.path, records, settings)


HEADS = {"row": "case", "model": "model", "tokens": "prompt", "at_once": "clients"}
"""Fields that name a row, and their columns."""
COLUMNS: dict[Column, Callable[[Mapping[str, Any]], Cell]] = {
    Column("read again", "tokens", ".0f"): lambda one: one["read_again_mean"],
    Column("hits", "%"): lambda one: 100 * one["cached"] / one["prompt"],
    Column("TTFT", "s", ".3g"): lambda one: one["ttft_s"],
    Column("memory", "MiB", ".0f"): lambda one: (one["resident_bytes"] or 0) / 2**20,
}
"""Cells of one server in one row. Memory is that of its processes after the case."""


def table(records: Records, without: str = "", heads: Sequence[str] = tuple(HEADS)) -> Table:
    """Return the columns of each server except ``without``, after those of ``heads``."""
    sides = [*dict.fromkeys((*RIVALS, *(one["side"] for one in records)))]
    cells = [
        (column._replace(name=f"{side}: {column.name}"), side, read)
        for column, read in COLUMNS.items()
        for side in sides
        if column.name != without
    ]
    rows = []
    for key, of in grouped(records, *HEADS).items():
        found = {one["side"]: one for one in of}
        rows.append([*key[: len(heads)], *(read(found[side]) if side in found else None
                             for _, side, read in cells)])  # fmt: skip
    columns = [Column(HEADS[name], form="d") for name in heads]
    return Table([*columns, *(column for column, *_ in cells)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="builtin", help="builtin, 530m, 1b-moe or a GGUF file")
    add("--format", default="Q8_0", help="of a model that is written: Q4_0, ...")
    add("--size", choices=("small", "published"), default="small")
    add("--tokens", type=positive, nargs="+", default=[600], help="of a prompt: 2000 16000")
    add("--at-once", type=positive, nargs="+", default=[1], help="clients: 1 4")
    add("--cases", nargs="+", choices=CASES, default=[*CASES], help="by default all")
    add("--sides", nargs="+", help="names of the servers, by default all")
    add("--threads", type=positive, default=os.cpu_count() or 1)
    add("--resume", action="store_true", help="leave out cases of this commit")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Servers are stopped on the way.
    sizes, names = itertools.product(options.tokens, options.at_once), options.sides
    plans = [CasePlan(options.model, options.format, *size, options.cases) for size in sizes]
    if options.size == "published":
        plans, names = [*PUBLISHED], names or RIVALS
    if not LLAMA_SERVER.is_file():
        print("llama-server is not built. Run `make llama` (some minutes).")
    sides = [side for side in SIDES if not names or side.name in names]
    sides = [side for side in sides if LLAMA_SERVER.is_file() or not side.is_llama]
    results, ran = Results(provenance.WRITTEN / "second_turn.jsonl"), list[dict[str, Any]]()
    for plan in plans:
        wanted = [case for case in plan.cases if case in options.cases]
        for case, side in itertools.product(wanted, sides):
            if options.resume and results.has(side.name, plan, case):
                continue
            found = measure(side, plan, case, options.threads)
            results.add(found, {"threads": options.threads})
            ran += found
            for one in found:
                for fault in one["faults"]:
                    print(f"{side.name}, {one['row']}: {fault}", file=sys.stderr)
            others = found[0]["others"]
            busy = f", no times: others used {others:.0%} of the processors"
            print(f"{plan.model}, {plan.num_tokens} tokens, {plan.at_once} at once, {case}: "
                  f"{side.name}{busy if others > MAX_OTHERS else ''}", flush=True)  # fmt: skip
    print(results.path)
    print(table(ran))


if __name__ == "__main__":
    main()
