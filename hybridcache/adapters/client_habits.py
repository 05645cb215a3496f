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
LENGTHS = ("completion_tokens", "output_tokens", "eval_count", "completionTokens", "outputTokens")
"""Names of the number of tokens of an answer in ``usage``, or in the whole answer (Ollama). AI SDK
and Bedrock write the last two."""


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
    for given in map(message.get, THOUGHTS):
        if found := _inside(given) if isinstance(given, Mapping) else _joined(given):
            return found
    return (
        _inside(message) if message.get("type") in THOUGHT_PARTS else _joined(message.get(DETAILS))
    )


def _inside(part: Mapping[str, object]) -> str:
    """Return the text of an object with thoughts."""
    return next(filter(None, map(_joined, map(part.get, ("text", "content", "summary")))), "")


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


def length_of(usage: Mapping[str, object]) -> tuple[int | None, int]:
    """Return the tokens of an answer, None if unknown, and those of its thoughts, by the ``usage``
    of any API; of Cohere's, by ``tokens`` in it. Raises ValueError for another value.

    >>> length_of({"output_tokens": 420, "output_tokens_details": {"reasoning_tokens": 400}})
    (420, 400)
    """
    usage = tokens if isinstance(tokens := usage.get("tokens"), Mapping) else usage
    details = [usage, *(usage.get(f"{name}_details") for name in LENGTHS)]
    kinds = "reasoning_tokens", "thinking_tokens"
    thoughts = [d.get(kind) for d in details if isinstance(d, Mapping) for kind in kinds]
    return _count([usage.get(name) for name in LENGTHS]), _count(thoughts) or 0


def _count(values: Sequence[object]) -> int | None:
    found = next((one for one in values if one is not None), None)
    if isinstance(found, float) and found.is_integer():
        found = int(found)
    if found is not None and (not isinstance(found, int) or isinstance(found, bool) or found < 0):
        raise ValueError(f"usage has {found!r} in place of a number of tokens")
    return found


RENDERED = ("tool_use", "tool_result", "function_call", "function_call_output")
"""Types of blocks that chat templates write."""
SERVED = re.compile(r"(.+)_(?:(call|use|request)|result|output|response|tools|upload)")
"""Types of blocks about tools that the server of an earlier answer ran; the second group is in
those of calls."""
DATA = re.compile(
    r"(?:data:[\w/+.;=-]*;base64,)?[\w/+-]{60,}+(?:(?:\s|\\+[rn])++(?:[\w/+-]{60,}+|[\w/+-]*+=))*+=*",
    re.ASCII,
)
"""Text that may be base64, in one piece or in lines."""
LEAST_DATA = 512
"""Least number of characters of base64 that are left out."""


def line_of(block: Mapping[str, object]) -> str | None:
    """Return the text of a block of history that no chat template writes. None for other blocks.

    Such a block is a refusal, a found document, or a tool that the server of an earlier answer ran.
    Pictures, documents and sound in it, which are long base64, become their size.

    >>> line_of({"type": "server_tool_use", "name": "web_search", "input": {"query": "rain"}})
    '[web_search was called with {"query": "rain"}.]'
    >>> line_of({"type": "image_generation_call", "result": "iVBO" * 400})
    '[image_generation was called with {"result": "[1,200 bytes were left out here.]"}.]'
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
    if kind in RENDERED or (served := SERVED.fullmatch(kind)) is None:
        return None
    if isinstance(tools := block.get("tools"), list):
        names = [str(one.get("name")) for one in tools if isinstance(one, Mapping)]
        return f"[The tools {', '.join(names)} were found.]"
    own = ("type", "id", "status", "name", "cache_control", "caller")
    rest = {name: block[name] for name in block if name not in own}
    if served[2]:
        name = block.get("name") or served[1]
        return f"[{name} was called with {told(block.get('input', rest))}.]"
    return f"[Result: {told(block.get('content', block.get('output', rest)))}]"


def told(value: object) -> str:
    """Return a text, parts or another JSON value as one text without long base64. O(its size)."""
    if not isinstance(value, str):
        parts = value if isinstance(value, list) and _joined(value) else [value]
        value = "\n".join(_joined([one]) or json.dumps(_shown(one)) for one in parts)
    return DATA.sub(_size, value)


def _size(found: re.Match[str]) -> str:
    """Return the size of base64, or a text that is none."""
    data = re.sub(r"\s|\\+[rn]", "", found[0].rpartition(",")[2])
    if len(data) < LEAST_DATA or data in (data.lower(), data.upper()):
        return found[0]
    return f"[{len(data) * 3 // 4:,} bytes were left out here.]"


def _shown(value: object) -> object:
    """Return a JSON value without encrypted contents."""
    if isinstance(value, list):
        return [_shown(one) for one in value]
    if isinstance(value, Mapping):
        return {name: _shown(value[name]) for name in value if not name.startswith("encrypted")}
    return value
