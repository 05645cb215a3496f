"""Signals during a call that must be whole."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # ``signal`` takes 8 us per call, for enums.
import signal
import threading
from collections.abc import Callable
from types import FrameType


class DelayedSignals:
    """Handle SIGINT and SIGTERM at the end of the block, where no exception of a handler leaves
    memory claimed; a second signal at once. Does nothing outside of the main thread, in another
    such block, and for handlers that are not Python's."""

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
        self._received: list[int] = []
        self._is_open = False

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = _signal.getsignal(number)
            while isinstance(handler, DelayedSignals) and not handler._is_open:
                handler = handler._handlers[number]  # An exception has cut its ``__exit__``.
            if callable(handler) and not isinstance(handler, DelayedSignals):
                self._handlers[number] = handler
                _signal.signal(number, self)
        self._is_open = True

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._is_open and not self._received:
            self._received.append(number)
        else:  # It is the second one, or an exception has cut ``__enter__`` or ``__exit__``.
            self._is_open = False  # The exception may come before the first line of ``__exit__``.
            self._handlers[number](number, frame)

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        for number, handler in self._handlers.items():
            _signal.signal(number, handler)
        for number in self._received:
            self._handlers[number](number, None)
