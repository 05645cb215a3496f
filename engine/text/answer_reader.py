"""Reader of one answer: events of its reasoning, text and tool calls, and the reason of its end."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from engine.text.answers import (
    CLOSE,
    BrokenCall,
    Event,
    ReasoningReader,
    TextDelta,
    ToolCall,
    joined,
)
from engine.text.calls import CallReader, call_form
from engine.text.outputs import RequestOutput

PIECE = 512
"""Number of characters that are read at a time."""
BROKEN = "A call of a tool was left in the text, because "
"""Start of the warning about an answer; the reason follows."""
Finish = Literal["stop", "length", "tool_calls", "abort", "error"]


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """Form in which a model writes reasoning and tool calls."""

    thinks: bool
    offers_tools: bool
    """True if the template shows tools to the model."""
    calls: type[CallReader] | None
    """Reader of the model's calls, or None if it makes none or their form is not supported."""

    @classmethod
    @lru_cache(maxsize=4)
    def of(cls, template: str) -> AnswerForm:
        """Return the form for the source of a chat template. O(len(template)) for a new one."""
        offers_tools = "tools" in template
        calls = call_form(template) if offers_tools else None
        return cls(CLOSE in template, offers_tools, calls)


class AnswerReader:
    """Reads the text of one answer as it grows. The events do not depend on the pieces in which the
    text arrives."""

    def __init__(
        self,
        form: AnswerForm,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        is_thinking: bool = False,
        is_single: bool = False,
        index: int = 0,
        end_token_ids: Container[int] = (),
    ) -> None:
        """``tools``: tools with calls that are read, or None to treat calls as text. Without any
        tool, every call is text with a warning. ``is_thinking``: the prompt ends inside reasoning.
        ``is_single``: the answer is read only up to the end of its first call. ``end_token_ids``:
        tokens with which the model ends its answer."""
        self._reasoning = ReasoningReader(is_thinking) if form.thinks else None
        self._calls = form.calls(tools) if form.calls and tools is not None else None
        self._is_single, self._ends = is_single, end_token_ids
        self.index = index
        """Index of the answer within the request."""
        self.output: RequestOutput
        """Latest output that was read."""
        self.finish: Finish | None = None
        """Reason why the answer ended, or None if it goes on."""
        self._is_broken_off = False
        """True if a limit or a stop string ended the answer inside a call."""
        self._warning: str | None = None
        """Reason why the first of the calls that cannot be made is part of the text."""
        self.new: list[Event] = []
        """Events of the latest output."""
        self.events: list[Event] = []
        """All events so far."""
        self.is_over = False
        """True if the first call ended and the rest is ignored."""
        self.num_reasoning_tokens = 0

    @property
    def is_thinking(self) -> bool:
        """True if the next text is reasoning, as far as is known."""
        return self._reasoning is not None and self._reasoning.is_inside

    @property
    def warning(self) -> str | None:
        """Warning about a part of the text that looks like a call and cannot be made, or None.
        Known at the end of the answer."""
        return None if self.finish is None else self._warning

    def read(self, output: RequestOutput) -> None:
        """Read the new part of the answer in ``output``."""
        self.output = output
        self.new = [] if self.is_over else self._read(output)
        self.finish = self._finish(output)

    def _read(self, output: RequestOutput) -> list[Event]:
        was_thinking = self.is_thinking
        events = self.push(output.new_text)
        if was_thinking or self.is_thinking:
            self.num_reasoning_tokens += len(output.new_token_ids)
        if output.is_finished:
            is_cut = output.finish_reason != "stop" or int(output.output[-1]) not in self._ends
            rest = self.flush(is_cut)
            self._is_broken_off = is_cut and any(isinstance(one, BrokenCall) for one in rest)
            events = [*events, *rest]
        for one in events:
            if isinstance(one, BrokenCall) and self._warning is None:
                self._warning = f"{BROKEN}{one.why}."
        events = joined(one for one in events if not isinstance(one, BrokenCall))
        if self._is_single:
            ends = (at for at, one in enumerate(events, 1) if isinstance(one, ToolCall))
            end = next(ends, None)
            self.is_over = end is not None
            events = events[:end]
        self.events += events
        return events

    def _finish(self, output: RequestOutput) -> Finish | None:
        """Return the reason why the answer ended, or None."""
        if output.finish_reason is None:
            return None
        has_stopped = output.finish_reason == "stop" and not self._is_broken_off
        has_calls = any(isinstance(one, ToolCall) for one in self.events)
        # A call that ends exactly at the limit is complete: the client can run it.
        ends_in_call = has_calls and isinstance(self.events[-1], ToolCall)
        is_whole = output.finish_reason == "length" and ends_in_call
        if self.is_over or (has_calls and has_stopped) or is_whole:
            return "tool_calls"
        return output.finish_reason

    def push(self, text: str) -> list[Event]:
        """Return the events that are certain after ``text``. O(len(text)), over an answer."""
        events: list[Event] = []
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            if self._reasoning is not None:
                thoughts, piece = self._reasoning.push(piece)
                events += thoughts
            events += self._parts(piece)
        return joined(events)

    def flush(self, is_cut: bool = False) -> list[Event]:
        """Return the events held back, after the end of the text.

        ``is_cut``: the answer was cut off, so a call in progress stays as it is and may be
        incomplete JSON.
        """
        events: list[Event] = []
        if self._reasoning is not None:
            thoughts, rest = self._reasoning.flush()
            events = [*thoughts, *self._parts(rest)]
        if self._calls is not None:
            events.extend(self._calls.flush(is_cut))
        return joined(events)

    def _parts(self, text: str) -> list[Event]:
        """Return the events in text after the reasoning."""
        if not text:
            return []
        return [TextDelta(text)] if self._calls is None else self._calls.push(text)
