"""Tests of faulty trace files: each record is read, or reported with file, line and field, or
counted."""

from __future__ import annotations

import gzip
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from hybridcache.lab import traces
from hybridcache.lab.trace import BadRecordError
from hybridcache.lab.traces import frame, open_trace
from hybridcache.lab.traces.frame import TraceWarning
from tests.lab.records import SEGMENTS, agent_request, agent_session, lines

GOOD: dict[str, dict[str, Any]] = {
    "jsonl": {"session": "s", "timestamp": 1.0, "tokens": [1, 2], "output": [4]},
    "mooncake": {"timestamp": 9, "input_length": 600, "output_length": 4, "hash_ids": [7, 8]},
    "mooncake-sessions": {
        "session_id": "s",
        "delay": 1500,
        "input_length": 600,
        "output_length": 4,
        "hash_ids": [7, 8],
    },
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
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        "session": "s",
        "response": [{"type": "message", "content": "yes"}],
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


@pytest.mark.filterwarnings("ignore::hybridcache.lab.traces.frame.TraceWarning")
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
                line = "3, record 2" if reader in ARRAYS else "2"
                assert refusal(spec).startswith(f"{tmp_path}/t, line {line}: ")
    assert num_reported > len(WRONG)


@pytest.mark.filterwarnings("ignore::hybridcache.lab.traces.frame.TraceWarning")
@pytest.mark.parametrize("reader", list(GOOD))
def test_records_are_lines_or_an_array(reader: str, tmp_path: Path) -> None:
    good, path = GOOD[reader], tmp_path / "t"
    options = "?tokenizer=bytes" * (reader in TEXTS)
    found = []
    for text in (f"{json.dumps(good)}\n" * 2, json.dumps([good, good])):
        path.write_text(text)
        found.append([str(request) for request in open_trace(f"{path}{options}")])
    assert found[0] == found[1] != []


# --- Files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"hello\n", "line 1: not JSON"),
        (b'\n{"tokens": [1]', "line 2: not JSON .*column 15"),
        (b"\xff\xff\x00", "line 1: not UTF-8"),
        ("{}".encode("utf-16"), "line 1: not UTF-8"),
        (b'["\xff"]', "line 1, record 1: damaged, or not UTF-8"),
        (b"PK\3\4\0", "line 1: not JSON"),
        (b"", "there is no record"),
        (b"[]", "there is no record"),
        (b"[]\n\n{}", "line 1: the text after the array is lost"),
        (b"[1, 2]", "line 1, record 1: a JSON object was expected, not int"),
        (b'[\n{"id" 1}]', "line 2, record 1: not JSON"),
        (gzip.compress(b'{"tokens": [1]}\n')[:15], "line 1: damaged, or not UTF-8"),
        (gzip.compress(b'[{"id": "x"}]')[:18], "line 1, record 1: damaged, or not UTF-8"),
        (b'{"what": 1}', "no format recognises its fields .what.; a file of texts"),
        (b"who,what\n1,2\n", "no format recognises its columns .who, what.*Counts of tokens"),
        (b"time;prompt\n0;hello\n", "no format recognises its columns .time;prompt"),
        (b"time,pr\xe4mpt\n0,a\n", "line 1: damaged, or not UTF-8"),
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


def test_rows_without_a_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("0.0,hello\n1.0,hi\n")
    with pytest.raises(ValueError, match=r"its columns \(0\.0, hello\)"):
        open_trace(str(path))


def test_truncated_gzip_file_yields_its_whole_lines_and_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    long = "".join(f'{{"tokens": [{number}]}}\n' for number in range(8_000))
    path.write_bytes(gzip.compress(long.encode())[:-8_000])
    trace = open_trace(str(path), skip_bad=True)
    found = [int(request.tokens[0]) for request in trace.kept()]
    assert found == list(range(len(found))) and 100 < len(found) < 8_000
    assert trace.bad.count == 1 and trace.bad.first == refusal(str(path))
    assert f"line {len(found) + 1}: damaged, or not UTF-8: everything from" in trace.bad.first
    array = json.dumps([SEGMENTS[2] | {"id": f"{number}_0"} for number in range(2_000)])
    path.write_bytes(gzip.compress(array.encode())[:-2_000])
    assert 100 < len(list(open_trace(f"{path}?tokenizer=bytes", skip_bad=True))) < 2_000


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


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
def test_arrays_are_read_in_pieces(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame, "_CHUNK", chunk)
    path = tmp_path / "s.json"
    text = json.dumps([SEGMENTS[2], SEGMENTS[0], SEGMENTS[2]], indent=1)
    bad = text.replace('"id": "x_0",', '"id": "x_0" oops')
    line = bad[: bad.index("oops")].count("\n")
    path.write_text(bad)
    assert f"line {line}, record 2: not JSON" in refusal(f"sharegpt:{path}?tokenizer=bytes")
    trace = open_trace(f"sharegpt:{path}?tokenizer=bytes", skip_bad=True)
    decode = json.JSONDecoder.raw_decode
    with patch.object(json.JSONDecoder, "raw_decode", autospec=True, side_effect=decode) as tried:
        assert len(list(trace)) == 1 and trace.bad.count == 1
    assert tried.call_count < 20  # of 444 characters: long records take no quadratic time
    for cut in (-70, -2):
        path.write_text(text[:cut])
        assert "the records after it are lost" in refusal(f"sharegpt:{path}?tokenizer=bytes")
    monkeypatch.setattr(traces, "packaged_file", lambda *_: path)  # cut as that of the package is
    with pytest.warns(TraceWarning, match="cut in its last record, which is left out"):
        assert len(list(open_trace("sharegpt?tokenizer=bytes"))) == 3


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
    messages = [str(one.message) for one in caught if "not in order of time" in str(one.message)]
    return [int(request.tokens[0]) for request in found], messages, trace.bad.count


def test_large_disorder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request can be moved back by at most the number of requests that are read ahead."""
    monkeypatch.setattr(frame, "WINDOW", 5)
    late = [10 + k for k in range(5)]
    assert read_sorted(str(out_of_order(tmp_path, [*late, 3, 20])))[0] == [5, 0, 1, 2, 3, 4, 6]
    path = out_of_order(tmp_path, [*late, 15, 3, 20])
    assert "line 7: its time is 7 s before" in refusal(str(path))
    assert read_sorted(str(path), skip_bad=True) == ([0, 1, 2, 3, 4, 5, 7], [], 1)
    assert read_sorted(f"{path}?head=3")[0] == [0, 1, 2], "line 7 is not read"
    monkeypatch.setattr(frame, "WINDOW_IDS", 2)
    assert "line 4: " in refusal(str(out_of_order(tmp_path, [10, 11, 12, 3])))


def test_bad_line_is_reported_after_the_requests_before_it(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", {"tokens": [1]}, {"tokens": [2]}, {"tokens": []})
    requests = iter(open_trace(str(path)))
    assert [int(next(requests).tokens[0]) for _ in range(2)] == [1, 2]
    with pytest.raises(BadRecordError, match="line 3: tokens are empty"):
        next(requests)
    assert len(list(open_trace(f"{path}?head=2"))) == 2


@pytest.mark.parametrize(
    ("records", "line"),
    [
        ([{"timestamp": 0}, {"timestamp": "2026-03-01T09:00:00"}], 2),
        ([{"timestamp": 0}, {}], 2),
        ([{"timestamp": "2026-03-01T09:00"}, {"timestamp": "2026-03-01T09:00Z"}], 2),
        ([{"format": "hybridcache", "version": 7, "unit": 1}, {}], 1),
        ([{}, {"tokens": [1, True]}], 2),
        ([{}, {"stop_reason": "tired"}], 2),
        ([{}, {"session": "a", "prefix": [0, 1]}], 2),  # and tokens
    ],
)
def test_wrong_times_versions_and_reasons_are_refused(
    tmp_path: Path, records: list[dict[str, Any]], line: int
) -> None:
    written = (one if "format" in one else {"tokens": [1, 2]} | one for one in records)
    assert f"line {line}: " in refusal(str(lines(tmp_path / "t.jsonl", *written)))


@pytest.mark.parametrize(
    ("query", "header"), [("", "time,prompt"), ("&prompt=question", "time,question")]
)
def test_empty_first_prompt_of_a_table_is_a_bad_record(
    tmp_path: Path, query: str, header: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"{header}\n0,\n1,hello\n")
    spec = f"csv:{path}?tokenizer=bytes{query}"
    assert refusal(spec) == f"{path}, line 2: {header.partition(',')[2]} is empty"
    trace = open_trace(spec, skip_bad=True)
    assert len(list(trace)) == 1 and trace.bad.count == 1
    path.write_text(f'{header}\n0,a\n1,"b\n2,c\n3,"d"\n')
    trace = open_trace(spec, skip_bad=True)
    assert len(list(trace)) == 1 and "line 3: not comma-separated" in trace.bad.first
    assert trace.bad.first.endswith(", up to line 5")
    path.write_text(f"{header}\n0,{'a' * 200_000}\n")
    assert len(next(iter(open_trace(spec))).tokens) == 200_000


def test_conversations_read_as_requests_are_announced(tmp_path: Path) -> None:
    """The first record decides the format; here it ends with a user's message."""
    said = GOOD["conversations"]["messages"]
    path = lines(tmp_path / "t.jsonl", {"messages": said[:1]}, {"messages": said})
    message = "1 prompt without an answer end.*conversations:FILE"
    with pytest.warns(TraceWarning, match=message):
        assert len(list(open_trace(f"{path}?tokenizer=bytes"))) == 2
    batch = {"custom_id": "r1", "method": "POST", "url": "/v1/x", "body": {"messages": said[:1]}}
    path = lines(tmp_path / "t.jsonl", batch, {"messages": said, "answer": "x"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(open_trace(f"{path}?tokenizer=bytes"))) == 2


# --- Numbers and times --------------------------------------------------------------------------


def with_texts(value: Any) -> Any:
    """Return a record in which every number outside of lists of ids is a text."""
    if isinstance(value, dict):
        kept = ("hash_ids", "tokens", "output", "first_msg_blocks16", "session_id", "chat_id", "id")
        return {
            name: part if name in kept or name.startswith("parent") else with_texts(part)
            for name, part in value.items()
        }
    if isinstance(value, list):
        return list(map(with_texts, value))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


@pytest.mark.parametrize("reader", list(GOOD))
def test_numbers_may_be_texts_in_every_format(reader: str, tmp_path: Path) -> None:
    good, found = GOOD[reader], []
    for record in (good, with_texts(good)):
        spec = written(tmp_path / "t", reader, record, record)
        found.append([str(request) for request in open_trace(spec)])
    assert found[0] == found[1] != []


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        (
            ["0,hello,3", ",hello,3"],
            "line 3: it has no time, but .* a number as its time [(]when[)]",
        ),
        (
            [",hello,3", "1,hello,3"],
            "line 3: it has a number as its time, but .* no time [(]when[)]",
        ),
        (["0,hello,3", "1,,3"], "line 3: question is empty"),
        (["0,hello,3", "1,hello,three"], "line 3: tokens is 'three', not a whole number"),
        (["0,hello,3", "soon,hello,3"], "line 3: when is 'soon', not a number and not a time"),
        (["0,hello,3", "-1,hello,3"], "line 3: when is '-1', not a finite number of at least 0"),
    ],
)
def test_bad_cells_are_named_with_line_and_column(
    tmp_path: Path, rows: list[str], problem: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["when,question,tokens", *rows]))
    options = "tokenizer=bytes&time=when&prompt=question&length=tokens"
    with pytest.raises(BadRecordError, match=problem):
        list(open_trace(f"csv:{path}?{options}"))


@pytest.mark.parametrize("tokens", [{"tokens": []}, {"prefix": [0]}])
def test_rows_of_no_tokens_are_refused(tmp_path: Path, tokens: dict[str, list[int]]) -> None:
    assert refusal(f"jsonl:{lines(tmp_path / 't', tokens)}").endswith("line 1: tokens are empty")


@pytest.mark.parametrize(
    ("word", "first", "step", "span"),
    [
        ("mooncake", 5, 1, "0.005 to 0.044"),  # Seconds that are read as milliseconds.
        ("bailian", 1.7e12, 1000, "1.7e+12 to 1.7e+12"),  # Milliseconds since 1970.
        ("jsonl", 0, 0.001, "0 to 0.039"),
        ("mooncake", 5, 60, None),
        ("jsonl", 0, 0.01, None),  # As in a load test.
        ("mooncake", 5, 0, None),
        ("bailian", 1.7e9, 0.1, None),
    ],
)
def test_times_that_cannot_be_in_their_unit_are_warned_of(
    tmp_path: Path, word: str, first: float, step: float, span: str | None
) -> None:
    records = [GOOD[word] | {"timestamp": first + step * number} for number in range(40)]
    trace = open_trace(written(tmp_path / "t", word, *records))
    with warnings.catch_warnings(record=True) as caught:
        assert len(list(trace)) == 40
    said = [f"{tmp_path}/t: all 40 requests arrive from {span} s: are its times in another unit?"]
    assert [str(one.message) for one in caught] == said * (span is not None)
    records = [GOOD[word] | {"timestamp": first + step * number / 3} for number in range(120)]
    with warnings.catch_warnings(record=True) as caught:
        assert len(list(open_trace(written(tmp_path / "t", word, *records)))) == 120
    assert bool(caught) == (span is not None or 0 < step < 0.1)


def test_later_turns_of_a_session_follow_after_their_delays(tmp_path: Path) -> None:
    """Sessions stand one after the other, and the delay is the pause of a closed loop."""
    lengths = {"input_length": 512, "output_length": 40, "hash_ids": [7]}
    rows = [
        {"session_id": "a", "timestamp": 1000},
        {"session_id": "a", "delay": 1500},
        {"session_id": "a", "delay": "60000"},
        {"session_id": "b", "timestamp": 2000},
        {"session_id": "c"},
        {"session_id": "b", "delay": 250.5},
    ]
    path = lines(tmp_path / "t.jsonl", *(lengths | row for row in rows))
    trace = open_trace(path)
    found = [(one.timestamp_s, one.session, one.service_s) for one in trace]
    times = [(0.0, "c"), (1.0, "a"), (2.0, "b"), (2.2505, "b"), (2.5, "a"), (62.5, "a")]
    assert found == [(*one, 0.0) for one in times]
    path = lines(tmp_path / "t.jsonl", *(lengths | row for row in (*rows, {"session_id": "a"})))
    assert refusal(str(path)) == f"{path}, line 7: field 'delay' is missing"
