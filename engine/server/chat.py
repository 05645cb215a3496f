"""POST /v1/chat/completions: a chat rendered by the model's template, with the boundaries that
survive into the next turn."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request, Response

from engine import RequestOutput, RequestSpec
from engine.async_engine import RequestStream
from engine.server import logprobs
from engine.server.errors import APIError, of_failure
from engine.server.front import ServingContext, new_id, usage
from engine.server.schemas import ChatRequest, TokenizeRequest
from engine.server.streaming import DONE, EventStream, event, unless_gone
from engine.text.outputs import SampledToken
from engine.text.templates import ChatPrompt, TemplateError, render_chat


async def chat(front: ServingContext, request: Request, body: ChatRequest) -> Response:
    """Answer one chat request."""
    front.check_model(body.model)
    front.check_number(body.n)
    namespace = front.namespace_of(body.cache_salt)
    prompt = await render(front, body, len(await request.body()), namespace)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    num_top = (body.top_logprobs or 0) if body.logprobs else None
    [token_ids] = await front.as_arrays([prompt.token_ids])
    streams = await front.submit(
        RequestSpec(
            token_ids,
            sampling,
            namespace=namespace,
            boundaries=prompt.boundaries,
            answer_survives=prompt.answer_survives,
        )
        for sampling in body.samplings(limit, num_top, front.engine.sampling_defaults)
    )
    answer = _Answer(front, body)
    if body.stream:
        return EventStream(answer.events(streams))
    outputs = await unless_gone(request, front.finals(streams))
    return await front.answer(outputs, lambda: answer.whole(outputs))


async def render(
    front: ServingContext,
    body: ChatRequest | TokenizeRequest,
    size: int,
    namespace: str | None = None,
) -> ChatPrompt:
    """The chat of a ``body`` of ``size`` bytes as the model reads it. APIError 400: the template
    refuses it."""

    def work() -> ChatPrompt:
        return render_chat(
            front.tokenizer,
            [message.as_template_input() for message in body.messages or ()],
            tools=body.tools,
            add_generation_prompt=body.add_generation_prompt,
            variables=body.chat_template_kwargs,
            special_in_content=front.special_in_content,
            namespace=namespace,
        )

    try:
        return await front.workers.run(size, work)
    except TemplateError as error:
        raise APIError(400, f"The chat template refuses these messages: {error}") from error
    except ValueError as error:
        raise APIError(400, str(error), param="messages") from error


class _Answer:
    """One chat's answer, whole or in events."""

    def __init__(self, front: ServingContext, body: ChatRequest) -> None:
        self._front = front
        self._body = body
        self._head = {
            "id": new_id("chatcmpl"),
            "created": int(time.time()),
            "model": front.model_name,
        }

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": output.text, "refusal": None},
                "logprobs": self._scores(output.logprobs),
                "finish_reason": output.finish_reason,
            }
            for index, output in enumerate(outputs)
        ]
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": usage(outputs, self._body.n),
        }

    async def events(self, streams: Sequence[RequestStream]) -> AsyncIterator[bytes]:
        """The role of each choice, then one event an output. Text that was sent is never taken
        back."""
        for index in range(len(streams)):
            yield self._event([_delta(index, {"role": "assistant", "content": ""})])
        last: dict[int, RequestOutput] = {}
        try:
            async for index, output in self._front.outputs(streams):
                last[index] = output
                delta = {"content": output.new_text} if output.new_text else {}
                scores = self._scores(output.new_logprobs)
                yield self._event([_delta(index, delta, scores, output.finish_reason)])
        except Exception as error:
            yield event(of_failure(error).body())
            return
        if self._body.includes_usage:
            outputs = [last[index] for index in range(len(streams))]
            yield self._event([], usage=usage(outputs, self._body.n))
        yield DONE

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return event({**self._head, "object": "chat.completion.chunk", "choices": choices, **more})

    def _scores(self, scores: Sequence[SampledToken] | None) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return logprobs.for_chat(self._front.tokenizer, scores or (), self._body.top_logprobs or 0)


def _delta(
    index: int,
    delta: dict[str, Any],
    scores: dict[str, Any] | None = None,
    finish_reason: str | None = None,
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": scores, "finish_reason": finish_reason}
