"""Tests of streamed text: never retracted, cut before the first stop string, whole characters
only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.text.outputs import TextStream
from engine.text.tokenizer import ByteTokenizer

letters = st.text("abé", max_size=40)


def feed(text: str, stop: tuple[str, ...]) -> tuple[list[str], bool]:
    """Return (pieces in order, whether a stop string ended them)."""
    tokenizer = ByteTokenizer()
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
