"""Named fields of records with texts (a request, or a single message), and sessions of prompts.

``docs/reference/traces.md`` has the fields, and the rules for those that a file does not have.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import groupby, islice
from typing import Any, ClassVar

import numpy as np
from sortedcontainers import SortedDict

from hybridcache.adapters.client_habits import DETAILS, THOUGHTS, line_of
from hybridcache.lab.traces.dialects import ROLES, Chat, answer_of, is_response, plain_chat
from hybridcache.lab.traces.frame import FEWEST, TIMES, FileReader, Line, Notes, Record, Records
from hybridcache.lab.traces.text import ChatText
from hybridcache.lab.traces.trace import UNNAMED, BadRecords, FreshIds, TraceRequest

NAMES: dict[str, tuple[str, ...]] = {
    field: tuple(names.split())
    for field, names in {
        "prompt": "prompt",
        "messages": "messages",
        "time": " ".join(TIMES),
        "session": "session_id session conversation_id conversation chat_id thread_id",
        "answer": "answer response output completion response_body reply generated_text",
        "length": "output_tokens completion_tokens answer_tokens output_length "
        "max_tokens max_completion_tokens max_output_tokens",
        "model": "model",
        "system": "system instructions",
        "tools": "tools",
        "tenant": "cache_salt tenant tenant_id namespace",
        "status": "status_code status",
    }.items()
}
"""Fields of a record and the names that contain them. The first name with a value counts."""


def messages_of(given: object) -> object:
    """Return the messages of an ``input`` of the Responses API: a text, or items. Thoughts are left
    out: servers omit them from prompts."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not _are_objects(given) or not isinstance(given, list):
        return given
    found = []
    for item in given:
        kind = item.get("type", "message")
        if kind == "function_call":
            call = {"name": item.get("name"), "arguments": item.get("arguments")}
            found.append({"role": "assistant", "content": "", "tool_calls": [{"function": call}]})
        elif kind == "function_call_output":
            found.append({"role": "tool", "content": item.get("output")})
        elif kind != "reasoning":
            line = line_of(item)
            found.append({"role": "assistant", "content": line} if line is not None else item)
    return found


BODIES = ("request", "request_body", "body")
"""Names of an object that holds the fields of a request."""
RESPONSE = "choices", "content", "stop_reason", "usage"
"""Fields of a response that is part of the record of its request."""
OF_MESSAGE = ("role", "content", "tool_calls", "function_call")
"""Names of the fields of a single message."""
ABSENT = {
    "time": "one second between records",
    "session": "prompts that continue another",
    "answer": "unknown",
}
"""Rules of the fields that a record of a request does not have."""
SPELLINGS = {
    name.replace("_", ""): name
    for names in (OF_MESSAGE, (*THOUGHTS, DETAILS), BODIES, *NAMES.values())
    for name in names
}
"""Names of fields by their letters."""
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


def messages_in(record: Record, name: str) -> list[Record]:
    """Return the messages of a list, whose entries have a role and a content (``from`` and
    ``value`` in ShareGPT), or a text for each role."""
    found = list[Record]()
    for one in record.objects(name):
        if one and one.keys() <= ROLES.keys():
            found += [Record(role=role, content=text) for role, text in one.items()]
        else:
            usual = {"from": "role", "value": "content"}
            found.append(spelled(Record({usual.get(key, key): one[key] for key in one})))
    return found


@cache
def _usual(name: str) -> str:
    return SPELLINGS.get(re.sub(r"[\s_-]", "", name).lower(), name)


def _are_objects(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(type(one) is dict for one in value))


IN_JSON = ("messages", "tools", "tool_calls", "function_call", "metadata", *BODIES)
"""Fields that may be JSON text, as in a CSV file; so may an answer that is a response."""


def _decoded(field: str, value: object) -> object:
    """Return the value of a field. JSON as text is decoded."""
    if isinstance(value, str) and field in (*IN_JSON, "answer"):
        with suppress(ValueError, RecursionError):
            inner = json.loads(value)
            return inner if field != "answer" or is_response(inner) else value
    return value


def _inside(value: object, name: str) -> object:
    """Return the value of a field in objects, as in ``metadata.user``. ValueError if it is
    missing."""
    place, *parts = name.split(".")
    for part in parts:
        if not isinstance(value, dict) or part not in value:
            known = f"has {', '.join(value)}" if isinstance(value, dict) else "is no object"
            raise ValueError(f"there is no column {name!r}; {place} {known}")
        place, value = f"{place}.{part}", value[part]
    return value


def of_coding_session(record: Record) -> Record:
    """Return a line of Claude Code's session files as a single message; another one unchanged. The
    messages of each subagent are a session of their own."""
    message = record.get("message")
    if "sessionId" not in record or not isinstance(message, dict) or "role" not in message:
        return record
    found = Record({name: record[name] for name in ("timestamp",) if name in record})
    found |= {"role": message["role"], "content": message.get("content")}
    agent = f"/{record.get('agentId') or 'subagent'}" if record.get("isSidechain") else ""
    return Record(found, session=f"{record['sessionId']}{agent}")


def joined(records: Records) -> Records:
    """Yield records; the content of lines that follow each other with the same ``message.id`` is
    joined in the first."""

    def name_of(numbered: tuple[Line, dict[str, Any]]) -> object:
        message = numbered[1].get("message")
        has_parts = isinstance(message, dict) and isinstance(message.get("content"), list)
        return message.get("id") if has_parts else None  # type: ignore[union-attr]

    for name, parts in groupby(records, name_of):
        for line, record in parts:
            if name is not None:
                said: Any = record["message"]
                others: Iterator[Any] = (one["message"] for _, one in parts)
                said["content"] = [one for each in (said, *others) for one in each["content"]]
            yield line, record


class Named(Record):
    """Fields of a record under the names of ``NAMES``."""

    def __init__(self, record: Record, names: dict[str, str]) -> None:
        """``names`` are those that the user gave. Raises ValueError if one of them is missing."""
        record = spelled(of_coding_session(record), names.values())
        body = None if {"messages", "prompt"} & record.keys() else record.first(BODIES)
        inner = _decoded(body, record[body]) if body else None
        if isinstance(inner, dict):
            outer = {name: each for name, each in record.items() if name != body}
            record = Record(spelled(Record(inner), names.values()) | outer)
        self.record = record
        self.used: dict[str, str] = {}
        """Name of each field in the record."""
        for field, known in NAMES.items():
            own = names.get(field)
            if own and own not in record and (holder := own.partition(".")[0]) in record:
                record[own] = _inside(record[holder], own)
            if own and own not in record:
                raise ValueError(f"there is no column {own!r}; it has {', '.join(record)}")
            if found := record.first((own,) if own else known):
                self.used[field], self[field] = found, _decoded(field, record[found])
        inner = _decoded("metadata", record.get("metadata"))
        about = Record(inner) if isinstance(inner, dict) else Record()
        if "session" not in self and (found := about.first(NAMES["session"])):
            self.used["session"], self["session"] = f"metadata.{found}", about[found]
        said = record.first(("choices", "content")) if "messages" in record else None
        if said and self.used.get("answer", said) == said:
            self.used["answer"] = said  # The record is the request and the response.
            self["answer"] = {name: record[name] for name in RESPONSE if name in record}
        if (
            not self.keys() & {"messages", "prompt"}
            and "input" in record
            and not names.get("prompt")
        ):
            self.used["messages"], self["messages"] = "input", messages_of(record["input"])
        if "messages" in self:  # One of both is read.
            other = "messages" if names.get("prompt") else "prompt"
            for fields in (self, self.used):
                fields.pop(other, None)
        self._prompt_name = names.get("prompt") or "prompt"
        self.has_prompt = bool({self._prompt_name, "messages"} & (record.keys() | self.keys()))
        """True if it has a prompt or messages, which may be null."""
        self.is_message = "role" in record and not self.has_prompt

    @property
    def has_failed(self) -> bool:
        """True if the status is 400 or more, ``error`` or ``failed``."""
        status = str(self.get("status"))
        number = re.match(r"\s*(\d{1,9})", status)  # "429 Too Many Requests" is 429
        return int(number[1]) >= 400 if number else status.lower() in ("error", "failed")

    @property
    def unread(self) -> set[str]:
        """Names of the fields with a value that are not read."""
        given = {name for name, value in self.record.items() if value is not None}
        return given.difference(*((used, used.partition(".")[0]) for used in self.used.values()))

    @property
    def is_whole(self) -> bool:
        """True if it has no answer, and its messages end with an assistant's."""
        said = self.get("messages")
        if "answer" in self or not isinstance(said, list) or not said:
            return False
        role = spelled(Record(said[-1])).get("role") if isinstance(said[-1], dict) else None
        return ROLES.get(str(role).lower()) == "assistant"

    def request(self, chat: ChatText, fresh: FreshIds, notes: Notes) -> tuple[TraceRequest, str]:
        """Return the request without session and time, and its prompt as one text.

        An answer has the number of tokens that the server counted, if its text has fewer: thoughts
        that the client did not get are before the text, and are not in later prompts.
        """
        usage = self.record.get("usage")
        answer, length, reason, thinks = answer_of(self.get("answer"), usage, notes)
        is_limit = self.used.get("length", "max_").startswith("max_")
        if not length and not (is_limit and answer is not None):
            length = self.answer_length(notes)
        if "messages" in self:
            messages = [spelled(message) for message in self.objects("messages")]
            said = plain_chat(messages, self.get("system"), self.get("tools"), notes)
            request = chat.turn(said, answer or "", tools=True, is_cut=reason == "length")
            # A text that begins with the text of every earlier part of the chat.
            text = "".join(f"{one['role']}\x1f{one['content']}\x1e" for one in said)
        elif not self.has_prompt:
            names = ", ".join(self.record) or "no field"
            raise ValueError(f"there is no prompt in it ({names}): name it as in ?prompt=NAME")
        else:
            prompt = self.get("prompt") or ""
            text = prompt if isinstance(prompt, str) else ""
            ids = chat.encode(text) if text else Record(prompt=prompt or []).ids("prompt")
            if not len(ids):
                raise ValueError(f"{self._prompt_name} is empty")
            request = TraceRequest(0.0, "", None, ids, chat.encode(answer or ""))
        if answer is None:
            request = request._replace(output=fresh.take(length))
        elif (num_more := length - len(request.output)) > 0:
            more, own = fresh.take(num_more), request.output
            thinks = thinks or num_more > len(own)  # More than another way to count.
            parts = (more, own) if thinks else (own, more)
            request = request._replace(output=np.concatenate(parts))
        if thinks:
            request = request._replace(answer_survives=False)
        return request._replace(stop_reason=reason), text

    def answer_length(self, notes: Notes) -> int:
        """Return the length of an answer in a field of its own; a limit, or 0, is noted."""
        if (name := self.used.get("length", "")).startswith("max_"):
            notes.count(f"whose answer is taken to have {name}", "record")
        return self.record.optional(self.record.whole, name or "an answer or its length", 0, notes)

    def message(self) -> Record:
        """Return a single message."""
        return Record((name, _decoded(name, value)) for name, value in self.record.items())

    def namespace(self) -> str | None:
        """Return a name for model and tenant; None if there is neither."""
        model, tenant = self.get("model"), self.get("tenant")
        if tenant is None and isinstance(model, str):
            return model
        parts = {"model": model, "cache_salt": tenant}
        parts = {name: value for name, value in parts.items() if value is not None}
        return json.dumps(parts) if parts else None

    def describe(self) -> str:
        """Return the names that are read for each field, and the rules for those without one."""
        if self.is_message:
            found = [f"{name}={name}" for name in OF_MESSAGE if name in self.record]
            used = (pair for pair in self.used.items() if pair[0] not in ("answer", "length"))
            found += [f"{field}={name}" for field, name in used]
            return f"{', '.join(found)} (an answer is a request after all messages of its session)"
        found = [f"{field}={name}" for field, name in self.used.items()]
        known = self.used.keys() | ({"answer"} if "length" in self.used else set())
        found += [f"{name}=none ({rule})" for name, rule in ABSENT.items() if name not in known]
        return ", ".join(found)


@dataclass(frozen=True, slots=True)
class NamedTimes(FileReader):
    """Reader of records with named fields, whose times count from the first."""

    usual_times: ClassVar[str] = "s"
    named_fields: ClassVar[tuple[str, ...]] = ("time", "session", "length", "tenant", "status")
    prompt: str = ""
    """Name of the field of prompts in a file with other names; so are the next five."""
    time: str = ""
    session: str = ""
    length: str = ""
    tenant: str = ""
    """Name of the field of tenants. Prompts of different tenants share no prefix."""
    status: str = ""

    @property
    def names(self) -> dict[str, str]:
        """Names of the user, by field; empty for those of ``NAMES``."""
        return {name: getattr(self, name) for name in self.named_fields}

    def time_of(self, record: Record) -> tuple[Record, str | None]:
        named = record if isinstance(record, Named) else Named(record, self.names)
        return named.record, named.used.get("time")

    def first_fields(self) -> Record:
        """Return the fields of the first hundred records, each with its first value."""
        merged = Record()
        for _, record in islice(self.records(BadRecords(skip=True)), 100):
            merged |= {name: each for name, each in record.items() if merged.get(name) is None}
        return merged

    def named(self, record: Record) -> Named:
        """Return named fields. ValueError, with the file, if one that the user named is missing."""
        try:
            return Named(record, self.names)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None

    def ordered(self, found: Iterator[tuple[Line, TraceRequest]]) -> Iterator[TraceRequest]:
        began_s: float | None = None
        for request in FileReader.ordered(self, found):
            began_s = request.timestamp_s if began_s is None else began_s
            yield request._replace(timestamp_s=request.timestamp_s - began_s)


@dataclass(frozen=True, slots=True)
class NamedReader(NamedTimes):
    """Reader of texts."""

    named_fields: ClassVar[tuple[str, ...]] = (*NamedTimes.named_fields, "prompt", "answer")
    tokenizer: str = ""
    template: str = "chatml"
    answer: str = ""
    """Name of the field of answers."""

    def describe(self) -> str:
        """Return the names that are read for each field in the first hundred records."""
        merged = self.first_fields()
        return self.named(merged).describe() if merged else ""


# --- Sessions -----------------------------------------------------------------------------------


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


class Prompts:
    """Sessions of the prompts of a file. A note at its end tells if most continue no other, and
    names unread fields if no time, session or answer was found."""

    def __init__(self, notes: Notes) -> None:
        self._notes, notes.at_end = notes, self._end
        self._continued = Continued()
        self._last: dict[str | int, tuple[int, int]] = {}
        """Length and hash of the last prompt of a named session."""
        self._num_later = self._num_continued = 0
        self._unread, self._found = set[str](), set[str]()

    def session(self, name: str | int, record: Named, said: str) -> str | int:
        """Return the session of the next prompt: ``name``, or by its text if that is empty."""
        self._found |= record.keys()
        self._unread |= record.unread - {"usage"}
        if name == "":
            self._notes.count("without a session: each continues a prompt it begins with", "prompt")
            number, continues = self._continued.session(f"{record.namespace()}\0{said}")
            self._num_continued += continues
            return f"{UNNAMED}{number}"
        size, digest = self._last.get(name, (0, 0))
        self._num_later += size > 0
        self._num_continued += size > 0 and hash(said[:size]) == digest
        self._last[name] = len(said), hash(said)
        return name

    def _end(self) -> None:
        is_new = not self._last and self._continued.count >= FEWEST and not self._num_continued
        if is_new or self._num_later > 2 * self._num_continued:
            self._notes.say(NOT_CONTINUED)
        absent = [name for name in ABSENT if name not in self._found]
        if self._unread and absent:
            names = ", ".join(sorted(self._unread))
            self._notes.say(
                f"no {' and no '.join(absent)} was found; name its field as in "
                f"?{absent[-1]}=NAME: {names} are not read"
            )


class SessionMessages:
    """Single messages of a session so far. The prompt of each answer is all of them."""

    def __init__(self) -> None:
        self._said: Chat = []
        self._num_unanswered = 0
        self._before_s = self._asked_s = -math.inf

    def add(
        self, record: Named, chat: ChatText, clock: Callable[[Record], float], notes: Notes
    ) -> TraceRequest | None:
        """Add a message. Return its request, without session, if it is an answer: at its time, or
        if times are known at that of the message before. ValueError if that is out of order."""
        message, request = record.message(), None
        leading = (None, None) if self._said else (record.get("system"), record.get("tools"))
        *system, said = plain_chat([message], *leading, notes)
        now_s = clock(record)
        self._said += system
        is_answer = said["role"] == "assistant"
        if is_answer and self._said:
            is_timed = "time" in record and self._before_s >= 0
            asked_s = self._before_s if is_timed else now_s
            if asked_s < self._asked_s:
                raise ValueError("its messages are not in order of time")
            request = chat.turn(self._said, said["content"], tools=True)
            reason = "tool_use" if message.get("tool_calls") else "end_turn"
            request = request._replace(timestamp_s=asked_s, stop_reason=reason)
            if "time" in record:
                request = request._replace(service_s=max(0.0, now_s - asked_s))
            self._asked_s = asked_s
        unanswered = 0 if is_answer else self._num_unanswered + 1
        notes.count("without an answer left out", "message", unanswered - self._num_unanswered)
        self._num_unanswered, self._before_s = unanswered, now_s
        self._said.append(said)
        return request
