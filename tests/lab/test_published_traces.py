"""Tests of the readers of Bailian and BLIS traces, with files and ideal hits worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybridcache.lab.trace import BadRecordError, FreshIds
from hybridcache.lab.trace_stats import trace_stats
from hybridcache.lab.traces import open_trace, recognise
from hybridcache.lab.traces.base import TraceOrderWarning
from tests.lab.records import lines


def bailian(chat: int, parent: int, when: float, length: int, ids: list[int]) -> dict[str, Any]:
    names = {"chat_id": chat, "parent_chat_id": parent, "timestamp": when, "hash_ids": ids}
    return names | {"input_length": length, "output_length": 8, "type": "text", "turn": 1}


def test_bailian_conversations_are_trees(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "q.jsonl",
        bailian(1, -1, 0.5, 40, [10, 11, 12]),  # 16 + 16 + 8
        bailian(2, 1, 2.0, 64, [10, 11, 13, 14]),  # hits two blocks: 32
        bailian(3, 1, 3.0, 48, [10, 11, 15]),  # repeats turn two: 32
        bailian(4, 2, 4.0, 96, [10, 11, 13, 14, 16, 17]),  # continues 2: 64
        bailian(5, -1, 4.0, 16, [10]),  # another session, hits all but its last token: 15
        bailian(6, 99, 5.0, 16, [18]),  # has a parent before the start of the trace
    )
    assert recognise(path) == "bailian"
    trace = open_trace(str(path))
    found = list(trace)
    assert [request.session for request in found] == [1, 1, 3, 1, 5, 6]
    assert [request.timestamp_s for request in found] == [0.5, 2, 3, 4, 4, 5]
    assert found[0].partial_tokens == 8 and found[1].partial_tokens is None
    assert len(found[0].output) == 0 and len(found[1].output) == 1  # 8 fit into the third block
    stats = trace_stats(trace)
    assert (stats.unit, stats.prompt_tokens) == (16, 40 + 64 + 48 + 96 + 16 + 16)
    assert stats.ideal_tokens == 32 + 32 + 64 + 15


def test_bailian_prompt_may_lack_the_hash_of_its_last_block(tmp_path: Path) -> None:
    path = lines(tmp_path / "q.jsonl", bailian(1, -1, 0, 40, [10, 11]), bailian(2, 1, 1, 9, []))
    first, second = open_trace(str(path))
    assert first.tokens.tolist()[:2] == [10, 11] and first.tokens[2] >= FreshIds.FLOOR
    assert (first.num_tokens(16), second.num_tokens(16)) == (40, 9)
    wrong = lines(tmp_path / "w.jsonl", bailian(1, -1, 0, 41, [10]))
    with pytest.raises(BadRecordError, match=r"w\.jsonl, line 1: 1 hash_ids do not cover"):
        list(open_trace(str(wrong)))
    high = lines(tmp_path / "h.jsonl", bailian(1, -1, 0, 16, [1 << 30]))
    with pytest.raises(BadRecordError, match="line 1: a hash_id is not below"):
        list(open_trace(str(high)))


OLD = """\
arrival_time,request_id,model,prefill_tokens,decode_tokens
0.0,request_0,llama,"[1,2,3,4,5]","[101,102]"
0.5,request_1,llama,"[1,2,3,9]","[]"
0.75,request_2,qwen,"[1,2,3,9]","[]"
1.0,request_3,llama,"[1,2,3,4,5,101,102,7]",[]
"""


def test_blis_rows_with_token_ids(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_text(OLD)
    assert recognise(path) == "blis"
    trace = open_trace(str(path))
    first, *_ = trace
    assert first.tokens.tolist() == [1, 2, 3, 4, 5] and first.output.tolist() == [101, 102]
    stats = trace_stats(trace)
    # Request 1 hits 3 tokens; another model has no hits; request 3 hits prompt and answer: 7.
    assert (stats.prompt_tokens, stats.ideal_tokens) == (5 + 4 + 4 + 8, 3 + 7)
    path.write_bytes(b"\xef\xbb\xbf" + OLD.replace("\n", "\r\n").encode())
    assert trace_stats(open_trace(str(path))).ideal_tokens == 10


V2 = """\
request_id,tenant_id,session_id,round_index,prefix_group,prefix_length,input_tokens,output_tokens,\
model,server_input_tokens,arrival_time_us,status
0,,s,0,sys,100,20,5,,0,0,ok
1,,u,0,sys,100,30,5,,160,500000,ok
2,,s,1,sys,100,40,5,,0,1000000,ok
3,t,,0,,0,50,5,,60,1000000,ok
"""


def test_blis_rows_with_lengths_and_prefix_groups(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_text(V2)
    assert recognise(path) == "blis"
    stats = trace_stats(open_trace(str(path)))
    # The server's count is used only for rows without a group.
    assert stats.prompt_tokens == 120 + 130 + 140 + 60
    assert stats.ideal_tokens == 100 + 100 and stats.num_sessions == 3
    assert [request.timestamp_s for request in open_trace(str(path))] == [0, 0.5, 1, 1]


def test_blis_sessions_accumulate_prompts_and_answers(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_text(V2)
    trace = open_trace(f"{path}?growth=accumulate")
    first, _, third, _ = trace
    assert len(third.tokens) == 120 + 5 + 40  # round 0, its answer, 40 more
    assert third.tokens.tolist()[:125] == [*first.tokens.tolist(), *first.output.tolist()]
    assert trace_stats(trace).ideal_tokens == 100 + 125
    with_reset = V2.replace(",status", ",status,input_tokens_reset").replace(",ok\n", ",ok,\n")
    path.write_text(with_reset.replace("1000000,ok,", "1000000,ok,70", 1))
    third = list(open_trace(f"{path}?growth=accumulate"))[2]
    assert len(third.tokens) == 70 and third.tokens[0] != first.tokens[0]
    with pytest.raises(ValueError, match="option 'growth' is one of none, accumulate, not 'yes'"):
        open_trace(f"{path}?growth=yes")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("0,r,m,5047,514", "prefill_tokens is a count, 5047, and a list of ids is needed"),
        ('0,r,m,"[1,-2]",[]', "an id is not a whole number in"),
        ("0,r,m,[],[]", "the prompt is empty"),
        ("0,r,m,[1", "4 fields under 5 names"),
        ("0,r,m,[1,[]", "prefill_tokens is '\\[1', not a JSON list"),
        ("soon,r,m,[1],[]", "arrival_time is 'soon', not a number"),
        ("nan,r,m,[1],[]", "arrival_time is nan, not a finite number"),
    ],
)
def test_error_for_an_invalid_row_names_file_and_line(
    tmp_path: Path, row: str, problem: str
) -> None:
    path = tmp_path / "b.csv"
    path.write_text(OLD.partition("\n")[0] + '\n0,a,m,[1],"[]"\n' + row + "\n9,b,m,[1],[2]\n")
    with pytest.raises(BadRecordError, match=rf"b\.csv, line 3: {problem}"):
        list(open_trace(str(path)))
    trace = open_trace(str(path), skip_bad=True)
    assert len(list(trace)) == 2 and trace.bad.count == 1


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (",40,5,", ",forty,5,", "input_tokens is 'forty', not a whole number"),
        (",40,5,", ",-1,5,", "input_tokens is '-1', not a whole number"),
        ("100,40,5,,0,", "0,0,5,,0,", "the prompt is empty"),
    ],
)
def test_error_for_an_invalid_length_names_file_and_line(
    tmp_path: Path, old: str, new: str, problem: str
) -> None:
    path = tmp_path / "b.csv"
    path.write_text(V2.replace(old, new))
    with pytest.raises(BadRecordError, match=rf"b\.csv, line 4: {problem}"):
        list(open_trace(str(path)))


def test_disordered_rows_are_sorted(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_text(V2.replace("1000000,ok\n3", "10,ok\n3"))
    with pytest.warns(TraceOrderWarning, match="the first is line 4"):
        times = [request.timestamp_s for request in open_trace(str(path))]
    assert times == sorted(times) and 1e-5 in times


def test_table_that_is_not_a_trace_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "b.csv"
    path.write_text("arrived_at,prefill_tokens,decode_tokens\n0,5047,514\n")
    with pytest.raises(BadRecordError, match=r"b\.csv, line 2: prefill_tokens is a count, 5047"):
        list(open_trace(str(path)))
    path.write_text("one,two\n1,2\n")
    with pytest.raises(ValueError, match=r"no format recognises its columns \(one, two\)"):
        open_trace(str(path))
    path.write_text("one,two\n")
    with pytest.raises(ValueError, match="there is no record in it"):
        open_trace(str(path))
