"""Tests of faulty trace files: each record is read, or reported with file, line and field, or
counted."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import re
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import zstandard

from hybridcache.lab import traces
from hybridcache.lab.traces import frame, open_trace
from hybridcache.lab.traces.frame import TraceWarning
from hybridcache.lab.traces.statistics import trace_stats
from hybridcache.lab.traces.trace import BadRecordError
from hybridcache.radix.tokens import common_prefix_len
from tests.lab.traces.records import SEGMENTS, agent_request, agent_session, lines
from tests.refused import refused

BLOCKS = {"output_length": 4, "hash_ids": [7, 8]}
REPLAY = {"replay": {"trace_block_size": 64, "input_length": 99, "input_sequence_hashes": [7, 8]}}
GOOD: dict[str, dict[str, Any]] = {
    "jsonl": {"session": "s", "timestamp": 1.0, "tokens": [1, 2], "output": [4]},
    "mooncake": {"timestamp": 9, "input_length": 600, "output_length": 4, "hash_ids": [7, 8]},
    "mooncake-sessions": BLOCKS | {"session_id": "s", "delay": 1500, "input_length": 600},
    "dynamo": {
        "event_type": "request_end",
        "agent_context": {"session_id": "s"},
        "request": {"request_received_ms": 9, "output_tokens": 4, "total_time_ms": 3, **REPLAY},
    },
    "bailian": BLOCKS | {"chat_id": 3, "parent_chat_id": -1, "timestamp": 9, "input_length": 20},
    "messages": {
        "timestamp": 9.0,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        "session": "s",
        "response": [{"type": "message", "content": "yes"}],
    },
    "conversations": {
        "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    },
    "coding-agent": agent_session("a", 64, 64, [agent_request(0, 640, [1, 10])]),
    "sharegpt": SEGMENTS[0],
    "sharegpt-counts": {
        "id": "x",
        "turns": [["u", 20], ["a", 5], ["u", 3], ["a", 4]],
        "first_msg_blocks16": [7],
    },
    "counts": {"timestamp": 9, "chat_id": "s", "prompt_tokens": 40, "completion_tokens": 4},
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
UNASKED = {"id", "task_id", "trial", "timestamp", "tool_tokens", "system_tokens", "output_length"}
"""Fields that only name, time or measure a record."""
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


def test_every_reader_has_a_valid_record() -> None:
    assert traces.READERS.keys() == GOOD.keys(), "add a record to GOOD"


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
                first = trace.bad.first
                assert first.startswith(f"{tmp_path}/t, line {line}: ") and "\n" not in first
                assert wrong is not WRONG[-1] or first == refusal(spec)
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
    assert traces.recognise(path) == reader
    bare = {name: one for name, one in good.items() if name not in UNASKED}
    assert len(list(open_trace(written(path, reader, bare, bare)))) >= 2


def notes_on(spec: str) -> list[str]:
    """Return the warnings of reading a trace, without its path."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert list(open_trace(spec))
    return [str(one.message).split(": ", 1)[1] for one in caught]


DEFAULTS = {
    "without a time: ": "timestamp request_received_ms delay",
    "without {}: 0 is assumed": "output_length out tool_tokens system_tokens",
    "without output_length: 0 is assumed": "output_tokens output",
    "no trace_block_size: 64 tokens are assumed": "trace_block_size",
    "without an answer or its length: 0 is assumed": "response completion_tokens",
    "without a session: each": "session agent_context",
}
"""Warnings about defaults, and fields that all records lack."""


@pytest.mark.parametrize("reader", set(GOOD) - {"sharegpt", "conversations", "taubench"})
def test_each_default_in_place_of_a_field_is_said_once(reader: str, tmp_path: Path) -> None:
    text = json.dumps(GOOD[reader])
    usual = notes_on(written(tmp_path / "t", reader, GOOD[reader]))
    assert not [one for one in usual if "without a session" not in one or reader != "mooncake"]
    for said, names in DEFAULTS.items():
        for name in {*names.split()} & {*re.findall(r'"(\w+)":', text)}:
            less = json.loads(text.replace(f'"{name}":', '"unknown":'))
            rows = [less] * (1 if name == "delay" else 2)  # A second turn must have its delay.
            told = notes_on(written(tmp_path / "t", reader, *rows))
            assert len([one for one in told if said.format(name) in one]) == 1, (name, told)


# --- Files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"hello\n", "line 1: not JSON"),
        (b'\n{"tokens": [1]', "line 2: not JSON .*column 15"),
        (b"\xff\xff\x00", "line 1: not UTF-8"),
        ("{}".encode("utf-16"), "line 1: not UTF-8"),
        (b'["\xff"]', "line 1, record 1: damaged, or not UTF-8"),
        (b'{"format": "hybridcache", "version": 7, "unit": 1}', "line 1: version is 7"),
        (b"PK\3\4\0", "it is not a readable zip archive"),
        (b"BZh91AY", "line 1: damaged, or not UTF-8"),
        (b"PAR1\0", "a Parquet file: install the package pyarrow, or write it as JSON lines"),
        (b"\x28\xb5\x2f\xfd\0", "compressed with Zstandard: install the package zstandard"),
        (b"", "there is no record"),
        (b"[]", "there is no record"),
        (b"[]\n\n{}", "line 1: the text after the array is lost"),
        (b"[1, 2]", "line 1, record 1: a JSON object was expected, not int"),
        (b'[\n{"id" 1}]', "line 2, record 1: not JSON"),
        (gzip.compress(b'{"tokens": [1]}\n')[:15], "line 1: damaged, or not UTF-8"),
        (gzip.compress(b'[{"id": "x"}]')[:18], "line 1, record 1: damaged, or not UTF-8"),
        (b'{"what": 1}', "no format recognises its fields .what.; a file of texts"),
        (b'{"custom_id": "r", "response": {}}', "without their prompts: join .* by custom_id"),
        (b"who,what\n1,2\n", "no format recognises its fields .who, what.*are read as counts:"),
        (b"time,pr\xe4mpt\n0,a\n", "line 1: damaged, or not UTF-8"),
    ],
)
def test_file_that_no_reader_can_read_is_refused(
    content: bytes, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("zstandard", "pyarrow"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem) as caught:
        open_trace(str(path))
    assert str(caught.value).startswith(str(path))


def test_rows_without_a_header_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("0.0,hello\n1.0,hi\n")
    refused(r"its fields \(0\.0, hello\)", open_trace, str(path))


def long_rows(count: int) -> list[bytes]:
    """Return lines of numbered requests with random tokens, whose compressed files are read in
    several pieces."""
    draw = random.Random(1).choices
    return [b'{"tokens": %a}\n' % [n, *draw(range(50_000), k=30)] for n in range(count)]


def test_truncated_gzip_file_yields_its_whole_lines_and_an_error(tmp_path: Path) -> None:
    path, rng = tmp_path / "t.jsonl.gz", random.Random(1)
    path.write_bytes(gzip.compress(b"".join(long_rows(400)))[:-8_000])
    trace = open_trace(str(path), skip_bad=True)
    found = [int(request.tokens[0]) for request in trace.kept()]
    assert found == list(range(len(found))) and 100 < len(found) < 400
    assert trace.bad.count == 1 and trace.bad.first == refusal(str(path))
    assert f"line {len(found) + 1}: damaged, or not UTF-8: everything from" in trace.bad.first
    array = json.dumps([SEGMENTS[2] | {"id": f"{rng.getrandbits(500)}_0"} for _ in range(300)])
    path.write_bytes(gzip.compress(array.encode())[:-2_000])
    assert 100 < len(list(open_trace(f"{path}?tokenizer=bytes", skip_bad=True))) < 300


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
    problem = f"line {line}, record 2: not JSON, or cut (Expecting ',' delimiter); "
    assert problem in refusal(f"sharegpt:{path}?tokenizer=bytes")
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
    refused("line 3: tokens are empty", next, requests, kind=BadRecordError)
    assert len(list(open_trace(f"{path}?head=2"))) == 2


TIMED, ASKED = {"tokens": [1, 2], "timestamp": 0}, {"prompt": "a", "time": 0}
LOCAL = {"tokens": [1, 2], "timestamp": "2026-03-01T09:00"}
CELLS = "messages:?tokenizer=bytes&time=when&prompt=question&length=tokens"
REVERSED = agent_session("b", 64, 64, [agent_request(0, 640, [2, 1])])
TEXT = "messages:?tokenizer=bytes", ASKED
BAD: list[tuple[str, Any, Any, str]] = [
    ("jsonl:", TIMED, LOCAL, "it has a date without a zone, but the records above have a number"),
    ("jsonl:", LOCAL, LOCAL | {"timestamp": "2026-03-01T09:00Z"}, "it has a date with a zone, but"),
    ("jsonl:", TIMED, {"tokens": [1]}, "it has no time, but the records above have a number"),
    ("jsonl:", TIMED, TIMED | {"tokens": [1, True]}, "tokens must be int32"),
    *(
        ("jsonl:", TIMED, TIMED | {"session": one}, f"session is {one}, not a text or a whole")
        for one in (True, 1.5)
    ),
    *(
        ("mooncake:", GOOD["mooncake"], GOOD["mooncake"] | {"input_length": one}, f"is {one}, not")
        for one in (True, 600.5)
    ),
    ("coding-agent:", GOOD["coding-agent"], REVERSED, "hash_ids is not a list of ids and of runs"),
    ("jsonl:", TIMED, TIMED | {"stop_reason": "tired"}, "stop_reason must be one of"),
    ("jsonl:", TIMED, TIMED | {"session": "a", "prefix": [0, 1]}, "it has both tokens and"),
    *(
        ("jsonl:", {"tokens": [1]}, one, "tokens are empty$")
        for one in ({"tokens": []}, {"prefix": [0]})
    ),
    (*TEXT, {"prompt": 123}, "prompt is 123, not a list"),
    (*TEXT, {"time": 1}, r"there is no prompt in it \(time\)"),
    (*TEXT, {"messages": [{"role": "robot", "content": "a"}]}, "role is 'robot', none of"),
    (*TEXT, {"prompt": "b", "time": "2026-01-01T00:00"}, "it has a date without a zone"),
    (*TEXT, {"role": "user", "content": "a"}, "a message without a session: name"),
    (*TEXT, {"prompt": "b", "answer": {"choices": [5]}}, r"choices is \[5\], not a list of"),
    (*TEXT, {"messages": [{"role": "user", "parts": ["a"]}]}, "field 'content' is missing"),
    *(
        (*TEXT, {"prompt": "b", "answer": one}, f"its answer is {re.escape(str(one))}, not")
        for one in (17, ["a"], {"x": 1}, {"choices": []}, {"usage": 5}, True)
    ),
    (CELLS, "0,hello,3", ",hello,3", r"it has no time, but .* a number as its time \(when\)"),
    (CELLS, ",hello,3", "1,hello,3", r"it has a number as its time, but .* no time \(when\)"),
    (CELLS, "0,hello,3", "1,,3", "question is empty"),
    (CELLS, "0,hello,3", "1,hello,three", "tokens is 'three', not a whole number"),
    (CELLS, "0,hello,3", "soon,hello,3", "when is 'soon', not a number and not a time"),
    (CELLS, "0,hello,3", "-1,hello,3", "when is '-1', not a finite number of at least 0"),
]
"""Reader and options, a good record, a bad one after it, and words of the error."""


@pytest.mark.parametrize(("reader", "good", "bad", "words"), BAD)
def test_bad_records_are_named_with_line_and_field(
    reader: str, good: Any, bad: Any, words: str, tmp_path: Path
) -> None:
    rows = [good, bad] if reader == CELLS else [json.dumps(good), json.dumps(bad)]
    rows[:0] = ["when,question,tokens"] if reader == CELLS else []
    (tmp_path / "t").write_text("\n".join(rows))
    said = refusal(reader.replace(":", f":{tmp_path}/t", 1))
    assert re.match(f"{tmp_path}/t, line {len(rows)}: .*{words}", said), said


@pytest.mark.parametrize("name", ["prompt", "question"])
def test_empty_first_prompt_of_a_table_is_a_bad_record(tmp_path: Path, name: str) -> None:
    header, query = f"time,{name}", f"&prompt={name}"
    path = tmp_path / "t.csv"
    path.write_text(f"{header}\n0,\n1,hello\n")
    spec = f"messages:{path}?tokenizer=bytes{query}"
    assert refusal(spec) == f"{path}, line 2: {name} is empty"
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
    assert not [one for one in notes_on(f"{path}?tokenizer=bytes") if "end with" in one]


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
    ("word", "first", "step", "span", "said"),
    [
        ("mooncake", 5, 1, 39, "read in s: in ms the median distance would be 0.001 s"),
        ("mooncake", 0.5, 60.5, 2.3595, "in ms: the usual .* milliseconds with fractions are rare"),
        ("mooncake", 5, 60, 2.34, ""),
        (
            "mooncake",
            0,
            2e6,
            78_000,
            "in ms: the usual .*, although the median distance would be 2e.03",
        ),
        ("mooncake", 0, 2e9, 78, "read in ns: in ms the median distance would be 2e.06 s"),
        ("mooncake", 5, 0, 0, ""),
        ("mooncake", 1.7e12, 1000, 39, ""),
        ("mooncake", 1.7e9, 1, 39, "read in s: in ms the median"),
        ("bailian", 1.7e12, 1000, 39, ""),
        ("bailian", 1.7e9, 0.125, 4.875, ""),
        ("bailian", 0, 2000, 78, "read in ms: in s all are multiples of 1,000"),
        ("bailian", 7, 4001, 156.039, "read in ms: in s the median distance would be 4e.03 s"),
        (
            "jsonl",
            0,
            0.001,
            0.039,
            "in s: the usual .*, although the median distance would be 0.001",
        ),
        ("jsonl", 0, 0.01, 0.39, ""),  # As in a load test.
        ("messages", 100, 5000, 195, "read in ms"),
        ("messages", 1.7e18, 1e9, 39, ""),
        (
            "counts",
            0,
            2700.0,
            105_300,
            "in s: the usual unit, .* names none, although whole numbers",
        ),
        ("counts", 0, 2700.5, 105_319.5, ""),
        ("counts", 1e-4, 2700, 105_300, "although whole numbers"),
        ("counts", 0, 1000, 39, "read in ms: in s all are multiples of 1,000"),
    ],
)
def test_one_function_decides_the_unit_of_times_in_all_formats(
    tmp_path: Path, word: str, first: float, step: float, span: float, said: str
) -> None:
    records = [GOOD[word] | {"timestamp": first + step * number} for number in range(40)]
    spec = written(tmp_path / "t", word, *records)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = open_trace(spec)
        found = [one.timestamp_s for one in trace]
    assert found[-1] - found[0] == pytest.approx(span, rel=1e-4)
    told = [str(one.message) for one in caught if "times are" in str(one.message)]
    assert len(told) == bool(said)
    assert not said or (re.search(said, told[0]) and told[0].endswith("=s, ms, us or ns decides"))
    assert trace.times.startswith(("s, ", "ms, ", "ns, "))
    for unit, per_s in (("s", 1), ("ms", 1000)):
        asked = open_trace(f"{spec}{'&' if '?' in spec else '?'}times={unit}")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".*without a session")
            found = [one.timestamp_s for one in asked]
        assert found[-1] - found[0] == pytest.approx(39 * step / per_s)
        assert asked.times == f"{unit}, as ?times= says"


def test_every_format_with_times_has_the_option_and_no_other(tmp_path: Path) -> None:
    timed = {word for word, reader in traces.READERS.items() if reader.usual_times}
    assert timed > {"jsonl", "mooncake", "messages"}
    for word, record in GOOD.items():
        spec = written(tmp_path / "t", word, record)
        spec += ("&" if "?" in spec else "?") + "times="
        if word not in timed | {"counts"}:
            refused("no option 'times'", open_trace, f"{spec}s")
            continue
        assert len(list(open_trace(f"{spec}ms"))) == 1
        refused("is one of s, ms, us, ns, not 'min'", open_trace, f"{spec}min")
    own = tmp_path / "own.jsonl"
    rows = [{"timestamp": 1000 * n, "tokens": [1]} for n in range(12)]
    lines(own, {"format": "hybridcache", "version": 1, "unit": 1}, *rows)
    assert open_trace(own).times == "s, as our own format has them"
    agent = agent_session("a", 64, 64, [agent_request(1000 * n, 640, [1, 10]) for n in range(12)])
    found = [one.timestamp_s for one in open_trace(f"{lines(tmp_path / 'a', agent)}")]
    assert found[-1] - found[0] == 11, "milliseconds within a session"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("0.5,a,950,80", None),
        ("0.5,a,950.0,0", None),
        ("0.5,a,,80", "1 row of no prompt tokens left out"),
        ("0.5,a,0,80", "1 row of no prompt tokens left out"),
        ("0.5,a,950,x", "completion_tokens is 'x', not a whole number"),
        ("0.5,a,950", "3 fields under 4 names"),
        (",a,950,80", "but the records above have a number as its time"),
        ("0.5,a,-3,80", "prompt_tokens is '-3', not a whole number"),
    ],
)
def test_logs_of_counts_name_bad_cells(tmp_path: Path, row: str, problem: str | None) -> None:
    """Logs have numbers as times, empty cells, and rows of no tokens for failed requests."""
    path = tmp_path / "counts.csv"
    path.write_text(f"time,session,prompt_tokens,completion_tokens\n0,a,950,80\n{row}\n")
    try:
        with warnings.catch_warnings(record=True) as caught:
            requests = list(open_trace(path))
        said = [str(one.message) for one in caught]
    except ValueError as error:
        requests, said = [], [str(error)]
    if problem is None:
        assert [(one.timestamp_s, one.num_tokens(1)) for one in requests] == [(0, 950), (0.5, 950)]
        assert not said and requests[0].tokens.tolist() == requests[1].tokens.tolist()
    else:
        assert len(said) == 1 and problem in said[0]


def test_counts_have_columns_of_any_name_filters_and_a_shared_beginning(tmp_path: Path) -> None:
    path = tmp_path / "access.csv"
    path.write_text(
        "ts;user;endpoint;in;out;status\n"
        "2026-03-01T09:00:00;a;/chat;950;80;200\n"
        "2026-03-01T09:00:01;b;/chat;400;20;200\n"
        "2026-03-01T09:00:02;b;/embed;400;0;200\n"
        "2026-03-01T09:00:03;b;/chat;420;5;500\n"
        "2026-03-01T09:00:04;a;/chat;1157;68;200\n"
        "2026-03-01T09:00:05;a;/chat;90;1;200\n"
    )
    options = "prompt=in&session=user&length=out&where=endpoint:/chat&system=300"
    with warnings.catch_warnings(record=True) as caught:
        trace = open_trace(f"counts:{path}?{options}")
        first, other, later, cut = trace
    assert sorted(str(one.message).split(": ", 1)[1] for one in caught) == [
        "1 row of failed requests left out (status 400 or more, error or failed)",
        "1 row of other values than those of ?where= left out",
    ]
    whole = np.concatenate((first.tokens, first.output))
    assert common_prefix_len(first.tokens, other.tokens) == 300
    assert common_prefix_len(whole, later.tokens) == 1030 and len(later.tokens) == 1157
    assert cut.tokens.tolist() == first.tokens[:90].tolist()
    assert "prompt=in, time=ts, session=user, length=out, status=status (a prompt" in trace.columns
    assert "not read" not in trace.columns
    with pytest.raises(ValueError, match="no column of prompt tokens or sessions; it has ts"):
        open_trace(f"counts:{path}?session=user")
    with pytest.raises(ValueError, match="there is no column 'who'; it has ts, user"):
        open_trace(f"counts:{path}?prompt=in&session=who")
    path.write_text('{"session": 1, "prompt_tokens": 9, "completion_tokens": 2}\n' * 2)
    assert [one.num_tokens(1) for one in open_trace(path)] == [9, 9], "recognised, as JSON lines"


@pytest.mark.filterwarnings("ignore::hybridcache.lab.traces.frame.TraceWarning")
def test_the_column_of_the_status_can_have_any_name(tmp_path: Path) -> None:
    """Columns of counts that are not read are named, such as a status of another name."""
    path = tmp_path / "log.csv"
    path.write_text("user,in,http,x\na,90,200,1\na,95,429,1\na,99,500,1\n")
    spec = f"counts:{path}?prompt=in&session=user"
    assert open_trace(spec).columns.endswith("; not read: http, x")
    assert [one.num_tokens(1) for one in open_trace(f"{spec}&status=http")] == [90]
    refused("there is no column 'code'", open_trace, f"{spec}&status=code")
    path.write_text("user,prompt,http\na,hello,200\na,hello you,429\n")
    assert len(list(open_trace(f"{path}?tokenizer=bytes&session=user&status=http"))) == 1


def test_compressed_files_and_tables_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(json.dumps(GOOD["jsonl"] | {"timestamp": n}) + "\n" for n in range(3))
    wanted = list(map(str, open_trace(lines(tmp_path / "t", *map(json.loads, text.splitlines())))))
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("inside.jsonl", text)
    assert list(map(str, open_trace(tmp_path / "t.zip"))) == wanted
    with zipfile.ZipFile(tmp_path / "t.zip", "a") as archive:
        archive.writestr("other.jsonl", text)
    refused("a zip archive of 2 files: unpack it, and name one of", open_trace, tmp_path / "t.zip")
    for between in ",;\t":
        table = between.join(('"a,b;c"', "session", "prompt")) + "\n"
        (tmp_path / "t.csv").write_text(table + between.join(("0", "s", "hello")) + "\n")
        [request] = open_trace(f"{tmp_path / 't.csv'}?tokenizer=bytes")
        assert bytes(request.tokens.tolist()) == b"hello" and request.session == "s"
    # Pyarrow, which is large, by a double with the few names that are used.
    rows = [json.loads(line) | {"empty": None} for line in text.splitlines()]
    file = MagicMock(
        **{"iter_batches.return_value": [MagicMock(**{"to_pylist.return_value": rows})]}
    )
    file.__enter__.return_value = file
    parquet = SimpleNamespace(ParquetFile=lambda _: file)
    library = SimpleNamespace(parquet=parquet, ArrowException=OSError)
    monkeypatch.setitem(sys.modules, "pyarrow", library)
    for module in bz2, lzma:
        (tmp_path / "t.packed").write_bytes(module.compress(text.encode()))
        assert list(map(str, open_trace(tmp_path / "t.packed"))) == wanted
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    assert list(map(str, open_trace(tmp_path / "t.parquet"))) == wanted


def test_frames_of_zstandard_are_read_and_a_truncated_one_is_damaged(tmp_path: Path) -> None:
    rows = long_rows(400)
    rows[0] += b" " * 100_000 + b"\n"  # More than one read takes from a piece of the file.
    pack, path = zstandard.ZstdCompressor().compress, tmp_path / "t.jsonl.zst"
    first, second = pack(b"".join(rows[:150])), pack(b"".join(rows[150:]))
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    for content in (first + second, skippable + first + skippable + second):
        path.write_bytes(content)
        assert [int(one.tokens[0]) for one in open_trace(path)] == [*range(400)]
    for lost in (1, len(second) // 2, len(second) - 1):
        path.write_bytes((first + second)[:-lost])
        trace = open_trace(path, skip_bad=True)
        found = [int(one.tokens[0]) for one in trace.kept()]
        assert found == [*range(len(found))] and 100 < len(found) < 400
        assert "damaged, or not UTF-8: everything from" in str(trace.bad.first)
        assert "the last frame is truncated" in refusal(str(path))
    path.write_bytes(first[:60] + b"x" * 60)
    assert "damaged, or not UTF-8" in refusal(str(path))


DYNAMO = GOOD["dynamo"]
LATER = DYNAMO | {"request": DYNAMO["request"] | {"request_received_ms": 2009, "model": "b"}}
OTHER = {"event": {"event_type": "request_payload", "schema": "dynamo.request.trace.v1"}}
SAID = json.dumps([{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}])
PAIRS = [{"human": "hello", "assistant": "yes"}]
KNOWN: dict[str, list[dict[str, Any]]] = {
    "2 1 0.0 98 ms": [OTHER, {"timestamp": 1, "event": DYNAMO}, DYNAMO],
    "2 1 2.0 0 ms": [DYNAMO, LATER],
    "3 0 4.0 128 ms": [
        {"input_length": 100, "ts_ms": 2000 * n, "input_sequence_hashes": [7, n]} for n in range(3)
    ],
    "20 1 294.5 0 s": [
        {"input_length": 9, "hash_ids": [n], "session": "a", "delay": 15.5} for n in range(20)
    ],
    "3 2 2.0 8 s": [{"Session ID": one, "prompt_tokens": 9} for one in (None, "a", "a")],
    "3 0 4.0 2 us": [{"createdAt_us": 2e6 * n, "prompt": f"a{n}"} for n in range(3)],
    "1 1 0.0 0 s": [{"conversation": SAID}],
    "2 2 0.0 23 s": [{"conversations": PAIRS}] * 2,
}
"""Rows by their requests, sessions, seconds, tokens that an infinite cache skips, and unit."""


@pytest.mark.filterwarnings("ignore::hybridcache.lab.traces.frame.TraceWarning")
@pytest.mark.parametrize("wanted", KNOWN)
def test_what_the_log_of_another_program_has_is_read(wanted: str, tmp_path: Path) -> None:
    rows = KNOWN[wanted]
    is_text = {"prompt", "conversation", "conversations"} & rows[0].keys()
    spec = f"{lines(tmp_path / 't', *rows)}{'?tokenizer=bytes' * bool(is_text)}"
    one = trace_stats(open_trace(spec))
    facts = one.num_requests, one.num_sessions, f"{one.duration_s:.1f}", one.ideal_tokens
    assert " ".join(map(str, facts)) == wanted.rpartition(" ")[0]
    assert one.times.startswith(f"{wanted.rpartition(' ')[2]}, ") or "conv" in str(rows)
    assert ("no record has a time: one second" in one.times) == ("Session ID" in rows[0])


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
