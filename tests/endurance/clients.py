"""Coding agents from npm, with the settings that ``engine agent`` prints and
``docs/how-to/agents.md`` shows.

``engine serve`` runs the built-in model, whose tokens are characters: an agent's first prompt has
30,000 to 90,000. Each agent gets the same question in new sessions and must end without an error.
No request may be refused, and from the second session on the prompt must be reused.
The agents are those of ``make clients`` or on the ``PATH``; others are reported as not installed.
The model's answers to agents make no sense and may have no end: one that Claude Code reports as
longer than its limit counts as an answer.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.front.command.remote import PLACES, settings
from engine.front.server.settings import API_KEY_VARIABLE
from tests.documents import ROOT
from tests.endurance.faults import server_port

BIN = ROOT / "out/clients/node_modules/.bin"
PAGE = ROOT / "docs/how-to/agents.md"
QUESTION = "Ada has 5 apples. Ada buys 3 more. How many apples does Ada have now?"
MAX_S = 1_800.0
"""Time of one session. A slow machine needs minutes for the first prompt."""
LEAST_REUSED = 0.9
"""Least share of the longest prompt of a second session that comes from the cache."""


AGENTS = {
    "claude": ("-p",),
    "codex": ("exec", "--skip-git-repo-check"),
    "opencode": ("run",),
    "qwen": ("-p",),
}
"""Program -> its arguments before the question."""
SHORTER = {"CLAUDE_CODE_MAX_OUTPUT_TOKENS": "64"}
"""Variable of the test alone: the answers of the built-in model have no end."""


def flags() -> list[str]:
    """Return the flags of the server on the page."""
    [line] = re.findall(r"^engine serve (.*--max-model-len.*)$", PAGE.read_text(), re.MULTILINE)
    return shlex.split(line.replace("NAME", "builtin"))


def settings_of(name: str, port: int, key: str | None = None) -> str:
    """Return the settings of an agent for that server at ``port``, with short answers."""
    length = int(flags()[flags().index("--max-model-len") + 1])
    text = settings(name, f"http://127.0.0.1:{port}", "builtin", length, key)
    return text.replace("8192", "64")


def find(name: str) -> str | None:
    """Return the path of an installed agent, or None."""
    return shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}")


def requests_in(log: Path) -> list[tuple[int, int, int]]:
    """Return (status, prompt tokens, cached tokens) of each request for an answer in a log."""
    lines = map(json.loads, filter(lambda line: line.startswith("{"), log.read_text().splitlines()))
    answers = [one for one in lines if one.get("method") == "POST" and "status" in one]
    return [
        (one["status"], one["prompt_tokens"] or 0, one["cached_tokens"] or 0) for one in answers
    ]


def session(name: str, program: str, home: Path, port: int, key: str | None = None) -> float:
    """Ask in a new session of an agent. Returns its seconds; raises AssertionError if it fails."""
    keys = {} if key is None else {API_KEY_VARIABLE: key}
    file = home / PLACES[name]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(settings_of(name, port, key))
    work = home / "work"
    work.mkdir(exist_ok=True)
    (work / "a.py").write_text("print(1)\n")
    began = time.monotonic()
    done = subprocess.run(
        [program, *AGENTS[name], QUESTION],
        cwd=work,
        env={**os.environ, **SHORTER, **keys, "HOME": str(home), "XDG_CONFIG_HOME": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=MAX_S,
    )
    is_done = done.returncode == 0 or "output token maximum" in done.stdout
    assert is_done, f"{name} ended with {done.returncode}: {done.stdout[-2000:]}"
    return time.monotonic() - began


def run(seed: int, number: int, only: str = "") -> dict[str, Any]:
    """Run ``number`` sessions of every installed agent. Returns their seconds and reused tokens."""
    found: dict[str, Any] = {}
    for name in AGENTS:
        program = find(name)
        if only and name != only:
            continue
        if program is None:
            found[name] = "not installed"
            continue
        with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w") as log:
            command = [sys.executable, "-m", "engine", "serve", "--port", "0", *flags()]
            command += ["--log-requests", "--log-format", "json"]
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": log, "text": True}
            with subprocess.Popen(command, cwd=ROOT, **pipes) as server:
                try:
                    found[name] = _sessions(
                        name, program, Path(folder), server_port(server), number
                    )
                finally:
                    server.terminate()
    return found


def _sessions(name: str, program: str, home: Path, port: int, number: int) -> dict[str, Any]:
    """Run sessions of one agent, and compare the requests that the server has answered."""
    seconds, sent = [], 0
    reused = ""
    for index in range(number):
        seconds.append(round(session(name, program, home, port), 1))
        answers = requests_in(home / "log")[sent:]
        sent += len(answers)
        known = (200, 499)  # 499: an agent that waits no longer sends the request again.
        assert all(status in known for status, *_ in answers), f"{name}: {answers}"
        status, prompt, cached = max(answers, key=lambda one: one[1])
        assert status == 200, f"{name}: {answers}"
        reused = f"{cached:,} of {prompt:,}"
        if index:
            assert cached >= LEAST_REUSED * prompt, f"{name} reused {reused} tokens"
    return {"seconds": seconds, "reused in the last session": reused}
