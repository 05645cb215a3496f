"""Which calls of tools an answer may have, and must have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.server.errors import APIError, quoted
from engine.server.schemas import ChatRequest, NamedTool
from engine.text.answer_forms import AnswerForm


def callable_tools(body: ChatRequest, form: AnswerForm) -> Sequence[Mapping[str, Any]] | None:
    """The tools whose calls are read in an answer; None: what looks like a call is text.

    APIError 400: this model does not call tools, or not as it is asked to.
    """
    if not body.tools:
        if body.tool_choice not in (None, "none", "auto"):
            raise APIError(400, "'tool_choice' needs 'tools': send them.", param="tool_choice")
        return None
    if not form.offers_tools:
        raise APIError(
            400, "This model's chat template shows it no tools: leave 'tools' out.", param="tools"
        )
    if body.tool_choice == "none":
        return None
    if form.calls is None:
        raise APIError(
            400,
            "This model writes calls in a form that is not read here: leave 'tools' out, or send "
            "'tool_choice' 'none' and read them in the text.",
            param="tools",
        )
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if all(tool["function"]["name"] != name for tool in body.tools):
            raise APIError(
                400, f"There is no tool {quoted(name)} among 'tools'.", param="tool_choice"
            )
    return body.tools
