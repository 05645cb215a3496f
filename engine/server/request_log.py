"""Request log: one line per request with path, status, tokens, time, answer id and error."""

from __future__ import annotations

import logging
import sys
import time
from contextvars import ContextVar
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.text.outputs import RequestOutput

logger = logging.getLogger(__name__)
PROBES = ("/health", "/metrics")
"""Paths that monitors poll; their lines have the level DEBUG."""
MAX_PATH = 200
"""Maximum length of a path in a line."""


class RequestRecord:
    """Token counts of one HTTP request. A prompt with several answers counts once."""

    def __init__(self) -> None:
        self.outputs: dict[str, RequestOutput] = {}
        """Latest output of each generation, by its id."""
        self.repeated: set[str | None] = set()
        """Ids of generations that are further choices of an earlier one's prompt."""
        self.answer_id = ""
        """Id of the answer. Empty if there is none."""
        self.error = ""
        """Message of the error that the client got. Empty if it got none."""

    def words(self) -> str:
        """Return the token counts, or "" if nothing was generated."""
        if not self.outputs:
            return ""
        firsts = [output for name, output in self.outputs.items() if name not in self.repeated]
        prompt = sum(len(output.prompt_token_ids) for output in firsts)
        cached = sum(output.cached_len for output in firsts)
        answer = sum(len(output.output) for output in self.outputs.values())
        return f"  prompt {prompt:,}  cached {cached:,}  answer {answer:,}"


CURRENT: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)
"""Record of the request that is being answered, or None if requests are not logged."""


class RequestLog:
    """ASGI middleware that logs one line when an answer was sent or its client has disconnected."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record, started_s = RequestRecord(), time.perf_counter()
        status = 499  # the client left before the answer began
        is_whole = False

        async def watched(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body")

        token = CURRENT.set(record)
        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500 if status == 499 else status
            raise
        finally:
            CURRENT.reset(token)
            spent_ms = 1000 * (time.perf_counter() - started_s)
            level = logging.DEBUG if scope["path"] in PROBES else logging.INFO
            end = "" if is_whole else "not sent completely"
            notes = (record.answer_id, end, record.error)
            logger.log(
                level,
                "%s %s %d%s  %.0f ms%s",
                scope["method"],
                _safe_path(scope),
                status,
                record.words(),
                spent_ms,
                "".join(f"  {_safe(note)}" for note in notes if note),
            )


def _safe_path(scope: Scope) -> str:
    """Return the path as it was sent, without control characters for terminals."""
    path = quote(scope["path"], safe="/:@!$&'()*+,;=~-._")
    return path if len(path) <= MAX_PATH else path[:MAX_PATH] + "..."


def _safe(text: str) -> str:
    """Return ``text`` with control characters replaced."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def note_error(message: str) -> None:
    """Add an error message to the line of the current request."""
    record = CURRENT.get()
    if record is not None:
        record.error = message


def is_wanted(log_requests: bool | None) -> bool:
    """Return True if requests are logged. If ``log_requests`` is None, they are if the log is a
    terminal."""
    return sys.stderr.isatty() if log_requests is None else log_requests


def set_up_logging(level: str) -> None:
    """Send the log of engine and HTTP server from ``level`` on to the standard error output.
    Request lines, if enabled, do not depend on ``level``."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name in ("engine", "uvicorn"):
        log = logging.getLogger(name)
        log.setLevel(level.upper())
        log.addHandler(handler)
        log.propagate = False
    logger.setLevel(min(logging.getLogger("engine").level, logging.INFO))
