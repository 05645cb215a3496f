"""Signals that end a command, and its standard streams."""

from __future__ import annotations

import _thread
import io
import json
import logging
import os
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from types import FrameType
from typing import Any, NoReturn

RETRY_S = 0.02


class _Stream(io.FileIO):
    """Standard output or error stream. A write that fails discards its data."""

    is_told = can_wait = False
    """Whether the first failure is raised, and whether a reader is waited for."""

    def write(self, data: Any) -> int:
        try:
            if select.select([], [self], [], None if self.can_wait else 0)[1]:
                return super().write(bytes(data[: select.PIPE_BUF]))  # A pipe takes it at once.
        except OSError as error:
            is_told, self.is_told = self.is_told, False
            if is_told:
                why = f"standard output cannot be written ({error.strerror})"
                raise type(error)(f"{why}: send it to a file or a program that takes it") from None
        return len(data)


def prepare_streams(*, is_server: bool = False) -> None:
    """Open closed standard streams on the null device, also for child processes.

    A failure of standard error is ignored, and one of standard output raises OSError once. A server
    ignores both, and does not wait for their readers."""
    for name in ("stdin", "stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
        elif name != "stdin":
            raw = _Stream(stream.fileno(), "wb", closefd=False)
            raw.is_told, raw.can_wait = name == "stdout" and not is_server, not is_server
            facts = stream.encoding, stream.errors, None, stream.line_buffering
            stream = io.TextIOWrapper(io.BufferedWriter(raw), *facts)
        setattr(sys, name, stream)


class JsonFormatter(logging.Formatter):
    """Lines of the log as JSON objects: time, level, message, and the facts of a request."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **(getattr(record, "facts", None) or {"message": record.getMessage()}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(level: str, *names: str, is_json: bool = False) -> None:
    """Send the logs ``names`` from ``level`` on to the standard error output, with times."""
    handler = logging.StreamHandler()
    plain = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S%z")
    handler.setFormatter(JsonFormatter() if is_json else plain)
    for name in names:
        log = logging.getLogger(name)
        log.setLevel(level.upper())
        log.addHandler(handler)
        log.propagate = False


@contextmanager
def printed_warnings(program: str) -> Iterator[None]:
    """Print each different warning as one line on standard error, after the name of a program."""
    printed = cache(lambda text: print(f"{program}: {text}", file=sys.stderr))
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: printed(str(message))
        yield


def end_by_exception(*numbers: int) -> None:
    """Install handlers that end the main thread by an exception, so that it cleans up.

    SIGINT raises KeyboardInterrupt and any other signal SystemExit with 128 + its number. The
    handlers are installed even if the process was started with the signal ignored, as shells
    without job control do for SIGINT in the background. Only SIGHUP stays ignored, as ``nohup``
    wants it.

    Python discards an exception that a handler raises while a ``__del__`` method or the callback of
    a weak reference runs. Such a signal is handled again `RETRY_S` seconds later.
    """
    for number in numbers:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else _raise_exit
        )
    report = sys.unraisablehook

    def retry(lost: sys.UnraisableHookArgs) -> None:
        error = lost.exc_value
        if isinstance(error, KeyboardInterrupt | _Told):
            number = getattr(error, "number", signal.SIGINT)
            _thread.start_new_thread(_send_again, (signal.Signals(number),))
        else:
            report(lost)

    sys.unraisablehook = retry


class _Told(SystemExit):
    """The exit that a signal asked for."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


def _raise_exit(number: int, _: FrameType | None) -> NoReturn:
    raise _Told(number)


def _send_again(number: signal.Signals) -> None:
    time.sleep(RETRY_S)
    # To the main thread, which may wait in a system call.
    signal.pthread_kill(threading.main_thread().ident or 0, number)
