"""Threads for work that would block the event loop, with pauses for other threads.

A thread that computes in Python holds the interpreter, and another thread gets it only after a
switch interval. A step of the engine needs it hundreds of times and would wait each time. So long
work pauses between its pieces (``give_way``) and keeps each call into C short, because no other
thread runs during the call.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

LONG = 4096
"""Threshold above which work is done in a thread: bytes of a body, characters of a text or tokens
of an answer."""
NUM_WORKERS = 2
SWITCH_S = 0.0002
"""Time that a thread waits for the interpreter while another computes in Python."""
PAUSE_S = 0.0003

Result = TypeVar("Result")
_this_thread = threading.local()


class Workers:
    """A few threads for long work. Short work is not delayed by it."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(
            NUM_WORKERS, thread_name_prefix="server", initializer=_become_worker
        )
        self._compiler = ThreadPoolExecutor(
            1, thread_name_prefix="grammars", initializer=_become_worker
        )

    async def compile(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` in a separate thread for grammars, so that grammars do not delay long
        bodies."""
        return await asyncio.get_running_loop().run_in_executor(self._compiler, work)

    async def run(self, size: int, work: Callable[[], Result]) -> Result:
        """Run ``work`` directly if its ``size`` is small, else in a thread, and return its
        result."""
        if size <= LONG:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        for threads in (self._threads, self._compiler):
            threads.shutdown(wait=False, cancel_futures=True)


def _become_worker() -> None:
    _this_thread.is_worker = True


def give_way() -> None:
    """Pause between two pieces of long work, so that other threads can run. Does nothing outside
    worker threads."""
    if getattr(_this_thread, "is_worker", False):
        time.sleep(PAUSE_S)
