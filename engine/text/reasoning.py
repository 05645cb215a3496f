"""Reasoning before an answer, between ``<think>`` (in the prompt or the answer) and
``</think>``."""

from __future__ import annotations

from collections.abc import Callable

from engine.text.answer_events import Event, ReasoningDelta
from engine.text.marker_scan import MarkSearch, Space

OPEN, CLOSE = "<think>", "</think>"


class ReasoningReader:
    """Separates reasoning from the answer and strips the white space around it.

    Reasoning can start only at the beginning of an answer, and only ``</think>`` ends it: an answer
    that ends before is all reasoning.
    """

    def __init__(self, is_open: bool) -> None:
        """``is_open``: the prompt ends with ``<think>``."""
        self._close = MarkSearch(CLOSE)
        self._space = Space()
        self._begin = ""
        self._has_text = False
        self._state: Callable[[str], tuple[list[Event], str]]
        self._state = self._inside if is_open else self._before

    @property
    def is_inside(self) -> bool:
        """True if the next text is reasoning, as far as is known."""
        return self._state == self._inside

    def push(self, text: str) -> tuple[list[Event], str]:
        """Return (reasoning that is certain, text of the answer). O(len(text))."""
        return self._state(text)

    def flush(self) -> tuple[list[Event], str]:
        """Return the text held back in the same form, after the end of the text."""
        if self.is_inside:
            return self._thoughts(self._close.flush()), ""
        begin, self._begin = self._space.take() + self._begin, ""
        return [], begin if self._state == self._before else ""

    def _before(self, text: str) -> tuple[list[Event], str]:
        """State before any text other than white space or part of the mark."""
        if not self._begin:
            kept = text.lstrip()
            self._space.push(text[: len(text) - len(kept)])
            text = kept
        self._begin += text
        if len(self._begin) < len(OPEN) and OPEN.startswith(self._begin):
            return [], ""
        begin, self._begin = self._begin, ""
        if begin.startswith(OPEN):
            self._space.take()
            self._state = self._inside
            return self._inside(begin[len(OPEN) :])
        self._state = self._behind
        return [], self._space.take() + begin

    def _inside(self, text: str) -> tuple[list[Event], str]:
        thoughts, mark, rest = self._close.push(text)
        events = self._thoughts(thoughts)
        if mark is None:
            return events, ""
        self._space.take()
        self._state = self._between
        return events, self._between(rest)[1]

    def _between(self, text: str) -> tuple[list[Event], str]:
        text = text.lstrip()
        if text:
            self._state = self._behind
        return [], text

    def _behind(self, text: str) -> tuple[list[Event], str]:
        return [], text

    def _thoughts(self, text: str) -> list[Event]:
        if not self._has_text:
            text = text.lstrip()
        certain = self._space.push(text)
        self._has_text = self._has_text or bool(certain)
        return [ReasoningDelta(certain)] if certain else []
