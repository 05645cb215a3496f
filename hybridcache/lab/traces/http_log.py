"""Logs of HTTP requests: bodies with times, as JSON lines, and prompts in CSV files.

``engine record`` writes our own format (``jsonl``), which needs no other reader. This reader
accepts the logs of other proxies, under common field names:

- one line per exchange, ``{"timestamp", "request": {body}, "response": {body}}``;
- one line per request: the body itself with a ``timestamp`` in it;
- one line each for request and response, distinguished by ``type`` and joined by ``request_id``,
  as sammshen/agent-trace's proxy writes them (Hugging Face, ``sammshen/*-traces``).

Bodies are OpenAI's chat and text completions and Anthropic's messages, as objects or as text. A
response may be a stream of events. Failed requests (``status_code`` of 400 or more) and requests to
other paths are skipped. Times are seconds, milliseconds since 1970 if above 10**11, or ISO 8601.
They are counted from the first request. If the log contains neither the answer nor its length, the
length is the ``max_tokens`` of the request.

A CSV file has a column ``prompt`` (text) or ``messages`` (JSON). Columns for time, session, answer
and its length are optional, under the names of ``COLUMNS``.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

from hybridcache.lab.trace import BadRecords, FreshIds, TraceRequest
from hybridcache.lab.traces.base import (
    COUNTS_ALONE,
    LONGEST,
    FileReader,
    Record,
    TraceClock,
    callers_level,
    csv_lines,
    decoded,
    first_named,
    in_order,
    json_lines,
    key,
    moment,
    objects,
    parsed,
    read_ids,
    whole,
)
from hybridcache.lab.traces.messages import message_text, plain_chat
from hybridcache.lab.traces.text import ChatText, load_chat_text
from hybridcache.tokens import Tokens

TIMES = (
    "timestamp",
    "ts",
    "time",
    "seconds",
    "arrival_time",
    "timestamp_rel_s",
    "start_time",
    "startTime",
    "timestamp_utc",
)
REQUESTS = ("request", "request_body", "body", "req")
RESPONSES = ("response", "response_body", "answer", "resp")
SESSIONS = ("session_id", "session", "conversation_id", "conversation")
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
STATUSES = ("status_code", "status")
COLUMNS = {
    "prompt": ("prompt",),
    "messages": ("messages",),
    "time": TIMES,
    "session": SESSIONS,
    "answer": ("answer", "response", "output", "completion"),
    "length": ("output_tokens", "completion_tokens", "answer_tokens", "output_length", *LENGTHS),
    "model": ("model",),
    "system": ("system",),
    "tenant": ("cache_salt", "tenant", "tenant_id", "namespace"),
    "status": STATUSES,
}
"""Fields of a CSV file and the names of columns that contain them, the first present one counts."""
ABSENT = {
    "time": "one second between rows",
    "session": "rows that begin alike",
    "length": "answers are unknown",
}
"""Rules for fields without a column."""
PATHS = ("path", "url", "endpoint")
WAITING = 1024
"""Requests held until their response comes. Beyond that number, the first is yielded without
one."""


@dataclass(frozen=True, slots=True)
class HttpLogReader(FileReader):
    """Logged requests in the tokens of ``tokenizer`` and ``template``. Prompts that are already ids
    are kept.

    A session is the one given in the log, else all requests that begin with the same system message
    and the same first question. Different models (and ``cache_salt``) share nothing.
    """

    word: ClassVar[str] = "http-log"
    tokenizer: str = ""
    template: str = "chatml"
    unit: int = 1

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has a body with messages or a text prompt, together with a time
        or the name of a request."""
        try:
            body = _body(record)
        except ValueError:
            return False
        asks = body is not None and ("messages" in body or isinstance(body.get("prompt"), str))
        return asks and (body is not record or first_named(record, TIMES) is not None)

    def __call__(self) -> Iterator[TraceRequest]:
        parser = _HttpLogParser(load_chat_text(self.tokenizer, self.template))
        return _from_zero(in_order(self.path, self._exchanges(), parser.parse, self.bad))

    def _exchanges(self) -> Iterator[tuple[int, Record]]:
        """Yield (line number, request and response) in the order of the requests."""
        return _joined(json_lines(self.path, self.bad))


class TraceColumnsWarning(UserWarning):
    """Warning that a CSV file has unused columns and lacks a time, a session or answers."""


@dataclass(frozen=True, slots=True)
class CsvReader(HttpLogReader):
    """Prompts in a CSV file, a request per row, in the tokens of ``tokenizer`` and ``template``."""

    word: ClassVar[str] = "csv"
    is_csv: ClassVar[bool] = True
    prompt: str = ""
    """Name of the column of prompts in a file with other names; so are the next five."""
    time: str = ""
    session: str = ""
    answer: str = ""
    length: str = ""
    tenant: str = ""
    """Name of the column of tenants. Prompts of different tenants share no prefix."""

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether there is a column of prompts."""
        return "prompt" in record or "messages" in record

    def describe(self) -> str:
        """Return the columns that are read for each field, and the unused ones.

        Gives a TraceColumnsWarning if there are unused columns, and no time, session or length of
        answers. Raises ValueError if a column is missing, or if all prompts are whole numbers.
        """
        rows = csv_lines(self.path, BadRecords(skip=True))
        first = next(rows, (0, None))[1]
        if first is None:
            return ""
        if len(first) == 1 and ";" in next(iter(first)):
            raise ValueError(f"{self.path}: its columns are separated by semicolons: use commas")
        used = self._used(first)
        if "messages" not in used and "prompt" not in used:
            raise ValueError(
                f"{self.path}: there is no column prompt or messages ({', '.join(first)}): name "
                f"it as in csv:{self.path}?prompt=COLUMN. {COUNTS_ALONE}"
            )
        column = used.get("prompt", "")
        if column and "messages" not in used:
            texts = (row[column].strip() for row in chain([first], (row for _, row in rows)))
            if all(text.isdecimal() for text in texts if text) and first[column]:
                raise ValueError(
                    f"{self.path}: all prompts in column {column!r} are whole numbers, as "
                    f"{first[column]!r}. {COUNTS_ALONE}"
                )
        missing = [name for name in ABSENT if name not in used]
        if "answer" in used and "length" in missing:
            missing.remove("length")
        read = [f"{name}={column}" for name, column in used.items()]
        read += [f"{name}=none ({ABSENT[name]})" for name in missing]
        unused = [column for column in first if column and column not in used.values()]
        told = ", ".join(read) + (f"; unused: {', '.join(unused)}" if unused else "")
        if unused and missing:
            warnings.warn(
                TraceColumnsWarning(
                    f"{self.path}: {told}. Name columns as in "
                    f"csv:{self.path}?{missing[0]}={unused[0]}"
                ),
                stacklevel=callers_level(),
            )
        return told

    def _used(self, row: Record) -> dict[str, str]:
        """Return the column of each field that the file of ``row`` has."""
        own = {"prompt": self.prompt, "time": self.time, "session": self.session}
        own |= {"answer": self.answer, "length": self.length, "tenant": self.tenant}
        used = {}
        for name, known in COLUMNS.items():
            named = own.get(name)
            if named and named not in row:
                raise ValueError(
                    f"{self.path}: there is no column {named!r}; it has {', '.join(row)}"
                )
            if found := next((each for each in (named, *known) if each and each in row), None):
                used[name] = found
        if self.prompt:
            used.pop("messages", None)
        return used

    def _exchanges(self) -> Iterator[tuple[int, Record]]:
        used: dict[str, str] = {}
        for line, row in csv_lines(self.path, self.bad):
            used = used or self._used(row)
            yield from parsed(self.path, [(line, (line, row, used))], _from_row, self.bad)


class _HttpLogParser:
    """Converts exchanges to requests."""

    def __init__(self, chat: ChatText) -> None:
        self._chat = chat
        self._fresh, self._clock = FreshIds(), TraceClock()
        self._began_s: float | None = None

    def parse(self, record: Record) -> Iterable[TraceRequest]:
        """Return the request of the exchange; none if it failed or was not a generation request."""
        body = _body(record)
        if body is None or _failed(record) or not _asks_a_model(record, body):
            return
        asked = self._asked(body, decoded(_named(record, RESPONSES)))
        session = self._session(record, body)
        when_s = _time(record)
        if self._began_s is None:
            self._began_s = when_s
        now = self._clock.at(None if when_s is None else when_s - (self._began_s or 0.0))
        yield asked._replace(timestamp_s=now, session=session, namespace=_namespace(body))

    def _asked(self, body: Record, response: Any) -> TraceRequest:
        """Return prompt, answer and boundaries as a request without session and time."""
        answer, length = answer_of(response)
        reason = stop_reason_of(response)
        if answer is None and not length:
            named = first_named(body, LENGTHS)
            length = whole(body, named) if named else 0
        if "messages" in body:
            messages = objects(body, "messages")
            chat = plain_chat(messages, body.get("system"), body.get("tools"))
            is_cut = reason == "length"
            turn = self._chat.turn(chat, answer or "", tools=True, is_cut=is_cut)
            asked = turn.request("")
        else:
            prompt = self._prompt(body["prompt"])
            asked = TraceRequest(0.0, "", None, prompt, self._chat.encode(answer or ""))
        asked = asked._replace(stop_reason=reason)
        return asked if answer is not None else asked._replace(output=self._fresh.take(length))

    def _prompt(self, prompt: Any) -> Tokens:
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, list) and any(isinstance(part, str) for part in prompt):
            raise ValueError("several prompts in one request are not read")
        ids = self._chat.encode(prompt) if isinstance(prompt, str) else read_ids(prompt)
        if not len(ids):
            raise ValueError("the prompt is empty")
        return ids

    @staticmethod
    def _session(record: Record, body: Record) -> str | int:
        name = next((name for name in SESSIONS if record.get(name) is not None), None)
        if name is not None:
            return key(record, name)
        messages = body.get("messages")
        beginning: Any = body.get("prompt")
        if isinstance(messages, list):
            roles = [message.get("role") for message in messages]
            beginning = messages[: roles.index("user") + 1 if "user" in roles else 1]
        said = json.dumps([body.get("system"), beginning])
        return hashlib.blake2b(said.encode(), digest_size=8).hexdigest()


def _from_row(
    numbered: tuple[int, Record, Mapping[str, str]],
) -> Iterable[tuple[int, Record]]:
    """Convert a numbered row of texts, with the columns of its fields, to a record as a proxy
    writes it."""
    line, row, used = numbered
    record: dict[str, Any] = {name: row[column] for name, column in used.items() if row[column]}
    if "messages" in record:
        record["messages"] = decoded(record["messages"])
    else:
        record.setdefault("prompt", "")
    for name in ("time", "length", "status"):
        if name in record:
            with suppress(ValueError):  # else it is a date, or an error
                record[name] = float(record[name])
    if "length" in record:
        record["max_tokens"] = whole({used["length"]: record.pop("length")}, used["length"])
    if "tenant" in record:
        record["cache_salt"] = record.pop("tenant")
    if "answer" in record:
        record["response"] = {"choices": [{"text": record.pop("answer")}]}
    yield line, record


def _from_zero(requests: Iterable[TraceRequest]) -> Iterator[TraceRequest]:
    """Yield ``requests``, shifted so that times count from the first request. The first request
    need not be on the first line."""
    shift_s: float | None = None
    for request in requests:
        if shift_s is None:
            shift_s = max(0.0, -request.timestamp_s)
        yield request._replace(timestamp_s=request.timestamp_s + shift_s)


def _joined(records: Iterable[tuple[int, Record]]) -> Iterator[tuple[int, Record]]:
    """Join requests and responses on separate lines to one record, in order of the requests. Other
    lines are unchanged."""
    waiting: OrderedDict[Any, tuple[int, dict[str, Any]]] = OrderedDict()
    whole: set[Any] = set()

    def ready(limit: int) -> Iterator[tuple[int, Record]]:
        while waiting and (next(iter(waiting)) in whole or len(waiting) > limit):
            name, exchange = waiting.popitem(last=False)
            whole.discard(name)
            yield exchange

    for line, record in records:
        name = record.get("request_id")
        kind = record.get("type") if isinstance(name, str | int) else None
        if kind == "request":
            waiting[name] = (line, dict(record))
        elif kind == "response":
            if name in waiting:
                answered = {each: record[each] for each in STATUSES if each in record}
                waiting[name][1].update(answered, response=record.get("body"))
                whole.add(name)
        else:
            yield line, record
        yield from ready(WAITING)
    yield from ready(0)


def _body(record: Record) -> Record | None:
    """Return the body of the request, or None if the record has none. Raises ValueError if it is
    not an object."""
    found = record
    if not ("messages" in record or "prompt" in record):
        inner = decoded(_named(record, REQUESTS))
        while isinstance(inner, dict) and not ("messages" in inner or "prompt" in inner):
            deeper = decoded(_named(inner, REQUESTS))
            if deeper is None:
                break
            inner = deeper
        if inner is None or inner == "":
            return None
        if not isinstance(inner, dict):
            raise ValueError("the request's body is not a JSON object")
        found = inner
    return found


def _asks_a_model(record: Record, body: Record) -> bool:
    """Return whether a prompt must be computed. Raises ValueError for an unsupported kind."""
    if "messages" in body or "prompt" in body:
        return True
    path = _named(record, PATHS)
    if isinstance(path, str) and not path.rstrip("/").endswith("/responses"):
        return False
    raise ValueError("a body without messages and without prompt (Responses, embeddings?)")


def _failed(record: Record) -> bool:
    status = _named(record, STATUSES)
    return isinstance(status, int | float) and status >= 400


def _namespace(body: Record) -> str | None:
    """Return a name for model and ``cache_salt``; None if there is neither."""
    parts = {name: body[name] for name in ("model", "cache_salt") if body.get(name) is not None}
    is_plain = set(parts) == {"model"} and isinstance(parts["model"], str)
    return parts["model"] if is_plain else json.dumps(parts) if parts else None


def _time(record: Record) -> float | None:
    name = first_named(record, TIMES)
    if name is None:
        return None
    said = moment(record, name)
    return said / 1000 if said > 1e11 and not isinstance(record[name], str) else said


def _named(record: Record, names: Sequence[str]) -> Any:
    name = first_named(record, names)
    return None if name is None else record[name]


# --- Answers in responses: whole or as a stream of events, of OpenAI's and Anthropic's APIs -------


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


STOP_REASONS = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "max_tokens": "length",
    **{reason: reason for reason in ("end_turn", "tool_use", "stop_sequence", "length")},
}
"""Stop reasons of a trace, by those of OpenAI's and Anthropic's answers."""


def stop_reason_of(response: Any) -> str:
    """Return why the answer in ``response`` ended, or an empty string if it does not say."""
    if not isinstance(response, dict):
        return ""
    said = response.get("stop_reason") or _choice(response).get("finish_reason")
    return STOP_REASONS.get(said, "") if isinstance(said, str) else ""


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
