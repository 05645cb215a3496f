"""One thread for a disk: what somebody waits for goes before what nobody does, and that before
what may be left out."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import PriorityQueue
from typing import Any, TypeVar

Result = TypeVar("Result")
URGENT, PATIENT, LAST, IDLE = range(4)

Work = tuple[int, int, Callable[[], Any] | None, "Future[Any]"]


class DiskThread:
    """Does one thing after the other, urgent ones first, others in the order in which they came."""

    def __init__(self) -> None:
        self._queue: PriorityQueue[Work] = PriorityQueue()
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name="disk", daemon=True)
        self._thread.start()

    def do(self, work: Callable[[], Result], *, urgent: bool = False) -> Future[Result]:
        """Have ``work`` done; its result, or what it raised."""
        done: Future[Result] = Future()
        self._queue.put((URGENT if urgent else PATIENT, next(self._numbers), work, done))
        return done

    def when_idle(self, work: Callable[[], object]) -> None:
        """Have ``work`` done if there is nothing else to do before ``close``."""
        self._queue.put((IDLE, next(self._numbers), work, Future()))

    def close(self) -> None:
        """Do what is left but for idle work, and end."""
        self._queue.put((LAST, next(self._numbers), None, Future()))
        self._thread.join()

    def _run(self) -> None:
        while True:
            _, _, work, done = self._queue.get()
            if work is None:
                return
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)
