"""Prompts as texts: rows of a CSV file or JSON lines, in the tokens of a named tokenizer.

A record is one of three kinds:

- a request: ``prompt`` (the whole text sent to the model) or ``messages`` (OpenAI's or
  Anthropic's), possibly inside of ``request``, ``request_body`` or ``body``;
- a single message: ``role``, ``content`` and a session; each answer of an assistant is a request
  whose prompt is all messages of the session before it;
- a whole conversation: ``messages`` that end with an answer (fine-tuning files); see
  ``ConversationsReader``.

``FIELDS`` has the names under which time, session, answer and others are found. Times are seconds,
milliseconds since 1970 if above 10**11, or ISO 8601, and count from the first request. Without a
session, a prompt continues the session whose last prompt it begins with. Failed requests
(``status`` of 400 or more) are left out. Fields that are not read are named, with counts.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, ClassVar

from sortedcontainers import SortedDict

from hybridcache.lab.arrivals import Pauses, Poisson, Starts, interleave
from hybridcache.lab.trace import BadRecords, FreshIds, TraceRequest
from hybridcache.lab.traces.base import (
    COUNTS_ALONE,
    LONGEST,
    FileReader,
    Record,
    TraceClock,
    TraceFieldsWarning,
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
    text,
    whole,
)
from hybridcache.lab.traces.messages import message_text, plain_chat
from hybridcache.lab.traces.text import ChatText, load_chat_text
from hybridcache.tokens import Tokens

FIELDS = {
    "prompt": ("prompt",),
    "messages": ("messages",),
    "role": ("role",),
    "content": ("content",),
    "time": (
        *("timestamp", "ts", "time", "seconds", "arrival_time", "start_time", "created"),
        "created_at",
    ),
    "session": (
        *("session_id", "session", "conversation_id", "conversation", "chat_id"),
        "thread_id",
    ),
    "answer": (
        *("answer", "response", "output", "completion", "response_body", "reply"),
        "generated_text",
    ),
    "length": (
        *("output_tokens", "completion_tokens", "answer_tokens", "output_length"),
        *("max_tokens", "max_completion_tokens", "max_output_tokens"),
    ),
    "model": ("model",),
    "system": ("system",),
    "tools": ("tools",),
    "tenant": ("cache_salt", "tenant", "tenant_id", "namespace"),
    "status": ("status_code", "status"),
}
"""Fields of a record and the names that contain them. The first name with a value counts."""
BODIES = ("request", "request_body", "body")
"""Names of an object that holds the fields of a request."""
PARAMETERS = frozenset(
    (
        *("id", "object", "user", "n", "seed", "stop", "stream", "stream_options", "type", "index"),
        *("temperature", "top_p", "top_k", "logprobs", "metadata", "tool_choice", "request_id"),
        *("response_format", "presence_penalty", "frequency_penalty"),
    )
)
"""Names without a meaning for a cache. They are not counted as unread fields."""
ABSENT = {
    "time": "one second between records",
    "session": "prompts that continue another",
    "answer": "unknown",
}
"""Rules for fields that are absent."""
STOP_REASONS = {
    "stop": "end_turn",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "max_tokens": "length",
    **{reason: reason for reason in ("end_turn", "tool_use", "stop_sequence", "length")},
}
"""Stop reasons of a trace, by those of OpenAI's and Anthropic's answers."""
FEWEST = 10
"""Requests without any continued prompt from which on a warning is given."""
WHOLE_TEXT = "a prompt must be the whole text that was sent to the model, earlier turns included"


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
    unit: int = 1

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has messages, a prompt, or a role with a content."""
        body = _flat(record)
        return _asks(body) or ("role" in body and "content" in body)

    def __call__(self) -> Iterator[TraceRequest]:
        parser = _Parser(self, load_chat_text(self.tokenizer, self.template))
        return parser.checked(in_order(self.path, self.records(self.bad), parser.parse, self.bad))

    def records(self, bad: BadRecords) -> Iterator[tuple[int, Record]]:
        """Yield (line, record); fields of the body and of the record are in one object."""
        return ((line, _flat(record)) for line, record in json_lines(self.path, bad))

    def describe(self) -> str:
        """Return the names that are read for each field in the first record.

        Raises ValueError if there is nothing to read, or if all prompts of a CSV file are whole
        numbers.
        """
        first = next(self.records(BadRecords(skip=True)), (0, None))[1]
        if first is None:
            return ""
        try:
            used = self.used(first)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        if not _asks(used) and not {"role", "content"} <= used.keys():
            raise ValueError(
                f"{self.path}: there is no column prompt or messages ({', '.join(first)}): name "
                f"it as in {self.word}:{self.path}?prompt=COLUMN. {COUNTS_ALONE}"
            )
        found = [f"{name}={column}" for name, column in used.items()]
        if "role" in used and not _asks(used):
            return f"{', '.join(found)} (an answer is a request after all messages of its session)"
        missing = {name for name in ABSENT if name not in used}
        if "length" in used:
            missing -= {"answer"}
        found += [f"{name}=none ({rule})" for name, rule in ABSENT.items() if name in missing]
        return ", ".join(found)

    def used(self, record: Record) -> dict[str, str]:
        """Return the name of each field that ``record`` has. ValueError if a name that the user
        gave is missing."""
        own = {"prompt": self.prompt, "time": self.time, "session": self.session}
        own |= {"answer": self.answer, "length": self.length, "tenant": self.tenant}
        used = {}
        for name, known in FIELDS.items():
            named = own.get(name)
            if named and named not in record:
                raise ValueError(f"there is no column {named!r}; it has {', '.join(record)}")
            if found := first_named(record, (named,) if named else known):
                used[name] = found
        if self.prompt:
            used.pop("messages", None)
        return used


@dataclass(frozen=True, slots=True)
class CsvReader(MessagesReader):
    """Comma-separated values, a request or a message per row."""

    word: ClassVar[str] = "csv"
    is_csv: ClassVar[bool] = True

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether there is a column of prompts, of messages, or of roles and contents."""
        return _asks(record) or ("role" in record and "content" in record)

    def records(self, bad: BadRecords) -> Iterator[tuple[int, Record]]:
        """Yield (line, row). Empty fields are None, except for an empty prompt."""
        for line, row in csv_lines(self.path, bad):
            yield line, {name: value or None for name, value in row.items()}

    def describe(self) -> str:
        lines = csv_lines(self.path, BadRecords(skip=True))
        first = next(lines, (0, None))[1]
        if first is None:
            return ""
        if len(first) == 1 and ";" in next(iter(first)):
            raise ValueError(f"{self.path}: its columns are separated by semicolons: use commas")
        told = MessagesReader.describe(self)
        column = self.prompt or "prompt"
        if column in first and "messages" not in first:
            texts = (row[column].strip() for row in chain([first], (row for _, row in lines)))
            if first[column] and all(each.isdecimal() for each in texts if each):
                raise ValueError(
                    f"{self.path}: all prompts in column {column!r} are whole numbers, as "
                    f"{first[column]!r}. {COUNTS_ALONE}"
                )
        return told


@dataclass(frozen=True, slots=True)
class ConversationsReader(FileReader):
    """JSON lines of whole conversations, ``{"messages": [..., answer]}``, as for fine-tuning.

    Every answer is a request. Sessions arrive by ``starts``, and turns follow after ``pauses``.
    """

    word: ClassVar[str] = "conversations"
    tokenizer: str = ""
    template: str = "chatml"
    starts: Starts = field(default_factory=lambda: Poisson(1.0))
    pauses: Pauses = field(default_factory=Pauses)
    seed: int = 0
    unit: int = 1

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the messages end with an answer, and no other answer is in the record."""
        said = record.get("messages")
        last = said[-1] if isinstance(said, list) and said else None
        is_whole = isinstance(last, dict) and last.get("role") in ("assistant", "model")
        return is_whole and first_named(record, FIELDS["answer"]) is None

    def __call__(self) -> Iterator[TraceRequest]:
        return interleave(self._sessions(), self.starts, self.pauses, seed=self.seed)

    def _sessions(self) -> Iterator[list[TraceRequest]]:
        chat, number = load_chat_text(self.tokenizer, self.template), 0

        def parse(record: Record) -> Iterator[list[TraceRequest]]:
            nonlocal number
            number += 1
            yield answered(objects(record, "messages"), number, chat, record.get("tools"))

        return parsed(self.path, json_lines(self.path, self.bad), parse, self.bad)


def answered(
    messages: list[Record], session: str | int, chat: ChatText, tools: Any = None
) -> list[TraceRequest]:
    """Return a request for every answer in a conversation, without times."""
    found = []
    for number, message in enumerate(messages):
        if number and text(message, "role") in ("assistant", "model"):
            said = plain_chat(messages[:number], None, tools)
            reason = "tool_use" if message.get("tool_calls") else "end_turn"
            turn = chat.turn(said, message_text(message), tools=True)
            found.append(turn.request(session)._replace(stop_reason=reason))
    return found


class _Parser:
    """Converts records to requests, and counts what cannot be used."""

    def __init__(self, reader: MessagesReader, chat: ChatText) -> None:
        self._reader, self._chat = reader, chat
        self._fresh, self._clock, self._continued = FreshIds(), TraceClock(), _Continued()
        self._began_s: float | None = None
        self._said: dict[str | int, list[dict[str, str]]] = {}
        self._asked_s: dict[str | int, float] = {}
        self._last: dict[str | int, tuple[int, int]] = {}
        """Length and hash of the last prompt of a named session."""
        self._unread: Counter[str] = Counter()
        self._num_requests = self._num_later = self._num_continued = self._num_answers = 0

    def parse(self, record: Record) -> Iterable[TraceRequest]:
        """Return the requests of a record; none if it failed, or is a message of a user."""
        used = self._reader.used(record)
        with suppress(TypeError, ValueError):
            if float(_value(record, used, "status") or 0) >= 400:
                return
        names = {name for name, value in record.items() if value is not None and name}
        self._unread.update(names - {*used.values()} - PARAMETERS)
        when_s = self._time(record, used)
        if "role" in used and "messages" not in used and "prompt" not in used:
            yield from self._single(record, used, when_s)
            return
        request, said = self._request(record, used)
        namespace = _namespace(record, used)
        if "session" in used:
            session = key(record, used["session"])
            size, digest = self._last.get(session, (0, 0))
            if size:
                self._num_later += 1
                self._num_continued += hash(said[:size]) == digest
            self._last[session] = len(said), hash(said)
        else:
            session, continues = self._continued.session(f"{namespace}\0{said}")
            self._num_continued += continues
        self._num_requests += 1
        now = self._clock.at(when_s)
        yield request._replace(timestamp_s=now, session=session, namespace=namespace)

    def _request(self, record: Record, used: dict[str, str]) -> tuple[TraceRequest, str]:
        """Return the request without session and time, and its prompt as one text."""
        answer, length, reason = answer_of(decoded(_value(record, used, "answer")))
        self._num_answers += answer is not None
        if answer is None and not length and "length" in used:
            length = _count(record, used["length"])
        if "messages" in used:
            messages = objects({"messages": decoded(record[used["messages"]])}, "messages")
            system, tools = _value(record, used, "system"), _value(record, used, "tools")
            chat = plain_chat(messages, system, decoded(tools))
            turn = self._chat.turn(chat, answer or "", tools=True, is_cut=reason == "length")
            asked, said = turn.request(""), _joined(chat)
        else:
            prompt = record[used["prompt"]] if "prompt" in used else ""
            said = prompt if isinstance(prompt, str) else ""
            ids = self._prompt(prompt)
            asked = TraceRequest(0.0, "", None, ids, self._chat.encode(answer or ""))
        asked = asked._replace(stop_reason=reason)
        return asked if answer is not None else asked._replace(
            output=self._fresh.take(length)
        ), said

    def _prompt(self, prompt: Any) -> Tokens:
        if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, list) and any(isinstance(part, str) for part in prompt):
            raise ValueError("several prompts in one request are not read")
        ids = self._chat.encode(prompt) if isinstance(prompt, str) else read_ids(prompt)
        if not len(ids):
            raise ValueError("the prompt is empty")
        return ids

    def _single(
        self, record: Record, used: dict[str, str], when_s: float | None
    ) -> Iterable[TraceRequest]:
        """Add one message to its session; return a request if it is an answer."""
        if "session" not in used:
            raise ValueError("a single message needs a session: name its field with session=")
        session, now = key(record, used["session"]), self._clock.at(when_s)
        [message] = plain_chat([{"role": record["role"], "content": decoded(record["content"])}])
        before = self._said.setdefault(session, [])
        if message["role"] == "assistant" and before:
            asked_s = self._asked_s.get(session, now)
            turn = self._chat.turn(before, message["content"], tools=True)
            service_s = None if when_s is None else now - asked_s
            self._num_requests += 1
            self._num_answers += 1
            namespace = _namespace(record, used)
            yield turn.request(session)._replace(
                timestamp_s=asked_s, namespace=namespace, service_s=service_s
            )
        self._said[session] = [*before, message]
        self._asked_s[session] = now

    def _time(self, record: Record, used: dict[str, str]) -> float | None:
        """Return seconds since the first request; None without a time."""
        name = used.get("time")
        if name is None:
            return None
        said = record[name]
        with suppress(ValueError, TypeError):
            said = float(said) if isinstance(said, str) else said
        when_s = moment({name: said}, name)
        when_s = when_s / 1000 if when_s > 1e11 and not isinstance(said, str) else when_s
        if self._began_s is None:
            self._began_s = when_s
        return when_s - self._began_s

    def checked(self, requests: Iterable[TraceRequest]) -> Iterator[TraceRequest]:
        """Yield ``requests`` with times from the first one on, then warn about unusable data."""
        shift_s: float | None = None
        for request in requests:
            if shift_s is None:
                shift_s = max(0.0, -request.timestamp_s)
            yield request._replace(timestamp_s=request.timestamp_s + shift_s)
        if problems := list(self._problems()):
            path = self._reader.path
            warnings.warn(
                TraceFieldsWarning(f"{path}: {'; '.join(problems)}"), stacklevel=callers_level()
            )

    def _problems(self) -> Iterator[str]:
        """Describe what was not used, with counts."""
        unanswered = sum(said[-1]["role"] != "assistant" for said in self._said.values())
        if unanswered:
            yield f"{unanswered:,} messages without an answer are no requests"
        if self._num_later > 2 * self._num_continued and self._num_later:
            missed = self._num_later - self._num_continued
            yield (
                f"{missed:,} of {self._num_later:,} later prompts of a session do not begin with "
                f"the prompt before: {WHOLE_TEXT}"
            )
        elif self._continued.count >= FEWEST and not self._num_continued:
            yield (
                f"no prompt begins with an earlier one, so {self._num_requests:,} requests are "
                f"{self._continued.count:,} sessions: {WHOLE_TEXT}"
            )
        if self._unread and not self._num_answers and self._num_requests:
            names = ", ".join(f"{name} ({count:,})" for name, count in self._unread.most_common())
            yield (
                f"no answer was found, and these fields are not read: {names}; name one as in "
                f"{self._reader.word}:{self._reader.path}?answer={self._unread.most_common(1)[0][0]}"
            )


class _Continued:
    """Sessions of prompts without one: a prompt continues the session whose last prompt it begins
    with, and is longer than."""

    def __init__(self) -> None:
        self._last: SortedDict[str, int] = SortedDict()
        self.count = 0
        """Number of sessions."""

    def session(self, said: str) -> tuple[int, bool]:
        """Return the number of the session, and True if it is continued. O(length + log n), times
        the number of sorted neighbours that are tried, which is small."""
        place = self._last.bisect_left(said)
        while place:
            before: str = self._last.keys()[place - 1]
            if said.startswith(before):
                self._last[said] = session = self._last.pop(before)
                return session, True
            common = commonprefix_len(before, said)
            place = min(place - 1, self._last.bisect_right(said[:common]))
        self.count += 1
        self._last[said] = self.count
        return self.count, False


def commonprefix_len(first: str, second: str) -> int:
    """Return the number of leading characters that two texts share. O(n) in slices."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def answer_of(response: Any) -> tuple[str | None, int, str]:
    """Return (text, number of tokens, stop reason) of an answer.

    ``response`` is a text, a message, or a whole response of OpenAI's or Anthropic's APIs. The text
    is None, the number 0 and the reason empty if the response does not contain them.
    """
    if isinstance(response, str):
        if response.startswith(("data:", "event:")):
            raise ValueError("an answer is a stream of events: log its text instead")
        return response, 0, ""
    if not isinstance(response, dict):
        return None, 0, ""
    choices = response.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else {}
    choice = choice if isinstance(choice, dict) else {}
    said = response.get("stop_reason") or choice.get("finish_reason")
    reason = STOP_REASONS.get(said, "") if isinstance(said, str) else ""
    message = response if "content" in response else choice.get("message")
    if isinstance(message, dict):
        return message_text(message), 0, reason
    if isinstance(choice.get("text"), str):
        return choice["text"], 0, reason
    usage = response.get("usage")
    counts = usage if isinstance(usage, dict) else {}
    length = counts.get("completion_tokens", counts.get("output_tokens"))
    return None, length if isinstance(length, int) and 0 <= length <= LONGEST else 0, reason


def _flat(record: Record) -> Record:
    """Return the fields of a request and of its body in one object."""
    name = first_named(record, BODIES)
    body = None if name is None or _asks(record) else decoded(record[name])
    if name is None or not isinstance(body, dict):
        return record
    return body | {field: value for field, value in record.items() if field != name}


def _value(record: Record, used: dict[str, str], name: str) -> Any:
    return record[used[name]] if name in used else None


def _asks(fields: Record) -> bool:
    return "messages" in fields or "prompt" in fields


def _joined(chat: list[dict[str, str]]) -> str:
    """Return a chat as a text that begins with the text of every earlier part of it."""
    return "".join(f"{message['role']}\x1f{message['content']}\x1e" for message in chat)


def _count(record: Record, name: str) -> int:
    value = record[name]
    with suppress(ValueError, TypeError):
        value = float(value) if isinstance(value, str) else value
    return whole({name: value}, name)


def _namespace(record: Record, used: dict[str, str]) -> str | None:
    """Return a name for model and tenant; None if there is neither."""
    names = {"model": used.get("model"), "cache_salt": used.get("tenant")}
    parts = {part: record[name] for part, name in names.items() if name is not None}
    is_plain = set(parts) == {"model"} and isinstance(parts["model"], str)
    return parts["model"] if is_plain else json.dumps(parts) if parts else None
