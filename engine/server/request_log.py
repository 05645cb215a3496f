"""Request log: one line per request with path, status, tokens, time, answer id and error."""

from __future__ import annotations

import logging
import time
from urllib.parse import quote

from starlette.types import Scope

from engine.text.outputs import RequestOutput

logger = logging.getLogger(__name__)
PROBES = ("/health", "/metrics")
"""Paths that monitors poll; their lines have the level DEBUG."""
MAX_PATH = 200
"""Maximum length of a path in a line."""


class RequestRecord:
    """Facts about one HTTP request for its line. A prompt with several answers counts once."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        """``X-Request-Id`` of the request. Empty outside of the application."""
        self.began_s = time.perf_counter()
        self.status = 0
        """Status of the answer. 0 if the client left before the answer began."""
        self.is_sent = False
        """True if the client got the whole answer."""
        self.outputs: dict[str, RequestOutput] = {}
        """Latest output of each generation, by its id."""
        self.repeated: set[str | None] = set()
        """Ids of generations that are further choices of an earlier one's prompt."""
        self.answer_id = ""
        """Id of the answer. Empty if there is none."""
        self.error = ""
        """Message of the error that the client got. Empty if it got none."""

    @staticmethod
    def of(scope: Scope) -> RequestRecord:
        """Return the record of the request of ``scope``, which ``access.Requests`` made. Outside of
        the application it is a new one."""
        found: RequestRecord | None = scope.get("state", {}).get("record")
        return found or RequestRecord()

    def log(self, scope: Scope) -> None:
        """Write the line of the request of ``scope``."""
        notes = (self.answer_id, "" if self.is_sent else "not sent completely", self.error)
        logger.log(
            logging.DEBUG if scope["path"] in PROBES else logging.INFO,
            "%s %s %d%s  %.0f ms%s",
            scope["method"],
            _safe_path(scope),
            self.status or 499,
            self._counts(),
            1000 * (time.perf_counter() - self.began_s),
            "".join(f"  {_safe(note)}" for note in notes if note),
        )

    def _counts(self) -> str:
        """Return the token counts, or "" if nothing was generated."""
        if not self.outputs:
            return ""
        firsts = [output for name, output in self.outputs.items() if name not in self.repeated]
        prompt = sum(len(output.prompt_token_ids) for output in firsts)
        cached = sum(output.cached_len for output in firsts)
        answer = sum(len(output.output) for output in self.outputs.values())
        return f"  prompt {prompt:,}  cached {cached:,}  answer {answer:,}"


def _safe_path(scope: Scope) -> str:
    """Return the path as it was sent, without control characters for terminals."""
    path = quote(scope["path"], safe="/:@!$&'()*+,;=~-._")
    return path if len(path) <= MAX_PATH else path[:MAX_PATH] + "..."


def _safe(text: str) -> str:
    """Return ``text`` with control characters replaced."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


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
