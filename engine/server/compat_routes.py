"""Paths that clients of vLLM and SGLang ask for beside OpenAI's."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request

from engine.server.context import ServingContext
from engine.server.operator import Operator
from hybridcache.lab.extras import version as installed_version


def add_peers_paths(app: FastAPI, front: ServingContext, operator: Operator) -> None:
    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": installed_version()}

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return _tokenizer_info(front)

    # SGLang's benchmark posts, its documentation shows both.
    @app.post("/flush_cache")
    async def flush_cache(request: Request) -> dict[str, bool]:
        operator.check(request)
        await front.engine.reset_prefix_cache()
        return {"reset": True}


def _tokenizer_info(front: ServingContext) -> dict[str, Any]:
    """What lm-eval's remote tokenizer, and vLLM's clients, ask of a tokenizer."""
    tokenizer, template = front.tokenizer, front.tokenizer.chat_template
    named = {} if template is None else template.special_tokens
    ends = sorted(tokenizer.eos_token_ids)
    end = tokenizer.token_bytes(ends[0]).decode("utf-8", "replace") if ends else None
    return {
        "tokenizer_class": type(tokenizer).__name__,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": front.engine.max_model_len,
        "bos_token": named.get("bos_token") or None,
        "eos_token": named.get("eos_token") or end,
        "pad_token": named.get("pad_token") or None,
        "unk_token": named.get("unk_token") or None,
        "chat_template": None if template is None else template.source,
    }
