"""Tests of streamed text: never retracted, cut before the first stop string, whole characters
only."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.text.answers import (
    Answer,
    AnswerReader,
    DraftCounts,
    Phase,
    RequestOutput,
    TextDelta,
    TextStream,
    Timings,
)
from engine.text.tokenizer import IdTokenizer, StreamDecoder
from engine.text.tokenizer_files import HFTokenizer

letters = st.text("abé", max_size=40)


def feed(
    text: str, stop: tuple[str, ...], phase: Phase = "text", keeps_stop: bool = False
) -> tuple[list[str], bool]:
    """Return (pieces in order, whether a stop string ended them)."""
    tokenizer = HFTokenizer()
    stream = TextStream(StreamDecoder(tokenizer), stop, keeps_stop, phase)
    pieces = []
    for token in tokenizer.encode(text):
        piece, stopped = stream.push(token)
        pieces.append(piece)
        if stopped:
            return pieces, True
    piece, stopped = stream.flush()
    return [*pieces, piece], stopped


@given(letters, st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_pieces_add_up_to_the_text_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    pieces, stopped = feed(text, tuple(stop))
    ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    assert stopped == bool(ends)
    # The string that is completed first ends the answer. Among those completed together, the one
    # that begins first does.
    expected = text[: min(ends)[1]] if ends else text
    assert "".join(pieces) == expected


MARKS = ["<think>", "</think>", "<", "</", "think>", "a", "b", " ", "\n", "\n\n"]
PARTS = st.lists(st.sampled_from(MARKS), max_size=8).map("".join)
STOPS = PARTS.filter(
    lambda stop: stop and ("</think>" not in stop or stop.count("think>") == 1)
)  # With a second mark, one token could complete two stop strings.


@given(PARTS, st.lists(STOPS, max_size=3), st.booleans(), st.booleans())
def test_stop_strings_count_behind_the_reasoning_and_its_white_space(
    text: str, stop: list[str], is_open: bool, keeps_stop: bool
) -> None:
    """Compare with a search of the whole text. A stop string with the mark counts at the mark."""
    thinks = is_open or text.lstrip().startswith("<think>")
    stop = stop if thinks else stop[:1]  # The beginning is held back, as if it were one token.
    thought, mark, answer = text.partition("</think>") if thinks else ("", "", text)
    first = len(thought + mark) + (len(answer) - len(answer.lstrip()) if thinks else 0)
    met = []
    for one in stop:
        is_mark = thinks and "</think>" in one
        at = text.find(one, 0 if is_mark else first) if mark or not thinks or is_mark else -1
        met += [(at + len(one), at, one)] if at >= 0 else []
    pieces, stopped = feed(text, tuple(stop), "reasoning" if is_open else "beginning", keeps_stop)
    end, at, one = min(met, default=(0, len(text), ""))
    assert stopped == bool(met)
    assert "".join(pieces) == text[: end if keeps_stop and met else at]


def stream_of(*stop: str, piece: str = "-") -> TextStream:
    """Return a stream of tokens with the text ``piece``."""
    tokenizer = IdTokenizer(1, frozenset())
    tokenizer.token_bytes = lambda *_: piece.encode()  # type: ignore[method-assign]
    return TextStream(StreamDecoder(tokenizer), stop)


@given(letters, st.lists(st.text("abé", min_size=1, max_size=4), min_size=1), st.data())
def test_first_stop_string_of_a_long_token_is_found(
    end: str, stop: list[str], data: st.DataObject
) -> None:
    """Also a long one that begins before a short one."""
    text = "c" * data.draw(st.integers(0, 40)) + end
    stop.append(text[data.draw(st.integers(0, len(text))) :] or "x")
    stream = stream_of(*stop, piece=text)
    before, stopped = stream.push(0)
    found = [text.index(one) for one in stop if one in text]
    assert stopped == bool(found)
    assert before + stream.flush()[0] * (not found) == (text[: min(found)] if found else text)


def test_search_is_ready_at_once() -> None:
    """Even with the most and longest stop strings of a request, which are different each time."""
    began_s = time.thread_time()
    for number in range(10):
        stream_of(*(f"{number}{index}" * 512 for index in range(64)))
    assert time.thread_time() - began_s < 0.2


def test_a_text_that_repeats_the_beginning_of_a_long_stop_string_is_cheap() -> None:
    """A regular expression compared it at every place of the held text: 100 s in place of 0.1 s."""
    stream, began_s = stream_of("z", "-" * 8000 + "x"), time.thread_time()
    for token in range(8000):
        stream.push(token)
    assert time.thread_time() - began_s < 5


def test_white_space_behind_the_reasoning_is_not_part_of_the_text() -> None:
    """The text is shown as soon as its first character arrives."""
    reader = AnswerReader(thinks=True, is_thinking=True)
    events = [reader.push(piece) for piece in ("a</think>", " ", "\n b", " c")]
    assert events[1:] == [[], [TextDelta("b")], [TextDelta(" c")]]


def test_time_per_token_begins_behind_the_first_token() -> None:
    assert Timings(0.5, 1.0, 4.0).tpot_s(4) == 1.0
    assert Timings(0.5, 1.0, 4.0).tpot_s(2) == 3.0
    assert Timings(0.5, 1.0, 4.0).tpot_s(1) is Timings(0.5, 1.0, None).tpot_s(4) is None


def test_an_answer_grows_by_any_number_of_tokens() -> None:
    answer, end = Answer(np.empty(0, np.int32)), 0
    for new in ((1,), (2, 3), (), (4, 5, 6)):
        end += len(new)
        answer.add(RequestOutput("a", new, num_tokens=end))
    assert answer.tokens[:end].tolist() == [1, 2, 3, 4, 5, 6]


def test_copied_counts_of_drafts_do_not_change() -> None:
    counts = DraftCounts()
    counts.count("ngram", 2, 1)
    kept = counts.copy()
    counts.count("ngram", 1, 1)
    assert kept == DraftCounts(1, {("ngram", 1): 1, ("ngram", 2): 1}, {("ngram", 1): 1})
    assert (counts.num_verified, counts.accepted) == (2, {("ngram", 1): 2})
