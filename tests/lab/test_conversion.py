"""Tests of trace conversion: a converted trace has the same ideal hits, up to the block size."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcache.lab.cli import main
from hybridcache.lab.generators import GENERATORS
from hybridcache.lab.trace import BadRecordError, Trace, TraceRequest
from hybridcache.lab.trace_stats import trace_stats
from hybridcache.lab.traces import open_trace, recognise
from hybridcache.lab.traces.hashes import write as write_hashes
from tests.lab.records import lines

SAMPLES = Path(__file__).parent / "samples"


def written(write: Callable[..., int], trace: Trace, block: int) -> list[dict[str, Any]]:
    file = io.StringIO()
    num_requests = write(trace, file, block)
    rows = [json.loads(line) for line in file.getvalue().splitlines()]
    assert num_requests == len(rows)
    return rows


def trace_of(requests: Iterable[TraceRequest], unit: int = 1) -> Trace:
    return Trace("made", unit, tuple(requests).__iter__).kept()


def count_shared_tokens(requests: Iterable[TraceRequest], block: int) -> int:
    """Count the prompt tokens in leading blocks that an earlier prompt has too.

    The last block of a prompt may be shorter. The last token of a prompt never counts.
    """
    seen: set[tuple[Any, ...]] = set()
    total = 0
    for request in requests:
        prompt = request.tokens.tolist()
        ends = [*range(block, len(prompt), block), len(prompt)]
        prefixes = [(request.namespace, *prompt[:end]) for end in ends]
        known = [end for end, prefix in zip(ends, prefixes, strict=True) if prefix in seen]
        total += min(max(known, default=0), len(prompt) - 1)
        seen.update(prefixes)
    return total


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=9), st.sampled_from("ab")),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 4),
)
def test_mooncake_hashes_match_a_set_of_prefixes(
    prompts: list[tuple[list[int], str]], block: int
) -> None:
    nothing = np.zeros(0, np.int32)
    requests = [
        TraceRequest(float(number), number, space, np.asarray(ids, np.int32), nothing)
        for number, (ids, space) in enumerate(prompts)
    ]
    rows = written(write_hashes, trace_of(requests), block)
    again = []
    for row, request in zip(rows, requests, strict=True):
        length, hashes = row["input_length"], np.asarray(row["hash_ids"], np.int32)
        assert length == len(request.tokens) and len(hashes) == -(-length // block)
        again.append(TraceRequest(0.0, 0, None, hashes, nothing, (), length % block or None))
    ideal = trace_stats(trace_of(again, block)).ideal_tokens
    assert ideal == count_shared_tokens(requests, block)


@pytest.mark.parametrize("source", ["agent", "few-shot", "resend", "short"])
@pytest.mark.parametrize("block", [1, 16])
def test_conversion_to_mooncake_preserves_ideal_hits_of_whole_blocks(
    source: str, block: int, tmp_path: Path
) -> None:
    trace = open_trace(f"{source}?head=30")
    path = lines(tmp_path / "m.jsonl", *written(write_hashes, trace, block))
    assert recognise(path) == "mooncake"
    stats = trace_stats(open_trace(f"mooncake:{path}?unit={block}"))
    # Mooncake has no answer tokens, so hits are compared without answers.
    prompts = trace_stats(
        trace_of(request._replace(output=request.output[:0]) for request in trace)
    )
    assert stats.prompt_tokens == prompts.prompt_tokens
    whole_pages = prompts.ideal_tokens if block == 1 else prompts.ideal_by_page[block]
    assert whole_pages <= stats.ideal_tokens <= prompts.ideal_tokens


def test_each_hash_has_one_length() -> None:
    lengths: dict[int, int] = {}
    for row in written(write_hashes, GENERATORS["short"](), 64):
        for number, one in enumerate(row["hash_ids"]):
            length = min(64, row["input_length"] - 64 * number)
            assert lengths.setdefault(one, length) == length
    assert len(lengths) > 100


def turn(session: str, when: float, prompt: list[int], answer: list[int]) -> TraceRequest:
    as_ids = (np.asarray(ids, np.int32) for ids in (prompt, answer))
    return TraceRequest(when, session, None, *as_ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mooncake.jsonl.gz", "--to", "mooncake", "--block", "16"], "are not made of ids of 512"),
        (["mooncake.jsonl.gz", "--to", "mooncake", "--block", "0"], "blocks of 0 tokens are not"),
    ],
)
def test_impossible_conversion_gives_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *flags = arguments
    code = main(["trace", "convert", str(SAMPLES / name), str(tmp_path / "out"), *flags])
    out, error = capsys.readouterr()
    assert code == 2 and message in error and error.count("\n") == 1 and not out


def test_mooncake_trace_converted_to_mooncake_is_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.jsonl"
    source = f"{SAMPLES / 'mooncake.jsonl.gz'}?head=80"
    assert main(["trace", "convert", source, str(target), "--to", "mooncake"]) == 0
    assert capsys.readouterr().out.startswith("80 requests to ")
    before, after = trace_stats(open_trace(source)), trace_stats(open_trace(str(target)))
    assert (after.prompt_tokens, after.ideal_tokens) == (before.prompt_tokens, before.ideal_tokens)


def test_trace_is_never_overwritten_by_its_conversion(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = lines(tmp_path / "t.jsonl", {"tokens": [1, 2]}, {"tokens": [1, 3]})
    before = source.read_bytes()
    (tmp_path / "link.jsonl").symlink_to(source)
    for name in (str(source), f"jsonl:{source}", f"{source}?head=1"):
        for target in ("t.jsonl", "link.jsonl"):
            assert main(["trace", "convert", name, str(tmp_path / target)]) == 2
            error = capsys.readouterr().err
            assert "is the trace itself" in error and error.count("\n") == 1
    assert source.read_bytes() == before


@pytest.mark.parametrize("to", ["jsonl", "mooncake"])
def test_failed_conversion_leaves_the_target_unchanged(
    to: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = lines(tmp_path / "t.jsonl", {"tokens": [1, 2]}, {"tokens": []})
    empty = lines(tmp_path / "e.jsonl", {"tokens": []}, {"tokens": []})
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("kept")
    for target in (old, new):
        assert main(["trace", "convert", f"jsonl:{source}", str(target), "--to", to]) == 2
        assert "t.jsonl, line 2: the prompt is empty" in capsys.readouterr().err
        command = ["trace", "convert", f"jsonl:{empty}", str(target), "--to", to]
        assert main([*command, "--skip-bad"]) == 2
        assert "no request in it: all 2 records are bad" in capsys.readouterr().err
    assert old.read_text() == "kept" and not new.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.jsonl", "old", "t.jsonl"]
    link = tmp_path / "link"
    link.symlink_to(old)
    command = ["trace", "convert", f"jsonl:{source}", str(link), "--to", to, "--skip-bad"]
    assert main(command) == 0 and link.is_symlink()
    assert old.read_text() != "kept" and "1 bad records left out" in capsys.readouterr().out


@pytest.mark.parametrize("unit", [1, 16])
def test_answer_lengths_survive_every_conversion(
    unit: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
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
    own, other, again = (str(tmp_path / name) for name in ("own", "other", "again"))
    steps = [
        (f"bailian:{first}?unit={unit}", own, ["jsonl"]),
        (own, other, ["mooncake", "--block", "16"]),
        (f"mooncake:{other}?unit=16", again, ["mooncake", "--block", "16"]),
    ]
    for source, target, form in steps:
        assert main(["trace", "convert", source, target, "--to", *form]) == 0
        assert trace_stats(open_trace(source)).output.mean == pytest.approx(92 / 6)
    capsys.readouterr()
    for path in (other, again):
        found = [json.loads(line) for line in Path(path).read_text().splitlines()]
        assert [(row["input_length"], row["output_length"]) for row in found] == lengths
    before, after = (list(open_trace(spec)) for spec in (steps[0][0], own))
    for one, two in zip(before, after, strict=True):
        assert np.array_equal(one.output, two.output), "the answer's ids must not change"


def test_answer_length_must_match_the_number_of_ids(tmp_path: Path) -> None:
    head = {"format": "hybridcache", "version": 1, "unit": 4}
    for length, fits in ((0, False), (4, False), (5, True), (8, True), (12, True), (13, False)):
        row = {"tokens": [1], "output": [2, 3], "output_length": length}
        trace = open_trace(str(lines(tmp_path / "t.jsonl", head, row)))
        if fits:
            assert [each.num_answer_tokens(4) for each in trace] == [length]
        else:
            with pytest.raises(BadRecordError, match=f"line 2: output_length {length} is not"):
                list(trace)
