"""Paths of vLLM's and SGLang's clients: tokenization, and facts about the server."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response

from engine.server.api_errors import APIError, PlainJSON
from engine.server.bodies import to_json
from engine.server.chat import render
from engine.server.context import ServingContext
from engine.server.schemas import DetokenizeRequest, TokenizeRequest
from engine.text.tokenizer import EncodeOptions
from hybridcache.command.extras import version as installed_version


async def tokenize(
    context: ServingContext, max_prompt_ids: int, request: Request, body: TokenizeRequest
) -> Response:
    """Return the ids of a text or of a chat, at most ``max_prompt_ids``."""
    context.check_model(body.model)
    answer: dict[str, Any] = {"max_model_len": context.engine.max_model_len}
    tenant = context.tenant_of(request)
    if body.messages:
        prompt, _ = await render(context, body, len(await request.body()), tenant)
        token_ids = prompt.token_ids
        answer["boundaries"] = list(prompt.boundaries)
    else:
        how = EncodeOptions(body.add_special_tokens, namespace=tenant.namespace)
        [token_ids] = await context.encode([body.prompt or ""], how)
    if len(token_ids) > max_prompt_ids:
        raise APIError(
            400,
            f"This makes {len(token_ids)} tokens, more than {max_prompt_ids}: send it in parts, or "
            "raise --max-prompt-ids.",
        )
    answer |= {"count": len(token_ids), "tokens": token_ids}
    content = await context.workers.run(len(token_ids), lambda: to_json(answer))
    return Response(content, media_type="application/json")


async def detokenize(
    context: ServingContext, request: Request, body: DetokenizeRequest
) -> Response:
    """Return the text of token ids."""
    context.check_model(body.model)

    def work() -> str:
        num_ids = context.tokenizer.vocab_size
        if any(not 0 <= token_id < num_ids for token_id in body.tokens):
            raise APIError(400, f"'tokens' must be ids from 0 to {num_ids - 1}.", param="tokens")
        return context.tokenizer.decode(body.tokens, skip_special_tokens=False)

    return PlainJSON({"prompt": await context.workers.run(len(body.tokens), work)})


def add_facts(app: FastAPI, context: ServingContext) -> None:
    """Add the paths with facts about the server."""

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": installed_version()}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return _tokenizer_info(context)


def _tokenizer_info(context: ServingContext) -> dict[str, Any]:
    """Return the properties of the tokenizer that lm-eval and vLLM's clients request."""
    tokenizer, template = context.tokenizer, context.tokenizer.chat_template
    named = {} if template is None else template.special_tokens
    ends = sorted(tokenizer.eos_token_ids)
    end = tokenizer.token_bytes(ends[0]).decode("utf-8", "replace") if ends else None
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": context.engine.max_model_len,
        "bos_token": named.get("bos_token") or None,
        "eos_token": named.get("eos_token") or end,
        "pad_token": named.get("pad_token") or None,
        "unk_token": named.get("unk_token") or None,
        "chat_template": None if template is None else template.source,
    }
