"""Tests of faulty trace files: each record is read, or reported with file, line and field, or
counted."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybridcache.lab.simulation.simulate import simulate
from hybridcache.lab.trace import BadRecordError, Trace, TraceRequest
from hybridcache.lab.traces import frame, open_trace
from hybridcache.lab.traces.frame import TraceFieldsWarning, TraceOrderWarning
from tests.lab.records import SEGMENTS, agent_request, agent_session, lines

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
    "sharegpt": SEGMENTS[0],
    "sharegpt-counts": {
        "id": "x",
        "turns": [["u", 20], ["a", 5], ["u", 3], ["a", 4]],
        "first_msg_blocks16": [7],
    },
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
ARRAYS = ("sharegpt", "taubench")
TEXTS = (*ARRAYS, "messages", "conversations")


def written(path: Path, reader: str, *records: Any) -> str:
    """Write records in a format, each on its line, and return the trace specification."""
    texts = [json.dumps(record) for record in records]
    path.write_text("[\n" + ",\n".join(texts) + "]" if reader in ARRAYS else "\n".join(texts))
    return f"{reader}:{path}" + "?tokenizer=bytes" * (reader in TEXTS)


def refusal(spec: str) -> str:
    """Return the error of reading a trace, which is one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BadRecordError) as caught:
            list(open_trace(spec))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def agent(**fields: Any) -> dict[str, Any]:
    return agent_session("a", 0, 0, [agent_request(0, 64, [1, 1]) | fields])


@pytest.mark.parametrize(
    ("reader", "change", "named"),
    [
        ("jsonl", {"tokens": [-1]}, "tokens"),
        ("jsonl", {"tokens": [1.5]}, "tokens"),
        ("jsonl", {"tokens": [1 << 31]}, "tokens"),
        ("jsonl", {"tokens": [[1, 2], [3, 4]]}, "tokens"),
        ("jsonl", {"tokens": []}, "prompt"),
        ("jsonl", {"tokens": None}, "tokens"),
        ("jsonl", {"prefix": [0, 1]}, "prefix"),
        ("jsonl", {"output": 3}, "output"),
        ("jsonl", {"output_length": 1}, "output_length"),
        ("jsonl", {"timestamp": -2}, "timestamp"),
        ("jsonl", {"timestamp": "5"}, "timestamp"),
        ("jsonl", {"timestamp": float("nan")}, "timestamp"),
        ("jsonl", {"time": 1}, "time"),
        ("jsonl", {"partial": 7}, "partial"),
        ("jsonl", {"boundaries": [3]}, "boundaries"),
        ("jsonl", {"namespace": {}}, "namespace"),
        ("jsonl", {"session": [1]}, "session"),
        ("jsonl", {"session": True}, "session"),
        ("jsonl", {"answer_survives": "no"}, "answer_survives"),
        ("jsonl", {"session_end": 1}, "session_end"),
        ("jsonl", {"service": -1}, "service"),
        ("jsonl", {"stop_reason": 5}, "stop_reason"),
        ("mooncake", {"hash_ids": [7, 8, 9]}, "hash_ids"),
        ("mooncake", {"hash_ids": [1.5, 2]}, "hash_ids"),
        ("mooncake", {"input_length": 0}, "input_length"),
        ("mooncake", {"output_length": 1 << 40}, "output_length"),
        ("bailian", {"hash_ids": []}, "hash_ids"),
        ("bailian", {"chat_id": None}, "chat_id"),
        ("coding-agent", agent(hash_ids=[[2, 1]]), "hash_ids"),
        ("coding-agent", agent(hash_ids=[[0, 1 << 29]]), "hash_ids"),
        ("coding-agent", agent(hash_ids=[[1, 2]]), "blocks"),
        ("messages", {"messages": []}, "message"),
        ("messages", {"messages": [{"role": "user", "content": 5}]}, "content"),
        ("messages", {"messages": [{"role": "user", "content": "\ud800"}]}, "U+D800"),
        ("messages", {"messages": None, "prompt": ["a", "b"]}, "prompt"),
        (
            "messages",
            {"messages": None, "role": "user", "content": "a", "session": None},
            "session",
        ),
        ("messages", {"response": 'data: {"choices": []}'}, "stream"),
        ("messages", {"timestamp": "noon"}, "timestamp"),
        ("messages", {"timestamp": None}, "time"),
        ("messages", {"response": None, "max_tokens": "many"}, "max_tokens"),
        ("taubench", {"trial": None}, "trial"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "value"),
        ("sharegpt-counts", {"turns": [["x", 1]]}, "turns"),
        ("sharegpt-counts", {"first_msg_blocks16": [1 << 20]}, "first_msg_blocks16"),
    ],
)
def test_invalid_field_is_named(
    reader: str, change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    good = GOOD[reader]
    spec = written(tmp_path / "t", reader, good, good | change)
    line = 3 if reader in ARRAYS else 2
    error = refusal(spec)
    assert error.startswith(f"{tmp_path}/t, line {line}: ") and named in error.partition(": ")[2]
    trace = open_trace(spec, skip_bad=True)
    assert len({request.session for request in trace}) == 1 and trace.bad.count == 1


def test_prefix_of_more_ids_than_the_session_has_is_refused(tmp_path: Path) -> None:
    row = {"session": "new", "prefix": [5, 1]}
    assert "prefix" in refusal(f"jsonl:{lines(tmp_path / 't', row)}")


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


@pytest.mark.filterwarnings("ignore::hybridcache.lab.traces.frame.TraceFieldsWarning")
@pytest.mark.full("messages", "jsonl", "sharegpt", "taubench")
@pytest.mark.parametrize("reader", list(GOOD))
def test_wrong_field_values_are_read_or_reported(reader: str, tmp_path: Path) -> None:
    """Each wrong value is tried in each field. No other error is raised, and the records before and
    after are read."""
    good = GOOD[reader]
    changes = {"id": ("b_0", "c_0"), "timestamp": (0, 1 << 71), "ts": (0, 1 << 71)}
    before, after = good, good
    for name, (first, last) in changes.items():
        if name in good:
            before, after = replaced(before, (name,), first), replaced(after, (name,), last)
    num_reported = 0
    for place in places(good):
        for wrong in WRONG:
            spec = written(tmp_path / "t", reader, before, replaced(good, place, wrong), after)
            trace = open_trace(spec, skip_bad=True)
            count = sum(1 for _ in trace)
            assert count >= 2 and trace.bad.count <= 1
            if trace.bad.count:
                num_reported += 1
                line = 3 if reader in ARRAYS else 2
                assert refusal(spec).startswith(f"{tmp_path}/t, line {line}: ")
    assert num_reported > len(WRONG)


# --- Files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"hello\n", "line 1: not JSON"),
        (b'\n{"tokens": [1]', "line 2: not JSON .*column 15"),
        (b"\xff\xfe\x00", "line 1: not UTF-8"),
        (b'["\xff"]', "line 1: not UTF-8"),
        (b"", "there is no record"),
        (b"[]", "there is no record"),
        (b"[1, 2]", "line 1: a JSON object was expected, not int"),
        (b'[\n{"id" 1}]', "line 2: not JSON"),
        (gzip.compress(b'{"tokens": [1]}\n')[:15], "line 1: the gzip file is damaged"),
        (gzip.compress(b'[{"id": "x"}]')[:18], "line 1: the gzip file is damaged"),
        (b'{"what": 1}', "no format recognises its fields .what.; a file of texts"),
        (b"who,what\n1,2\n", "no format recognises its columns .who, what.*Counts of tokens"),
        (b"time;prompt\n0;hello\n", "separated by semicolons: use commas"),
        (b"time,pr\xe4mpt\n0,a\n", "line 1: not UTF-8"),
    ],
)
def test_file_that_no_reader_can_read_is_refused(
    content: bytes, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem) as caught:
        open_trace(str(path))
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (b"0,hello,many", "max_tokens"),
        (b"noon,hello,1", "time"),
        (b",hello,1", "time"),
        (b"0,,1", "prompt"),
        (b"0,a,1,2", "fields"),
        (b"0,\xe4,1", "UTF-8"),
        (b'0,"hello,1', "comma-separated"),
    ],
)
def test_invalid_row_is_named(row: bytes, named: str, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b"time,prompt,max_tokens\n0,hello,1\n" + row + b"\n")
    assert f"{path}, line 3: " in refusal(f"{path}?tokenizer=bytes")
    assert named in refusal(f"{path}?tokenizer=bytes")
    trace = open_trace(f"{path}?tokenizer=bytes", skip_bad=True)
    assert len(list(trace)) == 1 and trace.bad.count == 1


def test_truncated_gzip_file_yields_its_whole_lines_and_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    long = "".join(f'{{"tokens": [{number}]}}\n' for number in range(40_000))
    path.write_bytes(gzip.compress(long.encode())[:-40_000])
    trace = open_trace(str(path), skip_bad=True)
    found = [int(request.tokens[0]) for request in trace]
    assert found == list(range(len(found))) and 100 < len(found) < 40_000
    assert trace.bad.count == 1
    assert f"line {len(found) + 1}: the gzip file is damaged" in refusal(str(path))


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


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_arrays_are_read_in_pieces(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame, "_CHUNK", chunk)
    path = tmp_path / "s.json"
    text = json.dumps([SEGMENTS[2], SEGMENTS[0], SEGMENTS[2]], indent=1)
    bad = text.replace('"id": "x_0",', '"id": "x_0" oops')
    line = bad[: bad.index("oops")].count("\n")
    path.write_text(bad)
    assert f"line {line}: not JSON" in refusal(f"sharegpt:{path}?tokenizer=bytes")
    trace = open_trace(f"sharegpt:{path}?tokenizer=bytes", skip_bad=True)
    assert len(list(trace)) == 1 and trace.bad.count == 1, "both conversations are y: one"
    path.write_text(text[:-70])
    with pytest.warns(TraceFieldsWarning, match=r"s\.json: it ends inside of the record on line"):
        assert len(list(open_trace(f"sharegpt:{path}?tokenizer=bytes&limit=9"))) == 2


# --- Order and times ----------------------------------------------------------------------------


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
    assert f"line {first + 1})" in warning
    assert read_sorted(str(out_of_order(tmp_path, sorted(times))))[1] == []


def test_large_disorder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request can be moved back by at most the number of requests that are read ahead."""
    monkeypatch.setattr(frame, "WINDOW", 5)
    late = [10 + k for k in range(5)]
    assert read_sorted(str(out_of_order(tmp_path, [*late, 3, 20])))[0] == [5, 0, 1, 2, 3, 4, 6]
    path = out_of_order(tmp_path, [*late, 15, 3, 20])
    assert "line 7: its time 3 s is before 10 s" in refusal(str(path))
    assert read_sorted(str(path), skip_bad=True) == ([0, 1, 2, 3, 4, 5, 7], [], 1)
    assert read_sorted(f"{path}?head=3")[0] == [0, 1, 2], "line 7 is not read"
    monkeypatch.setattr(frame, "WINDOW_IDS", 2)
    assert "line 4: " in refusal(str(out_of_order(tmp_path, [10, 11, 12, 3])))


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


@pytest.mark.filterwarnings("ignore::hybridcache.lab.traces.frame.TraceFieldsWarning")
@pytest.mark.parametrize("reader", DISTINCT_FIELDS)
def test_formats_with_times_are_sorted(tmp_path: Path, reader: str) -> None:
    """A shuffled file gives the same requests as the ordered file."""
    records = [GOOD[reader] | DISTINCT_FIELDS[reader](k) for k in range(6)]
    expected = renumbered(open_trace(written(tmp_path / "sorted", reader, *records)))
    assert len({tuple(tokens) for _, tokens in expected}) == 6
    shuffled = [records[place] for place in (2, 0, 1, 5, 4, 3)]
    with pytest.warns(TraceOrderWarning):
        found = renumbered(open_trace(written(tmp_path / "shuffled", reader, *shuffled)))
    assert found == expected and found[0][0] >= 0


def renumbered(requests: Iterable[TraceRequest]) -> list[tuple[float, list[int]]]:
    """Return times and tokens, with ids numbered in the order in which they appear."""
    numbers: dict[int, int] = {}
    return [
        (one.timestamp_s, [numbers.setdefault(each, len(numbers)) for each in one.tokens.tolist()])
        for one in requests
    ]


def test_records_without_any_time_are_a_second_apart(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", {"tokens": [1]}, {"tokens": [2]})
    assert [request.timestamp_s for request in open_trace(str(path))] == [0.0, 1.0]


def test_unknown_fields_give_one_warning_with_their_names(tmp_path: Path) -> None:
    record = {"tokens": [1], "time": 3, "sesion": "a", "output_lenght": 5}
    path = lines(tmp_path / "t.jsonl", record, record)
    with pytest.warns(TraceFieldsWarning, match="sesion, output_lenght") as caught:
        first, _ = open_trace(str(path))
    assert len(caught) == 1 and caught[0].filename == __file__ and first.timestamp_s == 3
    texts = {"request": {"prompt": "a"}, "answer": {}}  # of engine record --text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(open_trace(str(lines(path, {"tokens": [1]} | texts))))


# --- Traces of programs -------------------------------------------------------------------------

IDS = np.arange(3, dtype=np.int32)
REQUEST = TraceRequest(0.0, "s", None, IDS, IDS)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        *(("timestamp_s", wrong) for wrong in (-10.0, float("nan"), "1", 1.0)),
        *(("tokens", wrong) for wrong in ([1.5], [[1], [2, 3]], [1 << 31], [])),
        *(("output", wrong) for wrong in (None, np.array([-1]))),
    ],
)
def test_invalid_request_of_a_program_is_named(field: str, wrong: Any) -> None:
    second = REQUEST._replace(**{"timestamp_s": 3.0} | {field: wrong})
    requests = (REQUEST._replace(timestamp_s=2.0), second)
    with pytest.raises(ValueError, match=f"^mine, request 2: {field}") as caught:
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
    with pytest.raises(ValueError, match="mine: it gave 9 requests at first and 0 now"):
        simulate(Trace("mine", 1, lambda: rows), gib=1, policy="lru")
    trace = open_trace("short?head=9")
    next(iter(trace))  # a part of a pass is not counted
    assert len(list(trace)) == len(list(trace)) == len(list(trace.kept())) == 9
