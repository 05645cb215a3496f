"""Tests that run the code blocks of hybridcache/lab/README.md."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import hybridcache.lab
from hybridcache.lab.cli import main
from tests import documents

README = Path(hybridcache.lab.__file__).parent / "README.md"


@pytest.mark.full
def test_commands_of_the_lab_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for line in "".join(blocks).splitlines():
        assert not main(shlex.split(line, comments=True)[1:]), line
    assert {"short.png", "short-losses.png", "plan.png", "runs.jsonl"} <= {
        path.name for path in tmp_path.iterdir()
    }


@pytest.mark.full
def test_python_code_of_the_lab_readme_runs(tmp_path: Path) -> None:
    assert documents.run(README, tmp_path) == 1
