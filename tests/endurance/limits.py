"""Real limits of memory, set on the processes of a running server at random moments.

``engine serve`` runs the built-in model, with an allocator that asks the system for each page.
While clients read answers, the address space of a process is limited to its size or a little more,
or the engine is in a cgroup that is full, for some time or for ever. Each answer must be right, or
refused or ended with a reason. A connection may also be cut, and a server may end, if the log has
the reason. A limit counts if an allocation failed: the log, an answer or the cgroup says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tests.endurance.faults import Broken, broken_server, is_gone, read_answer
from tests.waiting import wait_until

ALLOCATOR = {"PYTHONMALLOC": "malloc", "MALLOC_ARENA_MAX": "1", "MALLOC_TOP_PAD_": "0"}
ALLOCATOR |= {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Variables with which glibc returns memory at once."""
KINDS = ("engine", "engine", "server", "cgroup")
NUM_CLIENTS, NUM_PROMPTS, MAX_TOKENS = 6, 8, 200
SAYS = ("memory", "bad_alloc", "ended by sig")
"""Words of which one is in the log if memory was short."""


def ask(server: Broken, number: int, is_stream: bool) -> tuple[str, str]:
    """Return (text, failure) of one answer; a failure is a reason, or "cut". Raises AssertionError
    if nothing arrives for two minutes."""
    failure, text = "", ""
    try:
        with contextlib.closing(server.connect()) as connection:
            prompt = f"{number} " + "x" * 200
            server.ask(connection, MAX_TOKENS, prompt=prompt, stream=is_stream)
            status, body = read_answer(connection)
        if status != 200:
            return "", body or "cut"
        pieces = [body] if not is_stream else [line[6:] for line in body.split("\n\n")]
        for piece in pieces:
            if piece[:1] == "{":
                read = json.loads(piece)
                failure += json.dumps(read["error"]) if "error" in read else ""
                text += "".join(choice["text"] for choice in read.get("choices", ()))
        is_whole = '"finish_reason":"length"' in body
    except TimeoutError:
        raise AssertionError(f"client {number} waits without bound") from None
    except (OSError, HTTPException, ValueError):
        is_whole = False
    return text, failure or ("" if is_whole else "cut")


def size_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


@contextlib.contextmanager
def address_space(pid: int, num_bytes: int) -> Iterator[Callable[[], bool]]:
    """Limit a process to its size and ``num_bytes`` more. Yields a function that returns False: the
    system does not count failures."""
    size = max(size_bytes(pid) + num_bytes, 0)
    resource.prlimit(pid, resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
    try:
        yield lambda: False
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)


@contextlib.contextmanager
def cgroup(pid: int, num_bytes: int) -> Iterator[Callable[[], bool]]:
    """Move a process into a new group, below that of this process, which may use ``num_bytes``
    more. Yields a function that returns True once an allocation has failed. Raises OSError where no
    group can be made."""
    own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    (path,) = [path for _, kinds, path in own if "memory" in kinds.split(",")]
    above = Path("/sys/fs/cgroup/memory") / path.lstrip("/")
    folder = above / f"endurance-{pid}"
    folder.mkdir()
    try:
        (folder / "memory.limit_in_bytes").write_text(f"{num_bytes}")
        (folder / "cgroup.procs").write_text(f"{pid}")
        yield lambda: int((folder / "memory.failcnt").read_text()) > 0
    finally:
        with contextlib.suppress(OSError):  # It has ended.
            (above / "cgroup.procs").write_text(f"{pid}")
        wait_until(lambda: not (folder / "cgroup.procs").read_text())
        folder.rmdir()


def limit(server: Broken, expected: list[str], rng: random.Random) -> tuple[str, Counter[str]]:
    """Set one limit. Returns its kind, or "" if no allocation failed, and the number of answers by
    their ends. Raises AssertionError for a damage."""
    kind, answers = rng.choice(KINDS), list[tuple[int, str, str]]()
    engine, log_len, damages = server.engine, len(server.log.read_text()), list[str]()

    def client(first: int, is_stream: bool) -> None:
        for number in range(first, first + 3):
            try:
                answers.append((number, *ask(server, number % NUM_PROMPTS, is_stream)))
            except AssertionError as error:
                damages.append(str(error))

    starts = [(rng.randrange(99), rng.random() < 0.5) for _ in range(NUM_CLIENTS)]
    clients = [threading.Thread(target=client, args=start) for start in starts]
    for each in clients:
        each.start()
    time.sleep(rng.uniform(0, 0.8))
    pid = server.process.pid if kind == "server" else engine
    more = rng.choice((-(1 << 28), 0, 0, int(2 ** rng.uniform(12, 20))))
    lasts_s = rng.choice((0.1, 0.3, 1.0, 3.0, 60.0))
    limiting = address_space(pid, more)
    if kind == "cgroup":
        limiting = cgroup(pid, int(2 ** rng.uniform(16, 20)))
    with limiting as has_failed:
        until = time.monotonic() + lasts_s
        while time.monotonic() < until and any(each.is_alive() for each in clients):
            time.sleep(0.01)
        is_useful = has_failed()
    for each in clients:
        each.join(240)
    assert not damages and not any(each.is_alive() for each in clients), damages
    is_cut = any(failure == "cut" for *_, failure in answers)
    time.sleep(is_cut)  # A process may be ending.
    if has_ended := is_gone(engine) or server.process.poll() is not None:
        server.process.wait(60)
        wait_until(lambda: is_gone(engine))
    said, ends = server.log.read_text()[log_len:], Counter[str]()
    is_named = any(word in said.lower() for word in SAYS)
    assert is_named or not (is_cut or has_ended), f"{kind}: no reason in the log: {said[-2000:]}"
    for number, text, failure in answers:
        right = expected[number % NUM_PROMPTS]
        assert right[: len(text)] == text, f"{kind}: {number} is {text!r}, not {right!r}"
        assert failure or text == right, f"{kind}: {number} is cut without a reason"
        end = "refused" if failure and not text else "ended" if failure else "right"
        ends["cut" if failure == "cut" else end] += 1
    is_useful = is_useful or is_named or ends["right"] < len(answers)
    return f"{kind}, {'ended' if has_ended else 'survived'}" if is_useful else "", ends


def run(seed: int, num_limits: int) -> dict[str, Any]:
    """Set limits until ``num_limits`` have made an allocation fail. Returns their number by kind,
    and the number of answers by their ends."""
    rng, kinds, ends = random.Random(seed), Counter[str](), Counter[str]()
    os.environ |= ALLOCATOR
    with tempfile.TemporaryDirectory() as folder, broken_server(Path(folder), "--exact") as server:
        expected = [ask(server, number, False)[0] for number in range(NUM_PROMPTS)]
    for _ in range(20 * num_limits):
        if kinds.total() - kinds[""] >= num_limits:
            break
        with (
            tempfile.TemporaryDirectory() as folder,
            broken_server(Path(folder), "--exact") as server,
        ):
            for _ in range(20):
                kind, found = limit(server, expected, rng)
                kinds[kind] += 1
                ends += found
                if kind.endswith("ended") or kinds.total() - kinds[""] >= num_limits:
                    break
    return {"limits": dict(kinds), "answers": dict(ends)}
