"""Answers in response bodies, whole or as a stream of events, of OpenAI's and Anthropic's APIs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from hybridcache.lab.traces.base import LONGEST, Record
from hybridcache.lab.traces.messages import message_text


def answer_of(response: Any) -> tuple[str | None, int]:
    """Return (text, number of tokens) of the first choice in a response.

    The text is None if the response does not contain it, and the number is 0 if it is not stated.
    Raises ValueError or KeyError if the response cannot be read.
    """
    if isinstance(response, str) and "data:" in response:
        return _streamed(response), 0
    if isinstance(response, list):
        return _merged([event for event in response if isinstance(event, dict)]), 0
    if not isinstance(response, dict):
        return None, 0
    choice = _choice(response)
    message = response if "content" in response else choice.get("message")
    if isinstance(message, dict):
        return message_text(message), 0
    if isinstance(choice.get("text"), str):
        return choice["text"], 0
    usage = response.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    length = counts.get("completion_tokens", counts.get("output_tokens"))
    return None, length if isinstance(length, int) and 0 <= length <= LONGEST else 0


def _streamed(stream: str) -> str | None:
    """Return the text of server-sent events. Events that are not JSON are skipped."""

    def events() -> Iterator[Record]:
        for line in stream.splitlines():
            try:
                event = json.loads(line[5:]) if line.startswith("data:") else None
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict):
                yield event

    return _merged(events())


def _merged(events: Iterable[Record]) -> str | None:
    """Return the message that the deltas add up to, or None if there is no text."""
    words: list[Any] = []
    thoughts: list[Any] = []
    openai: dict[str, dict[str, Any]] = {}
    anthropic: dict[str, dict[str, Any]] = {}
    for event in events:
        choice = _choice(event)
        delta = _record(event, "delta") or _record(choice, "delta")
        block, index = _record(event, "content_block"), str(event.get("index"))
        words += [choice.get("text"), delta.get("content"), delta.get("text"), block.get("text")]
        thoughts += [delta.get("reasoning_content"), delta.get("thinking")]
        if block.get("type") == "tool_use":
            anthropic[index] = {"name": _text(block, "name"), "arguments": ""}
        elif index in anthropic:
            anthropic[index]["arguments"] += _text(delta, "partial_json")
        for call in _list(delta, "tool_calls"):
            function = _record(call, "function")
            kept = openai.setdefault(str(call.get("index")), {"name": "", "arguments": ""})
            for name in kept:
                kept[name] += _text(function, name)
    for call in anthropic.values():  # Anthropic messages have arguments as an object
        with suppress(ValueError, RecursionError):
            call["arguments"] = json.loads(call["arguments"] or "{}")
    text, thought = ("".join(filter(_is_text, parts)) for parts in (words, thoughts))
    calls = [{"function": call} for call in (*openai.values(), *anthropic.values())]
    if not (text or thought or calls):
        return None
    return message_text({"content": text, "reasoning_content": thought, "tool_calls": calls})


def _choice(answer: Record) -> Record:
    choices = answer.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}


def _record(record: Record, name: str) -> Record:
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _list(record: Record, name: str) -> list[Record]:
    value = record.get(name)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _text(record: Record, name: str) -> str:
    value = record.get(name)
    return value if isinstance(value, str) else ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
