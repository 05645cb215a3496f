"""Answers: the outputs of a request's steps, the conversion of its tokens to text, and the parts of
that text (reasoning, text and tool calls) as events in their order.

A tool call is emitted when it is complete. A call that cannot be made (its arguments cannot be
read, its tool was not offered, or it breaks off) is text, with a warning. Stop strings count only
behind the reasoning.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from msgspec import Struct, structs

from engine.errors import RequestError, WireError
from engine.text.tokenizer import CLOSE, OPEN, StreamDecoder
from hybridcache.radix.api import Losses

Counts = dict[tuple[str, int], int]
FinishReason = Literal["stop", "length", "abort", "error"]
NO_TOKEN = -1


class SampledToken(NamedTuple):
    """One sampled token with its log-probabilities."""

    token_id: int
    """Token id, or ``NO_TOKEN`` if the logits were NaN or infinite."""
    logprob: float | None = None
    """Natural logarithm of its probability, before penalties and temperature. None if not
    requested."""
    top_logprobs: tuple[tuple[int, float], ...] = ()
    """Most likely (token id, log-probability), best first."""


class DraftCounts(Struct, array_like=True):
    """Statistics on the drafts of one request."""

    num_verified: int = 0
    """Number of steps that verified a draft of the request."""
    drafted: Counts = {}
    """Number of draft tokens by (source, place in the draft, from 1)."""
    accepted: Counts = {}
    """Number of accepted draft tokens, by the same keys."""

    def copy(self) -> DraftCounts:
        """Return the present counts, which do not change with the request."""
        return DraftCounts(self.num_verified, {**self.drafted}, {**self.accepted})

    def count(self, source: str, num_drafted: int, num_accepted: int) -> None:
        """Count one draft with ``num_accepted`` accepted tokens at its beginning."""
        self.num_verified += 1
        for counts, number in ((self.drafted, num_drafted), (self.accepted, num_accepted)):
            for place in range(1, number + 1):
                counts[source, place] = counts.get((source, place), 0) + 1


class Timings(NamedTuple):
    """Times of one request in seconds, or None if not reached yet."""

    queue_s: float | None
    """Time from submission until its first tokens were scheduled."""
    ttft_s: float | None
    """Time from submission until its first token."""
    e2e_s: float | None
    """Time from submission until it finished."""

    def tpot_s(self, num_output_tokens: int) -> float | None:
        """Return the mean time per output token after the first, or None before two tokens or
        before the end."""
        if self.e2e_s is None or self.ttft_s is None or num_output_tokens < 2:
            return None
        return (self.e2e_s - self.ttft_s) / (num_output_tokens - 1)


class Transferred(NamedTuple):
    """Statistics on transfers between engines for one request."""

    tokens: int
    """Number of tokens of KV that were loaded into the cache. 0 if the prefix did not arrive
    completely."""
    needed_bytes: int
    """Bytes of that KV and of its state."""
    wire_bytes: int
    """All bytes sent and received, including messages and incomplete transfers."""


class Answer:
    """Everything that was generated for one request so far, held where its outputs are read. It
    only grows, so that the outputs of earlier steps stay as they are."""

    __slots__ = (
        *("known", "logprobs", "num_chars", "num_pieces", "num_tokens"),
        *("prompt", "prompt_logprobs", "text", "tokens"),
    )

    def __init__(self, prompt: npt.NDArray[np.int32]) -> None:
        self.prompt = prompt
        self.tokens = np.empty(64, np.int32)
        """Generated tokens, and room for further ones."""
        self.num_tokens = 0
        self.text: list[str] = []
        """Pieces of the text."""
        self.num_pieces = self.num_chars = 0
        self.logprobs: list[SampledToken] = []
        self.prompt_logprobs: tuple[SampledToken | None, ...] | None = None
        self.known: RequestOutput | None = None
        """Latest complete output, as it arrived."""

    def add(self, output: RequestOutput) -> RequestOutput:
        """Append the new part of ``output``, unless it was appended before, and return the output
        with this answer, complete. Can be repeated after an exception at any place. O(new tokens),
        amortised."""
        end, new = output.num_tokens, output.new_token_ids
        first = end - len(new)
        if end > len(self.tokens):
            self.tokens = np.concatenate((self.tokens, np.empty(end, np.int32)))
        if len(new) == 1:  # The usual case, in a third of the time.
            self.tokens[first] = new[0]
        else:
            self.tokens[first:end] = new
        if output.num_chars > self.num_chars:
            self.text[self.num_pieces :] = [output.new_text]
            self.num_pieces, self.num_chars = self.num_pieces + 1, output.num_chars
        self.logprobs[first:end] = output.new_logprobs
        if output.new_prompt_logprobs is not None:
            self.prompt_logprobs = output.new_prompt_logprobs
        self.num_tokens = end
        if output.losses is not None or (known := self.known) is None:
            self.known = output
            return structs.replace(output, answer=self)
        return structs.replace(
            output,
            cached_len=known.cached_len,
            losses=known.losses,
            timings=known.timings,
            transferred=known.transferred,
            answer=self,
        )


class RequestOutput(Struct, frozen=True, array_like=True):
    """Output of one step for one request: the new part. Readers get it with the whole ``answer`` so
    far; see ``Answer.add``. On the way, the fields from ``cached_len`` on are only in the first and
    the last output, and in the one after a preemption."""

    request_id: str
    new_token_ids: tuple[int, ...] = ()
    """Tokens that this step generated."""
    new_text: str = ""
    """New text that is certain: it contains no possible beginning of a stop string."""
    new_logprobs: tuple[SampledToken, ...] = ()
    """One per new token if the request has log-probabilities."""
    new_prompt_logprobs: tuple[SampledToken | None, ...] | None = None
    """Log-probabilities of the prompt, with the first tokens only. See ``prompt_logprobs``."""
    num_tokens: int = 0
    """Number of tokens generated so far."""
    num_chars: int = 0
    """Length of the text so far."""
    num_preemptions: int = 0
    """Number of times that the request gave up its memory for an older one."""
    cached_len: int = 0
    """Number of prompt tokens that were not computed."""
    losses: Losses | None = None
    """Number of other prompt tokens by loss cause; with ``cached_len`` they sum to the prompt. None
    if the request ended before it was scheduled."""
    finish_reason: FinishReason | None = None
    """None if the request goes on."""
    failure: WireError | None = None
    """Reason of ``finish_reason`` "error", else None."""
    timings: Timings = Timings(None, None, None)
    drafts: DraftCounts | None = None
    """Counts up to the last output, which has them; None if no step could have drafts."""
    transferred: Transferred | None = None
    """None if no other engine was involved."""
    answer: Answer | None = None
    """The answer so far, or None on the way to the reader."""

    @property
    def whole(self) -> Answer:
        """The answer so far, for a reader."""
        assert self.answer is not None, "an output that is on its way has no answer"
        return self.answer

    @property
    def prompt_token_ids(self) -> npt.NDArray[np.int32]:
        """Tokens of the prompt, int32[n]."""
        return self.whole.prompt

    @property
    def output(self) -> npt.NDArray[np.int32]:
        """All generated tokens, int32[m]: a view that is never overwritten."""
        return self.whole.tokens[: self.num_tokens]

    @property
    def token_ids(self) -> list[int]:
        """All generated tokens."""
        found: list[int] = self.output.tolist()
        return found

    @property
    def text(self) -> str:
        """All text that is certain. O(its length)."""
        return "".join(self.whole.text)[: self.num_chars]

    @property
    def logprobs(self) -> list[SampledToken] | None:
        """One per generated token, or None if not requested."""
        return self.whole.logprobs[: self.num_tokens] or None

    @property
    def prompt_logprobs(self) -> tuple[SampledToken | None, ...] | None:
        """One per prompt token, None for the first; set from the first token on if the request has
        them."""
        return self.whole.prompt_logprobs

    @classmethod
    def failed(cls, request_id: str, error: RequestError) -> RequestOutput:
        """Return the last output of a request that failed with ``error``."""
        return cls(request_id, finish_reason="error", failure=error.to_wire())

    @property
    def error(self) -> str | None:
        """Short reason of ``finish_reason`` "error", else None."""
        return None if self.failure is None else self.failure.message

    @property
    def is_finished(self) -> bool:
        """True if the request has ended."""
        return self.finish_reason is not None


def begin_of(text: str, mark: str) -> int:
    """Return the first position from which the rest of ``text`` may begin ``mark``; the end of the
    text if there is none."""
    at = text.find(mark[0], max(0, len(text) - len(mark) + 1))
    while at >= 0 and not mark.startswith(text[at:]):
        at = text.find(mark[0], at + 1)
    return at if at >= 0 else len(text)


Phase = Literal["beginning", "reasoning", "between", "text"]
"""Part of an answer: it is not known whether it begins with reasoning; its reasoning; the white
space after that; its text."""


class TextStream:
    """Converts the tokens of one request to text, which is cut before the first stop string behind
    the reasoning. A stop string with ``</think>`` also counts where the reasoning ends.

    Text that may be the beginning of a stop string is held back, so that no text is ever retracted.

    >>> from engine.text.tokenizer import IdTokenizer, StreamDecoder
    >>> stream = TextStream(StreamDecoder(IdTokenizer(10, frozenset())), [" 7 8"])
    >>> [stream.push(token) for token in (1, 7, 7, 8)]
    [(' 1', False), ('', False), (' 7', False), ('', True)]
    """

    __slots__ = ("_decoder", "_held", "_keeps_stop", "_stop", "phase")

    def __init__(
        self,
        decoder: StreamDecoder,
        stop: Sequence[str] = (),
        keeps_stop: bool = False,
        phase: Phase = "text",
    ) -> None:
        """``keeps_stop``: the text is cut after the stop string instead. ``phase``: part of the
        answer with which the text begins."""
        self._decoder, self._stop, self._keeps_stop = decoder, stop, keeps_stop
        self._held = ""
        self.phase = phase
        """Part of the answer that the next text belongs to, as far as is known."""

    def push(self, token_id: int, may_stop: bool = True) -> tuple[str, bool]:
        """Return (the text that is certain now, True if a stop string was found).

        Without ``may_stop`` no stop string is found. O(new text) per stop string, over an answer,
        except for texts that repeat its beginning.
        """
        new = self._decoder.push(token_id)
        if self.phase == "text" and not (self._stop and may_stop):
            return new, False
        return self._read(new, self._stop if may_stop else ())

    def flush(self) -> tuple[str, bool]:
        """Return (the text held back, True if it contains a stop string), after the last token."""
        new = self._decoder.flush()
        if self.phase == "beginning":
            self.phase = "text"
        text, has_stopped = self._read(new, self._stop)
        return text if has_stopped else text + self._held, has_stopped

    def _read(self, new: str, stops: Sequence[str]) -> tuple[str, bool]:
        text, self._held, before = self._held + new, "", ""
        if self.phase == "beginning":
            begin = text.lstrip()
            if len(begin) < len(OPEN) and OPEN.startswith(begin):
                self._held = text
                return "", False
            self.phase = "reasoning" if begin.startswith(OPEN) else "text"
        if self.phase == "reasoning":
            closing = [stop for stop in stops if CLOSE in stop]
            if any(stop in text for stop in closing):
                return self._cut(text, closing)
            at = text.find(CLOSE)
            marks = closing if at >= 0 else [CLOSE, *closing]
            hold = min((begin_of(text, mark) for mark in marks), default=len(text))
            if at < 0 or hold <= at:
                self._held = text[hold:]
                return text[:hold], False
            at += len(CLOSE)
            before, text, self.phase = text[:at], text[at:], "between"
        if self.phase == "between":
            kept = text.lstrip()
            before += text[: len(text) - len(kept)]
            if not kept:
                return before, False
            text, self.phase = kept, "text"
        certain, has_stopped = self._cut(text, stops)
        return before + certain, has_stopped

    def _cut(self, text: str, stops: Sequence[str]) -> tuple[str, bool]:
        """Return the certain part of ``text`` before one of ``stops``, and whether one was found;
        the rest is held back."""
        stops = [stop for stop in stops if stop[0] in text]
        found = [(at, len(stop), stop) for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            start, _, stop = min(found)
            self._held = ""
            return text[:start] + stop * self._keeps_stop, True
        cut = min((begin_of(text, stop) for stop in stops), default=len(text))
        self._held = text[cut:]
        return text[:cut], False


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """Next part of the model's reasoning before its answer."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Next part of the answer."""

    text: str


MAX_NAME = 256
"""Maximum length of a tool's name; a call with a longer one is text."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """Complete call of an offered tool. ``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


Event = ReasoningDelta | TextDelta | ToolCall


def joined(events: list[Event]) -> list[Event]:
    """Merge adjacent events of one kind. O(length)."""
    merged: list[Event] = []
    for kind, group in itertools.groupby(events, type):
        parts = cast("Any", group)
        merged += parts if kind is ToolCall else [kind("".join(part.text for part in parts))]
    return merged


def as_message(events: Sequence[Event]) -> dict[str, Any]:
    """Return an answer as the message that chat templates take. O(length)."""
    calls = [
        {"type": "function", "function": {"name": one.name, "arguments": one.arguments}}
        for one in events
        if isinstance(one, ToolCall)
    ]
    thoughts = [one.text for one in events if isinstance(one, ReasoningDelta)]
    texts = [one.text for one in events if isinstance(one, TextDelta)]
    return {
        "role": "assistant",
        "content": "".join(texts),
        "reasoning_content": "".join(thoughts),
        "tool_calls": calls,
    }


Finish = FinishReason | Literal["tool_calls"]


_OPENING = {OPEN[:end] for end in range(len(OPEN))}
"""Beginnings of the mark of reasoning."""


class AnswerReader:
    """Reads the text of one answer as it grows. The events do not depend on the pieces in which the
    text arrives. Calls of tools are text, except in its subclass that reads a form of calls."""

    def __init__(
        self,
        thinks: bool,
        *,
        is_thinking: bool = False,
        starts_text: bool = True,
        end_token_ids: Container[int] = (),
    ) -> None:
        """``thinks``: the model may write reasoning. ``is_thinking``: the prompt ends inside
        reasoning. ``starts_text``: False if the answer continues a text, so that its first white
        space counts. ``end_token_ids``: tokens with which the model ends its answer."""
        self._thinks = thinks
        self.is_thinking = thinks and is_thinking
        """True if the next text is reasoning, as far as is known."""
        self._has_thoughts = self.is_thinking and not starts_text
        """True if the prompt or an event has a part of the reasoning."""
        self._rest = ""
        """Text that is not read yet: it may begin a mark, or depends on the text after it."""
        self._is_whole = self._is_cut = False
        """True if no text follows ``_rest``, and if it was cut off there."""
        self._parts = self._read_parts()
        self._ends = end_token_ids
        self.output: RequestOutput
        """Latest output that was read. With ``is_over`` it ends with the first call."""
        self.finish: Finish | None = None
        """Reason why the answer ended, or None if it goes on."""
        self.new: list[Event] = []
        """Events of the latest output."""
        self.events: list[Event] = []
        """All events so far."""
        self.is_over = False
        """True if the first call ended and the rest is ignored."""
        self.num_reasoning_tokens = 0
        self.warned: dict[str, str] = {}
        """Field ``warning`` of an answer with a part that looks like a call and cannot be made; {}
        without one, and before the end of the answer."""

    def read(self, output: RequestOutput) -> None:
        """Read the new part of the answer in ``output``."""
        self.output = output
        was_thinking = self.is_thinking
        events = self.push(output.new_text)
        if was_thinking or self.is_thinking:
            self.num_reasoning_tokens += len(output.new_token_ids)
        if (reason := output.finish_reason) is not None:
            is_cut = reason != "stop" or int(output.output[-1]) not in self._ends
            events = joined([*events, *self.flush(is_cut)])
        self.new = events
        self.events += events
        self.finish = reason

    def push(self, text: str) -> list[Event]:
        """Return the events that are certain after ``text``. O(len(text)), over an answer, and a
        copy of the call or white space in progress."""
        self._rest += text
        events: list[Event] = []
        while (event := next(self._parts)) is not None:
            events.append(event)
        return events if len(events) < 2 else joined(events)

    def flush(self, is_cut: bool = False) -> list[Event]:
        """Return the events held back, after the end of the text. ``is_cut``: the answer was cut
        off, so a call in progress is text."""
        self._is_whole, self._is_cut = True, is_cut
        return self.push("")

    def _read_parts(self) -> Iterator[Event | None]:
        """Yield the events in the order of the text, and None where more of it is needed."""
        if self._thinks and not self.is_thinking:
            while (begin := self._rest.lstrip()) in _OPENING and not self._is_whole:
                yield None
            if begin.startswith(OPEN):  # Reasoning starts only at the beginning of an answer.
                self._rest, self.is_thinking = begin.removeprefix(OPEN), True
        if self.is_thinking:
            yield from self._read_reasoning()
        yield from self._read_text()

    def _read_text(self) -> Iterator[Event | None]:
        """Read the text after the reasoning."""
        while True:
            if self._rest:
                yield TextDelta(self._rest)
                self._rest = ""
            yield None

    def _certain(self, marks: Sequence[str]) -> str:
        """Return the beginning of the rest that cannot be part of one of ``marks``, without white
        space at its end."""
        ends = [len(self._rest) if self._is_whole else begin_of(self._rest, m) for m in marks]
        return self._rest[: min(ends)].rstrip()

    def _read_reasoning(self) -> Iterator[Event | None]:
        """Read up to ``</think>``, without the white space around the reasoning and after it. An
        answer that ends before is all reasoning."""
        while self.is_thinking:
            yield from self._read_thought((CLOSE,))
        while not self._rest.strip():
            yield None
        self._rest = self._rest.lstrip()

    def _read_thought(self, marks: Sequence[str]) -> Iterator[Event | None]:
        """Read up to ``</think>``, or up to the end of the text that cannot be part of one of
        ``marks``."""
        before, close, _ = self._rest.partition(CLOSE)
        yield from self._told(before.rstrip() if close else self._certain(marks))
        if close:
            self._rest, self.is_thinking = self._rest.lstrip().removeprefix(CLOSE), False
        else:
            yield None

    def _told(self, text: str) -> Iterator[Event]:
        """Read ``text``, the beginning of the rest, as reasoning or as text of the answer."""
        self._rest = self._rest[len(text) :]
        if text and not self.is_thinking:
            yield TextDelta(text)
        elif thoughts := text if self._has_thoughts else text.lstrip():
            self._has_thoughts = True
            yield ReasoningDelta(thoughts)
