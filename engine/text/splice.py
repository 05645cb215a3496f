"""Sampled tokens in place of a second tokenisation of what they said.

A message of the assistant that comes back is written by the template again, and encoded again: its
JSON may be spaced otherwise, its words cut otherwise, and the prompt then leaves the cache where
the answer began. Where it is known which tokens were sampled for it, these are used, and all text
around them stays what the template writes.

A turn is replaced only if

- the template writes the message exactly once, in a turn of its own: from the last control token
  before it to the next token that ends an answer, and the rest of the chat is the same text
  whatever the message says;
- the turn begins as the prompt ended that it was sampled for (``header``), and has the reasoning
  where there was some. Templates that drop either from history are followed, unless
  ``keeps_thinking`` says otherwise.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.text.answer_forms import MARKS as PARTS
from engine.text.tokenizer import Tokenizer

FIRST, LAST = 0x100000, 0x10FFFD
"""A private-use plane: characters that stand for a message, and for its turn."""
_PLACES = re.compile(f"([{chr(FIRST)}-{chr(LAST)}])")

Encode = Callable[[str], list[int]]
Render = Callable[[Sequence[Mapping[str, Any]]], str]


@dataclass(frozen=True, slots=True)
class SampledTurn:
    """What was sampled for one message of the assistant."""

    header: str
    """What the prompt ended with, from its last control token on."""
    token_ids: Sequence[int]
    """Without the token that ended it."""
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """A turn in a rendered chat, and the tokens that stand for it."""

    start: int
    end: int
    turn: SampledTurn


class Splices:
    """The turns of one rendered chat that sampled tokens stand for."""

    def __init__(self, text: str, spans: Sequence[Span]) -> None:
        """``spans``: of ``text``, ascending."""
        self._text = text
        self._spans = spans

    @property
    def num_turns(self) -> int:
        return len(self._spans)

    def apply(self, text: str) -> str:
        """``text``, a rendering that begins as the chat does, with a character in place of each
        turn that it has too. O(turns) in comparing."""
        pieces, end = [], 0
        for number, span in enumerate(self._spans):
            if text[end : span.end + 1] != self._text[end : span.end + 1]:
                break
            pieces += [text[end : span.start], chr(FIRST + number)]
            end = span.end
        return "".join((*pieces, text[end:]))

    def encode(self, text: str, encode: Encode) -> list[int]:
        """Ids of a text that ``apply`` made."""
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


def header_of(tokenizer: Tokenizer, text: str) -> str:
    """What a prompt ends with, from its last control token on; empty where it has none."""
    pattern = _control(tokenizer)
    starts = [found.start() for found in pattern.finditer(text, max(len(text) - 4096, 0))]
    return text[starts[-1] :] if starts else ""


def find_splices(
    tokenizer: Tokenizer,
    render: Render,
    messages: Sequence[Mapping[str, Any]],
    text: str,
    turns: Mapping[int, SampledTurn],
    keeps_thinking: bool,
) -> Splices:
    """Which of ``turns``, by the index of their message, can stand in ``text``, the rendering of
    ``messages``. One render, and O(len(text)) for every turn that is looked for."""
    ends = _ends(tokenizer)
    if not turns or not ends or len(messages) > LAST - FIRST or _PLACES.search(text):
        return NO_SPLICES
    marked = list(messages)
    for index in turns:
        marked[index] = {
            **messages[index],
            "content": chr(FIRST + index) + _content(messages[index]),
        }
    regions = _regions(render(marked), _control(tokenizer), ends)
    spans = [
        Span(start, end, turns[index])
        for index, start, end in _aligned(text, regions, ends)
        if keeps_thinking or _is_kept(text[start:end], turns[index])
    ]
    return Splices(text, spans)


def _is_kept(written: str, turn: SampledTurn) -> bool:
    """The template writes the turn as it was sampled: behind its header, and with its reasoning."""
    return written.startswith(turn.header) and turn.reasoning.strip() in written


def _content(message: Mapping[str, Any]) -> str:
    """Its text without the blanks at its beginning, which templates strip where they stand
    first."""
    return str(message.get("content") or "").lstrip()


class _Region(NamedTuple):
    """One marked turn."""

    message: int | None
    """Its index; None: the end of the chat."""
    before: str
    """The text between the turn before it and this one."""


def _regions(text: str, control: re.Pattern[str], ends: re.Pattern[str]) -> list[_Region]:
    """The turns that are marked once in ``text``, each in a turn of its own."""
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
    """(message, start, end) of each turn in ``text``, which must be the same around them; none
    where it is not."""
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


def _control(tokenizer: Tokenizer) -> re.Pattern[str]:
    """What begins and ends turns."""
    walls = set(tokenizer.special_tokens)
    return _any_of(t for t in tokenizer.control_tokens if t in walls and t not in PARTS)


def _ends(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """What ends an answer; None: nothing does that the text around it may be cut at."""
    walls = set(tokenizer.special_tokens) & set(tokenizer.control_tokens)
    texts = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in tokenizer.eos_token_ids]
    known = [text for text in texts if text in walls]
    return _any_of(known) if known else None


def _any_of(texts: Any) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
