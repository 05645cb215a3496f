"""Habits of clients that change prompts, read alike by the server and by readers of traces.

The table in docs/reference/http.md names the clients.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

BILLING = re.compile(
    r"^[ \t]*x-anthropic-billing-header:"
    r"(?:(?:[ \t]*\w+=[^;\s]*(?:;|(?=\s)|\Z))+[ \t]*(?:\r?\n)?|[^\n]*\n?)",
    re.MULTILINE,
)
"""Line of a system message that Claude Code writes for Anthropic's servers. It differs in every
request, so that no request would find a cached prefix. Gateways write other text behind it."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "reasoning_text")
"""Names of the text of a message's thoughts: vLLM's former name, the present one of vLLM and
OpenRouter, Ollama's, and Copilot's."""
DETAILS = "reasoning_details"
"""OpenRouter's list of the parts of thoughts."""
THOUGHT_PARTS = ("thinking", "reasoning", "redacted_thinking")
"""Types of the parts of a content, or of the items of a response, that are thoughts."""
LENGTHS = ("completion_tokens", "output_tokens", "eval_count")
"""Names of the number of tokens of an answer in ``usage``, or in the whole answer (Ollama)."""


def without_billing(system: str) -> str:
    r"""Return a system text without headers that change in each request. O(its length).

    >>> without_billing("x-anthropic-billing-header: cc_version=2; cch=1f;\nBe brief.")
    'Be brief.'
    >>> without_billing("x-anthropic-billing-header: cc_version=2; cch=1f;Be brief.")
    'Be brief.'
    """
    return BILLING.sub("", system) if "x-anthropic-billing-header:" in system else system


def thoughts_of(message: Mapping[str, object]) -> str:
    """Return the thoughts of a message, of a part of its content, or of an item of a response.

    They have many names. The text is empty if they are omitted, with or without a signature.

    >>> thoughts_of({"content": "8", "reasoning": "5 + 3"})
    '5 + 3'
    >>> thoughts_of({"type": "thinking", "thinking": "", "signature": "9f"})
    ''
    """
    for name in THOUGHTS:
        if found := _joined(message.get(name)):
            return found
    if message.get("type") in THOUGHT_PARTS:
        names = "text", "content", "summary"
        return next((found for name in names if (found := _joined(message.get(name)))), "")
    return _joined(message.get(DETAILS))


def _joined(value: object) -> str:
    """Return a text, or the texts of a list of parts with line breaks between them."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else []
    texts = [one.get("text") or one.get("summary") for one in parts if isinstance(one, Mapping)]
    return "\n".join(text for text in texts if isinstance(text, str))


def has_thoughts(message: Mapping[str, object]) -> bool:
    """Return True if a message, or a part of its content, has thoughts or an omission of them."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    kinds = {part.get("type") for part in parts if isinstance(part, Mapping)}
    return bool(kinds & {*THOUGHT_PARTS} or message.get(DETAILS) or thoughts_of(message))


def length_of(usage: Mapping[str, object]) -> tuple[int, int]:
    """Return the tokens of an answer, and those of its thoughts, by the ``usage`` of any API. 0 for
    an unknown number. Raises ValueError if a number is not a count.

    >>> length_of({"output_tokens": 420, "output_tokens_details": {"reasoning_tokens": 400}})
    (420, 400)
    """
    details = [usage, *(usage.get(f"{name}_details") for name in LENGTHS)]
    kinds = "reasoning_tokens", "thinking_tokens"
    thoughts = [d.get(kind) for d in details if isinstance(d, Mapping) for kind in kinds]
    return _count([usage.get(name) for name in LENGTHS]), _count(thoughts)


def _count(values: Sequence[object]) -> int:
    found = next((one for one in values if one is not None), 0)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ValueError(f"usage has {found!r} in place of a number of tokens")
    return found


RENDERED = ("tool_use", "tool_result", "function_call", "function_call_output")
"""Types of blocks that chat templates write."""


def line_of(block: Mapping[str, object]) -> str | None:
    """Return the text of a block of history that no chat template writes. None for other blocks.

    Such a block is a refusal, a found document, or a tool that the server of an earlier answer ran.

    >>> line_of({"type": "server_tool_use", "name": "web_search", "input": {"query": "rain"}})
    '[web_search was called with {"query": "rain"}.]'
    """
    kind = str(block.get("type"))
    if kind == "refusal":
        return str(block.get("refusal") or "")
    if kind == "tool_reference":
        return f"[The tool {block.get('tool_name')} was found.]"
    if kind == "search_result":
        heads = (block.get("title"), block.get("source"), _joined(block.get("content")))
        return "\n".join(str(one) for one in heads if one)
    if kind == "compaction":
        return _joined(block.get("content"))
    if kind in RENDERED:
        return None
    if kind.endswith("_tool_result"):
        content = block.get("content")
        return f"[Result: {_joined(content) or json.dumps(_shown(content))}]"
    if kind.endswith(("_tool_use", "_call")):
        own = ("type", "id", "status", "name", "cache_control", "caller")
        given = block.get("input", {name: block[name] for name in block if name not in own})
        name = block.get("name") or kind.removesuffix("_call")
        return f"[{name} was called with {json.dumps(_shown(given))}.]"
    return None


def _shown(value: object) -> object:
    """Return a JSON value without encrypted contents."""
    if isinstance(value, list):
        return [_shown(one) for one in value]
    if isinstance(value, Mapping):
        return {name: _shown(value[name]) for name in value if not name.startswith("encrypted")}
    return value
