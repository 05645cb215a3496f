"""Spans of OpenTelemetry's conventions for generative AI: model requests recorded by their client.

A file contains one OTLP JSON object of ``resourceSpans`` per line (or one over many lines), as the
collector's file exporter writes it. Alternatively it is an object of ``spans`` with plain
attributes, as Exgentic publishes them.

Only inference spans count: those with ``gen_ai.operation.name`` of chat, generate_content or
text_completion, or without that name but with input messages. They must have their content:
``gen_ai.input.messages``, ``gen_ai.system_instructions``, ``gen_ai.tool.definitions`` and
``gen_ai.output.messages``, on the span or on an event of it, structured or as text.

Token counts do not show which prompts agree, so a span that has only counts is refused. Conventions
before 1.37, with one event per message, are not supported. Spans are exported as they end, so the
whole file is read and sorted by start time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hybridcache.lab.trace import BadRecords, FreshIds, TraceRequest
from hybridcache.lab.traces.base import (
    DAMAGED,
    FileReader,
    Record,
    decoded,
    json_lines,
    moment,
    objects,
    open_bytes,
    parsed,
    shown,
    text,
    whole,
)
from hybridcache.lab.traces.messages import message_text, plain_chat
from hybridcache.lab.traces.text import ChatText, load_chat_text

INFERENCE = ("chat", "generate_content", "text_completion")
"""Operations that compute a prompt."""


@dataclass(frozen=True, slots=True)
class OtelReader(FileReader):
    """One request per span, in the tokens of ``tokenizer`` and ``template``. A session is a
    ``gen_ai.conversation.id``, else a trace; models share nothing. Holds the file in memory."""

    word: ClassVar[str] = "otel"
    tokenizer: str = ""
    template: str = "chatml"
    unit: int = 1

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has spans, in either form."""
        spans = record.get("spans")
        first = spans[0] if isinstance(spans, list) and spans else None
        flat = isinstance(first, dict) and "attributes" in first
        return flat or "resourceSpans" in record

    def __call__(self) -> Iterator[TraceRequest]:
        chat, fresh = load_chat_text(self.tokenizer, self.template), FreshIds()
        found: list[tuple[int, int, Record]] = []
        for line, document in _documents(self.path, self.bad):
            for span in parsed(self.path, [(line, document)], _spans, self.bad):
                starts = parsed(self.path, [(line, span)], _start_ns, self.bad)
                found += ((start, line, span) for start in starts)
        found.sort(key=lambda each: each[:2])
        began = found[0][0] if found else 0

        def parse(timed: tuple[int, Record]) -> Iterable[TraceRequest]:
            start, span = timed
            yield _asked(span, chat, fresh)._replace(timestamp_s=(start - began) / 1e9)

        sorted_spans = ((line, (start, span)) for start, line, span in found)
        return parsed(self.path, sorted_spans, parse, self.bad)


def _documents(path: Path, bad: BadRecords) -> Iterator[tuple[int, Record]]:
    """Yield (line, object) of JSON lines, or of one object over many lines."""
    with open_bytes(path) as file, suppress(ValueError, RecursionError, *DAMAGED):
        first = file.readline()
        try:
            json.loads(first)
        except ValueError:
            document = json.loads(first + file.read())
            if isinstance(document, dict):
                yield 1, document
                return
    yield from json_lines(path, bad)


def _spans(document: Record) -> Iterator[Record]:
    """Yield the inference spans of a document."""
    spans: list[Record] = []
    if "spans" in document:
        spans = objects(document, "spans")
    for resource in objects(document, "resourceSpans") if "resourceSpans" in document else ():
        for scope in objects(resource, "scopeSpans"):
            spans += objects(scope, "spans")
    for span in spans:
        facts, status = _facts(span), span.get("status")
        operation = facts.get("gen_ai.operation.name")
        asks = operation in INFERENCE if operation else "gen_ai.input.messages" in facts
        failed = isinstance(status, dict) and status.get("code") in (2, "STATUS_CODE_ERROR")
        if asks and not failed:
            yield {**span, "facts": facts}


def _start_ns(span: Record) -> Iterator[int]:
    if "start_time" in span:
        yield round(moment(span, "start_time") * 1e9)
    else:
        said = span["startTimeUnixNano"]
        if not str(said).isdecimal() or len(str(said)) > 20:  # 64-bit numbers
            raise ValueError(f"startTimeUnixNano is {shown(said)}, not a number of nanoseconds")
        yield int(said)


def _facts(span: Record) -> dict[str, Any]:
    """Return the attributes of a span and of its events, by name."""
    facts: dict[str, Any] = {}
    for owner in (span, *(objects(span, "events") if span.get("events") else ())):
        listed = owner.get("attributes") or {}
        if isinstance(listed, dict):
            facts |= listed
        else:
            facts |= _named(objects(owner, "attributes"))
    return facts


def _value(value: Any) -> Any:
    """Return the value of an OTLP ``AnyValue``."""
    if not isinstance(value, dict):
        raise ValueError(f"an attribute's value is {shown(value)}, not an object")
    if "arrayValue" in value:
        return [_value(each) for each in _inside(value, "arrayValue")]
    if "kvlistValue" in value:
        return _named(_inside(value, "kvlistValue"))
    if "intValue" in value:
        try:
            return int(str(value["intValue"]))
        except ValueError:
            said = shown(value["intValue"])
            raise ValueError(f"intValue is {said}, not a whole number") from None
    plain = ("stringValue", "boolValue", "doubleValue")
    return next((value[name] for name in plain if name in value), None)


def _named(pairs: list[Record]) -> dict[str, Any]:
    return {text(pair, "key"): _value(pair["value"]) for pair in pairs}


def _inside(value: Record, name: str) -> list[Record]:
    """Return the elements of an array or of a list of pairs; ``values`` may be missing if it is
    empty."""
    inner = value[name]
    if not isinstance(inner, dict):
        raise ValueError(f"{name} is {shown(inner)}, not an object")
    return objects(inner, "values") if inner.get("values") else []


def _asked(span: Record, chat: ChatText, fresh: FreshIds) -> TraceRequest:
    """Return the request of a span, without a time."""
    facts = span["facts"]
    if "gen_ai.input.messages" not in facts:
        raise ValueError(
            f"span {shown(span.get('name'))} has no gen_ai.input.messages, and counts of tokens do "
            "not tell which prompts agree; let its instrumentation capture the content"
        )
    prompt = plain_chat(
        _messages(facts, "gen_ai.input.messages"),
        decoded(facts.get("gen_ai.system_instructions")),
        decoded(facts.get("gen_ai.tool.definitions")),
    )
    said = _messages(facts, "gen_ai.output.messages") if "gen_ai.output.messages" in facts else []
    asked = chat.turn(prompt, message_text(said[0]) if said else "", tools=True).request("")
    if not said and "gen_ai.usage.output_tokens" in facts:
        asked = asked._replace(output=fresh.take(whole(facts, "gen_ai.usage.output_tokens")))
    name = facts.get("gen_ai.conversation.id") or span.get("session_id")
    session = str(name or span.get("traceId") or span.get("trace_id"))
    return asked._replace(session=session, namespace=str(facts.get("gen_ai.request.model")))


def _messages(facts: Record, name: str) -> list[Record]:
    return objects({name: decoded(facts[name])}, name)
