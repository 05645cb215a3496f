"""Processes of all ranks except the first: start, commands and failures. Messages are pickled by
``multiprocessing.connection``."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

from engine.config import EngineConfig
from engine.errors import describe_exit
from engine.interfaces import RunnerLost
from engine.plugins.tensor_parallel.group import START_TIMEOUT_S
from engine.schedule.scheduler import Batch
from engine.weights.model_config import ModelError

LAST_WORDS_S = 5.0
"""Time to wait for messages of the other ranks after a failed exchange. A dead rank sends none; a
rank that is alive without a message is the one that did not answer."""
CODE = (
    "import sys; sys.path[:0] = {paths!r}; "
    "from engine.plugins.tensor_parallel.rank_worker import main; main({fd})"
)


@dataclass(frozen=True, slots=True)
class Start:
    """First command to a rank."""

    number: int
    config: EngineConfig
    meeting: str
    """Path of the file through which the ranks connect."""
    num_threads: int
    """Number of threads on a CPU."""


@dataclass(frozen=True, slots=True)
class Forward:
    """Compute a batch; see ``Runner.forward``."""

    batch: Batch
    num_drawn: int | None
    """Number of tokens drawn by the previous step, which rank 0 distributes, or None."""


@dataclass(frozen=True, slots=True)
class Commit:
    """See ``Runner.commit``."""

    batch: Batch
    taken: Sequence[int]


RankEvent = Literal["here", "ready", "refused", "lost", "failed"]
"""``here``: the process runs and can connect to the others; ``ready``: its part of the model is
loaded. With the others it ends: ``refused``: the model is not supported in this configuration;
``lost``: another rank did not answer; ``failed``: there was another error."""


@dataclass(frozen=True, slots=True)
class RankReport:
    """Message of a rank to rank 0."""

    event: RankEvent
    sentence: str = ""
    """Reason why the process ends."""

    @property
    def is_last(self) -> bool:
        """True if the process ends."""
        return self.event not in ("here", "ready")


@dataclass(frozen=True, slots=True)
class Follower:
    """One rank with its process and connection."""

    number: int
    process: subprocess.Popen[bytes]
    line: Connection

    def receive(self, timeout_s: float) -> RankReport:
        """Return the next report. Raises EOFError or OSError if the rank has gone, and
        TimeoutError if none arrived."""
        if not self.line.poll(timeout_s):
            raise TimeoutError("there was no report")
        report: RankReport = self.line.recv()
        return report


class Followers:
    """Ranks 1 to ``count - 1``. They end when this is closed or collected, or this process ends."""

    def __init__(self, config: EngineConfig, num_threads: int) -> None:
        """Start the processes and wait until all run. Raises RunnerLost if one ends."""
        self._count, self._sentence = config.num_ranks, ""
        folder = tempfile.TemporaryDirectory(prefix="hybridcache-ranks-")
        self.meeting = str(Path(folder.name) / "meeting")
        """Path of the file through which the ranks connect."""
        self._all = [_start(number) for number in range(1, self._count)]
        self._end = weakref.finalize(self, _end, self._all, folder)
        try:
            for one in self._all:
                one.line.send(Start(one.number, config, self.meeting, num_threads))
            self.wait_for("here")
        except OSError as error:
            raise self.lost(error) from None

    def wait_for(self, event: RankEvent) -> None:
        """Wait until all report ``event``. Raises RunnerLost or ModelError for anything else."""
        for one in self._all:
            try:
                answer = one.receive(START_TIMEOUT_S)
            except (EOFError, OSError) as error:
                raise self.lost(error) from None
            if answer.event != event:
                raise self.lost(RunnerLost("it was not ready"), {one.number: answer})

    def order(self, order: object) -> None:
        """Send a command to all ranks. Raises RunnerLost if one has gone."""
        if self._sentence:
            raise RunnerLost(self._sentence)
        for one in self._all:
            try:
                one.line.send(order)
            except OSError as error:
                raise self.lost(error) from None

    def lost(self, error: BaseException, said: dict[int, RankReport] | None = None) -> Exception:
        """End all ranks, which cannot continue after ``error``.

        Returns the exception to raise instead, a sentence that names the rank. ``said`` has
        messages that were received already.
        """
        said = dict(said or {})
        deadline = time.monotonic() + LAST_WORDS_S
        is_own = not isinstance(error, RunnerLost | OSError | EOFError)
        for one in () if is_own else self._all:
            with suppress(EOFError, OSError):
                while one.number not in said:
                    answer = one.receive(max(0.01, deadline - time.monotonic()))
                    if answer.is_last:
                        said[one.number] = answer
        refused = [answer.sentence for answer in said.values() if answer.event == "refused"]
        self._sentence = self._what_happened(error, is_own, said)
        for one in self._all:
            one.process.kill()
        self.close()
        return ModelError(refused[0]) if refused else RunnerLost(self._sentence)

    def _what_happened(
        self, error: BaseException, is_own: bool, said: dict[int, RankReport]
    ) -> str:
        if is_own:
            return f"rank 0 failed within a step, and the others with it: {error!r}."
        for number, answer in said.items():
            if answer.event == "failed":
                return f"rank {number} of {self._count} failed: {answer.sentence}."
        silent = [one for one in self._all if one.number not in said]
        for one in silent:
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(0.2)
            if one.process.returncode is not None:
                how = describe_exit(one.process.returncode)
                return f"rank {one.number} of {self._count} {how}; start the engine again."
        names = " and ".join(f"rank {one.number}" for one in silent) or "a rank"
        return f"{names} of {self._count} did not answer in time ({error}); start the engine again."

    def check(self) -> None:
        """Raise RunnerLost if a rank has ended before ``close``."""
        if self._sentence:
            raise RunnerLost(self._sentence)
        if self._end.alive and any(one.process.poll() is not None for one in self._all):
            raise self.lost(EOFError("one has ended"))

    def close(self) -> None:
        """End all processes."""
        self._end()


def _start(number: int) -> Follower:
    ours, theirs = Pipe()
    with theirs:
        descriptor = theirs.fileno()
        code = CODE.format(paths=[path or os.getcwd() for path in sys.path], fd=descriptor)
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    return Follower(number, process, ours)


def _end(followers: Sequence[Follower], folder: tempfile.TemporaryDirectory[str]) -> None:
    """End all ranks. A rank that waits for a command ends when its connection closes; one that
    computes is killed."""
    for one in followers:
        one.line.close()
    for one in followers:
        try:
            one.process.wait(2.0)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
    folder.cleanup()
