"""The command line: what each command prints, and one sentence for what can not be done."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import pytest

from engine.config import EngineConfig
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.times import Roofline
from hybridcache.lab.advise import WORTH, advise
from hybridcache.lab.baselines import BASELINES
from hybridcache.lab.cli import main
from hybridcache.lab.extras import CACHE_DISTRIBUTION
from hybridcache.lab.generators import chat, resend, short
from hybridcache.lab.optimum import best_plan
from hybridcache.lab.report import METRICS, optimum_table
from hybridcache.lab.simulation.simulate import load_model, optimum, simulate
from hybridcache.lab.trace import Trace
from hybridcache.lab.traces import open_trace
from hybridcache.policies.registry import eviction_names, placement_names

SAMPLE = str(Path(__file__).parent / "samples" / "mooncake.jsonl.gz")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    out, error = capsys.readouterr()
    return code, out, error


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"hybridcache {metadata.version(CACHE_DISTRIBUTION)}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("simulate --polciy lru", "--polciy, did you mean --policy? See `hybridcache simulate"),
        ("simulate --trace chat --polciy lru", "--polciy lru, did you mean --policy?"),
        ("advise --trace=chat --gibb=3", "--gibb=3, did you mean --gib?"),
        ("simulate --trac chat --qqq", "unrecognized arguments: --qqq. See"),
        ("simulate --pol lru", "the following arguments are required: --trace. See"),
        ("trace stats", "the following arguments are required: trace. See"),
        ("simulat", "invalid choice: 'simulat'"),
    ],
)
def test_a_wrong_flag_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: str, sentence: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_trace_stats(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "trace", "stats", SAMPLE)
    assert code == 0 and "ideal token hit rate 26.57 %" in out and "seen before, %" in out
    _, out, _ = run(capsys, "trace", "stats", SAMPLE, "--json")
    assert json.loads(out)["num_requests"] == 400


def test_trace_convert_keeps_every_figure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "t.jsonl"
    assert main(["trace", "convert", SAMPLE + "?head=50", str(target)]) == 0
    capsys.readouterr()
    records = []
    for spec in (SAMPLE + "?head=50", str(target)):
        main(["trace", "stats", spec, "--json"])
        record = json.loads(capsys.readouterr().out)
        del record["name"]
        records.append(record)
    assert records[0] == records[1]


def test_simulate_prints_a_table_and_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figure, output = tmp_path / "f.png", tmp_path / "runs.jsonl"
    arguments = ["simulate", "--trace", "short", "--gib", "1:4:3", "--baseline", "vllm"]
    arguments += ["--metric", "hit,missed_tokens", "--losses", "--bins"]
    arguments += ["--figure", str(figure), "--output", str(output)]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "(infinite cache)" in out and "85.9" in out and "never seen" in out
    assert "by prompt tokens" in out and "by earlier requests" in out
    assert figure.stat().st_size > 10_000
    assert len(output.read_text().splitlines()) == 6
    again = run(capsys, *arguments)
    assert again[1] == out, "a sweep that resumes says the same"


def test_closed_loop_prints_a_row_for_each_policy_and_rate_and_draws(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    figure, output = tmp_path / "cliff.png", tmp_path / "runs.jsonl"
    words = ["--trace", "short?head=40", "--gib", "1", "--rate", "1:4:2", "--seeds", "2"]
    words += [
        "--admission",
        "oldest,live:4,sessions",
        "--max-share",
        "0.5",
        "--figure",
        str(figure),
        "--output",
        str(output),
    ]
    code, out, _ = run(capsys, "simulate", "--closed-loop", *words)
    assert code == 0 and figure.stat().st_size > 10_000
    lines = [line.split(",")[0] for line in out.splitlines()]
    assert [lines.count(word) for word in ("oldest", "live:4", "sessions")] == [2, 2, 2]
    for title in ("hit, %", "p99", "goodput/s", "makespan, s", "oldest wait, s", "Jain"):
        assert title in out
    assert "40 requests in closed loop" in out and "step times: a roofline" in out
    assert "null" not in out and len(output.read_text().splitlines()) == 3 * 2 * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rate", "1:2:3"], "--rate is about sessions that wait for answers: add --closed-loop"),
        (["--closed-loop", "--rate", "0:2:3"], "rates above 0 are needed"),
        (["--closed-loop", "--admission", "fastest"], "unknown admission policy 'fastest'"),
        (["--closed-loop", "--baseline", "vllm"], "--baseline has no meaning with --closed-loop"),
        (["--closed-loop", "--max-share", "2"], "max_share must be above 0 and at most 1"),
    ],
)
def test_what_a_closed_loop_cannot_be_is_one_sentence(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    code, out, error = run(capsys, "simulate", "--trace", "short?head=4", "--gib", "1", *words)
    assert code and not out and message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trace", "stats", "no-such-file"], "no-such-file"),
        (["simulate", "--trace", "chat", "--model", "qwen3.5"], "means several"),
        (["simulate", "--trace", "chat", "--policy", "best"], "unknown eviction policy 'best'"),
        (["simulate", "--trace", "chat", "--policy", "no.module:X"], "no module"),
        (["simulate", "--trace", "chat", "--baseline", "word"], "no baseline 'word'"),
        (["simulate", "--trace", "chat", "--metric", "joy"], "unknown metric 'joy'"),
        (["simulate", "--trace", "chat", "--metric", "optimum"], "needs a plan: add --optimum"),
        (["simulate", "--trace", "chat", "--policy", ""], "nothing to simulate"),
        (
            ["simulate", "--trace", "chat", "--policy", "json:JSONDecoder"],
            "it does not implement EvictionPolicy",
        ),
        (["simulate", "--trace", "chat", "--gib", "0"], "--gib '0'"),
        (["simulate", "--trace", "chat", "--gib", "-1"], "--gib '-1'"),
        (["simulate", "--trace", "chat", "--gib", "inf"], "--gib 'inf'"),
        (["simulate", "--trace", "chat", "--gib", "nan"], "--gib 'nan'"),
        (["simulate", "--trace", "chat", "--gib", "1:2:0"], "--gib '1:2:0'"),
        (["simulate", "--trace", "chat", "--gib", "2:1:3"], "(low first)"),
        (["simulate", "--trace", "chat", "--gib", "1e12"], "int32 can number"),
        *(
            ([*command, "--trace", "chat", flag, "1e300"], "1e+300")
            for command in (["simulate"], ["optimum"], ["advise", "--gib", "1"])
            for flag in ("--host-gib", "--disk-gib")
        ),
        (["simulate", "--trace", "chat", "--gib", "1e300"], "--gib '1e300': GiB above 0, below"),
        (["advise", "--trace", "chat", "--gib", "1e300"], "--gib 1e+300: GiB above 0, below"),
        (["optimum", "--trace", "chat", "--gib", "1:1e300:3"], "GiB above 0, below 1.1e+15"),
        (["simulate", "--trace", "chat", "--gib", "1:2:100000000"], "they are more than 1000"),
        (["simulate", "--trace", "chat", "--memory", "pools"], "give --kv-share between 0 and 1"),
        (["simulate", "--trace", "chat", "--grid", "99999999999"], "no prompt is longer than"),
        (["advise", "--trace", "chat", "--gib", "0.001"], "nothing fits in"),
        (["optimum", "--trace", "chat?head=5", "--gap", "nan"], "no negative gap"),
        (["optimum", "--trace", "chat?head=5", "--limit", "nan"], "positive time limit"),
        (["trace", "stats", str(Path(SAMPLE).parent)], "is a folder: name a file in it"),
        (["trace", "stats", "blaian:bl.jsonl"], "'blaian' is not a reader (jsonl, "),
        (["simulate", "--trace", "chat", "--page-size", "0"], "must be at least 1"),
        (["simulate", "--trace", "chat", "--grid", "-64"], "must be at least 1"),
        (["simulate", "--trace", "chat", "--servers", "0"], "servers must be at least 1"),
        (["simulate", "--trace", "chat", "--max-running", "0"], "max_running must be at least 1"),
        (["simulate", "--trace", "chat", "--processes", "0"], "processes must be at least 1"),
        (["simulate", "--trace", "chat", "--figure", "f.xyz"], "must end in .png, .svg or .pdf"),
        (["simulate", "--trace", "chat?head=0"], "chat: there is no request in it"),
        (["trace", "stats", "chat?head=0"], "there is no request in it"),
        (
            ["simulate", "--trace", "chat", "--model", "Qwen/Qwen3.5-35B-A3B-FP8"],
            "did you mean 'Qwen3.5-35B-A3B'?",
        ),
        (["simulate", "--trace", SAMPLE, "--grid", "100"], "grid 100 must divide"),
        (["advise", "--trace", "chat?head=0", "--gib", "1"], "chat: there is no request in it"),
        (["advise", "--trace", "chat", "--gib", "0"], "--gib 0.0"),
        (
            ["advise", "--trace", "chat", "--gib", "1", "--state-dtypes", "int4"],
            "'int4' is none of",
        ),
        (["optimum", "--trace", "chat?head=0"], "chat: there is no request in it"),
        (["optimum", "--trace", "chat", "--limit", "0"], "positive time limit"),
        (["optimum", "--trace", "chat", "--gap", "-1"], "no negative gap"),
        (
            ["optimum", "--trace", "chat?head=5", "--host-gib", "1", "--method", "milp"],
            "method milp does not support tiers below the device: use greedy",
        ),
        (["simulate", "--trace", "chat", "--host-gb-s", "50"], "say its size with --host-gib"),
        (["optimum", "--trace", "chat", "--disk-gb-s", "6"], "say its size with --disk-gib"),
        *(
            ([*command, "--host-gib", "1", "--host-gb-s", "-5"], "--host-gb-s -5: GB/s above 0")
            for command in (["simulate", "--trace", "chat"], ["optimum", "--trace", "chat"])
        ),
        (["simulate", "--trace", "chat?seed=x"], "option 'seed' needs a whole number"),
        (["simulate", "--trace", "chat?haed=9"], "'haed'; did you mean 'head'? It has seed, bound"),
        (["simulate", "--trace", "csv:no.csv"], "'csv:no.csv': there is no file no.csv"),
        (["simulate", "--trace", "chat", "--gib", "1,0,2"], "--gib '1,0,2': GiB above 0"),
        (["optimum", "--trace", "chat", "--gib", "1,-3"], "are needed (-3 is not)"),
        (["simulate", "--trace", "chat", "--figure", "no/f.png"], "there is no folder no"),
        (["simulate", "--trace", "chat", "--page", "log.csv"], "name an .html file"),
        (["simulate", "--trace", "chat", "--figure-size", "3x2"], "name its file with --figure"),
        (["optimum", "--trace", "chat", "--no-figure-notes"], "--no-figure-notes is about a fig"),
        (
            ["simulate", "--trace", "chat", "--figure", "f.png", "--figure-font", "DejaVu Sanz"],
            "no font 'DejaVu Sanz' is installed here; similar names: DejaVu Sans",
        ),
    ],
)
def test_what_can_not_be_done_is_one_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    code, out, error = run(capsys, *arguments)
    assert code == 2 and sentence in error and error.count("\n") == 1 and not out


def test_bad_records_are_counted_wherever_they_are_skipped(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"tokens": [1, 2, 3]}\n{"tokens": []}\n{"tokens": [1, 2, 4]}\n')
    for command in (["simulate"], ["optimum", "--method", "greedy"]):
        code, _, error = run(capsys, *command, "--trace", str(trace), "--gib", "1", "--skip-bad")
        assert code == 0 and "2 requests, 1 bad records left out" in error
    trace.write_text('{"tokens": []}\n{"tokens": []}\n')
    for first in (["trace", "stats"], ["simulate", "--trace"], ["optimum", "--trace"]):
        code, _, error = run(capsys, *first, f"jsonl:{trace}", "--skip-bad")
        assert code == 2 and "no request in it: all 2 records are bad" in error


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m hybridcache simulate --trace short?head=9 --gib 1,2 | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_the_figure_is_there_whoever_stops_reading(tmp_path: Path) -> None:
    figure = tmp_path / "f.png"
    command = f"{sys.executable} -m hybridcache simulate --trace short?head=9 --gib 1,2"
    subprocess.run(f"{command} --figure {figure} | true", shell=True, check=True)
    assert figure.stat().st_size > 10_000


@contextlib.contextmanager
def simulating(output: Path, processes: int) -> Iterator[subprocess.Popen[str]]:
    """A long ``simulate`` that has written its first result, in a session of its own. SIGINT was
    ignored when it started, as for ``command &`` and nohup."""
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
        while not (output.exists() and output.read_text()):
            assert process.poll() is None
            time.sleep(0.02)
        yield process


@pytest.mark.full("1")
@pytest.mark.parametrize("processes", [1, 2])
def test_control_c_is_one_sentence_that_says_what_is_kept(tmp_path: Path, processes: int) -> None:
    output = tmp_path / "runs.jsonl"
    with simulating(output, processes) as run_:
        os.killpg(run_.pid, signal.SIGINT)
        _, error = run_.communicate()
    assert run_.returncode == 130 and "Traceback" not in error
    sentence = error.splitlines()[-1]
    assert (
        sentence.startswith("hybridcache: stopped; what was done is in") and str(output) in sentence
    )


@pytest.mark.full("SIGTERM")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_processes_end_with_the_command_that_started_them(tmp_path: Path, number: int) -> None:
    with simulating(tmp_path / "runs.jsonl", 2) as run_:
        run_.send_signal(number)
        run_.communicate(timeout=30)  # Up to the end: no other process has its stderr open.


def test_help_lists_the_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "4000")
    with pytest.raises(SystemExit):
        main(["simulate", "--help"])
    words = capsys.readouterr().out.replace(",", " ").split()
    assert {*eviction_names(), *placement_names(), *BASELINES, *METRICS} <= set(words)


def test_tables_name_the_machine_and_what_a_cause_is(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["simulate", "--trace", "short?head=20", "--gib", "1", "--metric", "ttft-p50"]
    _, out, _ = run(capsys, *command, "--losses")
    assert "a roofline of 4 x H100 SXM: 494.5 TFLOP/s" in out
    assert "the first that holds on its path" in out and "as at Qwen3-Next's sizes" not in out
    model = ["--model", "qwen3.5-0.8b", "--policy", "marconi:0.5", "--metric", "hit"]
    _, out, _ = run(capsys, *command[:-2], *model)
    assert "as at Qwen3-Next's sizes, not this model's" in out and "H100" not in out


def test_a_policy_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from hybridcache.policies.eviction.scored import ScorePolicy\n\n\n"
        "class Shallow(ScorePolicy):\n"
        "    def score(self, item):\n"
        "        return (-item.position, item.last_used)\n"
    )
    command = [
        Path(sys.executable).with_name("hybridcache"),
        "simulate",
        "--trace",
        "short?head=40",
    ]
    command += ["--gib", "1,4", "--policy", "lru,mine:Shallow", "--processes", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "mine:Shallow" in done.stdout


@pytest.mark.full
def test_a_policy_is_run_again_if_it_or_a_module_that_it_imports_was_edited(tmp_path: Path) -> None:
    text = (
        "from hybridcache.policies.eviction.scored import ScorePolicy\n"
        "from signs import factor\n\n\n"
        "class Mine(ScorePolicy):\n"
        "    def score(self, item):\n"
        "        return SIGN * factor() * item.last_used\n"
    )
    signs = "def factor():\n    from inner import sign\n\n    return sign()\n"
    (tmp_path / "signs.py").write_text(signs)
    (tmp_path / "inner").mkdir()
    relative = "from .deep import SIGN\n\n\ndef sign():\n    return SIGN\n"
    (tmp_path / "inner" / "__init__.py").write_text(relative)
    command = [Path(sys.executable).with_name("hybridcache"), "simulate", "--trace", "short"]
    command += ["--gib", "1", "--policy", "edited:Mine", "--output", "runs.jsonl", "--no-bound"]
    tables = []
    for sign, deep in (("1", "1.0"), ("1", "1.0"), ("-1", "1.0"), ("1", "-1.")):
        (tmp_path / "edited.py").write_text(text.replace("SIGN", sign))
        (tmp_path / "inner" / "deep.py").write_text(f"SIGN = {deep}\n")
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        tables.append(done.stdout)
    assert tables[0] == tables[1] != tables[2] == tables[3]
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3


RESULTS_TO = {
    "simulate": "simulate --trace TRACE --gib 1",
    "closed loop": "simulate --closed-loop --trace TRACE --gib 1 --rate 1 --admission oldest",
    "fleet": "simulate --replicas 2 --trace TRACE --gib 1",
    "optimum": "optimum --trace TRACE --gib 1 --method greedy",
    "leaderboard": "leaderboard --built-in lru --split split.toml",
}


@pytest.mark.parametrize("command", RESULTS_TO.values(), ids=RESULTS_TO)
def test_a_file_that_holds_no_results_is_never_written_to(
    command: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    short_split = 'model = "qwen3-next"\nseeds = [1]\n[gib]\n"short?head=20" = [0.5]\n'
    Path("split.toml").write_text(short_split)
    assert run(capsys, "trace", "convert", "short?head=20", "trace.jsonl")[0] == 0
    others = {
        "log.csv": "time,prompt\n0,hello\n",
        "half": "no line end",
        "list.json": "[1, 2]\n",
        "own.jsonl": '{"key": 3, "tokens": [1]}\n',
    }
    for name, text in others.items():
        Path(name).write_text(text)
    for name in (*others, "trace.jsonl"):
        before = Path(name).read_bytes()
        words = command.replace("TRACE", "trace.jsonl").split()
        code, out, error = run(capsys, *words, "--output", name)
        assert code == 2 and name in error and not out
        assert Path(name).read_bytes() == before
    for _ in range(2):  # new, and again
        code, out, error = run(capsys, *words, "--output", "new.jsonl")
        assert code == 0 and Path("new.jsonl").read_text().count("\n") >= 1


def test_runs_of_python_are_continued_by_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = tmp_path / "runs.jsonl"
    simulate("short?head=20", gib=1, policy="lru").write_jsonl(lines)
    words = ["simulate", "--trace", "short?head=20", "--gib", "1", "--output", str(lines)]
    assert run(capsys, *words)[0] == 0


def test_optimum(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    arguments = ["optimum", "--trace", "resend?head=45", "--gib", "2,4", "--method", "greedy"]
    code, out, _ = run(capsys, *arguments, "--output", str(output))
    assert code == 0 and "reached, %" in out
    asked = ["optimum", "--trace", "short?head=45", "--gib", "0.3"]
    whole = run(capsys, *asked, "--method", "greedy")[1]
    assert run(capsys, *asked, "--counts-running")[1].split()[:-1] != whole.split()[:-1]
    assert [json.loads(line)["method"] for line in output.read_text().splitlines()] == [
        "greedy"
    ] * 2


def test_the_optimum_says_how_long_it_may_take(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["simulate", "--trace", "short?head=20", "--gib", "1,2,4"]
    code, _, error = run(capsys, *words, "--optimum", "lp")
    assert code == 0 and error.startswith(
        "hybridcache: best plans: lp, at most about 3 min (60 s a"
    )
    assert run(capsys, *words, "--optimum", "greedy")[2] == ""


def test_the_builtin_model_of_the_engine_is_a_model_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["simulate", "--trace", "short?head=20", "--gib", "0.01", "--model", "builtin"]
    code, out, _ = run(capsys, *words)
    assert code == 0 and out.startswith("short, builtin: 20 requests")
    code, out, _ = run(capsys, "advise", *words[1:])
    assert code == 0 and "engine serve --model builtin --cache-gib 0.01" in out
    monkeypatch.setattr("hybridcache.lab.simulation.simulate.find_spec", lambda _: None)
    code, out, error = run(capsys, *words)
    assert code == 2 and "--model builtin is part of the engine, which is not installed" in error


def test_share_of_the_optimum() -> None:
    for argument, function in (("optimum", simulate), ("method", optimum)):
        with pytest.raises(ValueError, match=f"{argument} must be one of milp, lp, greedy"):
            function("short?head=60", gib=1, **{argument: "gredy"})
    result = simulate("short?head=60", gib=(1, 8), optimum="greedy")
    for run_ in result.runs:
        assert run_.share_of_optimum is not None and run_.share_of_optimum > 0
    table = result.table("optimum")
    assert "% of best plan" in table and "greedy's, not the optimum" in table
    assert "solver" not in table, "none ran"
    assert "best plan:" not in result.table("hit")
    assert "(with hindsight)" in result.table() and "(with hindsight)" not in result.table("flops")


def test_advice_is_the_best_of_what_it_tried() -> None:
    advice = advise(short(), gib=2, policy="lru")
    first = [a for a in advice.answers if a.question == "policy @ checkpoints"]
    best = max(first, key=lambda answer: answer.run.token_hit_rate)
    assert best.chosen and best.option.endswith(advice.checkpoints.split(",every")[0])
    assert advice.result.token_hit_rate >= best.run.token_hit_rate
    assert 0 < advice.kv_share < 1
    precise = [a for a in advice.answers if a.question == "precision of states"]
    assert [a.option for a in precise if a.chosen] == [advice.state_dtype]
    most = max(answer.run.token_hit_rate for answer in precise)
    assert advice.result.token_hit_rate >= most - WORTH
    for answer in precise[: [a.chosen for a in precise].index(True)]:
        assert answer.run.token_hit_rate < most - WORTH, "a finer one would have done"
    text = advice.text()
    assert f"states in {advice.state_dtype}" in text
    assert advice.policy in text and "GiB for states" in text
    assert json.loads(json.dumps(advice.as_record()))["policy"] == "lru"


def test_times_that_tell_no_options_apart_are_explained_once() -> None:
    """On an H100 the built-in model takes the constant part of the time whatever is reused."""
    text = advise("chat?head=30", gib=0.01, model="builtin").text()
    assert "TTFT 5.0 ms with every option: these prompts are short for the assumed machine" in text
    assert text.count("TTFT") == 1
    slower = Roofline(load_model("builtin"), flops_per_s=1e9, bytes_per_s=1e9, overhead_s=0)
    text = advise("chat?head=30", gib=0.01, model="builtin", times=slower).text()
    assert "every option" not in text and text.count("TTFT P50") == 2


def test_a_finer_grid_is_advised_where_it_gains() -> None:
    asked = {"policy": "lru", "state_dtypes": ()}
    advice = advise(open_trace("tree-of-thoughts?head=200"), gib=4, **asked)
    tried = {a.option: a for a in advice.answers if a.question == "grid of checkpoints"}
    assert list(tried) == ["64", "32", "16"]
    rates = {option: answer.run.token_hit_rate for option, answer in tried.items()}
    assert rates["64"] < rates["16"] - WORTH
    assert tried[str(advice.grid)].chosen and advice.grid < 64
    assert advice.result.token_hit_rate == rates[str(advice.grid)]
    assert f"grid {advice.grid}" in advice.text() and advice.as_record()["grid"] == advice.grid
    long = advise(resend().head(20), gib=8, **asked)
    assert long.grid == 64 and len([a for a in long.answers if a.question.startswith("grid")]) == 3
    blocks = advise(open_trace(f"{SAMPLE}?head=20"), gib=40, **asked)
    assert blocks.grid == 64 and all(not a.question.startswith("grid") for a in blocks.answers)


def test_the_share_of_a_plan_says_how_far_the_optimum_can_be(tmp_path: Path) -> None:
    result = simulate("resend?head=45", gib=(2, 8), optimum="lp")
    table = result.table("optimum")
    [row] = [line for line in table.splitlines() if line.startswith("(no plan passes)")]
    shares = [float(cell) for cell in row.split()[-2:]]
    gaps = [1 - 100 / share for share in shares]
    assert all(share >= 100 for share in shares)
    assert f"at most {100 * max(gaps):.1f} % above it" in table or max(gaps) < 1e-3
    plan = result.runs[0].optimum_tokens
    assert plan is not None
    above = replace(result.runs[0], cached_tokens=plan + 1)
    table = replace(result, runs=(above, result.runs[1])).table("optimum")
    assert "100.0*" in table and "* above the plan" in table


def test_a_plan_that_the_solver_did_not_better_is_the_greedys() -> None:
    def plan_by(trace: Trace, method: Literal["greedy", "lp", "milp"]) -> str:
        found = best_plan(
            trace,
            capacity_bytes=1 << 30,
            kv_bytes_per_token=24576,
            state_bytes=77_266_944,
            grid=64,
            method=method,
            limit_s=20,
        )
        assert found.record()["plan_by"] == found.plan_by
        assert found.plan_by in optimum_table([found])
        return found.plan_by

    assert plan_by(chat().head(50), "lp") == plan_by(resend().head(45), "milp") == "greedy"
    assert plan_by(chat().head(50), "milp") == "milp"


def test_only_what_the_engine_serves_is_advised_unless_more_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def tried(*more: str) -> list[str]:
        code, out, _ = run(capsys, *command, *more)
        assert code == 0
        answers = json.loads(out)["answers"]
        return [a["option"] for a in answers if a["question"] == "precision of states"]

    command = ["advise", "--trace", "short?head=30", "--gib", "0.3", "--policy", "lru", "--json"]
    assert tried() == list(get_args(get_type_hints(EngineConfig)["state_dtype"]))
    assert tried("--state-dtypes", "int8,bfloat16") == ["float32", "bfloat16", "int8"]
    code, out, _ = run(capsys, *command[:-1])
    assert code == 0 and "to serve: engine serve --model" in out


def test_advice_for_a_model_without_states() -> None:
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = ModelGeometry.from_config(config)
    advice = advise(short().head(40), model=model, gib=0.1, policy="lru")
    assert advice.kv_share == 1.0 and "0 GiB for states" in advice.text()


@pytest.mark.parametrize("word", list(METRICS))
def test_every_metric_has_a_table(word: str) -> None:
    result = simulate("short?head=20", gib=(1, 2))
    assert METRICS[word].title in result.table(word)


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = (
        "import sys, hybridcache.lab.cli\n"
        "print([name for name in ('torch', 'matplotlib', 'scipy', 'transformers') if name in "
        "sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_optimum_stands_in_the_lines_and_its_price_in_the_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace, lines = "short?head=60", tmp_path / "runs.jsonl"
    figure = tmp_path / "f.png"
    sweep = ["simulate", "--trace", trace, "--gib", "0.5,4", "--output", str(lines)]
    shown = ("--optimum", "lp", "--losses", "--bins", "--figure", str(figure))
    code, out, _ = run(capsys, *sweep, *shown)
    assert code == 0 and "(no plan passes)" in out
    assert {path.name for path in tmp_path.glob("*.png")} == {"f.png", "f-losses.png", "f-bins.png"}
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    for record in records:
        reached = record["optimum_tokens"] / record["prompt_tokens"]
        assert record["token_hit_rate"] <= reached <= record["plan_bound"] + 1e-9
        assert record["share_of_optimum"] == record["cached_tokens"] / record["optimum_tokens"]
    main(sweep)
    capsys.readouterr()
    again = [json.loads(line) for line in lines.read_text().splitlines()]
    assert again == records, "what was known is kept, and nothing is run twice"

    found = tmp_path / "optimum.jsonl"
    priced = ["optimum", "--trace", trace, "--gib", "0.5,4", "--method", "lp"]
    code, out, _ = run(capsys, *priced, "--output", str(found), "--figure", str(figure))
    assert code == 0 and "gap, %" in out and "points a GiB more" in out
    scarce, ample = (json.loads(line) for line in found.read_text().splitlines())
    assert len(scarce["prices_tokens_per_gib"]) == scarce["num_requests"] - 1
    assert scarce["gib_worth"] > 0 == ample["gib_worth"]
