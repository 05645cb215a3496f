"""Chat templates in a process of their own, with limits of time and memory.

A template is a program that came with a model's files. Jinja's sandbox keeps it from objects and
files, not from endless loops and huge texts. So one process renders for this one. It ends if a
rendering exceeds a limit, and the next rendering starts another.

This file is also the program of that process, which imports nothing of the engine.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

LIMIT_S = 2.0
"""Maximum processor time of one rendering."""
LIMIT_BYTES = 1 << 30
"""Maximum memory of the process that renders."""
TOO_MUCH = (
    f"The chat template needs more than {LIMIT_S:g} s or {LIMIT_BYTES >> 30} GiB for one chat. If "
    "short chats fail too, it does not end: use another one (--chat-template)."
)
TEXT, REFUSED, EXCEEDED = b"tre"


class TemplateError(ValueError):
    """The template rejects this chat, or exceeds a limit. The message is the template's."""


class Renderer:
    """Process that renders templates for this one. Started at the first rendering. Thread-safe."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection
        self._owner = 0
        """Id of the process that started it: a fork needs its own."""

    def render(self, source: str, variables: Mapping[str, object] | None) -> str:
        """Return the text of the template ``source``, or compile it only if there are no
        ``variables``. Raises TemplateError for a syntax error, any exception in the template, and
        an exceeded limit."""
        question = pickle.dumps((source, variables))
        with self._lock:
            try:
                known = self._process
                if known is None or self._owner != os.getpid() or known.poll() is not None:
                    self._start()
                self._pipe.send_bytes(question)
                answer = self._pipe.recv_bytes()
            except BaseException as error:  # An interrupt would leave its answer to the next call.
                self._end()
                if not isinstance(error, OSError | EOFError):
                    raise
                answer = bytes([EXCEEDED])
        if answer[0] == EXCEEDED:
            raise TemplateError(TOO_MUCH)
        text = answer[1:].decode("utf-8", "surrogatepass")
        if answer[0] == REFUSED:
            raise TemplateError(text)
        return text

    def _start(self) -> None:
        # -P: the modules of this folder must not take the place of others.
        command = [sys.executable, "-P", "-s", __file__, str(self._limit_s)]
        self._pipe, other = Pipe()
        with other:
            ends: dict[str, Any] = {"stdin": other.fileno(), "stdout": other.fileno()}
            process = subprocess.Popen(command, **ends, start_new_session=True)
        if self._process is None:
            atexit.register(self._end)
        self._process, self._owner = process, os.getpid()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()


# --- The program ----------------------------------------------------------------------------------


class _GenerationTag(jinja2.ext.Extension):
    """Tag ``{% generation %}``, which marks text for training. Serving renders its contents."""

    tags = {"generation"}  # noqa: RUF012 the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    """Compile a template (25 ms)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationTag],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(value: object, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
    """Write JSON without HTML escapes, unlike Jinja's own filter, with the options of
    ``transformers``."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise TemplateError(message)


def answer(source: str, variables: Mapping[str, object] | None) -> tuple[int, str]:
    """Return the kind of an answer and its text."""
    try:
        template = _compiled(source)
        return TEXT, "" if variables is None else template.render(variables)
    except TemplateError as error:
        return REFUSED, str(error)
    except jinja2.TemplateSyntaxError as error:
        said = str(error).rstrip(".")
        return REFUSED, f"The chat template does not parse: {said}."
    except MemoryError:
        return EXCEEDED, ""
    except Exception as error:  # A template is a program, and clients choose its inputs.
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        return REFUSED, f"{kind}{error}"


def main() -> None:
    """Answer questions, which come over the socket of the standard input, until its end."""
    limit_s, pipe = float(sys.argv[1]), Connection(sys.stdin.fileno())
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(EOFError, OSError):  # The other process has ended.
        while True:
            question = pipe.recv_bytes()
            # Without a handler, SIGPROF ends the process, also in the middle of a C function.
            signal.setitimer(signal.ITIMER_PROF, limit_s)
            try:
                kind, text = answer(*pickle.loads(question))
                reply = bytes([kind]) + text.encode("utf-8", "surrogatepass")
            except MemoryError:
                reply = bytes([EXCEEDED])
            signal.setitimer(signal.ITIMER_PROF, 0)
            pipe.send_bytes(reply)


if __name__ == "__main__":
    main()
