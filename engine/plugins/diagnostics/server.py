"""Path that explains the cache misses of an answer to the operator."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response

from engine.plugins.diagnostics.explanations import Explanations
from engine.server.access import Operator
from engine.server.api_errors import APIError, quoted
from engine.server.bodies import json_response
from engine.server.context import ServingContext


def _why_unknown(unknown: Sequence[str], has_forgotten: bool) -> str:
    """Return the reason why there is no explanation; ids in ``unknown`` are not stored."""
    if not unknown:
        return "The two answers have different salts (cache_salt): they share no cache entries."
    if unknown[0].startswith("cmpl"):
        return "Only chats are explained, not text completions: send the 'id' of a chat's answer."
    message = (
        f"No chat answer with the id {quoted(unknown[0])} is stored: send the 'id' of an "
        "answer. The request log also shows it."
    )
    if has_forgotten:
        message += " Older ones were evicted: raise --explain-mib to store more."
    return message


async def explanation(
    context: ServingContext, explanations: Explanations, operator: Operator, request: Request
) -> Response:
    """Explain the cache misses of an answer to the operator."""
    operator.check(request)
    if context.engine.config.prefix_cache == "none":
        raise APIError(404, "Nothing to explain: the prefix cache is off (--prefix-cache).")
    answer_id = request.path_params["answer_id"]
    compared_with = request.query_params.get("compared_with")
    told = explanations.look_up(answer_id, compared_with)
    if told is None:
        names = [answer_id] if compared_with is None else [answer_id, compared_with]
        unknown = [name for name in names if explanations.memory.find(name) is None]
        raise APIError(404, _why_unknown(unknown, explanations.memory.has_forgotten))
    return json_response(told)
