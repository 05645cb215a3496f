"""Which form a model's answers have, by its chat template, and the reader of one answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.plugins import call_form
from engine.text import reasoning
from engine.text.answer_events import CALL_CLOSE, CALL_OPEN, CallForm, Event, TextDelta, joined
from engine.text.reasoning import ReasoningReader

MARKS = (reasoning.OPEN, reasoning.CLOSE, CALL_OPEN, CALL_CLOSE)
"""Tokens of a vocabulary that stand for a part of an answer: they are text, also where the
vocabulary has them among those that are not shown."""
PIECE = 512
"""Characters that are read at a time."""


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How one model writes reasoning and calls."""

    thinks: bool
    offers_tools: bool
    """The template shows the model its tools."""
    calls: CallForm | None
    """Reads its calls; None: it makes none, or in a form that is not known here."""

    @classmethod
    def of(cls, template: str) -> AnswerForm:
        """The form that the source of a chat template asks for. O(len(template))."""
        offers_tools = "tools" in template
        calls = call_form(template) if offers_tools else None
        return cls(reasoning.CLOSE in template, offers_tools, calls)


class AnswerReader:
    """Reads the text of one answer as it grows; in whatever pieces it comes, the events say the
    same."""

    def __init__(
        self,
        form: AnswerForm,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        is_thinking: bool = False,
    ) -> None:
        """``tools``: those whose calls are read, None: calls are text. ``is_thinking``: the prompt
        ends inside of reasoning."""
        self._reasoning = ReasoningReader(is_thinking) if form.thinks else None
        self._calls = form.calls(tools) if form.calls and tools else None

    @property
    def is_thinking(self) -> bool:
        """What comes next is reasoning, as far as is known."""
        return self._reasoning is not None and self._reasoning.is_inside

    def push(self, text: str) -> list[Event]:
        """What became certain. O(len(text)), over an answer."""
        events: list[Event] = []
        for start in range(0, len(text), PIECE):
            events.extend(self._read(text[start : start + PIECE]))
        return joined(events)

    def flush(self, is_cut: bool = False) -> list[Event]:
        """What was held back: there is no more text. ``is_cut``: the model had not ended; what it
        had begun stays as it is, and may be no whole JSON."""
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
