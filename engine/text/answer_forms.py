"""Form of a model's answers, derived from its chat template, and the reader of one answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.plugins import call_form
from engine.text import reasoning
from engine.text.answer_events import CALL_CLOSE, CALL_OPEN, CallForm, Event, TextDelta, joined
from engine.text.reasoning import ReasoningReader

MARKS = (reasoning.OPEN, reasoning.CLOSE, CALL_OPEN, CALL_CLOSE)
"""Marks of the parts of an answer. They are part of the text, even if the vocabulary lists them as
tokens that are not shown."""
PIECE = 512
"""Number of characters that are read at a time."""


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """Form in which a model writes reasoning and tool calls."""

    thinks: bool
    offers_tools: bool
    """True if the template shows tools to the model."""
    calls: CallForm | None
    """Reader of the model's calls, or None if it makes none or their form is not supported."""

    @classmethod
    def of(cls, template: str) -> AnswerForm:
        """Return the form for the source of a chat template. O(len(template))."""
        offers_tools = "tools" in template
        calls = call_form(template) if offers_tools else None
        return cls(reasoning.CLOSE in template, offers_tools, calls)


class AnswerReader:
    """Reads the text of one answer as it grows. The events do not depend on the pieces in which the
    text arrives."""

    def __init__(
        self,
        form: AnswerForm,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        is_thinking: bool = False,
    ) -> None:
        """``tools``: tools with calls that are read, or None to treat calls as text.
        ``is_thinking``: the prompt ends inside reasoning."""
        self._reasoning = ReasoningReader(is_thinking) if form.thinks else None
        self._calls = form.calls(tools) if form.calls and tools else None

    @property
    def is_thinking(self) -> bool:
        """True if the next text is reasoning, as far as is known."""
        return self._reasoning is not None and self._reasoning.is_inside

    def push(self, text: str) -> list[Event]:
        """Return the events that are certain after ``text``. O(len(text)), over an answer."""
        events: list[Event] = []
        for start in range(0, len(text), PIECE):
            events.extend(self._read(text[start : start + PIECE]))
        return joined(events)

    def flush(self, is_cut: bool = False) -> list[Event]:
        """Return the events held back, after the end of the text.

        ``is_cut``: the answer was cut off, so a call in progress stays as it is and may be
        incomplete JSON.
        """
        events: list[Event] = []
        if self._reasoning is not None:
            thoughts, rest = self._reasoning.flush()
            events = [*thoughts, *self._answer(rest)]
        if self._calls is not None:
            events.extend(self._calls.flush(is_cut))
        return joined(events)

    def _read(self, text: str) -> list[Event]:
        if self._reasoning is None:
            return self._answer(text)
        thoughts, rest = self._reasoning.push(text)
        return [*thoughts, *self._answer(rest)]

    def _answer(self, text: str) -> list[Event]:
        if not text:
            return []
        return [TextDelta(text)] if self._calls is None else self._calls.push(text)
