"""Sampled tokens of earlier answers in the prompt of a chat.

When a client sends an answer back, the template writes it again and the tokenizer encodes it again.
Its JSON may be spaced differently and its words split differently, so the prompt would differ from
the cached one where the answer begins. If the sampled tokens are known, they are used instead, and
all text around them stays as the template writes it. A turn is replaced only if

- the template writes the message exactly once, in a separate turn (from the last control token
  before it to the next end token);
- the rest of the chat does not depend on the message;
- the turn begins with the end of the prompt that it was sampled for (``header``), and contains its
  reasoning if there was any. Templates that drop either from history are followed, unless
  ``keeps_thinking`` is set.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.text.answers import MARKS
from engine.text.tokenizer import Message, Tokenizer, any_of

FIRST, LAST = 0x100000, 0x10FFFD
"""Private-use characters that stand for a message, and for its turn."""
_PLACES = re.compile(f"([{chr(FIRST)}-{chr(LAST)}])")


@dataclass(frozen=True, slots=True)
class SampledTurn:
    """Tokens sampled for one assistant message."""

    header: str
    """End of the prompt, from its last control token on."""
    token_ids: Sequence[int]
    """Sampled tokens without the end token."""
    reasoning: str = ""


Encode = Callable[[str], list[int]]
Render = Callable[[Sequence[Message]], str]


@dataclass(frozen=True, slots=True)
class Span:
    """A turn in a rendered chat, and the tokens that replace it."""

    start: int
    end: int
    turn: SampledTurn


class Splices:
    """Turns of one rendered chat that are replaced by sampled tokens."""

    def __init__(self, text: str, spans: Sequence[Span]) -> None:
        """``spans`` of ``text``, ascending."""
        self._text = text
        self._spans = spans

    def apply(self, text: str) -> str:
        """Return ``text`` with a character in place of each turn that it shares with the chat.

        ``text`` is a rendering that begins as the chat does. O(turns) comparisons.
        """
        pieces, end = [], 0
        for number, span in enumerate(self._spans):
            if text[end : span.end + 1] != self._text[end : span.end + 1]:
                break
            pieces += [text[end : span.start], chr(FIRST + number)]
            end = span.end
        return "".join((*pieces, text[end:]))

    def encode(self, text: str, encode: Encode) -> list[int]:
        """Return the ids of a text that ``apply`` made."""
        if not self._spans:
            return encode(text)
        token_ids: list[int] = []
        for number, piece in enumerate(_PLACES.split(text)):
            if number % 2:
                turn = self._spans[ord(piece) - FIRST].turn
                token_ids += encode(turn.header)
                token_ids += turn.token_ids
            elif piece:
                token_ids += encode(piece)
        return token_ids


NO_SPLICES = Splices("", ())


def find_splices(
    tokenizer: Tokenizer,
    render: Render,
    messages: Sequence[Message],
    text: str,
    turns: Mapping[int, SampledTurn],
    keeps_thinking: bool,
) -> Splices:
    """Return the turns that can be replaced in ``text``, the rendering of ``messages``.

    ``turns`` are given by the index of their message. Takes one render, and O(len(text)) per turn.
    """
    if not turns or len(messages) > LAST - FIRST or _PLACES.search(text):
        return NO_SPLICES
    ends = _ends(tokenizer)
    if ends is None:
        return NO_SPLICES
    marked = list(messages)
    for index in turns:
        marked[index] = {
            **messages[index],
            "content": chr(FIRST + index) + _content(messages[index]),
        }
    regions = _regions(render(marked), control_pattern(tokenizer), ends)
    spans = [
        Span(start, end, turns[index])
        for index, start, end in _aligned(text, regions, ends)
        if keeps_thinking or _is_kept(text[start:end], turns[index])
    ]
    return Splices(text, spans)


def _is_kept(written: str, turn: SampledTurn) -> bool:
    """Return True if the template writes the turn as it was sampled: after its header, and with its
    reasoning."""
    return written.startswith(turn.header) and turn.reasoning.strip() in written


def _content(message: Message) -> str:
    """Return the text of a message without leading blanks, which templates strip at the start of a
    turn."""
    return str(message.get("content") or "").lstrip()


class _Region(NamedTuple):
    """One marked turn."""

    message: int | None
    """Index of the message, or None for the end of the chat."""
    before: str
    """Text between the previous turn and this one."""


def _regions(text: str, control: re.Pattern[str], ends: re.Pattern[str]) -> list[_Region]:
    """Return the turns with a mark that occurs once in ``text``, each in a separate turn."""
    regions, last = [], 0
    counts = Counter(_PLACES.findall(text))
    for place in _PLACES.finditer(text):
        starts = [found.start() for found in control.finditer(text, last, place.start())]
        end = ends.search(text, place.end())
        if starts and end is not None and counts[place.group()] == 1:
            before = _PLACES.sub("", text[last : starts[-1]])
            regions.append(_Region(ord(place.group()) - FIRST, before))
            last = end.start()
    return [*regions, _Region(None, _PLACES.sub("", text[last:]))]


def _aligned(
    text: str, regions: Sequence[_Region], ends: re.Pattern[str]
) -> list[tuple[int, int, int]]:
    """Return (message, start, end) of each turn in ``text``, or [] if the text around the turns
    differs."""
    spans: list[tuple[int, int, int]] = []
    at = 0
    for index, before in regions:
        start = at + len(before)
        end = ends.search(text, start + 1)
        if text[at:start] != before or (index is not None and end is None):
            return []
        if index is None:
            return spans if start == len(text) else []
        assert end is not None
        spans.append((index, start, end.start()))
        at = end.start()
    return []


def _ends(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return a pattern of the tokens that end an answer, or None if the text cannot be split at
    them."""
    walls = set(tokenizer.special_tokens) & set(tokenizer.control_tokens)
    texts = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in tokenizer.eos_token_ids]
    known = [text for text in texts if text in walls]
    return any_of(known) if known else None


def control_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Return a pattern of the tokens that begin and end turns."""
    walls = set(tokenizer.special_tokens)
    return any_of(t for t in tokenizer.control_tokens if t in walls and t not in MARKS)
