"""One chat in any dialect, and POST /v1/chat/completions, OpenAI's dialect.

A chat is rendered and submitted (``ask``), and its answers are read as events (``ChatSession``),
which the dialect writes in its own form.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Container, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from engine.async_engine import RequestStream
from engine.requests.grammar import Grammar
from engine.requests.spec import RequestSpec
from engine.server.access import AnswerId, Tenant, new_id
from engine.server.api_errors import APIError, quoted
from engine.server.bodies import DONE, EventStream, as_event, event, unless_gone
from engine.server.context import (
    AskedChat,
    ChatDiagnostics,
    ServingContext,
    cache_details,
    chat_scores,
    prompt_score_fields,
    token_id_fields,
    usage,
)
from engine.server.schemas import Chat, ChatRequest, NamedTool, cuts_of
from engine.text.answers import (
    CLOSE,
    BrokenCall,
    CallArguments,
    CallBegin,
    CallEnd,
    CallForm,
    Event,
    ReasoningDelta,
    ReasoningReader,
    TextDelta,
    as_message,
    joined,
)
from engine.text.chat_prompt import ChatPrompt, Cut, no_chat, render_chat
from engine.text.outputs import RequestOutput, SampledToken
from engine.text.tokenizer import TemplateError

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
    @lru_cache(maxsize=4)
    def of(cls, template: str, call_form: Callable[[str], CallForm | None]) -> AnswerForm:
        """Return the form for the source of a chat template. ``call_form`` returns the reader of
        its calls. O(len(template)) for a new one."""
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
    ) -> None:
        """``tools``: tools with calls that are read, or None to treat calls as text. Without any
        tool, every call is text with a warning. ``is_thinking``: the prompt ends inside
        reasoning."""
        self._reasoning = ReasoningReader(is_thinking) if form.thinks else None
        self._calls = form.calls(tools) if form.calls and tools is not None else None

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


def callable_tools(body: ChatRequest, form: AnswerForm) -> Sequence[Mapping[str, Any]] | None:
    """Return the tools with calls that are read in an answer, or None if calls are treated as text.

    Returns no tools for ``tool_choice`` ``none``: a call that is made anyway is text with a
    warning. Raises APIError 400 if this model does not call tools, or not in the requested way.
    """
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise APIError(400, "'tool_choice' needs 'tools': send them.", param="tool_choice")
        return None
    if not form.offers_tools:
        raise APIError(
            400, "This model's chat template does not support tools: omit 'tools'.", param="tools"
        )
    if body.tool_choice == "none":
        return ()
    if form.calls is None:
        raise APIError(
            400,
            "The form of this model's tool calls is not supported: omit 'tools', or send "
            "'tool_choice' 'none' and read them in the text.",
            param="tools",
        )
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if all(tool["function"]["name"] != name for tool in body.tools):
            raise APIError(
                400, f"There is no tool {quoted(name)} among 'tools'.", param="tool_choice"
            )
    return body.tools


BROKEN = "A call of a tool was left in the text, because "
"""Start of the warning about an answer; the reason follows."""
Finish = Literal["stop", "length", "tool_calls", "abort", "error"]


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """Result of one step of the engine for one answer."""

    index: int
    """Index of the answer within the request."""
    events: list[Event]
    output: RequestOutput
    finish: Finish | None
    """Reason why the answer ended, in its last delta."""
    warning: str | None = None
    """Set in the last delta if part of the text looks like a call that cannot be made."""


async def render(
    context: ServingContext, body: Chat, size: int, tenant: Tenant
) -> tuple[ChatPrompt, Any]:
    """Render the chat of a ``body`` of ``size`` bytes. Returns the prompt and the handle of its
    answer. Raises APIError 400 if the template rejects it."""

    def settled(cut: Cut) -> Cut:
        if cut.content is None or cut.message is None:
            return cut
        part = {"role": body.messages[cut.message].role, "content": cut.content}
        return cut._replace(content=context.chats.kept(part)["content"])

    def work() -> tuple[ChatPrompt, Any]:
        messages = [message.as_template_input() for message in body.messages]
        tools = None if body.tools is None else [_plain(tool) for tool in body.tools] or None
        chat = context.chats.before_render(messages, tools, body.chat_template_kwargs, tenant)
        prompt = render_chat(
            context.tokenizer,
            chat.messages,
            tools=tools,
            add_generation_prompt=body.begins_answer,
            continues_last=body.continue_final_message,
            variables=chat.variables,
            special_in_content=context.special_in_content,
            namespace=tenant.namespace,
            cuts=[settled(cut) for cut in cuts_of(body.messages, body.tools)],
            sampled=chat.sampled,
            keeps_thinking=chat.keeps_thinking,
        )
        return prompt, chat.place

    if context.tokenizer.chat_template is None:
        raise APIError(400, no_chat(context.tokenizer))
    try:
        return await context.workers.run(size, work)
    except TemplateError as error:
        raise APIError(400, f"The chat template rejects these messages: {error}") from error
    except ValueError as error:
        raise APIError(400, str(error), param="messages") from error


def settle_system(context: ServingContext, body: ChatRequest) -> ChatRequest:
    """Change late system messages into user messages if the template supports none there.

    They keep their places, because a prompt that changes at its beginning is not in the cache.
    """
    template = context.tokenizer.chat_template
    if template is None or template.takes_late_system:
        return body
    roles = [message.role for message in body.messages]
    first = next((at for at, role in enumerate(roles) if role != "system"), len(roles))
    for message in body.messages[max(first, 1) :]:
        if message.role == "system":
            message.role = "user"
    return body


def _plain(tool: dict[str, object]) -> dict[str, object]:
    """Return a tool without the fields that are meant for the server, such as ``cache_control`` and
    ``strict``."""
    plain = {name: value for name, value in tool.items() if name != "cache_control"}
    if isinstance(function := plain.get("function"), dict):
        plain["function"] = {name: value for name, value in function.items() if name != "strict"}
    return plain


async def ask(
    context: ServingContext,
    body: ChatRequest,
    size: int,
    tenant: Tenant,
    answer_id: AnswerId,
    prompt_name: str = "messages",
    format_name: str = "response_format",
) -> ChatSession:
    """Submit a chat of ``size`` bytes. An answer ends at the latest with the context.

    ``prompt_name`` and ``format_name`` are the dialect's names of the prompt and of the answer's
    format. Raises APIError or RequestError if the chat is refused.
    """
    context.check_model(body.model)
    context.check_number(body.n)
    template = context.tokenizer.chat_template
    source = "" if template is None else template.source
    form = AnswerForm.of(source, context.parts.call_form)
    tools = None if template is None else callable_tools(body, form)
    prompt, place = await render(context, body, size, tenant)
    context.check_length(len(prompt.token_ids), prompt_name)
    limit = context.answer_limit(len(prompt.token_ids), body.limit)
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    [token_ids] = await context.as_arrays([prompt.token_ids])
    samplings = body.samplings(limit, num_top, context.engine.sampling_defaults)

    def call_grammar() -> Grammar | None:
        written = "hermes" if form.calls is None else form.calls.FORM
        return context.parts.call_grammar(body, written, form.thinks)

    grammar = await context.grammar_of(body, call_grammar, prompt.is_thinking, format_name)

    def diagnose() -> ChatDiagnostics:
        asked = AskedChat(
            answer_id.public,
            np.asarray(token_ids, np.int32),
            context.model_name,
            tenant,
            [message.as_template_input() for message in body.messages],
            body.tools,
            body.chat_template_kwargs,
            size,
            request_id=answer_id.request_id(0),
            compared_with=body.compared_with,
            wants_diagnostics=body.diagnostics is not None,
        )
        return context.chats.diagnose(asked)

    diagnostics = await context.workers.run(size, diagnose)
    specs = (
        RequestSpec(
            token_ids,
            sampling,
            namespace=tenant.namespace,
            boundaries=prompt.boundaries,
            answer_survives=prompt.answer_survives,
            ends_session=body.ends_session,
            answer_starts_text=not body.continue_final_message,
            call_marks=form.calls.MARKS if form.calls is not None and tools else (),
            request_id=answer_id.request_id(choice),
            choice_of=answer_id.request_id(0) if choice else None,
            grammar=grammar,
            prompt_logprobs=body.prompt_logprobs,
        )
        for choice, sampling in enumerate(samplings)
    )
    streams = await context.submit(specs, answer_id)
    readers = [AnswerReader(form, tools=tools, is_thinking=prompt.is_thinking) for _ in streams]
    is_single, ends = not body.parallel_tool_calls, context.tokenizer.eos_token_ids
    readings = [_Reading(each, is_single, ends) for each in readers]
    return ChatSession(context, prompt, streams, readings, diagnostics, place)


@dataclass(frozen=True, slots=True)
class ChatSession:
    """A chat in progress."""

    _context: ServingContext
    prompt: ChatPrompt
    _streams: Sequence[RequestStream]
    _readings: Sequence[_Reading]
    diagnostics: ChatDiagnostics
    _place: Any

    @property
    def num_answers(self) -> int:
        return len(self._streams)

    def num_reasoning_tokens(self, index: int = 0) -> int:
        """Return the number of reasoning tokens so far."""
        return self._readings[index].num_reasoning_tokens

    def written(self, output: RequestOutput) -> dict[str, int]:
        """Return OpenAI's ``cache_write_tokens``: the tokens computed up to the last position that
        later prompts are known to share. ``output`` is one of the first answer."""
        is_off = self._context.engine.config.prefix_cache == "none"
        shared = 0 if is_off else max(self.prompt.boundaries, default=0)
        return {"cache_write_tokens": max(0, shared - output.cached_len)}

    async def news(self) -> AsyncIterator[ChatDelta]:
        """Yield the deltas of all answers until all have ended, or the client has left."""
        unended: RequestOutput | None = None
        """Last output of the first answer, until its end was reported."""
        try:
            async with aclosing(self._context.outputs(self._streams)) as outputs:
                async for index, output in outputs:
                    reading = self._readings[index]
                    events, finish = reading.read(output), reading.finish(output)
                    if index == 0:
                        unended = output
                        await self.diagnostics.see(output, self._context.workers)
                    if reading.is_over and finish is None:
                        self._streams[index].abort("stop")
                    if finish is not None:
                        message = as_message(reading.events)
                        if not reading.is_over:
                            self._context.chats.after_answer(
                                self.prompt, self._place, message, output
                            )
                        if index == 0:
                            self.diagnostics.end(output, message)
                            unended = None
                    warning = reading.warning if finish else None
                    yield ChatDelta(index, events, output, finish, warning)
        finally:
            if unended is not None:
                self.diagnostics.end(unended, as_message(self._readings[0].events))

    async def answers(self) -> list[ChatDelta]:
        """Wait for all answers. Returns the last delta of each, in order, with all of its
        events."""
        ends = {news.index: news async for news in self.news() if news.finish is not None}
        return [
            replace(ends[index], events=joined(reading.events))
            for index, reading in enumerate(self._readings)
        ]


class _Reading:
    """Reads one answer, at most up to the end of its first call if ``is_single``."""

    def __init__(self, reader: AnswerReader, is_single: bool, ends: Container[int]) -> None:
        """``ends``: tokens with which the model ends its answer."""
        self._reader = reader
        self._is_single = is_single
        self._ends = ends
        self._has_calls = False
        self._ends_in_call = False
        """True if the last event that was read is the end of a call."""
        self._is_broken_off = False
        """True if a limit or a stop string ended the answer inside a call."""
        self.warning: str | None = None
        """Reason why the first of the calls that cannot be made is part of the text."""
        self.events: list[Event] = []
        """All events so far."""
        self.is_over = False
        """True if the first call ended and the rest is ignored."""
        self.num_reasoning_tokens = 0

    def read(self, output: RequestOutput) -> list[Event]:
        """Return the events that ``output`` adds."""
        if self.is_over:
            return []
        was_thinking = self._reader.is_thinking
        events = self._reader.push(output.new_text)
        if was_thinking or self._reader.is_thinking:
            self.num_reasoning_tokens += len(output.new_token_ids)
        if output.is_finished:
            is_cut = output.finish_reason != "stop" or int(output.output[-1]) not in self._ends
            rest = self._reader.flush(is_cut)
            self._is_broken_off = is_cut and any(isinstance(one, BrokenCall) for one in rest)
            events = [*events, *rest]
        for one in events:
            if isinstance(one, BrokenCall) and self.warning is None:
                self.warning = f"{BROKEN}{one.why}."
        events = joined(one for one in events if not isinstance(one, BrokenCall))
        self._has_calls = self._has_calls or any(isinstance(one, CallBegin) for one in events)
        if self._is_single:
            ends = (at for at, one in enumerate(events, 1) if isinstance(one, CallEnd))
            end = next(ends, None)
            self.is_over = end is not None
            events = events[:end]
        self.events += events
        if events:
            self._ends_in_call = isinstance(events[-1], CallEnd)
        return events

    def finish(self, output: RequestOutput) -> Finish | None:
        """Return the reason why the answer ended, or None."""
        if output.finish_reason is None:
            return None
        has_stopped = output.finish_reason == "stop" and not self._is_broken_off
        # A call that ends exactly at the limit is complete: the client can run it.
        is_whole = output.finish_reason == "length" and self._ends_in_call
        if self.is_over or (self._has_calls and has_stopped) or is_whole:
            return "tool_calls"
        return output.finish_reason


QUIET_S = 5.0
"""Seconds without an event after which an empty one is sent. It keeps proxies from closing the
stream while a long call is generated."""


async def chat(context: ServingContext, request: Request, body: ChatRequest, size: int) -> Response:
    """Answer one chat request."""
    context.check_limit(body.max_tokens, "max_tokens")
    context.check_limit(body.max_completion_tokens, "max_completion_tokens")
    tenant = context.tenant_of(request, body.cache_salt)
    with context.ids.claimed("chatcmpl", tenant, body.request_id) as answer_id:
        session = await ask(context, body, size, tenant, answer_id)
    diagnostics = session.diagnostics
    writer = _ChatWriter(context, body, session)
    if body.stream:
        return EventStream(writer.events(), diagnostics.headers, as_event, context.pause_s)
    answers = await unless_gone(request.receive, session.answers())
    outputs = [answer.output for answer in answers]
    headers = diagnostics.headers()
    return await context.answer(outputs, lambda: writer.whole(answers), headers=headers)


class _ChatWriter:
    """Writes a chat's answers, as a whole or as events."""

    def __init__(self, context: ServingContext, body: ChatRequest, session: ChatSession) -> None:
        self._context = context
        self._session = session
        self._diagnostics = session.diagnostics
        self._body = body
        self._head = {
            "id": session.diagnostics.answer_id,
            "created": int(time.time()),
            "model": context.model_name,
            "system_fingerprint": context.engine.facts.exactness.fingerprint,
        }

    def whole(self, answers: Sequence[ChatDelta]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": _message(answer.events),
                "logprobs": self._scores(answer.output.logprobs),
                "finish_reason": answer.finish,
                **_warning(answer.warning),
                **token_id_fields(self._body, answer.output, answer.output.token_ids, False),
            }
            for index, answer in enumerate(answers)
        ]
        outputs = [answer.output for answer in answers]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": self._usage(outputs),
            **self._of_prompt(outputs[0]),
            **cache_details(self._body, outputs),
            **self._told(),
        }

    def _of_prompt(self, output: RequestOutput) -> dict[str, Any]:
        """Return the fields about the prompt, which all answers share."""
        ids = token_id_fields(self._body, output, (), True)
        ids.pop("token_ids", None)
        return ids | prompt_score_fields(self._context.tokenizer, self._body, output)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the role of each choice, then one event per output. Text that was sent is never
        retracted."""
        session = self._session
        last: dict[int, RequestOutput] = {}
        deltas = [_Deltas() for _ in range(session.num_answers)]
        sent_s = time.monotonic()
        async for news in session.news():
            is_first = not last
            if is_first:
                for index in range(session.num_answers):
                    yield self._event([_choice(index, {"role": "assistant", "content": ""})])
            last[news.index] = news.output
            more = self._of_prompt(news.output) if is_first else {}
            if self._body.repeats_usage:
                more["usage"] = self._usage(list(last.values()))
            choice = self._delta(deltas[news.index], news)
            if more or choice != _choice(news.index, {}) or sent_s + QUIET_S < time.monotonic():
                sent_s = time.monotonic()
                yield self._event([choice], **more)
        outputs = [last[index] for index in range(session.num_answers)]
        if details := cache_details(self._body, outputs):
            yield self._event([], **details)
        if self._body.includes_usage:
            yield self._event([], usage=self._usage(outputs), **self._told())
        elif told := self._told():
            yield self._event([], **told)
        yield DONE

    def _usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Return the token counts of all answers so far, which have one prompt."""
        counts = usage(outputs, outputs[:1])
        counts["prompt_tokens_details"] |= self._session.written(outputs[0])
        return counts

    def _told(self) -> dict[str, Any]:
        """Return the explanation of cache misses, if it was requested."""
        return self._diagnostics.told() | self._diagnostics.diagnostics()

    def _delta(self, deltas: _Deltas, news: ChatDelta) -> dict[str, Any]:
        scores = self._scores(news.output.new_logprobs)
        choice = _choice(news.index, deltas.write(news.events), scores, news.finish)
        new = news.output.new_token_ids
        choice |= _warning(news.warning)
        return choice | token_id_fields(self._body, news.output, new, False)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return event({**self._head, "object": "chat.completion.chunk", "choices": choices, **more})

    def _scores(self, scores: Sequence[SampledToken] | None) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return chat_scores(self._context.tokenizer, scores or (), self._body.top_logprobs or 0)


def _warning(warning: str | None) -> dict[str, Any]:
    return {} if warning is None else {"warning": warning}


def _choice(
    index: int,
    delta: dict[str, Any],
    scores: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish_reason}


def _message(events: Sequence[Event]) -> dict[str, Any]:
    """Return an answer as a message that clients can send back unchanged."""
    delta = _Deltas().write(events)
    message = {"role": "assistant", "content": delta.pop("content", ""), "refusal": None, **delta}
    for call in message.get("tool_calls", ()):
        del call["index"]
        if not message["content"]:
            message["content"] = None
    return message


class _Deltas:
    """Writes the events of one answer as deltas of its message. Calls are numbered, and named in
    their first delta."""

    def __init__(self) -> None:
        self._num_calls = 0

    def write(self, events: Sequence[Event]) -> dict[str, Any]:
        """Write all of ``events`` as one delta. O(their length)."""
        texts: dict[str, list[str]] = {}
        calls: list[dict[str, Any]] = []
        arguments: list[list[str]] = []
        for one in events:
            match one:
                case ReasoningDelta(text):
                    texts.setdefault("reasoning_content", []).append(text)
                case TextDelta(text):
                    texts.setdefault("content", []).append(text)
                case CallBegin(name):
                    head = {
                        "id": new_id("call", "_"),
                        "type": "function",
                        "function": {"name": name},
                    }
                    calls.append({"index": self._num_calls, **head})
                    arguments.append([])
                    self._num_calls += 1
                case CallArguments(text):
                    if not calls:
                        calls.append({"index": self._num_calls - 1, "function": {}})
                        arguments.append([])
                    arguments[-1].append(text)
        for call, pieces in zip(calls, arguments, strict=True):
            call["function"]["arguments"] = "".join(pieces)
        delta: dict[str, Any] = {name: "".join(pieces) for name, pieces in texts.items()}
        return delta | ({"tool_calls": calls} if calls else {})
