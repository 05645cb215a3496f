"""POST /v1/completions: one or several prompts as text or token ids, with optional echo and
scores."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from typing import Annotated, Any

from msgspec import Meta
from starlette.responses import Response

from engine.async_engine import RequestStream
from engine.requests.request import RequestSpec
from engine.server.access import choice_id, new_id
from engine.server.bodies import DONE, EventStream, as_event, event, unless_gone
from engine.server.context import (
    Call,
    ServingContext,
    finite,
    prompt_id_fields,
    token_id_fields,
    token_text,
    usage,
)
from engine.server.schemas import Count, NumScores, Sampling, TokenId
from engine.text.outputs import RequestOutput, SampledToken
from engine.text.tokenizer import MAX_CONTEXT, EncodeOptions, StreamDecoder


class CompletionRequest(Sampling, kw_only=True):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    """Text, list of texts, list of token ids, or list of such lists."""
    max_tokens: Count = 16
    echo: bool = False
    logprobs: NumScores | None = None
    add_special_tokens: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({*map(type, self.prompt)}) > 1:
            raise ValueError(
                "'prompt' must be a text, a list of texts, a list of token ids or a list of such "
                "lists."
            )
        if not self.max_tokens and not self.echo:
            raise ValueError("'max_tokens' must be at least 1 (got 0); 0 requires 'echo'.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """List of prompts, with one entry per prompt."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)

    @property
    def shows_prompt(self) -> bool:
        """True if the answer contains the prompt."""
        return self.echo or self.return_token_ids


async def complete(call: Call, body: CompletionRequest) -> Response:
    """Answer one completion request."""
    context, answer_id = call.context, new_id("cmpl")
    context.check_number(len(body.prompts) * body.n)
    context.check_limit(body.max_tokens, "max_tokens")
    stream = await _submit(call, body, answer_id)
    num_answers, head = len(stream.answers), context.head(answer_id, "text_completion")
    choices = [_Choice(context, body, index) for index in range(num_answers)]

    async def events() -> AsyncGenerator[bytes, None]:
        """Yield one event per output. Text that was sent is never retracted."""
        last: dict[int, RequestOutput] = {}
        async for index, output in context.outputs(stream, call.record):
            last[index] = output
            work = partial(choices[index].write_new, output, head)
            is_long = choices[index].is_first and body.shows_prompt
            yield await context.workers.run(len(output.prompt_token_ids) if is_long else 0, work)
        if body.includes_usage:
            outputs = [last[index] for index in range(num_answers)]
            yield event({**head, "choices": [], "usage": usage(outputs, outputs[:: body.n])})
        yield DONE

    if body.stream:
        return EventStream(events(), call.cache_headers, as_event, context.keep_alive_s)
    outputs = await unless_gone(call.request.receive, context.finals(stream, call.record))

    def whole() -> dict[str, Any]:
        written = [
            choice.write(output, output.text, output.token_ids, output.logprobs or ())
            for choice, output in zip(choices, outputs, strict=True)
        ]
        return {**head, "choices": written, "usage": usage(outputs, outputs[:: body.n])}

    headers = call.cache_headers()
    return await context.answer(outputs, whole, echoes=body.shows_prompt, headers=headers)


async def _submit(call: Call, body: CompletionRequest, answer_id: str) -> RequestStream:
    """Submit all prompts and choices of ``body``. Raises APIError or RequestError if one is
    refused."""
    context, namespace = call.context, call.tenant.namespace
    how = EncodeOptions(body.add_special_tokens, namespace=namespace)
    prompts = await context.encode(body.prompts, how)
    for prompt in prompts:
        context.check_length(len(prompt), "prompt", min(body.max_tokens, 1))
    scores_prompt = body.echo and (body.logprobs is not None or body.max_tokens == 0)
    limits = [context.answer_limit(len(prompt), body.max_tokens) for prompt in prompts]
    samplings = {
        limit: body.samplings(limit, body.logprobs, context.engine.sampling_defaults)
        for limit in set(limits)
    }
    grammar = await context.grammar_of(body.forms("response_format"))
    choices = (
        (prompt, sampling)
        for prompt, limit in zip(prompts, limits, strict=True)
        for sampling in samplings[limit]
    )
    specs = (
        RequestSpec(
            prompt,
            sampling,
            namespace=namespace,
            prompt_logprobs=(body.logprobs or 0) if scores_prompt else None,
            request_id=choice_id(answer_id, number),
            choice_of=choice_id(answer_id, number - number % body.n) if number % body.n else None,
            grammar=grammar,
            ends_session=body.ends_session,
        )
        for number, (prompt, sampling) in enumerate(choices)
    )
    return await context.submit(specs, answer_id, call.record)


class _Choice:
    """Writes one choice, as a whole or piece by piece."""

    def __init__(self, context: ServingContext, body: CompletionRequest, index: int) -> None:
        self._tokenizer = context.tokenizer
        self._body = body
        self._index = index
        self._skips_special = body.skip_special_tokens is not False
        self._decoder: StreamDecoder | None = None
        """Decoder that gives the offsets of tokens in the text."""
        self._offset = 0
        self.is_first = True
        """True until the first part is written."""

    def write_new(self, output: RequestOutput, head: Mapping[str, Any]) -> bytes:
        """Write the event of the latest output, in an answer that begins with ``head``."""
        piece = self.write(output, output.new_text, output.new_token_ids, output.new_logprobs)
        return event({**head, "choices": [piece]})

    def write(
        self,
        output: RequestOutput,
        text: str,
        token_ids: Sequence[int],
        scores: Sequence[SampledToken | None],
    ) -> dict[str, Any]:
        """Write the next part of an answer, or all of it. The first part has the echoed prompt."""
        told = token_id_fields(self._body, token_ids)
        if self.is_first:
            self.is_first = False
            told |= prompt_id_fields(self._body, output)
            if self._body.logprobs is not None:
                before = () if self._body.echo else output.prompt_token_ids[-MAX_CONTEXT:].tolist()
                self._decoder = self._tokenizer.stream_decoder(self._skips_special, before)
            if self._body.echo:
                prompt = output.prompt_token_ids.tolist()
                text = self._tokenizer.decode(prompt, self._skips_special) + text
                if output.prompt_logprobs is not None:
                    token_ids = (*prompt, *token_ids)
                    scores = (*output.prompt_logprobs, *scores)
        return {
            "index": self._index,
            "text": text,
            "logprobs": self._scores(token_ids, scores),
            "finish_reason": output.finish_reason,
            **told,
        }

    def _scores(
        self, token_ids: Sequence[int], scores: Sequence[SampledToken | None]
    ) -> dict[str, list[Any]] | None:
        """Return the lists of scores for the next tokens, or None if they are not requested. A
        score is None if the token was not predicted (the first of a prompt)."""
        if self._decoder is None:
            return None
        written: dict[str, list[Any]] = {
            name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        }
        for token_id, score in zip(token_ids, scores, strict=False):
            top = None
            if score is not None:
                best = score.top_logprobs[: self._body.logprobs]
                top = {token_text(self._tokenizer, one): finite(number) for one, number in best}
            written["tokens"].append(token_text(self._tokenizer, token_id))
            written["token_logprobs"].append(None if score is None else finite(score.logprob))
            written["top_logprobs"].append(top)
            written["text_offset"].append(self._offset)
            self._offset += len(self._decoder.push(token_id))
        return written
