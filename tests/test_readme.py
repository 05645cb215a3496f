"""The README is true: its examples run, its links lead somewhere, its policy of one's own is seen
by the simulator."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.command.cli import main as engine
from hybridcache.lab.cli import main as hybridcache

COMMANDS = {"engine": engine, "hybridcache": hybridcache}
ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_examples_run() -> None:
    result = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert result.attempted > 10 and not result.failed


def test_every_link_and_every_named_file_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    scripts = [
        f"{name.replace('.', '/')}.py" for name in re.findall(r"-m (experiments\.\w+)", README)
    ]
    assert links
    missing = [path for path in links + scripts if "://" not in path and not (ROOT / path).exists()]
    assert missing == []


def test_a_policy_of_ones_own_is_simulated(tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n# mine\.py\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.py").write_text(block)
    command = [sys.executable, "-m", "hybridcache", "simulate", "--trace", "short"]
    command += ["--model", "qwen3-next", "--gib", "1,2", "--policy", "lru,mine:CheapestFirst"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mine:CheapestFirst" in done.stdout


def test_the_commands_parse() -> None:
    """Each `hybridcache` and `engine` command of the README has the flags that it shows."""
    for line in re.findall(r"^(?:hybridcache|engine) .*$", README, re.MULTILINE):
        words = line.split("  ")[0].split("#")[0].split()
        assert words[1] in (
            *("trace", "simulate", "optimum", "advise"),
            *("serve", "inspect", "convert", "record", "top"),
        ), line
        flags = {word for word in words if word.startswith("--")}
        depth = 3 if words[:2] == ["hybridcache", "trace"] else 2
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ended:
            COMMANDS[words[0]]([*words[1:depth], "--help"])
        assert ended.value.code == 0
        assert flags <= set(re.findall(r"--[a-z0-9-]+", shown.getvalue())), line


@pytest.mark.parametrize("command", ["hybridcache", "engine"])
def test_a_command_runs_as_a_module(command: str) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", command, "--help"], capture_output=True, text=True, check=True
    )
    assert f"usage: {command}" in shown.stdout
