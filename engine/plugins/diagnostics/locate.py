"""Which part of a chat a position of its text lies in, found by rendering it with a mark before
every text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from engine.text.templates import ChatTemplate, TemplateError

FIRST, LAST = 0xF0000, 0xFFFFD
"""A private-use plane: as many marks as it has characters."""
_TOOL, _SYSTEM = "tool_to_find", "text to find"
_MARK = re.compile(f"[{chr(FIRST)}-{chr(LAST)}]")


def locate(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    variables: Mapping[str, Any] | None,
    num_chars: int,
) -> str | None:
    """The field of the chat, as in ``messages[3].content``, that the rendered text is in after
    ``num_chars``; None: it is in none yet, or the chat has marks itself. One render."""
    paths: list[str] = []
    chat = [
        {name: _marked(value, f"messages[{i}].{name}", paths) for name, value in message.items()}
        for i, message in enumerate(messages)
    ]
    offered = None if tools is None else _marked(tools, "tools", paths)
    if len(paths) > LAST - FIRST or _MARK.search(json.dumps([messages, tools], ensure_ascii=False)):
        return None
    try:
        text = template.render(chat, tools=offered, add_generation_prompt=True, variables=variables)
    except TemplateError:
        return None
    found = None
    for before, mark in enumerate(_MARK.finditer(text)):
        if mark.start() - before > num_chars:
            break
        index = ord(mark.group()) - FIRST
        found = paths[index] if index < len(paths) else None
    return found


def _marked(value: Any, path: str, paths: list[str]) -> Any:
    """``value`` with a mark in each of its texts, after the blanks that it begins with: templates
    strip those. A role stays what it is."""
    if isinstance(value, str) and not path.endswith((".role", ".type", ".id", "_id")):
        paths.append(path)
        stripped = value.lstrip()
        blanks = value[: len(value) - len(stripped)]
        return f"{blanks}{chr(FIRST + len(paths) - 1)}{stripped}"
    if isinstance(value, Mapping):
        return {name: _marked(entry, f"{path}.{name}", paths) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(entry, f"{path}[{i}]", paths) for i, entry in enumerate(value)]
    return value


def writes_tools_first(template: ChatTemplate) -> bool:
    """Whether tools stand before the system message's own text. One render."""
    tool = {"type": "function", "function": {"name": _TOOL, "parameters": {}}}
    chat = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": "hi"}]
    try:
        text = template.render(chat, tools=[tool])
    except TemplateError:
        return True
    return text.find(_TOOL) < text.find(_SYSTEM)
