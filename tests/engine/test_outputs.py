"""Tests of streamed text: never retracted, cut before the first stop string, whole characters
only."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from engine.text.outputs import WINDOW, MarkSearch, TextStream
from engine.text.tokenizer import HFTokenizer

letters = st.text("abé", max_size=40)


def feed(text: str, stop: tuple[str, ...]) -> tuple[list[str], bool]:
    """Return (pieces in order, whether a stop string ended them)."""
    tokenizer = HFTokenizer()
    stream = TextStream(tokenizer.stream_decoder(), stop)
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


@given(letters, st.lists(st.text("abé", min_size=1, max_size=4), min_size=1), st.data())
def test_first_mark_of_a_long_text_is_found(
    end: str, marks: list[str], data: st.DataObject
) -> None:
    """Also a long mark that begins before a short one, at any distance from the window's end."""
    text = "c" * data.draw(st.integers(0, 3 * WINDOW)) + end
    marks.append(text[data.draw(st.integers(0, len(text))) :] or "x")
    search = MarkSearch(*marks)
    before, mark, rest = search.push(text)
    found = [(text.index(one), len(one), one) for one in marks if one in text]
    if found:
        start, size, first = min(found)
        assert (before, mark, rest) == (text[:start], first, text[start + size :])
    else:
        assert (before + search.flush(), mark, rest) == (text, None, "")


def test_search_is_ready_at_once() -> None:
    """Even with the most and longest stop strings of a request, which are different each time."""
    began_s = time.thread_time()
    for number in range(10):
        MarkSearch(*(f"{number}{index}" * 512 for index in range(64)))
    assert time.thread_time() - began_s < 0.2


def test_a_text_that_repeats_the_beginning_of_a_long_stop_string_is_cheap() -> None:
    """A regular expression compared it at every place of the held text: 100 s in place of 0.1 s."""
    search, began_s = MarkSearch("z", "-" * 8000 + "x"), time.thread_time()
    for _ in range(8000):
        search.push("-")
    assert time.thread_time() - began_s < 5
