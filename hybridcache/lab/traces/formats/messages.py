"""Requests as texts: JSON lines of requests in the forms of many APIs (a prompt, or messages), or
of single messages, of which each answer is a request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from hybridcache.lab.traces.frame import FileReader, Notes, Record, Records
from hybridcache.lab.traces.named import Named, NamedReader, Prompts, SessionMessages, joined
from hybridcache.lab.traces.text import load_chat_text
from hybridcache.lab.traces.trace import BadRecords, FreshIds, TraceRequest

FAILED = "of failed requests left out (status 400 or more, error or failed)"
WHOLE = (
    "without an answer end with an assistant's message: if each is a whole conversation, and its "
    "assistant's messages are the answers, read the file as conversations:FILE"
)

NO_SESSION = "a message without a session: name the field that has it as in ?session=NAME"


@dataclass(frozen=True, slots=True)
class MessagesReader(NamedReader):
    """JSON lines of requests, or of single messages."""

    word: ClassVar[str] = "messages"

    @staticmethod
    def recognises(record: Record) -> bool:
        """Return whether the record has messages, a prompt, or a role with a content."""
        named = Named(record, {})
        return named.has_prompt or (named.is_message and "content" in named.record)

    @staticmethod
    def is_left_out(record: Record) -> bool:
        """Return whether it is a line of a coding session without a message: a summary, a state."""
        has_session = "sessionId" in record or "leafUuid" in record
        return has_session and "type" in record and not isinstance(record.get("message"), dict)

    def records(self, bad: BadRecords) -> Records:
        """Yield (line, record). Lines with parts of one answer (Claude Code writes one per block)
        are one record."""
        return joined(FileReader.records(self, bad))

    def parser(self, notes: Notes) -> Callable[[Record], Iterator[TraceRequest]]:
        chat, names = load_chat_text(self.tokenizer, self.template), self.names
        clock, fresh, prompts = self.clock(notes), FreshIds(), Prompts(notes)
        conversations = defaultdict[str | int, SessionMessages](SessionMessages)

        def parse(raw: Record) -> Iterator[TraceRequest]:
            record = Named(raw, names)
            if record.has_failed:
                notes.count(FAILED, "record")
            elif record.is_message:
                if "session" not in record:
                    raise ValueError(NO_SESSION)
                session = record.key("session")
                found = conversations[session].add(record, chat, clock, notes)
                if found is not None:
                    yield found._replace(session=session, namespace=record.namespace())
            else:
                name = record.key("session") if "session" in record else ""
                request, said = record.request(chat, fresh, notes)
                now_s, namespace = clock(record), record.namespace()
                if record.is_whole:
                    notes.count(WHOLE, "prompt")
                request = request._replace(session=prompts.session(name, record, said))
                yield request._replace(timestamp_s=now_s, namespace=namespace)

        return parse
