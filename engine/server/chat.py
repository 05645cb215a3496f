"""One chat in any dialect, and POST /v1/chat/completions, OpenAI's dialect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from msgspec import structs
from starlette.responses import Response

from engine.requests.chat_prompt import NO_CHAT, ChatPrompt
from engine.requests.grammar import Grammar, grammar_of_calls, grammar_of_strict_calls, tag
from engine.server.bodies import APIError, event, run
from engine.server.context import Call, Writer, finite, new_id, token_text
from engine.server.schemas import ChatRequest, NamedTool, cuts_of
from engine.text.answers import AnswerForm, AnswerReader, Event, as_message
from engine.text.outputs import RequestOutput, SampledToken


def callable_tools(body: ChatRequest, form: AnswerForm) -> Sequence[Mapping[str, Any]] | None:
    """Return the tools with calls that are read in an answer, or None if calls are treated as text.

    Returns no tools for ``tool_choice`` ``none``: a call that is made anyway is text with a
    warning. Raises APIError 400 if this model does not call tools, or not in the requested way.
    """
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise APIError(400, "'tool_choice' needs 'tools': send them.")
        return None
    if not form.offers_tools:
        raise APIError(400, "The chat template of this model has no tools: omit 'tools'.")
    if body.tool_choice == "none":
        return ()
    if form.calls is None:
        message = "This model's form of calls is not supported: omit 'tools', or read calls in the "
        raise APIError(400, message + "text with 'tool_choice' 'none'.")
    if form.calls.name == "xml":
        try:
            for tool in body.tools:
                tag(tool["function"]["name"])
        except ValueError as error:
            raise APIError(400, f"'tools': {error}") from None
    return body.tools


async def render(call: Call, body: ChatRequest) -> ChatPrompt:
    """Return the prompt of a chat. Raises APIError 400 if the template rejects it."""
    context, tenant = call.context, call.tenant
    template = context.tokenizer.chat_template
    if template is None:
        raise APIError(400, NO_CHAT)
    has_developer = "developer" in template.source

    def work() -> ChatPrompt:
        messages = [message.as_template_input() for message in body.messages]
        for message in messages:
            if message["role"] == "developer" and not has_developer:
                message["role"] = "system"
        return context.history.render(
            messages,
            tenant,
            tools=body.plain_tools or None,
            variables=body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt is not False
            and not body.continue_final_message,
            continues_last=body.continue_final_message,
            namespace=tenant.namespace,
            cuts=cuts_of(body.messages, body.tools),
        )

    try:
        return await run(call.size, work)
    except ValueError as error:
        message = f"The chat template rejects these messages: {error}"
        raise APIError(400, message, param="messages") from error


def _forms(
    body: ChatRequest, form: AnswerForm, format_name: str, *, is_thinking: bool
) -> dict[str, Callable[[], Grammar]]:
    """Return ``Sampling.forms``, with required and strict calls. With tools that may be called, the
    format is that of an answer without calls."""
    forms, tools, choice = body.forms(format_name), body.tools or (), body.tool_choice
    written = "hermes" if form.calls is None else form.calls.name
    calls = partial(grammar_of_calls, tools, form=written, in_parallel=body.parallel_tool_calls)
    if choice not in (None, "none", "auto"):
        name = choice.function.name if isinstance(choice, NamedTool) else "required"
        forms["tool_choice"] = partial(calls, name)
    elif choice != "none" and tools and (text := forms.get(format_name)) is not None:
        forms[format_name] = partial(calls, text=text)
    elif (
        choice != "none"
        and not forms
        and any(tool["function"].get("strict") is True for tool in tools)
    ):
        may_think = form.thinks and not is_thinking
        forms["tools"] = partial(grammar_of_strict_calls, tools, written, may_think=may_think)
    return forms


class ChatWriter(Writer):
    """Generates the answers to one chat, and reads them as events for a dialect to write."""

    FORMAT = "response_format"
    """The dialect's name of the answer's format."""
    _body: ChatRequest

    async def answer(self, is_stream: bool) -> Response:
        """Submit the chat and return the response. Raises APIError if the chat is refused."""
        call, context, body = self._call, self._context, self._body
        form = context.form
        prompt = self._prompt = await render(call, body)
        tools = callable_tools(body, form)
        self.readers = [
            AnswerReader(
                form,
                tools=tools,
                is_thinking=prompt.is_thinking,
                starts_text=prompt.spec.answer_starts_text,
                is_single=not body.parallel_tool_calls,
                end_token_ids=context.tokenizer.eos_token_ids,
            )
            for _ in range(body.n)
        ]
        marks = form.calls.marks if form.calls is not None and tools else ()
        specs = [structs.replace(prompt.spec, call_marks=marks)]
        num_scores = (body.top_logprobs or 0) if body.logprobs else None
        forms = _forms(body, form, self.FORMAT, is_thinking=prompt.is_thinking)
        await self.submit(specs, body.limit, num_scores, forms, prompt.is_thinking)
        return await self.respond(is_stream)

    def written(self) -> dict[str, int]:
        """Return the tokens computed up to the last position that later prompts may share."""
        is_off = self._context.engine.config.prefix_cache == "none"
        shared = 0 if is_off else max(self._prompt.spec.boundaries.positions, default=0)
        return {"cache_write_tokens": max(0, shared - self.outputs[0].cached_len)}

    @property
    def outputs(self) -> list[RequestOutput]:
        """Output of each answer as far as it was read."""
        return [reader.output for reader in self.readers]

    def read(self, index: int, output: RequestOutput) -> None:
        super().read(index, output)
        reader = self.readers[index]
        reader.read(output)
        if reader.finish is not None and not reader.is_over:
            self._context.history.keep(self._prompt, as_message(reader.events), output)
        elif reader.is_over and reader.finish is None:
            self._stream.abort("stop", output.request_id)

    def ended(self) -> None:
        """Also remember the chat with its first answer, for explanations."""
        super().ended()
        if first := self._latest.get(0):
            message = as_message(self.readers[0].events)
            self._context.remember(self.answer_id, self._call, self._body, first, message)


async def chat(call: Call, body: ChatRequest) -> Response:
    """Answer one chat request."""
    return await _ChatWriter(call, body, new_id("chatcmpl")).answer(body.stream)


class _ChatWriter(ChatWriter):
    """Writes OpenAI's chat completions."""

    def __init__(self, call: Call, body: ChatRequest, answer_id: str) -> None:
        super().__init__(call, body, answer_id)
        self.KIND = "chat.completion.chunk" if body.stream else "chat.completion"
        self._num_calls = Counter[int]()
        """Number of calls of each answer that were written."""

    def whole(self) -> dict[str, Any]:
        choices = [
            {"index": index, "message": _message(self.readers[index].events)}
            | self._more(index, output.logprobs, output.token_ids)
            for index, output in enumerate(self.outputs)
        ]
        ids = self._ids("prompt_token_ids", self.outputs[0].prompt_token_ids)
        return self._completion(choices, usage=self._usage(), **ids)

    def write(self, index: int, is_first: bool) -> Iterator[bytes]:
        """Yield one event, after the role of the choice if it is its first."""
        news, ids = self.readers[index], dict[str, Any]()
        empty = {"index": index, "delta": {}, "logprobs": None, "finish_reason": None}
        if is_first:
            if len(self._latest) == 1:
                ids = self._ids("prompt_token_ids", news.output.prompt_token_ids)
            role = {"delta": {"role": "assistant", "content": ""}}
            yield event(self._completion([empty | role]))
        delta, output = _delta(news.new, self._num_calls[index]), news.output
        self._num_calls[index] += len(delta.get("tool_calls", ()))
        more = self._more(index, output.new_logprobs, output.new_token_ids)
        choice = {"index": index, "delta": delta} | more
        if ids or choice != empty:
            yield event(self._completion([choice], **ids))

    def _more(
        self, index: int, scores: Sequence[SampledToken] | None, token_ids: Sequence[int]
    ) -> dict[str, Any]:
        """Return the fields of a choice, or of a part of it, besides its text."""
        answer = self.readers[index]
        told = {"logprobs": self._scores(scores), "finish_reason": answer.finish, **answer.warned}
        return told | self._ids("token_ids", token_ids)

    def _usage(self) -> dict[str, Any]:
        counts = super()._usage()
        counts["prompt_tokens_details"] |= self.written()
        return counts

    def _scores(self, scores: Sequence[SampledToken] | None) -> dict[str, Any] | None:
        """Return one object per token, with its best alternatives, if they are requested."""
        if not self._body.logprobs:
            return None
        tokenizer, num_top = self._context.tokenizer, self._body.top_logprobs or 0

        def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
            return {
                "token": token_text(tokenizer, token_id),
                "logprob": finite(logprob),
                "bytes": list(tokenizer.token_bytes(token_id)),
            }

        content = []
        for score in scores or ():
            rivals = [entry(*pair) for pair in score.top_logprobs[:num_top]]
            content.append({**entry(score.token_id, score.logprob), "top_logprobs": rivals})
        return {"content": content}


def _message(events: Sequence[Event]) -> dict[str, Any]:
    """Return an answer as a message that clients can send back unchanged."""
    delta = _delta(events)
    message = {"role": "assistant", "content": delta.pop("content", ""), "refusal": None, **delta}
    for call in message.get("tool_calls", ()):
        del call["index"]
        if not message["content"]:
            message["content"] = None
    return message


def _delta(events: Sequence[Event], num_calls: int = 0) -> dict[str, Any]:
    """Return ``events`` as one delta of a message that has ``num_calls`` already. O(length)."""
    said = as_message(events)
    delta = {name: said[name] for name in ("reasoning_content", "content") if said[name]}
    if calls := [
        {"index": number, "id": new_id("call", "_"), **call}
        for number, call in enumerate(said["tool_calls"], num_calls)
    ]:
        delta["tool_calls"] = calls
    return delta
