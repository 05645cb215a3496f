"""Tests of faulty trace files: each record is read, reported with file and line, or counted."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridcache.lab.cli import main
from hybridcache.lab.simulation.simulate import simulate
from hybridcache.lab.trace import BadRecordError, Trace, TraceRequest
from hybridcache.lab.traces import base, open_trace
from hybridcache.lab.traces.base import TraceOrderWarning
from hybridcache.lab.traces.jsonl import TraceFieldsWarning
from tests.lab.records import (
    SEGMENTS,
    agent_request,
    agent_session,
    lines,
)


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"tokens": []}, "the prompt is empty"),
        ({"tokens": [-1]}, "an id is not a whole number in"),
        ({"tokens": [1.5]}, "an id is not a whole number in"),
        ({"tokens": [1 << 31]}, "an id is not a whole number in"),
        ({"tokens": [[1, 2], [3, 4]]}, "an id is not a whole number in"),
        ({"tokens": "12"}, "a list of ids was expected, not str"),
        ({"tokens": [1, [2]]}, "an id is not a whole number in"),
        ({"tokens": [1], "output_length": -5}, "output_length is -5, not a whole number in"),
        ({"tokens": [1], "output_length": 1 << 40}, "output_length is 1099511627776, not"),
        ({"tokens": [1], "timestamp": float("nan")}, "timestamp is nan, not a finite number"),
        ({"tokens": [1], "timestamp": "5"}, "timestamp is '5', not a number"),
        ({"tokens": [1], "timestamp": -2}, "timestamp is -2, not a finite number of at least 0"),
        ({"tokens": [1], "partial": 7}, r"partial is 7, not a whole number in \[1, 1\]"),
        ({"tokens": [1], "partial": "x"}, "partial is 'x'"),
        ({"tokens": [1], "boundaries": [2]}, "a boundary is outside of the prompt's 1 ids"),
        ({"tokens": [1], "boundaries": 1}, "a list of ids was expected, not int"),
        ({"tokens": [1], "namespace": {}}, "namespace is {}, not a text or a whole number"),
        ({"tokens": [1], "session": [1]}, r"session is \[1\], not a text or a whole number"),
        (
            {"tokens": [1], "answer_survives": "no"},
            "answer_survives is .no.: it must be true or false",
        ),
        ({"tokens": [1], "session_end": 1}, "session_end is 1: it must be true or false"),
        ({"tokens": [1], "stop_reason": 5}, "stop_reason is 5, not a text"),
        ({"session": "s", "prefix": []}, "prefix does not say how many ids are kept"),
        ({"session": "new", "prefix": [5, 1]}, "prefix keeps 5 ids of 0"),
        ({"session": "s"}, "tokens or prefix is missing"),
        ({"session": "s", "tokens": [1], "prefix": [0, 1]}, "it has both tokens and prefix: give"),
        (
            {"tokens": [1], "output": [2], "output_length": 1},
            "it has both output and output_length",
        ),
        ({"tokens": [1], "timestamp": 1, "time": 1}, "it has both timestamp and time: give one"),
        ({"tokens": [1], "time": 1}, "it has a time, but the records above have no time"),
        ([1], "a JSON object was expected, not list"),
    ],
)
def test_error_for_a_bad_line_names_file_and_line(
    tmp_path: Path, record: Any, problem: str
) -> None:
    path = lines(tmp_path / "t.jsonl", {"tokens": [1]}, record, {"tokens": [2]})
    with pytest.raises(BadRecordError, match=rf"t\.jsonl, line 2: {problem}"):
        list(open_trace(f"jsonl:{path}"))
    trace = open_trace(f"jsonl:{path}", skip_bad=True)
    assert len(list(trace)) == 2 and trace.bad.count == 1


def test_error_for_an_unreadable_first_line_names_it(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    for content, problem in (
        (b"hello\n", "t.jsonl, line 1: not JSON"),
        (b'\n{"tokens": [1]', "t.jsonl, line 2: not JSON .* column 15"),
        (b"\xff\xfe\x00", "t.jsonl, line 1: not UTF-8"),
        (b"[\xff", "t.jsonl, line 1: not UTF-8"),
        (b"", "t.jsonl: there is no record in it"),
        (b"[]", "t.jsonl: there is no record in it"),
        (b"[1, 2]", "t.jsonl, line 1: a JSON object was expected, not int"),
        (b'[\n{"id" 1}]', "t.jsonl, line 2: not JSON"),
        (gzip.compress(b'{"tokens": [1]}\n')[:15], "t.jsonl, line 1: the gzip file is damaged"),
        (gzip.compress(b'[{"id": "x"}]')[:18], "t.jsonl, line 1: the gzip file is damaged"),
        (b'{"what": 1}', "no format recognises its first record"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=problem):
            open_trace(str(path))
    with pytest.raises(FileNotFoundError, match=r"no trace 'no\.jsonl': no such file or generator"):
        open_trace("no.jsonl")


LONG = "".join(f'{{"tokens": [{number}]}}\n' for number in range(40_000))


def test_truncated_gzip_file_yields_its_whole_lines_and_an_error(
    tmp_path: Path,
) -> None:
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(LONG.encode())[:-40_000])
    trace = open_trace(str(path), skip_bad=True)
    found = [int(request.tokens[0]) for request in trace]
    assert found == list(range(len(found))) and 100 < len(found) < 40_000
    assert trace.bad.count == 1
    line = len(found) + 1
    with pytest.raises(
        BadRecordError, match=rf"t\.jsonl\.gz, line {line}: the gzip file is damaged"
    ):
        list(open_trace(str(path)))


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("zipped", [False, True])
def test_byte_order_marks_and_line_endings_are_ignored(
    tmp_path: Path, ending: str, mark: str, zipped: bool
) -> None:
    path = tmp_path / "t"
    listed = '{"tokens": [1]}' + ending + '{"tokens": [2]}\n' + ending + '{"tokens": [3]}'
    array = "[" + ending + json.dumps(SEGMENTS[0]) + "," + ending + json.dumps(SEGMENTS[2]) + "]"
    for text, spec, count in ((listed, "", 3), (array, "?tokenizer=bytes", 2)):
        data = (mark + text).encode()
        path.write_bytes(gzip.compress(data) if zipped else data)
        assert sum(1 for _ in open_trace(f"{path}{spec}")) == count


GOOD: dict[str, dict[str, Any]] = {
    "jsonl": {"session": "s", "timestamp": 1.0, "tokens": [1, 2], "output": [4]},
    "mooncake": {"timestamp": 9, "input_length": 600, "output_length": 4, "hash_ids": [7, 8]},
    "bailian": {
        "chat_id": 3,
        "parent_chat_id": -1,
        "timestamp": 9,
        "input_length": 20,
        "output_length": 4,
        "hash_ids": [7, 8],
    },
    "messages": {
        "timestamp": 9.0,
        "messages": [{"role": "user", "content": "hello"}],
        "session": "s",
        "response": "yes",
    },
    "conversations": {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "yes"},
        ],
    },
    "coding-agent": agent_session("a", 64, 64, [agent_request(0, 640, [1, 10])]),
    "sharegpt-counts": {"id": "a", "turns": [["u", 3], ["a", 5]], "first_msg_blocks16": [0]},
    "sharegpt": SEGMENTS[0],
    "taubench": {
        "task_id": 1,
        "trial": 0,
        "traj": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        ],
    },
}
"""Valid record of each format."""
WRONG = [None, True, -1, 1.5, float("nan"), 1 << 40, 1 << 70, "x", [1], [[2, 1], [3]], {"a": 1}]
WRONG.append([[1, 1 << 40]])


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value inside a record."""
    inside: Any = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value) if isinstance(value, list) else inside
    return [each for key, part in inside for each in ((*path, key), *places(part, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], wrong: Any) -> Any:
    """Return a copy with ``wrong`` at ``path``."""
    if not path:
        return wrong
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], wrong)
    return copy


@pytest.mark.full("messages", "jsonl", "sharegpt", "taubench")
@pytest.mark.parametrize("reader", list(GOOD))
def test_wrong_field_values_are_read_or_reported(reader: str, tmp_path: Path) -> None:
    """Each wrong value is tried in each field. No other error is raised, and the records before and
    after are read."""
    path, good = tmp_path / "t", GOOD[reader]
    spec = f"{reader}:{path}"
    if reader in ("sharegpt", "taubench", "messages", "conversations"):
        spec += "?tokenizer=bytes"
    array = reader in ("sharegpt", "taubench")
    changes = {"id": ("b_0", "c_0"), "timestamp": (0, 1 << 71), "ts": (0, 1 << 71)}
    before, after = good, good
    for name, (first, last) in changes.items():
        if name in good:
            before, after = replaced(before, (name,), first), replaced(after, (name,), last)
    num_reported = 0
    for place in places(good):
        for wrong in WRONG:
            records = [json.dumps(each) for each in (before, replaced(good, place, wrong), after)]
            path.write_text("[\n" + ",\n".join(records) + "]" if array else "\n".join(records))
            trace = open_trace(spec, skip_bad=True)
            count = sum(1 for _ in trace)
            assert count >= 2 and trace.bad.count <= 1
            if trace.bad.count:
                num_reported += 1
                line = 3 if array else 2
                with pytest.raises(BadRecordError, match=rf"/t, line {line}: [^\n]+$"):
                    list(open_trace(spec))
    assert num_reported > len(WRONG)


def out_of_order(folder: Path, times: Sequence[float]) -> Path:
    """Write a file with the prompt ``[k]`` on line ``k``."""
    records = ({"tokens": [k], "timestamp": when} for k, when in enumerate(times))
    return lines(folder / "t.jsonl", *records)


def read_sorted(spec: str, *, skip_bad: bool = False) -> tuple[list[int], list[str], int]:
    """Return (first id of each request, warnings about order, number of bad records)."""
    trace = open_trace(spec, skip_bad=skip_bad)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = list(trace)
    times = [request.timestamp_s for request in found]
    assert times == sorted(times)
    messages = [str(one.message) for one in caught if one.category is TraceOrderWarning]
    return [int(request.tokens[0]) for request in found], messages, trace.bad.count


@pytest.mark.parametrize("seed", range(4))
def test_small_disorder_is_sorted_with_one_warning(tmp_path: Path, seed: int) -> None:
    """A log that is written when requests end is disordered. Requests with the same time keep their
    order."""
    choose = np.random.default_rng(seed)
    starts = np.sort(choose.integers(0, 60, 200))
    order = np.argsort(starts + choose.exponential(20, 200), kind="stable")
    times = starts[order].tolist()
    found, messages, _ = read_sorted(str(out_of_order(tmp_path, times)))
    assert found == sorted(range(200), key=lambda k: times[k])
    first = next(k for k in range(1, 200) if times[k] < times[k - 1])
    [warning] = messages
    assert f"t.jsonl: lines are not in order of time (the first is line {first + 1})" in warning
    assert read_sorted(str(out_of_order(tmp_path, sorted(times))))[1] == []


def test_error_for_large_disorder_names_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request can be moved back by at most the number of requests that are read ahead."""
    monkeypatch.setattr(base, "WINDOW", 5)
    late = [10 + k for k in range(5)]
    assert read_sorted(str(out_of_order(tmp_path, [*late, 3, 20])))[0] == [5, 0, 1, 2, 3, 4, 6]
    path = out_of_order(tmp_path, [*late, 15, 3, 20])
    with pytest.raises(
        BadRecordError, match=r"line 7: its time 3 s is before 10 s, .* sort the file by time"
    ):
        read_sorted(str(path))
    assert read_sorted(str(path), skip_bad=True) == ([0, 1, 2, 3, 4, 5, 7], [], 1)
    assert read_sorted(f"{path}?head=3")[0] == [0, 1, 2], "line 7 is not read"
    monkeypatch.setattr(base, "WINDOW_IDS", 2)
    with pytest.raises(BadRecordError, match=r"line 4: .* sort the file by time"):
        read_sorted(str(out_of_order(tmp_path, [10, 11, 12, 3])))


def test_bad_line_is_reported_after_the_requests_before_it(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", {"tokens": [1]}, {"tokens": [2]}, {"tokens": []})
    requests = iter(open_trace(str(path)))
    assert [int(next(requests).tokens[0]) for _ in range(2)] == [1, 2]
    with pytest.raises(BadRecordError, match="line 3: the prompt is empty"):
        next(requests)
    assert len(list(open_trace(f"{path}?head=2"))) == 2


DISTINCT_FIELDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "jsonl": lambda k: {"timestamp": 1 + k, "tokens": [k], "session": k},
    "mooncake": lambda k: {"timestamp": 1 + k, "hash_ids": [k, 8]},
    "bailian": lambda k: {"timestamp": 1 + k, "hash_ids": [k, 8], "chat_id": k},
    "messages": lambda k: {"timestamp": 1 + k, "prompt": f"hello {k}", "messages": None},
}
"""Fields of the k-th request of a format that differ from those of other requests."""


@pytest.mark.parametrize("reader", DISTINCT_FIELDS)
def test_formats_with_times_are_sorted(tmp_path: Path, reader: str) -> None:
    """A shuffled file gives the same requests as the ordered file."""
    records = [GOOD[reader] | DISTINCT_FIELDS[reader](k) for k in range(6)]
    tokenizer = "?tokenizer=bytes" * (reader == "messages")
    spec = f"{reader}:{lines(tmp_path / 'sorted', *records)}{tokenizer}"
    expected = renumbered(open_trace(spec))
    assert len({tuple(tokens) for _, tokens in expected}) == 6
    shuffled = [records[place] for place in (2, 0, 1, 5, 4, 3)]
    spec = f"{reader}:{lines(tmp_path / 'shuffled', *shuffled)}{tokenizer}"
    with pytest.warns(TraceOrderWarning):
        found = renumbered(open_trace(spec))
    assert found == expected and found[0][0] >= 0


def renumbered(requests: Iterable[TraceRequest]) -> list[tuple[float, list[int]]]:
    """Return times and tokens, with ids numbered in the order in which they appear."""
    numbers: dict[int, int] = {}
    return [
        (one.timestamp_s, [numbers.setdefault(each, len(numbers)) for each in one.tokens.tolist()])
        for one in requests
    ]


def test_command_line_warns_once_about_disorder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The warning is not repeated by each process that reads the trace."""
    path = out_of_order(tmp_path, [5, 3, 9, 8])
    arguments = ["simulate", "--trace", str(path), "--gib", "1,2", "--policy", "lru"]
    assert main([*arguments, "--processes", "2"]) == 0
    [line] = [line for line in capfd.readouterr().err.splitlines() if "order of time" in line]
    assert line.startswith(f"hybridcache: {path}: lines are not in order")


def test_surrogates_and_invalid_numbers_are_reported(tmp_path: Path) -> None:
    surrogate = {"messages": [{"role": "user", "content": "\ud800"}]}
    for record, problem in (
        ({"timestamp": 0, "request": surrogate}, "a text holds U\\+D800, half of a character"),
    ):
        path = lines(tmp_path / "t.jsonl", record)
        with pytest.raises(BadRecordError, match=rf"t\.jsonl, line 1: {problem}"):
            list(open_trace(f"{path}?tokenizer=bytes"))
        trace = open_trace(f"{path}?tokenizer=bytes", skip_bad=True)
        assert list(trace) == [] and trace.bad.count == 1


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
def test_record_without_a_time_among_others_is_bad(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "t.csv":
        path.write_text("time,prompt,max_tokens\n5,a,1\n,b,1\n9,c,1\n")
        spec, line = f"{path}?tokenizer=bytes", 3
    else:
        spec, line = str(lines(path, {"time": 5, "tokens": [1]}, {"tokens": [2]})), 2
    with pytest.raises(
        BadRecordError, match=rf"line {line}: it has no time, but the records above"
    ):
        list(open_trace(spec))
    trace = open_trace(spec, skip_bad=True)
    assert list(trace) and trace.bad.count == 1


def test_records_without_any_time_are_a_second_apart(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", {"tokens": [1]}, {"tokens": [2]})
    assert [request.timestamp_s for request in open_trace(str(path))] == [0.0, 1.0]


def test_unknown_fields_give_one_warning_with_their_names(tmp_path: Path) -> None:
    record = {"tokens": [1], "time": 3, "sesion": "a", "output_lenght": 5}
    path = lines(tmp_path / "t.jsonl", record, record)
    with pytest.warns(
        TraceFieldsWarning, match=r"unused fields: sesion, output_lenght; "
    ) as caught:
        first, _ = open_trace(str(path))
    assert len(caught) == 1 and caught[0].filename == __file__ and first.timestamp_s == 3
    texts = {"request": {"prompt": "a"}, "answer": {}}  # of engine record --text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(open_trace(str(lines(path, {"tokens": [1]} | texts))))


def test_csv_row_that_is_not_utf_8_is_named_and_can_be_skipped(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes(b'time,prompt,max_tokens\n0,a,1\n1,"b\n\xe4",1\n2,\xc3\xa4,1\n')
    spec = f"{path}?tokenizer=bytes"
    with pytest.raises(BadRecordError, match=r"latin\.csv, line 4: not UTF-8"):
        list(open_trace(spec))
    trace = open_trace(spec, skip_bad=True)
    assert [len(request.tokens) for request in trace] == [1, 2] and trace.bad.count == 1
    path.write_bytes(b"time,pr\xe4mpt\n0,a\n")
    with pytest.raises(BadRecordError, match=r"latin\.csv, line 1: not UTF-8"):
        list(open_trace(f"csv:{spec}"))


IDS = np.arange(3, dtype=np.int32)
REQUEST = TraceRequest(0.0, "s", None, IDS, IDS)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"timestamp_s": -10.0}, r"timestamp_s must be a finite number of at least 0 \(got -10"),
        ({"timestamp_s": float("nan")}, r"timestamp_s must be .* \(got nan\)"),
        ({"timestamp_s": "1"}, r"timestamp_s must be .* \(got '1'\)"),
        ({"timestamp_s": 1.0}, "timestamp_s 1 is before 2, that of the request before it: sort"),
        (
            {"tokens": [1.5]},
            r"tokens must be int32\[n\], or a list of whole numbers .*got \[1\.5\]",
        ),
        ({"tokens": [[1], [2, 3]]}, r"tokens must be int32\[n\]"),
        ({"tokens": [1 << 31]}, r"tokens must be int32\[n\]"),
        ({"tokens": []}, "tokens are empty"),
        ({"output": None}, r"output must be int32\[n\], or a list .* \(got None\)"),
        ({"output": np.array([-1])}, r"output must be int32\[n\]"),
    ],
)
def test_invalid_request_of_a_program_is_named(change: dict[str, Any], problem: str) -> None:
    requests = (
        REQUEST._replace(timestamp_s=2.0),
        REQUEST._replace(**{"timestamp_s": 3.0} | change),
    )
    with pytest.raises(ValueError, match=f"^mine, request 2: {problem}") as caught:
        simulate(Trace("mine", 1, lambda: requests), gib=1, policy="lru")
    assert "\n" not in str(caught.value)


def test_lists_of_ids_are_converted() -> None:
    given = [REQUEST._replace(tokens=[1, 2], output=[]), REQUEST._replace(tokens=IDS.astype(int))]  # type: ignore[arg-type]
    for request, ids in zip(Trace("mine", 1, lambda: given), ([1, 2], [0, 1, 2]), strict=True):
        assert request.tokens.dtype == request.output.dtype == np.int32
        assert request.tokens.tolist() == ids
    with pytest.raises(ValueError, match=r"request 1: a TraceRequest is needed \(got tuple\)"):
        list(Trace("mine", 1, lambda: [(0.0, "a")]))  # type: ignore[list-item]


def test_requests_that_can_be_iterated_only_once_are_an_error() -> None:
    rows = (REQUEST._replace(timestamp_s=float(k)) for k in range(9))
    message = (
        r"mine: it gave 9 requests at first and 0 now: requests\(\) must start again at each call"
    )
    with pytest.raises(ValueError, match=message):
        simulate(Trace("mine", 1, lambda: rows), gib=1, policy="lru")
    trace = open_trace("short?head=9")
    next(iter(trace))  # a part of a pass is not counted
    assert len(list(trace)) == len(list(trace)) == len(list(trace.kept())) == 9
