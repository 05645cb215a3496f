"""Tests of the reader of Bailian traces, with files and ideal hits worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hybridcache.lab.trace import BadRecordError, FreshIds
from hybridcache.lab.trace_stats import trace_stats
from hybridcache.lab.traces import open_trace, recognise
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
    assert first.tokens.tolist()[:2] == [0, 1] and first.tokens[2] >= FreshIds.FLOOR
    assert (first.num_tokens(16), second.num_tokens(16)) == (40, 9)
    wrong = lines(tmp_path / "w.jsonl", bailian(1, -1, 0, 41, [10]))
    with pytest.raises(BadRecordError, match=r"w\.jsonl, line 1: 1 hash_ids do not cover"):
        list(open_trace(str(wrong)))


def test_hashes_of_any_size_and_texts_are_renumbered(tmp_path: Path) -> None:
    small, large = [5, 9], [(1 << 64) - 1, 1 << 40]
    for ids in (small, large, ["0xff", "0x0e"]):
        rows = (bailian(1, -1, 0, 32, ids), bailian(2, 1, 1, 32, ids[::-1]))
        first, second = open_trace(str(lines(tmp_path / "q.jsonl", *rows)))
        assert (first.tokens.tolist(), second.tokens.tolist()) == ([0, 1], [1, 0])
    bad = lines(tmp_path / "b.jsonl", bailian(1, -1, 0, 16, [1.5]))
    with pytest.raises(BadRecordError, match="line 1: hash_ids is not a list of whole numbers or"):
        list(open_trace(str(bad)))


def test_mooncake_like_records_may_have_sessions(tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [3]}
    path = lines(tmp_path / "m.jsonl", row | {"session_id": "a"}, row, row | {"session_id": "a"})
    assert [request.session for request in open_trace(str(path))] == ["a", 2, "a"]
