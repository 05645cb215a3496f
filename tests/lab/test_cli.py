"""Tests of the command line: output of each command, and one-line errors."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from hybridcache.command.extras import CACHE_DISTRIBUTION
from hybridcache.lab.cli import main
from tests.test_refusals import exit_code
from tests.waiting import wait_until


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out, error = capsys.readouterr()
    return code, out, error


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--version"])
    assert exited.value.code == 0
    assert capsys.readouterr().out == f"hybridcache {metadata.version(CACHE_DISTRIBUTION)}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("simulate --polciy lru", "--polciy lru, did you mean --policy? See `hybridcache"),
        ("optimum chat", "required: --trace. See"),
        ("optimum --trace=chat --gibb=3", "--gibb=3, did you mean --gib?"),
        ("simulate --trac chat --qqq", "unrecognized arguments: --qqq. See"),
        ("simulate --trace short --gib 1 --gib 2", "--gib: it is given twice: give it once, with"),
        ("simulate --pol lru", "the following arguments are required: --trace. See"),
        ("simulate --trace short --gib 1%:100%:0", "gib '1%:100%:0': GiB above 0, below"),
        ("simulate --trace short --gib 4:1", "as low:high:points (low first, 2 or more)"),
        ("simulate --trace short --rate 1:4:1", "as a,b,c, or as numbers\n"),
        ("simulate --trace short --gib 1e9", "are more than the 2147483648 that int32"),
        (
            "simulate --trace short --eviction lru",
            "--eviction lru: write --policy, the name of `en",
        ),
        ("simulate --trace short --placement lru", "--placement lru: write --checkpoints"),
        ("simulate --closed-loop --trace short --servers 2", "servers is of replays alone"),
        ("simulate --trace short --gib 1 --metric hitt", "'hitt', did you mean 'hit'?"),
        ("simulate --trace short --seeds 1 2", ": 2: join several values with commas"),
        ("simulate --closed-loop --trace short --seeds 1,x", "invalid number or list value"),
        ("simulate --trace short --figure /dev/null/f.png", "/dev/null cannot be a folder: na"),
        ("simulate --trace short --output /dev/null/runs", "/dev/null cannot be a folder: na"),
        ("simulate --trace short --gib 1 --max-running 2", "--max-running is about sessions"),
        ("simulate --closed-loop --trace short --starts burst", "starts must be poisson, fixed"),
        ("simulate --trace short?head=9 --trace nope --gib 1", "no trace 'nope'"),
        ("leaderboard --policy lru", "--policy: write the policy without a flag"),
        ("simulate --trace=", "a trace must be the name of a file or a generator"),
        ("simulate --trace short --scenario=", "--scenario: the name of a file must not be empty"),
        ("simulate --trace short --model=", "model '' means several: Qwen3-Next"),
        ("simulate --trace shrt --write-scenario /proc/s", "did you mean 'short'?"),
        ("simulate --trace short --policy lruu --write-scenario /proc/s", "did you mean 'lru'?"),
        ("simulate --trace short --admission session --write-scenario /proc/s", "'sessions'?"),
        ("trace stats shrt", "did you mean 'short'?"),
        ("trace stats /dev/null", "is not a regular file"),
    ],
)
def test_wrong_flag_or_name_gives_one_line_with_a_suggestion(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert exit_code(main, arguments.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_simulate_prints_a_table_and_writes_a_figure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figure, output = tmp_path / "new" / "f.png", tmp_path / "other" / "runs.jsonl"
    arguments = ["simulate", "--trace", "short", "--gib", "1:4:3", "--baseline", "vllm"]
    arguments += ["--metric", "hit,checkpoints", "--losses"]
    arguments += ["--figure", str(figure), "--output", str(output)]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "(infinite cache)" in out and "85.9" in out and "never seen" in out
    assert figure.stat().st_size > 10_000
    assert len(output.read_text().splitlines()) == 6
    again = run(capsys, *arguments)
    assert again[1] == out, "a resumed sweep must print the same"


def test_closed_loop_prints_a_row_per_policy_and_rate_and_writes_a_figure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figure, output = tmp_path / "cliff.png", tmp_path / "runs.jsonl"
    flags = ["--trace", "short?head=40", "--gib", "1", "--rate", "1:4:2", "--seeds", "3,5"]
    flags += ["--admission=oldest,live:4,sessions", f"--figure={figure}", f"--output={output}"]
    code, out, _ = run(capsys, "simulate", "--closed-loop", *flags)
    assert code == 0 and figure.stat().st_size > 10_000
    lines = [line.split(",")[0] for line in out.splitlines()]
    assert [lines.count(policy) for policy in ("oldest", "live:4", "sessions")] == [2, 2, 2]
    assert "40 requests in closed loop" in out and "step times: a roofline" in out
    assert "null" not in out and len(output.read_text().splitlines()) == 3 * 2 * 2


def test_scenario_file_keeps_what_it_can_and_names_the_rest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "new" / "s.toml"
    flags = ["--trace=short?head=9", "--gib=1", "--policy=lru", "--rate=1", "--admission=oldest"]
    written = f"--write-scenario={path}"
    code, out, _ = run(capsys, "simulate", "--closed-loop", "--skip-bad", *flags, written)
    assert code == 0 and "scenario: " in out
    code, out, _ = run(capsys, "simulate", "--closed-loop", "--scenario", str(path))
    assert code == 0 and "in closed loop" in out
    code, _, error = run(capsys, "simulate", "--scenario", str(path))
    assert code == 2 and "rate is about sessions" in error and "--closed-loop" in error
    code, _, error = run(capsys, "simulate", *flags[:3], written)
    assert code == 2 and "the file exists" in error


def test_skipped_bad_records_are_counted_by_every_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"tokens": [1, 2, 3]}\n{"tokens": []}\n{"tokens": [1, 2, 4]}\n')
    for command in (["simulate"], ["optimum"]):
        code, _, error = run(capsys, *command, "--trace", str(trace), "--gib", "1", "--skip-bad")
        assert code == 0 and "2 requests, 1 bad record left out" in error
    trace.write_text('{"tokens": []}\n{"tokens": []}\n')
    for first in (["trace", "stats"], ["simulate", "--trace"], ["optimum", "--trace"]):
        code, _, error = run(capsys, *first, f"jsonl:{trace}", "--skip-bad")
        assert code == 2 and "no request in it: all 2 records are bad" in error


def test_shares_of_a_plan_without_a_plan_are_refused_before_the_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["simulate", "--trace", "short?head=9", "--gib", "1", "--metric", "hit,optimum"]
    code, shown, error = run(capsys, *command)
    assert code == 2 and not shown and "needs a plan: add --optimum" in error


def test_closed_output_pipe_is_not_an_error() -> None:
    command = f"{sys.executable} -m hybridcache simulate --trace short?head=9 --gib 1,2 | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@contextlib.contextmanager
def simulating(output: Path, processes: int) -> Iterator[subprocess.Popen[str]]:
    """Start a long ``simulate`` in a new process session, and wait for its first result.

    It inherits an ignored SIGINT, as with ``command &`` and nohup.
    """
    command = [sys.executable, "-m", "hybridcache", "simulate", "--trace"]
    command += ["conversations?live=8&head=400", "--gib", "0.5:8:60", "--output", str(output)]
    command += ["--processes", str(processes), "--no-bound"]
    ignoring = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", *command]
    with subprocess.Popen(
        ignoring,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        wait_until(lambda: output.exists() and output.read_text())
        yield process


@pytest.mark.full("1-SIGINT", "2-SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("processes", [1, 2])
def test_interrupt_gives_one_line_that_names_the_results_file(
    tmp_path: Path, processes: int, number: int
) -> None:
    output = tmp_path / "runs.jsonl"
    with simulating(output, processes) as run_:
        os.killpg(run_.pid, number)
        _, error = run_.communicate()
    assert run_.returncode == 128 + number and "Traceback" not in error
    line = error.splitlines()[-1]
    assert line.startswith("hybridcache: stopped; what was done is in") and str(output) in line


@pytest.mark.full("SIGKILL")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_worker_processes_end_with_the_command(tmp_path: Path, number: int) -> None:
    with simulating(tmp_path / "runs.jsonl", 2) as run_:
        run_.send_signal(number)
        run_.communicate(timeout=120)  # Returns only if no process still has stderr open.


@pytest.mark.full
def test_edited_policy_is_simulated_again(tmp_path: Path) -> None:
    """The source of its module identifies a run. Modules that it imports do not."""
    text = (
        "from hybridcache.policies.eviction.scored import ScorePolicy\n\n\n"
        "class Mine(ScorePolicy):\n"
        "    def score(self, item):\n"
        "        return SIGN * item.last_used\n"
    )
    command = [Path(sys.executable).with_name("hybridcache"), "simulate", "--trace", "short"]
    command += ["--gib", "1", "--policy", "edited:Mine", "--output", "runs.jsonl", "--no-bound"]
    tables = []
    for sign in ("1.0", "1.0", "-1.0"):
        (tmp_path / "edited.py").write_text(text.replace("SIGN", sign))
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        tables.append(done.stdout)
    assert tables[0] == tables[1] != tables[2]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 2


COMMANDS_WITH_RESULTS = {
    "simulate": "simulate --trace TRACE --gib 1",
    "closed loop": "simulate --closed-loop --trace TRACE --gib 1 --rate 1 --admission oldest",
    "leaderboard": "leaderboard --built-in lru --split split.toml",
}


@pytest.mark.parametrize("command", COMMANDS_WITH_RESULTS.values(), ids=COMMANDS_WITH_RESULTS)
def test_output_never_overwrites_a_file_without_results(
    command: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    short_split = 'model = "qwen3-next"\nseeds = [1]\n[cells]\n"short?head=20" = {sizes = [0.5]}\n'
    Path("split.toml").write_text(short_split)
    assert run(capsys, "trace", "convert", "short?head=20", "trace.jsonl")[0] == 0
    others = {
        "log.csv": "time,prompt\n0,hello\n",
        "half": "no line end",
        "list.json": "[1, 2]\n",
        "own.jsonl": '{"key": 3, "tokens": [1]}\n',
        "others.jsonl": '{"key": "0123456789abcdef", "kind": "Others"}\n',
    }
    for name, text in others.items():
        Path(name).write_text(text)
    for name in (*others, "trace.jsonl"):
        before = Path(name).read_bytes()
        arguments = command.replace("TRACE", "trace.jsonl").split()
        code, out, error = run(capsys, *arguments, "--output", name)
        assert code == 2 and name in error and not out
        assert Path(name).read_bytes() == before
    Path("link").symlink_to("new.jsonl")
    for _ in range(2):  # a new file, then an existing file with results
        code, out, error = run(capsys, *arguments, "--output", "link")
        assert code == 0 and '"version": ' in Path("new.jsonl").read_text()
        assert Path("link").is_symlink()


def test_optimum_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["optimum", "--trace", "resend?head=45", "--gib", "2,4"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "reached, %" in out
