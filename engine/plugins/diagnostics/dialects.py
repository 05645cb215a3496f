"""An explanation as the hosted services write it: both compare requests, and know nothing of what
the cache still had.

Anthropic: ``diagnostics`` of /v1/messages (platform.claude.com, "Cache diagnostics"). OpenAI:
``prompt_cache_diagnostics`` of /v1/responses (developers.openai.com, "Prompt cache diagnostics").
"""

from __future__ import annotations

from typing import Any

from engine.plugins.diagnostics.explain import Change, Explanation, Parting

ANTHROPIC: dict[Change, str] = {
    "model": "model_changed",
    "system": "system_changed",
    "tools": "tools_changed",
    "messages": "messages_changed",
    "variables": "unavailable",
}
"""``unavailable``: another parameter that makes the prompt is the cause."""
OPENAI: dict[Change, str] = {
    "model": "model_changed",
    "system": "input_changed",
    "tools": "tools_changed",
    "messages": "input_changed",
}
EFFORT = ("reasoning_effort", "enable_thinking", "thinking", "thinking_budget")
"""Switches of templates that say how much is thought."""


def for_anthropic(explanation: Explanation | None) -> dict[str, Any] | None:
    """``diagnostics`` of an answer that a comparison was asked for; None: no request differs.
    ``explanation`` None: the earlier message is not known here."""
    if explanation is None:
        return {"cache_miss_reason": {"type": "previous_message_not_found"}}
    parting = explanation.parting
    kind = None if parting is None else ANTHROPIC.get(parting.change)
    if parting is None or kind is None:
        return None
    reason: dict[str, Any] = {"type": kind}
    if kind != "unavailable":
        reason["cache_missed_input_tokens"] = explanation.prompt_len - parting.at
    return {"cache_miss_reason": reason}


def for_openai(explanation: Explanation | None) -> dict[str, Any]:
    """``prompt_cache_diagnostics`` of an answer that a comparison was asked for; None: the earlier
    response is not known here."""
    if explanation is None:
        return {"type": "comparison_response_not_found"}
    parting = explanation.parting
    if parting is None or parting.change in ("answer", "template"):
        return {"type": "cache_hit"}
    reason = _openai_reason(parting)
    if reason is None:
        return {"type": "unavailable"}
    return {
        "type": "cache_miss",
        "reason": reason,
        "cache_missed_tokens": max(explanation.earlier_len - parting.at, 0),
        "comparison_reusable_tokens": explanation.earlier_len,
    }


def _openai_reason(parting: Parting) -> str | None:
    if parting.change == "variables":
        name = (parting.path or "").rpartition(".")[2]
        return "reasoning_effort_changed" if name in EFFORT else None
    if parting.change == "messages" and parting.how == "removed":
        return "context_compacted"
    return OPENAI.get(parting.change)
