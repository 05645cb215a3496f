"""Threads for what would take the event loop too long, and how these leave others their turn.

A thread that computes in Python holds the interpreter, and whoever waits for it gets it a switch
interval later: a step of the engine, which takes it hundreds of times, would wait as often. So long
work pauses between its pieces (``give_way``), and keeps each call into C short, since nothing else
runs in this process meanwhile.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

LONG = 4096
"""Bytes of a body, characters of a text or tokens of an answer above which a thread does the
work."""
NUM_WORKERS = 2
SWITCH_S = 0.0002
"""What a thread waits for the interpreter while another computes in Python."""
PAUSE_S = 0.0003

Result = TypeVar("Result")
_this_thread = threading.local()


class Workers:
    """A few threads for long work, which waits for long work only."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(
            NUM_WORKERS, thread_name_prefix="server", initializer=_become_worker
        )
        self._compiler = ThreadPoolExecutor(
            1, thread_name_prefix="grammars", initializer=_become_worker
        )

    async def compile(self, work: Callable[[], Result]) -> Result:
        """What ``work`` returns, done in a thread of its own kind: who waits for a grammar keeps
        nobody waiting who brings a long body."""
        return await asyncio.get_running_loop().run_in_executor(self._compiler, work)

    async def run(self, size: int, work: Callable[[], Result]) -> Result:
        """What ``work`` returns: done here where its ``size`` is small, else in a thread."""
        if size <= LONG:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        for threads in (self._threads, self._compiler):
            threads.shutdown(wait=False, cancel_futures=True)


def _become_worker() -> None:
    _this_thread.is_worker = True


def give_way() -> None:
    """Between two pieces of long work: in a worker, let the other threads go on for a moment."""
    if getattr(_this_thread, "is_worker", False):
        time.sleep(PAUSE_S)
