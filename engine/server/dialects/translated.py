"""From the body of a dialect to the one chat request that is answered."""

from __future__ import annotations

import json
from typing import Any

from pydantic import ValidationError

from engine.server.errors import of_validation
from engine.server.schemas import ChatRequest


def chat_request(fields: dict[str, Any]) -> ChatRequest:
    """``fields`` as a chat request, without those that say nothing. APIError 400: what they ask for
    is not served."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatRequest.model_validate(given)
    except ValidationError as error:
        raise of_validation(error) from None


BROKEN = "INVALID_JSON"
"""Where the arguments of a call stand that are no JSON object: Anthropic's own word for it."""


def parsed_arguments(text: str) -> dict[str, Any]:
    """The arguments of a call that a model wrote, whether or not they are JSON."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {BROKEN: text}
