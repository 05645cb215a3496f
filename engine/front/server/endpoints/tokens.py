"""Tokenization, as in vLLM."""

from __future__ import annotations

from functools import partial

from msgspec import field
from starlette.responses import Response

from engine.errors import JsonObject
from engine.front.server.bodies import APIError, Body, json_response, run
from engine.front.server.endpoints.chat import render
from engine.front.server.schemas import ChatRequest, Messages, TokenId
from engine.front.server.writers import Call


class TokenizeRequest(ChatRequest, kw_only=True):
    """POST /tokenize: a text, or a chat as /v1/chat/completions would render it."""

    prompt: str | None = None
    add_special_tokens: bool = True
    messages: Messages = field(default_factory=list)

    def __post_init__(self) -> None:
        if (self.prompt is None) == (not self.messages):
            raise ValueError("Send either 'prompt' or 'messages'.")
        super().__post_init__()


class DetokenizeRequest(Body, kw_only=True):
    """POST /detokenize."""

    tokens: list[TokenId]


async def tokenize(call: Call, body: TokenizeRequest) -> Response:
    """Return the ids of a text or of a chat."""
    context = call.context
    answer: JsonObject = {"max_model_len": context.engine.facts.max_model_len}
    if body.messages:
        prompt = await run(call.size, partial(render, call, body))
        tokens, answer["boundaries"] = prompt.tokens, list(prompt.marks["boundaries"].positions)
    else:
        [tokens] = await context.encode(
            [body.prompt or ""], body.add_special_tokens, call.tenant.namespace
        )
    return await run(
        len(tokens),
        lambda: json_response(answer | {"count": len(tokens), "tokens": tokens.tolist()}),
    )


async def detokenize(call: Call, body: DetokenizeRequest) -> Response:
    """Return the text of token ids."""
    context = call.context

    def work() -> str:
        num_ids = context.tokenizer.vocab_size
        if any(not 0 <= token_id < num_ids for token_id in body.tokens):
            raise APIError(400, f"'tokens' must be ids of the tokenizer, from 0 to {num_ids - 1}.")
        return context.tokenizer.decode(body.tokens, skip_special_tokens=False)

    return json_response({"prompt": await run(len(body.tokens), work)})
