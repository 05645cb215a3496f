"""One background thread for all work on a disk, in order of priority."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import PriorityQueue
from typing import Any, TypeVar

Result = TypeVar("Result")
URGENT, NORMAL, LAST, IDLE = range(4)
POLL_S = 0.05

Work = tuple[int, int, Callable[[], Any] | None, "Future[Any] | None"]

logger = logging.getLogger(__name__)


class DiskThread:
    """Runs one job at a time: urgent ones first, others in the order in which they came.

    Nothing can interrupt a job that hangs in the system. ``busy_s`` says how long the current one
    has been running, so that callers can stop waiting.
    """

    def __init__(self) -> None:
        self._queue: PriorityQueue[Work] = PriorityQueue()
        self._numbers = itertools.count()
        self._started: float | None = None
        self._thread = threading.Thread(target=self._run, name="disk", daemon=True)
        self._thread.start()

    @property
    def busy_s(self) -> float:
        """Seconds since the current job began. 0 if there is none."""
        started = self._started
        return 0.0 if started is None else time.monotonic() - started

    def submit(self, work: Callable[[], Result], *, urgent: bool = False) -> Future[Result]:
        """Queue ``work``; the future has its result, or what it raised."""
        done: Future[Result] = Future()
        self._queue.put((URGENT if urgent else NORMAL, next(self._numbers), work, done))
        return done

    def run_later(self, work: Callable[[], object]) -> None:
        """Queue ``work`` that nobody waits for; an exception is logged."""
        self._queue.put((NORMAL, next(self._numbers), work, None))

    def when_idle(self, work: Callable[[], object]) -> None:
        """Run ``work`` if there is nothing else to do before ``close``."""
        self._queue.put((IDLE, next(self._numbers), work, None))

    def close(self, deadline_s: float) -> bool:
        """Do the queued work except idle work, and end.

        Returns False if a job ran longer than ``deadline_s``; the thread is then left alone.
        """
        self._queue.put((LAST, next(self._numbers), None, None))
        while self._thread.is_alive():
            if self.busy_s > deadline_s:
                return False
            self._thread.join(POLL_S)
        return True

    def _run(self) -> None:
        while True:
            _, _, work, done = self._queue.get()
            if work is None:
                return
            self._started = time.monotonic()
            try:
                result = work()
            except BaseException as error:
                if done is None:
                    logger.exception("A job of the disk thread failed.")
                else:
                    done.set_exception(error)
            else:
                if done is not None:
                    done.set_result(result)
            self._started = None
