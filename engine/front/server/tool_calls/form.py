"""Forms in which models write calls of tools: the common reader and grammar, and their registry.

A form is a subclass of ``CallForm`` in a file of this folder. It is found in a chat template by its
signs. ``docs/how-to/tool-calls.md`` adds one.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any, ClassVar, NamedTuple

from msgspec import structs

from engine.errors import JsonObject
from engine.front.server.bodies import APIError
from engine.front.server.schemas import ChatRequest, Choice, NamedTool
from engine.front.server.tool_calls.parameters import Parameters
from engine.text.answers import MAX_NAME, AnswerReader, Event, RequestOutput, ToolCall, begin_of
from engine.text.grammar import Grammar, GrammarError, quoted
from engine.text.tokenizer import CLOSE, OPEN, ChatTemplate, any_of
from hybridcache.geometry.families import defined

MAX_RETRIES = 8
"""Maximum number of broken calls of an answer that are searched for calls again, so that an answer
is read in linear time."""
GROWTH = 1.125
"""Factor by which a call must grow before it is parsed again, after as many further times, so that
it is read in linear time."""
BROKEN = "A call of a tool was left in the text, because "
THOUGHT = "A call of a tool was left in the reasoning, because "
"""Starts of warnings about an answer; the reason follows."""
UNNAMED = "The argument {!r} of a call is not in the schema of the tool"
BROKEN_OFF = "it breaks off"
STRICT = "the schema of a strict tool is not enforced there"
LEFT_OVER = "Text next to a call of a tool, inside of its marks, is part of the answer"
ANY_OBJECT = {"type": "object"}
ANY = "/(?s:.*)/"
"""Any text, as an expression of Lark."""
Function = Mapping[str, Any]
"""An offered tool: its name, the schema of its parameters, and whether it is strict."""


class ParsedCall(NamedTuple):
    """A call that was read."""

    name: str
    arguments: JsonObject
    doubt: str | None = None
    """Warning about the arguments."""


class Calls(NamedTuple):
    """Calls that were read at one mark."""

    calls: Sequence[ParsedCall]
    end: int
    """End of the calls in the text."""


class CallForm(ABC):
    """Calls of tools in the answers to one chat, between the marks of a form."""

    NAME: ClassVar[str]
    """Name on the start screen and in the table of families."""
    SIGNS: ClassVar[tuple[str, ...]]
    """Texts of chat templates; one of them shows that the model writes this form."""
    MARKS: ClassVar[tuple[str, ...]]
    """Texts with which calls begin."""
    ENDS: ClassVar[tuple[str, ...]]
    """Texts with which they may end; behind the first mark, only the first of them."""
    BEGIN: ClassVar[str]
    BETWEEN: ClassVar[str]
    END: ClassVar[str]
    """Texts in front of the first call, between two calls, and behind the last one, as templates
    write them. ``BEGIN`` starts with the first mark."""
    CLOSE: ClassVar[str] = ""
    """Mark that follows the calls that ``parse`` returns, and is not part of the answer."""
    LINES: ClassVar[tuple[str, ...]] = ()
    """Rules of Lark that the rules of all calls share."""

    def __init__(
        self,
        tools: Sequence[Mapping[str, Function]],
        choice: Choice | NamedTool | None = None,
        is_single: bool = False,
    ) -> None:
        """``tools``: as in OpenAI's API; without any, every call is text with a warning.
        ``choice``: its ``tool_choice``. ``is_single``: the first call ends the answer. Raises
        GrammarError if the name of a tool cannot be written."""
        self._offered: list[Function] = [tool["function"] for tool in tools]
        self.functions = {one["name"]: Parameters(one) for one in self._offered}
        self.marks = self.MARKS if tools else ()
        """Texts with which a call begins; () if every call is text."""
        self.is_single, self._choice = is_single, choice
        self.is_forced = choice not in (None, "none", "auto")
        """True if the answer must be calls."""

    @abstractmethod
    def parse(self, text: str, is_whole: bool = False, is_cut: bool = False) -> Calls | str | None:
        """Return the calls at the mark with which ``text`` begins, the reason why they cannot be
        made, or None if they are not complete. ``is_whole``: no text follows; ``is_cut``: because a
        limit or a stop string ended the answer. Calls that were returned do not depend on the text
        after them."""

    @abstractmethod
    def rules(self, name: str, tool: str, parameters: Parameters) -> list[str]:
        """Return the rule ``name`` of a call of ``tool``, without ``BEGIN`` and ``END``, and its
        parts. Raises GrammarError."""

    @classmethod
    def prepared(cls, messages: list[JsonObject], source: str) -> list[JsonObject]:
        """Return a chat as the template ``source`` of this form has to get it. Arguments of calls
        are objects, or their JSON."""
        return messages

    def after(self, mark: str) -> str:
        """Return an expression of Lark for calls behind ``mark``, in an answer that is free except
        for calls."""
        rest = self.BEGIN.removeprefix(mark)
        between = f"({_literal(self.BETWEEN)} function)*"
        return f"{_literal(rest)} function {between} {_literal(self.END)}"

    def refused(self, parsed: Calls | str) -> str | None:
        """Return the reason why ``parsed`` are not calls of offered tools, or None if they are."""
        if isinstance(parsed, str):
            return parsed
        names = [one.name for one in parsed.calls if one.name not in self.functions]
        if names and not self.functions:
            return "'tool_choice' is 'none'"
        return f"no tool {names[0][:MAX_NAME]!r} was offered" if names else None

    def reader(self, **options: Any) -> AnswerReader:
        """Return a reader of an answer with calls, with the ``options`` of ``AnswerReader``."""
        return CallReader(self, options)

    def restrict(
        self, forms: dict[str, Callable[[], Grammar]], format_name: str, may_think: bool
    ) -> None:
        """Add required or strict calls to the requested forms of an answer: parameter of the body
        -> function that makes its grammar. The form ``format_name`` is then that of an answer
        without calls. ``may_think``: the answer may begin with reasoning."""
        functions, choice = self._offered, self._choice
        if self.is_forced:
            name = choice.function.name if isinstance(choice, NamedTool) else None
            forms["tool_choice"] = partial(self.grammar, name)
        elif functions and (text := forms.get(format_name)) is not None:
            forms[format_name] = partial(self.grammar, text=text)
        elif not forms and any(function.get("strict") is True for function in functions):
            forms["tools"] = partial(self.free_grammar, may_think)

    def grammar(
        self, name: str | None = None, text: Callable[[], Grammar] | None = None
    ) -> Grammar:
        """Return the grammar of an answer that must call a tool, that of this ``name`` if given, or
        must be a ``text`` of this grammar in Lark.

        With ``text``, arguments are any object unless the tool is ``strict``. Limits of other tools
        are dropped if they cannot be enforced. Raises GrammarError if no tool has this name, or the
        schema of a strict one cannot be enforced.
        """
        functions = self._offered if text is None else self._only_strict()
        wanted = [f for f in functions if name in (None, f["name"])]
        if not wanted:
            names = ", ".join(function["name"] for function in self._offered)
            raise GrammarError(f"{name!r} is none of the tools: {names}.")
        is_one = self.is_single or name is not None
        more = "" if is_one else f"({_literal(self.BETWEEN)} function)*"
        start = f"start: {_literal(self.BEGIN)} function {more} {_literal(self.END)}"
        if text is not None:
            start += "\n" + text().text.replace("start:", "| ", 1)
        loosely = [f for f in self._only_strict() if name in (None, f["name"])]
        looser = None
        if wanted != loosely:
            looser = Grammar("lark", "\n".join([start, *self._rules(loosely)]))
        try:
            return Grammar("lark", "\n".join([start, *self._rules(wanted)]), looser=looser)
        except GrammarError:
            if looser is None:
                raise
            return looser

    def free_grammar(self, may_think: bool = False) -> Grammar:
        """Return the grammar of an answer that is free except for calls.

        Each call names a tool and has arguments that match its schema, or any object if the tool is
        not ``strict``. ``may_think``: the answer may begin with reasoning. Raises GrammarError if
        the schema of a strict tool cannot be used.
        """

        def free(rule: str, expression: str) -> list[str]:
            """Return the rules of text with calls, and reasoning outside of it."""
            texts, lines = rule.upper(), list[str]()
            kinds = [texts]
            for number, mark in enumerate(self.MARKS):
                kinds.append(f"{rule}_{number} {self.after(mark)} text")
                lines.append(f"{rule}_{number}[lazy]: {texts} {quoted(mark)}")
            return [f"{texts}: {expression}", f"{rule}: {' | '.join(kinds)}", *lines]

        lines = ["start: text", *free("text", ANY), *self._rules(self._only_strict())]
        if may_think:
            lines[0] = "start: first | thought text"
            lines += free("first", rf"{ANY} & ~/\s*{OPEN}(?s:.*)/")
            lines += ["thought[lazy]: THOUGHT", rf"THOUGHT: /\s*{OPEN}(?s:.*)<\/think>/"]
        return Grammar("lark", "\n".join(lines))

    def _only_strict(self) -> list[Function]:
        """Return the functions; those that are not strict take any object."""
        return [
            f if f.get("strict") is True else {"name": f["name"], "parameters": ANY_OBJECT}
            for f in self._offered
        ]

    def _rules(self, functions: Sequence[Function]) -> list[str]:
        """Return the rules of calls, with comments that errors of their compilation quote. Raises
        GrammarError with the name of the tool."""
        rules = [f"call_{number}" for number in range(len(functions))]
        lines = [*self.LINES, f"function: {' | '.join(rules)}"]
        for rule, function in zip(rules, functions, strict=True):
            tool = f"tool {function['name']!r}"
            try:
                made = self.rules(rule, function["name"], Parameters(function))
            except GrammarError as error:
                raise GrammarError(f"{tool}: {error}") from None
            lines += [f"{line} // {tool}" for line in made]
        return lines


def _literal(text: str) -> str:
    """Return ``text`` as an expression of Lark, which has no empty strings."""
    return quoted(text) if text else ""


class CallReader(AnswerReader):
    """Reader of an answer with calls."""

    def __init__(self, form: CallForm, options: Mapping[str, Any]) -> None:
        """``options``: those of ``AnswerReader``."""
        super().__init__(**options)
        self._form = form
        self.warning: str | None = None
        """Sentence about the first call that cannot be made, or is doubtful."""
        self._left: str | None = None
        """Warning of the last whole call in the reasoning, for an answer that makes none."""
        self._is_broken_off = False
        """True if a limit or a stop string ended the answer inside a call."""

    def read(self, output: RequestOutput) -> None:
        reason = output.finish_reason
        if self.is_over:  # How much was generated since depends on the time of the abort.
            self.output = structs.replace(
                self.output, new_token_ids=(), new_text="", new_logprobs=(), finish_reason=reason
            )
            self.new, self.finish = [], reason
        else:
            super().read(output)
        if self._form.is_single:
            ends = (at for at, one in enumerate(self.new, 1) if isinstance(one, ToolCall))
            if (end := next(ends, None)) is not None:
                self.is_over = True
                self.events = self.events[: len(self.events) - len(self.new) + end]
                self.new = self.new[:end]
        if reason is not None and any(isinstance(one, ToolCall) for one in self.events):
            has_stopped = reason == "stop" and not self._is_broken_off
            # A call that ends exactly at the limit is complete: the client can run it.
            is_whole = reason == "length" and isinstance(self.events[-1], ToolCall)
            if self.is_over or has_stopped or is_whole:
                self.finish = "tool_calls"
        if reason is not None and self.warning is not None:
            self.warned = {"warning": f"{self.warning}."}

    def _warn(self, why: str | None) -> None:
        self.warning = self.warning or why

    def _ends_in_mark(self) -> bool:
        """Return True if the answer was cut off inside of a mark. One character of it counts only
        in an answer that must be calls: others may end with a sign such as ``<``."""
        least = 1 if self._form.is_forced else 2
        ends = (len(self._rest) - begin_of(self._rest, mark) for mark in self._form.MARKS)
        return self._is_cut and max(ends) >= least

    def _made(self, call: ParsedCall) -> ToolCall:
        others = self._form.functions[call.name].others(call.arguments)
        if call.doubt or others:
            self._warn(call.doubt or UNNAMED.format(others[0][:MAX_NAME]))
        return ToolCall(call.name, json.dumps(call.arguments, ensure_ascii=False))

    def _read_reasoning(self) -> Iterator[Event | None]:
        """Read up to ``</think>``. Calls are part of the reasoning, unless the answer ends behind
        them: then they are made. There is a warning of those that are not, if no call follows."""
        num_retries, left = MAX_RETRIES, None
        while self.is_thinking:
            marks = self._form.MARKS if num_retries else ()
            found = any_of((CLOSE, *marks)).search(self._rest)
            if found is None or found[0] == CLOSE:
                if found is None and self._is_whole:
                    self._warn(THOUGHT + BROKEN_OFF if self._ends_in_mark() else left)
                yield from self._read_thought((CLOSE, *marks))
                continue
            yield from self._told(text := self._rest[: found.start()].rstrip())
            at, end = found.start() - len(text), found.end() - len(text)
            calls, why = list[ParsedCall](), None
            while why is None:
                parsed, _ = yield from self._parse_call(at, end, CLOSE)
                why = self._form.refused(parsed)
                if isinstance(parsed, str) or why is not None:
                    num_retries -= 1
                    break
                calls += parsed.calls
                at = end = yield from self._behind(at + parsed.end)
                if at == len(self._rest):
                    is_strict = any(self._form.functions[one.name].is_strict for one in calls)
                    end_why = f"{BROKEN_OFF} behind it" if self._is_cut else None
                    why = STRICT if is_strict else end_why
                    break
                if (mark := any_of(marks).match(self._rest, at)) is None:
                    why = "more reasoning or an answer follows it"
                else:
                    end = mark.end()
            if why is None:
                yield from map(self._made, calls)
                self._rest, self.is_thinking, self._left, left = "", False, None, None
                continue
            left = THOUGHT + why
            # A part of a call that an answer follows is only a word about calls.
            self._left = left if calls or isinstance(parsed, Calls) else self._left
            yield from self._told(self._rest[:end].rstrip())
        while not self._rest.strip():
            if self._is_whole:
                self._warn(left)
            yield None
        self._rest = self._rest.lstrip()

    def _behind(self, at: int) -> Generator[None, None, int]:
        """Return the position of the text behind a call in reasoning that ends ``at``: the end of
        the rest if the answer has no more text. Yields None where more is needed."""
        close, marks = self._form.CLOSE, (CLOSE, *self._form.MARKS)
        while True:
            text = self._rest[at:].lstrip()
            after = text.removeprefix(close).lstrip()
            is_over = not after.removeprefix(CLOSE).strip()
            is_open = is_over or any(one != after and one.startswith(after) for one in marks)
            if self._is_whole or not (is_open or close.startswith(text)):
                return len(self._rest) - (0 if is_over else len(after))
            yield None

    def _read_text(self) -> Iterator[Event | None]:
        """Read text and calls. White space around a call is not text."""
        marks, close = self._form.MARKS, self._form.CLOSE
        signs = (close, *marks) if close else marks
        begins, breaks = any_of(marks), any_of(signs)
        beginnings = {one[:end] for one in signs for end in range(len(one))}
        num_retries, has_calls = MAX_RETRIES, False
        while True:
            found = begins.search(self._rest)
            if found is None and self._is_whole and self._ends_in_mark():
                self._warn(f"{BROKEN}{BROKEN_OFF}")
                self._is_broken_off = True
            text = self._rest[: found.start()].rstrip() if found else self._certain(signs)
            if has_calls and close and close in text:
                self._warn(LEFT_OVER)
            yield from self._told(text)
            if found is None:
                if self._is_whole and not has_calls:
                    self._warn(self._left)
                    yield from self._told(self._rest)
                yield None
                continue
            start = found.start() - len(text)
            parsed, end = yield from self._parse_call(start, found.end() - len(text))
            why = self._form.refused(parsed)
            if isinstance(parsed, Calls) and why is None:
                has_calls = True
                yield from map(self._made, parsed.calls)
                self._rest = self._rest[start + parsed.end :]
                while (behind := self._rest.lstrip()) in beginnings and not self._is_whole:
                    yield None
                is_part = self._is_cut and close.startswith(behind)
                self._rest = "" if is_part else behind.removeprefix(close)
                is_left = close and behind and self._rest == behind and found[0] == marks[0]
                if is_left and not begins.match(behind):
                    self._warn(LEFT_OVER)
                continue
            self._warn(f"{BROKEN}{why}")
            self._is_broken_off = self._is_cut
            # It is text up to the next mark.
            mark = breaks.search(self._rest, start + 1, end) if num_retries else None
            if mark is not None:
                num_retries -= 1
                end = mark.end() if mark.group() == close else mark.start()
            yield from self._told(self._rest[:end].rstrip())

    def _parse_call(
        self, start: int, at: int, stop: str | None = None
    ) -> Generator[None, None, tuple[Calls | str, int]]:
        """Return the calls at ``start`` of the rest, or the reason why there is none, and the end
        of the text that they were read from. Their mark ends ``at``; a mark ``stop`` ends the text.
        Yields None where more is needed."""
        form, tried, num_retries = self._form, 0, MAX_RETRIES
        is_first = self._rest.startswith(form.MARKS[0], start)
        marks = *form.ENDS[: 1 if is_first else None], *form.MARKS, *([stop] if stop else ())
        ends, longest = any_of(marks), max(map(len, marks))
        while True:
            end = ends.search(self._rest, at)
            if end is not None and end[0] != stop:
                at = end.end()
                has_grown = at - start >= GROWTH * tried
                if has_grown or num_retries:
                    tried, num_retries = at - start, num_retries - (not has_grown)
                    parsed = form.parse(self._rest[start:at])
                    if parsed is not None:
                        return parsed, at
            elif end is not None or self._is_whole:
                until = len(self._rest) if end is None else end.start()
                is_cut = self._is_cut or end is not None
                parsed = form.parse(self._rest[start:until], True, is_cut)
                # The text of a cut call is not malformed, as far as is known.
                if parsed is None or (end is None and self._is_cut and isinstance(parsed, str)):
                    parsed = BROKEN_OFF
                return parsed, until
            else:
                at = max(at, len(self._rest) - longest)
                yield None


# --- Registry -------------------------------------------------------------------------------------


@cache
def forms() -> dict[str, type[CallForm]]:
    """Map the ``NAME`` of each form in this folder to its class."""
    return {name: form for form, name in defined(__package__, "NAME")}


@lru_cache(maxsize=64)
def form_of(source: str) -> type[CallForm] | None:
    """Return the form of a chat template, or None if no form has a sign in it. Of several, the one
    with most marks is taken, since the marks of another form may be part of its own."""
    fitting = [form for form in forms().values() if any(sign in source for sign in form.SIGNS)]
    return max(fitting, key=lambda form: len(form.MARKS), default=None)


def words_of(template: ChatTemplate) -> str:
    """Return the name of a template's form for the start screen, or why there is none."""
    if "tools" not in template.source:
        return "none: the chat template has no tools"
    form = form_of(template.source)
    return "not supported: the chat template has no known form" if form is None else form.NAME


def prepared(messages: Sequence[JsonObject], template: ChatTemplate) -> list[JsonObject]:
    """Return a chat as its template has to get it; see ``CallForm.prepared``."""
    form = form_of(template.source)
    return [*messages] if form is None else form.prepared([*messages], template.source)


def tool_calls(body: ChatRequest, template: ChatTemplate) -> CallForm | None:
    """Return the calls in the answers to a chat with tools, or None if they are text. Raises
    APIError 400 if this model does not call tools."""
    choice, source = body.tool_choice, template.source
    if "tools" not in source:
        raise APIError(400, "The chat template of this model has no tools: omit 'tools'.")
    # The last mark of the first form is in no template of the second.
    form = form_of(source)
    if form is None:
        if choice == "none":
            return None
        message = "This model's form of calls is not supported: omit 'tools', or read calls in the "
        raise APIError(400, message + "text with 'tool_choice' 'none'.")
    try:
        return form(
            () if choice == "none" else body.tools or (), choice, not body.parallel_tool_calls
        )
    except ValueError as error:
        raise APIError(400, f"'tools': {error}") from None
