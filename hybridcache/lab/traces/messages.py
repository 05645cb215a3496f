"""Requests as texts, in the tokens of a named tokenizer: JSON lines, or comma-separated values.

A record is a request (a prompt or messages), or a single message (a role, a content and a session),
of which each answer is a request. ``docs/reference/traces.md`` has the fields and rules.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, ClassVar

from sortedcontainers import SortedDict

from hybridcache.lab.trace import BadRecords, FreshIds, TraceRequest
from hybridcache.lab.traces.dialects import Chat, answer_of, is_response, plain_chat
from hybridcache.lab.traces.frame import FileReader, Line, Notes, Record, TraceClock, csv_lines
from hybridcache.lab.traces.text import ChatText, load_chat_text

SINCE_1970 = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))
"""Numbers above the first value are times since 1970, in the second value's parts of a second."""
NAMES: dict[str, tuple[str, ...]] = {
    field: tuple(names.split())
    for field, names in {
        "prompt": "prompt",
        "messages": "messages",
        "time": "timestamp ts time seconds arrival_time start_time created created_at started_at",
        "session": "session_id session conversation_id conversation chat_id thread_id",
        "answer": "answer response output completion response_body reply generated_text",
        "length": "output_tokens completion_tokens answer_tokens output_length "
        "max_tokens max_completion_tokens max_output_tokens",
        "model": "model",
        "system": "system",
        "tools": "tools",
        "tenant": "cache_salt tenant tenant_id namespace",
        "status": "status_code status",
    }.items()
}
"""Fields of a record and the names that contain them. The first name with a value counts."""
OF_MESSAGES = ("session", "time", "system", "tools", "model", "tenant", "status")
"""Fields that a record of a single message may have."""
CALLS = {"tool_calls": list, "function_call": dict}
"""Fields of a single message that may be JSON text, as in a CSV file."""
ABSENT = {
    "time": "one second between records",
    "session": "prompts that continue another",
    "answer": "unknown",
}
"""Rules of the fields that a record of a request does not have."""
BODIES = ("request", "request_body", "body")
"""Names of an object that holds the fields of a request."""
SPELLINGS = {
    name.replace("_", ""): name
    for name in (
        *("role", "content", "reasoning_content", *CALLS, *BODIES),
        *(each for names in NAMES.values() for each in names),
    )
}
"""Names of fields by their letters."""
FEWEST = 10
"""Requests without any continued prompt from which on a warning is given."""
FAILED = "of failed requests left out (status 400 or more, error or failed)"
WHOLE = (
    "without an answer end with an assistant's message: if each is a whole conversation, and its "
    "assistant's messages are the answers, read the file as conversations:FILE"
)
NOT_CONTINUED = (
    "most prompts do not begin with an earlier prompt of their session: a prompt must be the whole "
    "text that was sent to the model, earlier turns included"
)


def spelled(record: Record, kept: Collection[str] = ()) -> Record:
    """Return ``record`` with the names of ``SPELLINGS`` for those that differ from them in case,
    underscores, hyphens or spaces only. Names in ``kept``, and a second one for a field, stay."""
    names = dict[str, str]()
    for name in record:
        usual = _usual(name)
        is_free = name not in kept and usual not in record and usual not in names
        names[usual if is_free else name] = name
    return Record((usual, record[name]) for usual, name in names.items())


@cache
def _usual(name: str) -> str:
    return SPELLINGS.get(re.sub(r"[\s_-]", "", name).lower(), name)


class Named(Record):
    """Fields of a record under the names of ``NAMES``. JSON and numbers as text are decoded."""

    def __init__(self, record: Record, names: dict[str, str]) -> None:
        """``names`` are those that the user gave. Raises ValueError if one of them is missing."""
        record = spelled(record, names.values())
        body = None if {"messages", "prompt"} & record.keys() else record.first(BODIES)
        inner = _json(record[body], dict) if body else None
        if isinstance(inner, dict):
            outer = {name: each for name, each in record.items() if name != body}
            record = Record(spelled(Record(inner), names.values()) | outer)
        self.record = record
        self.used: dict[str, str] = {}
        for field, known in NAMES.items():
            own = names.get(field)
            if own and own not in record:
                raise ValueError(f"there is no column {own!r}; it has {', '.join(record)}")
            if found := record.first((own,) if own else known):
                self.used[field], self[field] = found, _decoded(field, record[found])
        if "messages" in self:  # One of both is read.
            other = "messages" if names.get("prompt") else "prompt"
            for fields in (self, self.used):
                fields.pop(other, None)
        self.has_prompt = bool({names.get("prompt") or "prompt", "messages"} & record.keys())
        """True if it has a prompt or messages, which may be null."""
        self.is_message = "role" in record and not self.has_prompt

    def time_s(self, clock: TraceClock) -> float:
        """Return the time in seconds, of the next record of ``clock``."""
        when = clock.at(self, "time" if "time" in self else None)
        if isinstance(self.get("time"), str):
            return when
        return when / next((unit for above, unit in SINCE_1970 if when > above), 1.0)

    @property
    def has_failed(self) -> bool:
        """True if the status is 400 or more, ``error`` or ``failed``."""
        status = str(self.get("status"))
        number = re.match(r"\s*(\d{1,9})", status)  # "429 Too Many Requests" is 429
        return int(number[1]) >= 400 if number else status.lower() in ("error", "failed")

    def message(self) -> Record:
        """Return a single message. Calls that are JSON text are decoded."""
        message = Record(self.record)
        for name, kind in CALLS.items():
            if name in message:
                value = _json(message[name], kind)
                message[name] = None if value == "null" else value
        return message

    def describe(self) -> str:
        """Return the names that are read for each field, and the rules for those without one."""
        if self.is_message:
            own = ("role", "content", *CALLS)
            found = [f"{name}={name}" for name in own if name in self.record]
            found += [f"{name}={self.used[name]}" for name in OF_MESSAGES if name in self.used]
            return f"{', '.join(found)} (an answer is a request after all messages of its session)"
        found = [f"{name}={column}" for name, column in self.used.items()]
        known = self.used.keys() | ({"answer"} if "length" in self.used else set())
        found += [f"{name}=none ({rule})" for name, rule in ABSENT.items() if name not in known]
        return ", ".join(found)

    def namespace(self) -> str | None:
        """Return a name for model and tenant; None if there is neither."""
        parts = {"model": self.get("model"), "cache_salt": self.get("tenant")}
        parts = {name: value for name, value in parts.items() if value is not None}
        is_plain = set(parts) == {"model"} and isinstance(parts["model"], str)
        return parts["model"] if is_plain else json.dumps(parts) if parts else None


def _decoded(field: str, value: Any) -> Any:
    if field in ("time", "length") and isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    if field in ("messages", "tools"):
        return _json(value, list)
    response = _json(value, dict) if field == "answer" else None
    return response if isinstance(response, dict) and is_response(response) else value


def _json(value: Any, kind: type) -> Any:
    """Return ``value``, decoded if it is the JSON text of an object, or of a list of objects."""
    with suppress(ValueError, RecursionError):
        inner = json.loads(value) if isinstance(value, str) else None
        is_list = isinstance(inner, list) and all(isinstance(each, dict) for each in inner)
        return inner if isinstance(inner, kind) and (is_list or kind is dict) else value
    return value


class Continued:
    """Sessions of prompts without one: a prompt continues the last prompt that it begins with."""

    def __init__(self) -> None:
        self._last: SortedDict[str, int] = SortedDict()
        self.count = 0

    def session(self, said: str) -> tuple[int, bool]:
        """Return the number of the session, and True if it is continued."""
        place = self._last.bisect_left(said)
        while place:
            before: str = self._last.keys()[place - 1]
            if said.startswith(before):
                self._last[said] = session = self._last.pop(before)
                return session, True
            low = bisect_left(  # length of the common beginning
                range(len(before)), True, key=lambda end: not said.startswith(before[: end + 1])
            )
            place = min(place - 1, self._last.bisect_right(said[:low]))
        self.count += 1
        self._last[said] = self.count
        return self.count, False


class Conversation:
    """Messages of a session so far. Each answer is a request whose prompt is all of them."""

    def __init__(self, chat: ChatText, session: str | int) -> None:
        self._chat, self._session = chat, session
        self.said: Chat = []
        self.num_unanswered = 0
        self._before_s: float | None = None
        self._asked_s = -math.inf

    def add(
        self, message: dict[str, str], record: Record, now_s: float | None
    ) -> TraceRequest | None:
        """Add a message at ``now_s``, if it has a time. Return its request if it is an answer, at
        the time of the message before it. ValueError if that is before the last request's."""
        request = None
        if message["role"] == "assistant" and self.said:
            request = self._chat.turn(self.said, message["content"], tools=True)
            reason = "tool_use" if record.get("tool_calls") else "end_turn"
            request = request._replace(session=self._session, stop_reason=reason)
            if now_s is not None:
                asked_s = now_s if self._before_s is None else self._before_s
                if asked_s < self._asked_s:
                    raise ValueError("its messages are not in order of time")
                self._asked_s, service_s = asked_s, max(0.0, now_s - asked_s)
                request = request._replace(timestamp_s=asked_s, service_s=service_s)
        self.num_unanswered = 0 if message["role"] == "assistant" else self.num_unanswered + 1
        self.said.append(message)
        self._before_s = now_s
        return request


class PromptParser:
    """Converts records to requests, and assembles single messages to prompts."""

    def __init__(self, chat: ChatText, names: dict[str, str], notes: Notes) -> None:
        self._chat, self._names, self._notes = chat, names, notes
        self._fresh, self._clock, self._continued = FreshIds(), TraceClock(), Continued()
        self._last: dict[str | int, tuple[int, int, float]] = {}
        """Length, hash and time of the last prompt of a named session."""
        self._unread = set[str]()
        self._num_requests = self._num_answers = self._num_later = self._num_continued = 0
        self._conversations = dict[str | int, Conversation]()

    def parse(self, raw: Record) -> Iterator[TraceRequest]:
        """Yield the request of a record; none if it failed, or is a message without an answer."""
        record = Named(raw, self._names)
        if record.has_failed:
            self._notes.count(FAILED, "record")
            return
        if record.is_message:
            yield from self._message(record)
            return
        session = record.optional(record.key, "session", None)
        session = None if session == "" else session  # as the empty field of a CSV
        request, said = self._request(record)
        now, namespace = record.time_s(self._clock), record.namespace()
        given = {name for name, value in record.record.items() if value is not None}
        self._unread |= given - {*record.used.values()}
        request = request._replace(session=self._session(session, namespace, said, now))
        yield request._replace(timestamp_s=now, namespace=namespace)

    def _session(
        self, name: str | int | None, namespace: str | None, said: str, now_s: float
    ) -> Hashable:
        """Return the session of the next prompt: ``name``, or by its text if that is None."""
        self._num_requests += 1
        if name is None:
            number, continues = self._continued.session(f"{namespace}\0{said}")
            self._num_continued += continues
            return f"unnamed {number}"
        size, digest, before_s = self._last.get(name, (0, 0, -math.inf))
        if now_s >= before_s:
            self._num_later += size > 0
            self._num_continued += size > 0 and hash(said[:size]) == digest
            self._last[name] = len(said), hash(said), now_s
        return name

    def _request(self, record: Named) -> tuple[TraceRequest, str]:
        """Return the request without session and time, and its prompt as one text."""
        answer, length, reason = answer_of(record.get("answer"))
        self._num_answers += answer is not None
        if answer is None and not length and "length" in record:
            length = record.whole("length")
        if "messages" in record:
            messages = [spelled(message) for message in record.objects("messages")]
            said = plain_chat(messages, record.get("system"), record.get("tools"))
            if answer is None and said[-1]["role"] == "assistant":
                self._notes.count(WHOLE, "prompt")
            request = self._chat.turn(said, answer or "", tools=True, is_cut=reason == "length")
            # A text that begins with the text of every earlier part of the chat.
            text = "".join(f"{one['role']}\x1f{one['content']}\x1e" for one in said)
        elif not record.has_prompt:
            names = ", ".join(record.record) or "no field"
            raise ValueError(f"there is no prompt in it ({names}): name it as in ?prompt=NAME")
        else:
            prompt = record.get("prompt") or ""
            is_text = isinstance(prompt, str)
            text = prompt if is_text else ""
            ids = self._chat.encode(prompt) if is_text else Record(prompt=prompt).ids("prompt")
            if not len(ids):
                raise ValueError("the prompt is empty")
            request = TraceRequest(0.0, "", None, ids, self._chat.encode(answer or ""))
        if answer is None:
            request = request._replace(output=self._fresh.take(length))
        return request._replace(stop_reason=reason), text

    def _message(self, record: Named) -> Iterator[TraceRequest]:
        """Add a message to the conversation of its session; yield a request if it is an answer."""
        session, message = record.key("session"), record.message()
        conversation = self._conversations.get(session) or Conversation(self._chat, session)
        is_first = not conversation.said
        leading = (record.get("system"), record.get("tools")) if is_first else ()
        *system, said = plain_chat([message], *leading)
        now_s, namespace = record.time_s(self._clock), record.namespace()
        conversation.said += system
        request = conversation.add(said, message, now_s if "time" in record else None)
        self._conversations[session] = conversation
        if request is not None:
            self._num_requests += 1
            self._num_answers += 1
            when_s = request.timestamp_s if "time" in record else now_s
            yield request._replace(timestamp_s=when_s, namespace=namespace)

    def end(self) -> None:
        """Note unanswered messages, prompts that continue no other, and a file without answers."""
        unanswered = sum(one.num_unanswered for one in self._conversations.values())
        self._notes.count("without an answer left out", "message", unanswered)
        is_new = not self._last and self._continued.count >= FEWEST and not self._num_continued
        if is_new or self._num_later > 2 * self._num_continued:
            self._notes.say(NOT_CONTINUED)
        if self._unread and not self._num_answers and self._num_requests:
            names = ", ".join(sorted(self._unread))
            self._notes.say(
                f"no answer was found; name its field as in ?answer=NAME: {names} are not read"
            )


@dataclass(frozen=True, slots=True)
class MessagesReader(FileReader):
    """JSON lines of requests, or of single messages."""

    word: ClassVar[str] = "messages"
    tokenizer: str = ""
    template: str = "chatml"
    prompt: str = ""
    """Name of the field of prompts in a file with other names; so are the next five."""
    time: str = ""
    session: str = ""
    answer: str = ""
    length: str = ""
    tenant: str = ""
    """Name of the field of tenants. Prompts of different tenants share no prefix."""

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has messages, a prompt, or a role with a content."""
        named = Named(record, {})
        return named.has_prompt or (named.is_message and "content" in named.record)

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[TraceRequest]]:
        parser = PromptParser(load_chat_text(self.tokenizer, self.template), self._names, notes)
        notes.at_end = parser.end
        return parser.parse

    def ordered(self, found: Iterator[tuple[Line, Any]]) -> Iterator[TraceRequest]:
        """Yield the requests in order of time, which counts from the first."""
        began_s: float | None = None
        for request in FileReader.ordered(self, found):
            began_s = request.timestamp_s if began_s is None else began_s
            yield request._replace(timestamp_s=request.timestamp_s - began_s)

    @property
    def _names(self) -> dict[str, str]:
        fields = ("prompt", "time", "session", "answer", "length", "tenant")
        return {name: getattr(self, name) for name in fields}

    def describe(self) -> str:
        """Return the names that are read for each field in the first hundred records."""
        merged = Record()
        for _, record in islice(self.records(BadRecords(skip=True)), 100):
            missing = (name for name in record if merged.get(name) is None)
            merged |= {name: record[name] for name in missing}
        try:
            return Named(merged, self._names).describe() if merged else ""
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None


@dataclass(frozen=True, slots=True)
class CsvReader(MessagesReader):
    """Comma-separated values, a request or a message per row."""

    word: ClassVar[str] = "csv"
    is_csv: ClassVar[bool] = True

    def records(self, bad: BadRecords) -> Iterator[tuple[int, Record]]:
        """Yield (line, row). Empty fields are None."""
        for line, row in csv_lines(self.path, bad):
            yield line, Record((name, value or None) for name, value in row.items())
