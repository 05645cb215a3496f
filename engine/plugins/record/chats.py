"""Reads requests and answers of three APIs (OpenAI chat, OpenAI responses, Anthropic messages) as
chats.

It works in front of any server: it ignores unknown fields, and rejects nothing.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

Fields = Mapping[str, Any]
LINE_END = re.compile(r"\r\n|\n|\r")
MAX_RESPONSES = 4096
"""Maximum number of responses that are kept, so that a later one can continue them."""


class Chats:
    """Reads bodies and answers by the end of their path."""

    def __init__(self) -> None:
        self._items: OrderedDict[str, list[Fields]] = OrderedDict()
        """Items of the responses that were used last, up to the end of each."""

    def read(self, path: str, body: Fields, raw: bytes) -> tuple[Fields, Fields]:
        """Return (body, answer) of a request to /chat/completions, /completions, /messages or
        /responses.

        ``raw`` is the answer, as one object or as events. The result is a body of one of the first
        two paths, and a message of the assistant. O(size of both, and of the responses before it).
        """
        answers = list(_answers(raw))
        if path.endswith("/completions"):
            return body, _choice(answers)
        if path.endswith("/messages"):
            return _of_messages(body), _said(_blocks(answers))
        return self._of_responses(body, answers)

    def _of_responses(self, body: Fields, answers: Sequence[Fields]) -> tuple[Fields, Fields]:
        last = answers[-1] if answers else {}
        response = last.get("response") or last
        asked = body.get("input") or []
        items = [{"role": "user", "content": asked}] if isinstance(asked, str) else [*asked]
        items = [*self._items.get(body.get("previous_response_id") or "", ()), *items]
        output = response.get("output") or []
        if response.get("id"):
            self._items[str(response["id"])] = [*items, *output]
        if len(self._items) > MAX_RESPONSES:
            self._items.popitem(last=False)
        messages = list(_messages(items))
        if body.get("instructions"):
            messages.insert(0, {"role": "system", "content": body["instructions"]})
        tools = [{"type": "function", "function": tool} for tool in body.get("tools") or ()]
        found = [*_messages(output), {"role": "assistant", "content": ""}]
        return {**body, "messages": messages, "tools": tools}, found[0]


def _answers(raw: bytes) -> Iterator[dict[str, Any]]:
    """Yield the objects of an answer: one, or one per event. Incomplete ones are omitted."""
    text = raw.decode("utf-8", "replace")
    is_whole = text.lstrip().startswith("{")
    # Not splitlines: JSON can contain other line separators, such as U+2028.
    lines = LINE_END.split(text)
    events = [line[5:].strip() for line in lines if line.startswith("data:")]
    for found in [text] if is_whole else events:
        with suppress(ValueError):
            if isinstance(parsed := json.loads(found), dict):
                yield parsed


def _assistant(text: str, reasoning: str, calls: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return a message of the assistant; ``calls`` are (name, arguments)."""
    made = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in calls
    ]
    message = {"role": "assistant", "content": text}
    return (
        message
        | ({"reasoning_content": reasoning} if reasoning else {})
        | ({"tool_calls": made} if made else {})
    )


def _choice(answers: Iterable[Fields]) -> dict[str, Any]:
    """Return the first choice of an answer as a message of the assistant."""
    text, reasoning = "", ""
    calls: dict[int, list[str]] = {}
    for answer in answers:
        for choice in answer.get("choices") or ():
            if choice.get("index", 0):
                continue
            said = choice.get("delta") or choice.get("message") or {}
            text += said.get("content") or choice.get("text") or ""
            reasoning += said.get("reasoning_content") or said.get("reasoning") or ""
            for place, call in enumerate(said.get("tool_calls") or ()):
                known = calls.setdefault(call.get("index", place), ["", ""])
                function = call.get("function") or {}
                known[0] += function.get("name") or ""
                known[1] += function.get("arguments") or ""
    return _assistant(text, reasoning, [(calls[at][0], calls[at][1]) for at in sorted(calls)])


def _text(content: Any) -> str:
    """Return the text of a content, or of those parts of one that are text."""
    if not isinstance(content, list):
        return str(content or "")
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    return "\n".join(str(part) for part in parts if part)


def _of_messages(body: Fields) -> Fields:
    messages: list[dict[str, Any]] = []
    if system := _text(body.get("system")):
        messages.append({"role": "system", "content": system})
    for message in body.get("messages") or ():
        content = message.get("content")
        blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if message.get("role") == "assistant":
            messages.append(_said(blocks))
            continue
        messages += [
            {"role": "tool", "content": _text(block.get("content"))}
            for block in blocks
            if block.get("type") == "tool_result"
        ]
        if text := _text([block for block in blocks if block.get("type") == "text"]):
            messages.append({"role": message.get("role"), "content": text})
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool.get("name"),
                "description": tool.get("description"),
                "parameters": tool.get("input_schema"),
            },
        }
        for tool in body.get("tools") or ()
    ]
    return {**body, "messages": messages, "tools": tools}


def _said(blocks: Iterable[Fields]) -> dict[str, Any]:
    """Return blocks of /messages as one message of the assistant."""
    by_kind: dict[str, list[Fields]] = {}
    for block in blocks:
        by_kind.setdefault(block.get("type") or "", []).append(block)
    thoughts = [block.get("thinking") or "" for block in by_kind.get("thinking", ())]
    calls = [
        (block.get("name") or "", json.dumps(block.get("input") or {}))
        for block in by_kind.get("tool_use", ())
    ]
    return _assistant(_text(by_kind.get("text", [])), "\n".join(thoughts), calls)


def _blocks(answers: Sequence[Fields]) -> list[Fields]:
    """Return the blocks of an answer of /messages, which is one object or events."""
    if len(answers) == 1 and "content" in answers[0]:
        return list(answers[0]["content"])
    blocks: dict[int, dict[str, Any]] = {}
    arguments: dict[int, str] = {}
    for event in answers:
        at = event.get("index", 0)
        if event.get("type") == "content_block_start":
            blocks[at] = dict(event.get("content_block") or {})
        elif event.get("type") == "content_block_delta" and at in blocks:
            delta = event.get("delta") or {}
            for name in ("text", "thinking"):
                if name in delta:
                    blocks[at][name] = (blocks[at].get(name) or "") + delta[name]
            arguments[at] = arguments.get(at, "") + (delta.get("partial_json") or "")
    for at, text in arguments.items():
        if blocks[at].get("type") == "tool_use":
            try:
                blocks[at]["input"] = json.loads(text or "{}")
            except ValueError:  # The call is incomplete.
                blocks[at]["input"] = text
    return [blocks[at] for at in sorted(blocks)]


def _messages(items: Iterable[Fields]) -> Iterator[dict[str, Any]]:
    """Yield items of /responses as messages. Consecutive reasoning, text and calls of the assistant
    are one message."""
    text, reasoning = "", ""
    calls: list[tuple[str, str]] = []
    for item in items:
        kind, role = item.get("type") or "message", item.get("role")
        if kind == "reasoning":
            reasoning += _text(item.get("content")) or _text(item.get("summary"))
        elif kind == "function_call":
            calls.append((item.get("name") or "", item.get("arguments") or ""))
        elif kind == "message" and role == "assistant":
            text += _text(item.get("content"))
        elif kind in ("message", "function_call_output"):
            if text or reasoning or calls:
                yield _assistant(text, reasoning, calls)
            text, reasoning, calls = "", "", []
            said = _text(item.get("content" if kind == "message" else "output"))
            yield {"role": role or "tool", "content": said}
    if text or reasoning or calls:
        yield _assistant(text, reasoning, calls)
