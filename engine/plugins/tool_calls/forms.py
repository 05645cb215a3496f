"""The form in which a model writes tool calls, by its chat template."""

from __future__ import annotations

from engine.plugins.tool_calls.calls import CallReader
from engine.plugins.tool_calls.hermes import HermesReader
from engine.plugins.tool_calls.qwen_xml import FUNCTION, QwenXMLReader
from engine.text.answer_events import CALL_OPEN


def call_form(template: str) -> type[CallReader] | None:
    """Return the reader of the calls that the source of a chat template asks for; None if it asks
    for none, or for a form that is not known here. O(len(template))."""
    if FUNCTION in template:
        return QwenXMLReader
    return HermesReader if CALL_OPEN in template else None
