"""Form in which a model writes tool calls, derived from its chat template."""

from __future__ import annotations

from engine.plugins.tool_calls.hermes import HermesReader
from engine.plugins.tool_calls.qwen_xml import FUNCTION, QwenXMLReader
from engine.text.answers import CALL_OPEN
from engine.text.calls import CallReader


def call_form(template: str) -> type[CallReader] | None:
    """Return the reader of the calls in the source of a chat template, or None without calls in a
    supported form. O(len(template))."""
    if FUNCTION in template:
        return QwenXMLReader
    return HermesReader if CALL_OPEN in template else None
