"""Budget of the repository: lines, flags of `engine serve`, and functions of three walks.

    python -m tests.budget            print the numbers and their differences from the budget
    python -m tests.budget --update   store the numbers in tests/budget.json; lines by tens

A walk is the set of functions of the repository that one piece of work calls. Kernels are the
references, so that the number does not depend on compiler and processor. Comprehensions do not
count: since Python 3.12 most of them are no functions.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from engine import AsyncEngine, Engine, EngineConfig, SamplingParams
from engine.front.command import cli
from engine.front.server.app import create_app
from engine.front.server.settings import ServerConfig
from engine.runner.backends import override_all
from tests.cache.serving import hybrid, publish
from tests.selection import ROOT

STORE = ROOT / "tests" / "budget.json"
FOLDERS = {
    "hybridcache/lab": "hybridcache/lab",
    "hybridcache without lab": "hybridcache",
    "engine": "engine",
    "kernels": "kernels",
    "experiments": "experiments",
    "tests": "tests",
}
"""Parts of the repository and their folders. A file belongs to the first part that has it."""
COUNTED = tuple(f"{ROOT / package}/" for package in ("hybridcache", "engine", "kernels"))
COMPREHENSIONS = {"<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"}


def num_lines() -> dict[str, int]:
    """Return the lines of Python of each part, and those of C++."""
    groups, seen = {}, set[Path]()
    for name, folder in FOLDERS.items():
        groups[name] = set((ROOT / folder).rglob("*.py")) - seen
        seen |= groups[name]
    groups["C++"] = {file for end in ("cpp", "h") for file in (ROOT / "kernels").rglob(f"*.{end}")}
    return {
        f"lines of {name}": sum(len(file.read_bytes().splitlines()) for file in files)
        for name, files in groups.items()
    }


def num_flags() -> int:
    """Return the number of flags in the help of `engine serve`."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        cli.main(["serve", "--help"])
    return len(set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", text.getvalue(), re.M)) - {"--help"})


class Walk:
    """Functions that are called from ``start`` to ``stop``, in this thread and in threads that
    began after the object was made."""

    def __init__(self) -> None:
        self.functions: dict[tuple[str, int], str] = {}
        """(file, first line) -> qualified name, in the order of the first calls."""
        self.is_open = False
        threading.setprofile(self._note)

    def start(self) -> None:
        self.functions, self.is_open = {}, True
        sys.setprofile(self._note)

    def stop(self) -> int:
        """Return the number of functions."""
        self.is_open = False
        sys.setprofile(None)
        return len(self.functions)

    def _note(self, frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        is_counted = self.is_open and code.co_name not in COMPREHENSIONS
        if is_counted and event == "call" and code.co_filename.startswith(COUNTED):
            place = code.co_filename, code.co_firstlineno
            self.functions.setdefault(place, code.co_qualname)


def cache_walk(walk: Walk) -> int:
    """Count match, lock, allocation, insert and eviction."""
    cache = hybrid(num_slots=4, grid=64, eviction="survival", debug=False)
    walk.start()
    for number in range(6):
        prompt = np.arange(200 + 64 * (number % 2), dtype=np.int32) + 1000 * (number // 2)
        match = cache.match(prompt)
        handle = cache.lock(match.node)
        cache.touch(match)
        publish(cache, prompt, [len(prompt) // 64 * 64], match=match)
        cache.unlock(handle)
    cache.evict(num_tokens=300)
    return walk.stop()


def small_engine() -> Engine:
    return Engine(EngineConfig(cache_gib=0.05, device="cpu", kernels=override_all("reference")))


def generate_walk(walk: Walk) -> int:
    """Count ``Engine.generate`` of one cold prompt of token ids."""
    engine, prompt = small_engine(), list(range(1, 250)) * 2
    engine.generate([prompt], SamplingParams(max_tokens=4))
    walk.start()
    engine.generate([[7, *prompt]], SamplingParams(max_tokens=4))
    return walk.stop()


def chat_walk(walk: Walk) -> int:
    """Count from a POST in this process to the first streamed text, in the third chat. The second
    step waits for that text, because the engine's thread may be early."""
    engine, may_step = small_engine(), threading.Event()
    step = engine.step

    def one_step() -> Any:
        may_step.wait()
        if walk.is_open:
            may_step.clear()
        return step()

    engine.step = one_step  # type: ignore[method-assign]

    async def chat(app: Any, text: str) -> int:
        body = {"messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": 300}
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions"}
        scope |= {"query_string": b"", "headers": [(b"content-type", b"application/json")]}
        parts = [{"type": "http.request", "body": json.dumps(body).encode()}]
        arrived, counts = asyncio.Event(), []

        async def receive() -> Any:
            if not parts:
                await arrived.wait()
            return parts.pop() if parts else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if walk.is_open and re.search(rb'"content": ?"[^"]', message.get("body", b"")):
                counts.append(walk.stop())
                may_step.set()
                arrived.set()

        may_step.set()
        walk.start()
        await app(scope, receive, send)
        return counts[0]

    async def chats() -> int:
        app = create_app(AsyncEngine(engine), ServerConfig())
        async with app.router.lifespan_context(app):
            for number in range(3):
                count = await chat(app, f"{number} Tell me a story.")
                while engine.has_work():
                    await asyncio.sleep(0.01)
        return count

    return asyncio.run(chats())


def measure(walks: dict[str, dict[tuple[str, int], str]] | None = None) -> dict[str, int]:
    """Return today's numbers. ``walks`` gets the functions of each walk."""
    found, walk = num_lines() | {"flags of engine serve": num_flags()}, Walk()
    try:
        for count in (cache_walk, generate_walk, chat_walk):
            found[f"functions of {count.__name__}"] = count(walk)
            if walks is not None:
                walks[count.__name__] = walk.functions
    finally:
        threading.setprofile(None)
    return found


def compare(found: dict[str, int], budget: dict[str, int]) -> list[str]:
    """Return a line for each number, with its difference from the budget."""
    both = [(name, found.get(name, 0), budget.get(name, 0)) for name in found | budget]
    return [
        f"{name:32} {number:7,} of {most:7,} {number - most:+6,}" for name, number, most in both
    ]


def read_store() -> dict[str, int]:
    return json.loads(STORE.read_text())  # type: ignore[no-any-return]


def main() -> None:
    found = measure()
    if "--update" in sys.argv:
        tens = {name: -(-n // 10) * 10 if "lines" in name else n for name, n in found.items()}
        STORE.write_text(json.dumps(tens, indent=1) + "\n")
    print("\n".join(compare(found, read_store())))


if __name__ == "__main__":
    main()
