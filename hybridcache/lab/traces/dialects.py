"""Messages and answers of OpenAI's and Anthropic's dialects as role and text.

Each message becomes one text, so that every chat template accepts it. Tool calls and their results
are in the form of Hermes, and tool definitions precede the system message. The text can differ from
the one a server's own template writes, but two prompts agree wherever those would.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from hybridcache.adapters.client_habits import (
    DETAILS,
    LENGTHS,
    THOUGHT_PARTS,
    THOUGHTS,
    has_thoughts,
    length_of,
    line_of,
    thoughts_of,
    without_billing,
)
from hybridcache.lab.traces.frame import LONGEST, Notes, Record, shown

Chat = list[dict[str, str]]
STOP_REASONS = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "max_tokens": "length",
    **{reason: reason for reason in ("end_turn", "tool_use", "stop_sequence", "length")},
}
"""Stop reasons of a trace, by those of OpenAI's and Anthropic's answers."""
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool", "function")},
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("model", "gpt", "chatgpt", "bing", "bard", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
"""Roles of messages, by those of a file in small letters."""

OUTPUT_ITEMS = {"message", "function_call", "reasoning"}
"""Types of items in the output of the Responses API."""
UNKNOWN_USAGE = (
    "with a usage without a known number of tokens ({}): they are as long as their texts, or as "
    "the field that ?length=NAME names"
)
BILLING = "without the billing header that Claude Code changes in each request"


class RecordedAnswer(NamedTuple):
    """The answer of a record."""

    text: str | None
    """None if it is unknown."""
    num_tokens: int = 0
    """By the server's count, thoughts included. 0 if it is unknown."""
    stop_reason: str = ""
    """Empty if it is unknown."""
    has_thoughts: bool = False
    """True if it begins with thoughts, even if the text lacks them."""


def plain_chat(
    messages: Iterable[Record],
    system: object = None,
    tools: object = None,
    notes: Notes | None = None,
) -> Chat:
    """Return a prompt as ``{"role", "content"}`` messages; ``notes`` count changes of its texts.
    ValueError or KeyError if invalid."""
    chat = [{"role": _role(message), "content": message_text(message)} for message in messages]
    if not chat:
        raise ValueError("there is no message in it")
    leading = [_content(system)] if system else []
    given = *leading, *(one["content"] for one in chat if one["role"] == "system")
    if any(without_billing(text) != text for text in given):
        leading = [cleaned for text in leading if (cleaned := without_billing(text))]
        for one in chat:
            if one["role"] == "system":
                one["content"] = without_billing(one["content"])
        chat = [one for one in chat if one["role"] != "system" or one["content"]] or chat[:1]
        if notes is not None:
            notes.count(BILLING, "prompt")
    leading = [json.dumps(tools, sort_keys=True)] * bool(tools) + leading
    if chat[0]["role"] == "system" and leading:
        leading.append(chat.pop(0)["content"])
    return [{"role": "system", "content": "\n\n".join(leading)}, *chat] if leading else chat


def role_of(message: Record) -> str:
    """Return the role of a message. ValueError if it is unknown."""
    role = ROLES.get(message.text("role").lower())
    if role is None:
        raise ValueError(f"role is {shown(message['role'])}, none of {', '.join(ROLES)}")
    return role


def message_text(message: Record) -> str:
    """Return the text of a message, including its thoughts and tool calls."""
    others = message.keys() & {*THOUGHTS, DETAILS, "tool_calls", "function_call"}
    words = _content(message.get("content") if others else message["content"])
    words = _thought(thoughts_of(message)) + words
    calls = message.objects("tool_calls") if message.get("tool_calls") else []
    if message.get("function_call"):
        calls = [Record(function=message["function_call"])]
    return _begun(words + "".join(_call(call["function"]) for call in calls))


def is_response(value: object) -> bool:
    """Return True for a message or a response, False for an answer that is another JSON value."""
    if not isinstance(value, dict):
        return False
    has_field = any(name in value for name in ("choices", "content", "usage", "body"))
    is_message = isinstance(value.get("message"), dict)
    return has_field or is_message or isinstance(value.get("output"), list)


def answer_of(response: object, usage: object = None, notes: Notes | None = None) -> RecordedAnswer:
    """Return the answer of a record: a text, a message, or a whole response of the APIs of OpenAI,
    Anthropic or Ollama. ``usage`` is that of the record, if the response has none. ValueError for
    another value; ``notes`` count usages without a known length.
    """
    if response is None or isinstance(response, str):
        if str(response).startswith(("data:", "event:")):
            raise ValueError("an answer is a stream of events: log its text instead")
        length, num_thoughts = _length(usage, notes)
        return RecordedAnswer(response, length, "", num_thoughts > 0)
    refusal = ValueError(
        f"its answer is {shown(response)}, not a text, a message, or a response with a message, a "
        "text or its usage"
    )
    if isinstance(response, dict) and isinstance(response.get("body"), dict):
        response = response["body"]  # The Batch API's
    whole = Record(response) if isinstance(response, dict) else Record()
    choice = whole.objects("choices")[0] if whole.get("choices") else Record()
    usage = whole.get("usage") or choice.get("usage") or usage
    # That of several choices is their sum.
    is_one = not isinstance(choices := whole.get("choices"), list) or len(choices) < 2
    said = usage or dict(whole) if is_one else None
    length, num_thoughts = _length(said, notes if usage else None)
    items = whole.get("output") if isinstance(whole.get("output"), list) else response
    if isinstance(items, list):
        are_items = all(isinstance(one, dict) for one in items)
        kinds = {str(one.get("type")) for one in items if are_items and line_of(one) is None}
        if not items or not are_items or not kinds <= OUTPUT_ITEMS:
            raise refusal
        text = _begun("".join(map(_output_item, items)))
        return RecordedAnswer(text, length, "", bool(num_thoughts) or "reasoning" in kinds)
    if not isinstance(response, dict):
        raise refusal
    reason = STOP_REASONS.get(str(response.get("stop_reason") or choice.get("finish_reason")), "")
    inner = output if isinstance(output := whole.get("output"), dict) else response  # Bedrock's
    message = inner if "content" in inner else choice.get("message", inner.get("message"))
    if isinstance(message, dict):
        thinks = bool(num_thoughts) or has_thoughts(message)
        return RecordedAnswer(message_text(Record(message)), length, reason, thinks)
    if "text" in choice:
        return RecordedAnswer(choice.text("text"), length, reason, bool(num_thoughts))
    if isinstance(usage, dict) and usage.keys() & {*LENGTHS}:
        return RecordedAnswer(None, length, reason, bool(num_thoughts))
    raise refusal


def _length(usage: object, notes: Notes | None) -> tuple[int, int]:
    """Return the tokens of an answer and of its thoughts; 0 for an unknown number."""
    if isinstance(usage, str):  # a cell of a table
        with suppress(ValueError, RecursionError):
            usage = json.loads(usage)
    length, num_thoughts = length_of(usage) if isinstance(usage, dict) else (None, 0)
    if length is None and usage and notes:
        notes.count(UNKNOWN_USAGE.format(shown(usage)), "answer")
    if (length or 0) > LONGEST:
        raise ValueError(f"its usage has {length} tokens, more than {LONGEST}")
    return length or 0, num_thoughts


def _output_item(item: dict[str, object]) -> str:
    """Return the text of an item of the Responses API."""
    if (line := line_of(item)) is not None:
        return line
    if item["type"] == "function_call":
        return _call({"name": item.get("name"), "arguments": item.get("arguments")})
    if item["type"] == "reasoning":
        return _thought(thoughts_of(item))
    return _content(item.get("content"))


def _role(message: Record) -> str:
    role, content = role_of(message), message.get("content")
    if role == "user" and isinstance(content, list):  # Anthropic's tool results are the user's
        kinds = {str(part.get("type")) for part in content if isinstance(part, dict)}
        return "tool" if kinds == {"tool_result"} else role
    return role


def _content(content: object) -> str:
    """Return a text, or a list of parts, as one text; empty for null."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, str | dict) for part in content):
        return "".join(part if isinstance(part, str) else _part(Record(part)) for part in content)
    raise ValueError(f"content is {shown(content)}, not a text or a list of parts")


def _part(part: Record) -> str:
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text") or part.keys() == {"text"}:
        return part.text("text")
    if kind in THOUGHT_PARTS:
        return _thought(thoughts_of(part))
    if (line := line_of(part)) is not None:
        return line
    if kind == "tool_use":
        return _call({"name": part["name"], "arguments": part.get("input")})
    if kind == "tool_result":
        result = part.get("content")
        is_parts = isinstance(result, list) and all(
            isinstance(each, dict) and "type" in each for each in result
        )
        is_content = is_parts or result is None or isinstance(result, str)
        return _content(result) if is_content else json.dumps(result, sort_keys=True)
    # The number of tokens of an image or a file is unknown: a unique mark replaces it.
    mark = hashlib.blake2b(json.dumps(part, sort_keys=True).encode(), digest_size=8)
    return f"<{kind} {mark.hexdigest()}>"


def _thought(words: str) -> str:
    return f"<think>\n{words}\n</think>\n\n" if words else ""


def _begun(text: str) -> str:
    """Return the text of a message without the newline of a call that nothing precedes: after the
    newline of the header, both would be one token in the next prompt."""
    return text.removeprefix("\n") if text.startswith("\n<tool_call>") else text


def _call(function: object) -> str:
    return f"\n<tool_call>\n{json.dumps(function, sort_keys=True)}\n</tool_call>"
