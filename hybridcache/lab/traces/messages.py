"""Messages of OpenAI's and Anthropic's dialects as role and text.

Each message becomes one text, so that every chat template accepts it. Tool calls and their results
are in the form of Hermes, and tool definitions precede the system message. The text can differ from
the one a server's own template writes, but two prompts agree wherever those would.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from hybridcache.lab.traces.base import Record, objects, shown, text


def plain_chat(
    messages: Iterable[Record], system: Any = None, tools: Any = None
) -> list[dict[str, str]]:
    """Return a prompt as ``{"role", "content"}`` messages. Raises ValueError or KeyError if it is
    invalid."""
    chat = [{"role": _role(message), "content": message_text(message)} for message in messages]
    if not chat:
        raise ValueError("there is no message in it")
    leading = [json.dumps(tools, sort_keys=True)] if tools else []
    leading += [content_text(system)] if system else []
    if chat[0]["role"] == "system" and leading:
        leading.append(chat.pop(0)["content"])
    return [{"role": "system", "content": "\n\n".join(leading)}, *chat] if leading else chat


def message_text(message: Record) -> str:
    """Return the text of a message, including its thoughts and tool calls."""
    words = content_text(message.get("parts", message.get("content")))
    if message.get("reasoning_content"):
        words = _thought(text(message, "reasoning_content")) + words
    calls: list[Any] = objects(message, "tool_calls") if message.get("tool_calls") else []
    if message.get("function_call"):
        calls = [{"function": message["function_call"]}]
    return words + "".join(_call(call["function"]) for call in calls)


def content_text(content: Any) -> str:
    """Return a text, or a list of parts, as one text; empty for null. Raises ValueError
    otherwise."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, str | dict) for part in content):
        parts = [part if isinstance(part, str) else _part(part) for part in content]
        return "".join(parts)
    raise ValueError(f"content is {shown(content)}, not a text or a list of parts")


def _role(message: Record) -> str:
    role = text(message, "role")
    if role == "user":  # In Anthropic's dialect, tool results are part of a user's message.
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        kinds = {part.get("type") for part in parts if isinstance(part, dict)}
        return "tool" if kinds == {"tool_result"} else role
    return {"developer": "system", "model": "assistant"}.get(role, role)


def _part(part: Record) -> str:
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text"):
        return text(part, "text" if "text" in part else "content")
    if kind in ("thinking", "reasoning"):
        return _thought(text(part, "thinking" if kind == "thinking" else "content"))
    if kind in ("tool_use", "tool_call"):
        arguments = part.get("input", part.get("arguments"))
        return _call({"name": part["name"], "arguments": arguments})
    if kind in ("tool_result", "tool_call_response"):
        result = part.get("content", part.get("response", part.get("result")))
        return content_text(result) if _is_content(result) else json.dumps(result, sort_keys=True)
    # The number of tokens of an image or a file is unknown: a unique mark replaces it.
    mark = hashlib.blake2b(json.dumps(part, sort_keys=True).encode(), digest_size=8)
    return f"<{kind} {mark.hexdigest()}>"


def _is_content(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(part, dict) and "type" in part for part in value)
    return value is None or isinstance(value, str)


def _thought(words: str) -> str:
    return f"<think>\n{words}\n</think>\n\n"


def _call(function: Any) -> str:
    return f"\n<tool_call>\n{json.dumps(function, sort_keys=True)}\n</tool_call>"
