"""Completions of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from starlette.responses import Response

from engine.errors import Json, JsonObject
from engine.front.server.schemas import CompletionRequest
from engine.front.server.writers import Call, Writer, finite, new_id, token_text
from engine.requests.request import Marks
from engine.text.answers import SampledToken
from engine.text.tokenizer import StreamDecoder


async def complete(call: Call, body: CompletionRequest) -> Response:
    """Answer one completion request."""
    context, namespace = call.context, call.tenant.namespace
    writer = _CompletionWriter(call, body)
    prompts = await context.encode(body.prompts, body.add_special_tokens, namespace)
    scores_prompt = body.echo and (body.logprobs is not None or body.max_tokens == 0)
    marks: Marks = {"prompt_logprobs": (body.logprobs or 0) if scores_prompt else None}
    forms = body.forms("response_format")
    await writer.submit(prompts, marks, body.max_tokens, body.logprobs, forms)
    return await writer.respond(body.stream)


class _CompletionWriter(Writer):
    """Writes completions. The first part of each choice has the echoed prompt."""

    _body: CompletionRequest

    def __init__(self, call: Call, body: CompletionRequest) -> None:
        super().__init__(call, body, new_id("cmpl"), len(body.prompts))
        self._skips_special = body.skip_special_tokens is not False
        self._decoders: dict[int, StreamDecoder] = {}
        """Decoder of each choice, which gives the offsets of tokens in the text."""
        self._offsets = Counter[int]()
        """Length of the text of each choice, as decoded so far."""

    def whole(self) -> JsonObject:
        choices = [
            self._choice(index, True, output.text, output.token_ids, output.logprobs or ())
            for index, output in enumerate(self.outputs)
        ]
        return {**self._fields, "choices": choices, "usage": self._usage()}

    def write(self, index: int, is_first: bool) -> Iterator[bytes]:
        output = self._latest[index]
        news = output.new_text, output.new_token_ids, output.new_logprobs
        yield self._chunk([self._choice(index, is_first, *news)])

    def _choice(
        self,
        index: int,
        is_first: bool,
        text: str,
        token_ids: Sequence[int],
        scores: Sequence[SampledToken | None],
    ) -> JsonObject:
        """Return the next part of a choice, or all of it."""
        output, body, tokenizer = self._latest[index], self._body, self._context.tokenizer
        told = self._ids("token_ids", token_ids)
        if is_first:
            told |= self._ids("prompt_token_ids", output.prompt_token_ids)
            if body.logprobs is not None:
                self._decoders[index] = StreamDecoder(tokenizer, self._skips_special, body.echo)
            if body.echo:
                prompt = output.prompt_token_ids.tolist()
                text = tokenizer.decode(prompt, self._skips_special) + text
                if output.prompt_logprobs is not None:
                    token_ids = (*prompt, *token_ids)
                    scores = (*output.prompt_logprobs, *scores)
        return {
            "index": index,
            "text": text,
            "logprobs": self._scores(index, token_ids, scores),
            "finish_reason": output.finish_reason,
            **told,
        }

    def _scores(
        self, index: int, token_ids: Sequence[int], scores: Sequence[SampledToken | None]
    ) -> dict[str, list[Json]] | None:
        """Return the lists of scores for the next tokens, or None if they are not requested. A
        score is None if the token was not predicted (the first of a prompt)."""
        if self._body.logprobs is None:
            return None
        tokenizer = self._context.tokenizer
        rows = list[tuple[Json, ...]]()
        for token_id, score in zip(token_ids, scores, strict=False):
            top, logprob = None, None if score is None else finite(score.logprob)
            if score is not None:
                best = score.top_logprobs[: self._body.logprobs]
                top = {token_text(tokenizer, one): finite(number) for one, number in best}
            rows.append((token_text(tokenizer, token_id), logprob, top, self._offsets[index]))
            self._offsets[index] += len(self._decoders[index].push(token_id))
        names = "tokens", "token_logprobs", "top_logprobs", "text_offset"
        return {name: [row[at] for row in rows] for at, name in enumerate(names)}
