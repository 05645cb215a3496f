"""Conversion of a dialect's body to the chat request that is answered."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from engine.server.api_errors import of_validation
from engine.server.schemas import ChatRequest


def chat_request(fields: dict[str, Any], format_name: str) -> ChatRequest:
    """Return ``fields`` as a chat request, without those that are None.

    Errors in the answer's format use the dialect's ``format_name``. Raises APIError 400 for
    unsupported fields.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatRequest.model_validate(given).with_format_name(format_name)
    except ValidationError as error:
        raise of_validation(error, given) from None
