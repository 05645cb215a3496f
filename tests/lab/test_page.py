"""The laboratory's page is true: it has every word, its samples are read, its placement runs, its
commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import hybridcache.lab
from hybridcache.geometry.times import MeasuredTimes
from hybridcache.lab.baselines import BASELINES
from hybridcache.lab.cli import main
from hybridcache.lab.generators import GENERATORS
from hybridcache.lab.report import METRICS
from hybridcache.lab.traces import READERS, open_trace
from hybridcache.policies.registry import EVICTION_NAMES, PLACEMENT_NAMES
from hybridcache.routing.registry import ROUTERS

PAGE = (Path(hybridcache.lab.__file__).parent / "README.md").read_text(encoding="utf-8")


def _words() -> set[str]:
    """Everything in backticks, numbers left out, and what a row's `-variant` makes of that row's
    first word."""
    found: set[str] = set()
    for line in PAGE.splitlines():
        words = [re.split(r"[:\[]", word)[0] for word in re.findall(r"`([^`]+)`", line)]
        found.update(words)
        stems = {words[0], re.sub(r"-p\d+$", "", words[0])} if words else set()
        stems |= {re.sub(r"-p\d+$", "", word) for word in words}
        found.update(stem + word for word in words if word.startswith("-") for stem in stems)
    return found


@pytest.mark.parametrize(
    "registry",
    [
        EVICTION_NAMES,
        PLACEMENT_NAMES,
        BASELINES,
        METRICS,
        READERS,
        GENERATORS,
        ROUTERS,
    ],
)
def test_every_word_is_on_it(registry: dict[str, object]) -> None:
    assert set(registry) - _words() == set()


def test_its_samples_are_read(tmp_path: Path) -> None:
    trace, table = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "talk.jsonl").write_text(trace)
    requests = list(open_trace(str(tmp_path / "talk.jsonl")))
    assert [request.tokens.tolist() for request in requests][1] == [5, 6, 7, 8, 9, 10, 11, 12]
    (tmp_path / "times.json").write_text(table)
    assert MeasuredTimes.load(tmp_path / "times.json").seconds(0, 1024) == 0.05


def test_its_placement_gives_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n# mine\.py\n(.*?)```", PAGE, re.DOTALL)
    command, mine, other = re.findall(
        r"`hybridcache (simulate [^`]*mine:Quarters)`: ([\d.]+) beside ([\d.]+) %", PAGE
    )[0]
    (tmp_path / "mine.py").write_text(block)
    monkeypatch.chdir(tmp_path)
    main(shlex.split(command))
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "lru @" in line]
    assert [row[3] for row in rows] == [other, mine]


@pytest.mark.full
def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for line in "".join(blocks).splitlines():
        assert not main(shlex.split(line, comments=True)[1:]), line
    assert {"short.png", "short-losses.png", "short-bins.png", "price.png", "runs.jsonl"} <= {
        path.name for path in tmp_path.iterdir()
    }
