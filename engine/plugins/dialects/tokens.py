"""Tokenization, as in vLLM."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, field
from starlette.requests import Request
from starlette.responses import Response

from engine.server.api_errors import APIError
from engine.server.bodies import Body, json_response, to_json
from engine.server.chat import render
from engine.server.context import ServingContext
from engine.server.schemas import (
    MAX_COUNT_OF_IDS,
    ChatRequest,
    Messages,
    TokenId,
)
from engine.text.tokenizer import EncodeOptions


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

    model: str | None = None
    tokens: Annotated[list[TokenId], Meta(max_length=MAX_COUNT_OF_IDS)]


async def tokenize(
    context: ServingContext, request: Request, body: TokenizeRequest, size: int
) -> Response:
    """Return the ids of a text or of a chat, at most ``MAX_COUNT_OF_IDS``."""
    context.check_model(body.model)
    answer: dict[str, Any] = {"max_model_len": context.engine.facts.max_model_len}
    tenant = context.tenant_of(request)
    if body.messages:
        prompt, _ = await render(context, body, size, tenant)
        token_ids = prompt.token_ids
        answer["boundaries"] = list(prompt.spec.boundaries)
    else:
        how = EncodeOptions(body.add_special_tokens, namespace=tenant.namespace)
        [token_ids] = await context.encode([body.prompt or ""], how)
    if len(token_ids) > MAX_COUNT_OF_IDS:
        message = f"This makes {len(token_ids)} tokens, more than {MAX_COUNT_OF_IDS}"
        param = "messages" if body.messages else "prompt"
        raise APIError(400, f"{message}: send it in parts.", param=param)
    answer |= {"count": len(token_ids), "tokens": token_ids}
    content = await context.workers.run(len(token_ids), lambda: to_json(answer))
    return Response(content, media_type="application/json")


async def detokenize(
    context: ServingContext, request: Request, body: DetokenizeRequest, size: int
) -> Response:
    """Return the text of token ids."""
    context.check_model(body.model)

    def work() -> str:
        num_ids = context.tokenizer.vocab_size
        if any(not 0 <= token_id < num_ids for token_id in body.tokens):
            raise APIError(400, f"'tokens' must be ids from 0 to {num_ids - 1}.", param="tokens")
        return context.tokenizer.decode(body.tokens, skip_special_tokens=False)

    return json_response({"prompt": await context.workers.run(len(body.tokens), work)})
