"""Tensor parallelism: the runner of rank 0 makes the other ranks, which are processes, compute
every batch with it, and its plugin ends the engine if one of them has ended.

Rank 0 sends each process the arguments of ``_follow``, then an ``Order`` per operation. A process
sends None when it runs, None when its part of the model is loaded, and an exception when it ends.
"""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed

from engine.config import EngineConfig
from engine.core import Plugin
from engine.errors import RunnerLost, describe_exit
from engine.models import read_model
from engine.runner.build import load_runner
from engine.runner.device import Device
from engine.runner.loading import shared_sizes
from engine.runner.model_runner import ModelRunner
from engine.schedule.scheduler import Batch
from engine.weights.model_config import ModelError, read_config
from engine.weights.ranks import Rank
from hybridcache.scheduling.cache_manager import CacheManager

TIMEOUT_S = 300.0
"""Time after which a rank that does not answer counts as lost: longer than a rank may load its part
after the others, or compile kernels."""
HERE = "127.0.0.1"
"""Address of all ranks, which are processes of one machine."""


class TorchGroup:
    """A ``Group`` of ``count`` processes that connect through the file ``meeting``: nccl or, on a
    CPU, gloo of ``torch.distributed``. It is not global, so several engines in one process have
    separate groups."""

    def __init__(self, number: int, count: int, meeting: str, device: Device) -> None:
        """Wait for all ranks. Raises RunnerLost if one does not arrive, and ModelError if this
        build of PyTorch has no backend for the device."""
        backend = "ProcessGroupGloo" if device.is_cpu else "ProcessGroupNCCL"
        made = getattr(torch.distributed, backend, None)
        if made is None:
            raise ModelError(f"--tp needs {backend}, which this build of PyTorch does not have.")
        from torch._C._distributed_c10d import FileStore

        self._count, timeout = count, timedelta(seconds=TIMEOUT_S)
        try:
            store = FileStore(meeting, count)
            store.set_timeout(timeout)
            if device.is_cpu:
                options = made._Options()
                options._devices = [made.create_device(hostname=HERE)]
            else:
                options = made.Options()
            options._timeout = timeout
            self._group = made(store, number, count, options)
        except RuntimeError as error:
            raise RunnerLost(f"the ranks could not connect: {error}") from None

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """See ``Group``. Raises RunnerLost if a rank has gone, or did not answer in time."""
        parts = [torch.empty_like(x) for _ in range(self._count)]
        places = [part.view(-1).view(torch.uint8) for part in parts]
        try:
            self._group.allgather([places], [x.view(-1).view(torch.uint8)]).wait()
        except RuntimeError as error:
            raise RunnerLost(f"an exchange between ranks broke off: {error}") from None
        return parts


LAST_WORDS_S = 5.0
"""Time to wait for messages of the other ranks after a failed exchange. A dead rank sends none; a
rank that is alive without a message is the one that did not answer."""
CODE = (
    "import sys; sys.path[:0] = {paths!r}; "
    "from engine.plugins.tensor_parallel.coordinator import follow; follow({fd})"
)


@dataclass(frozen=True, slots=True)
class Order:
    """One operation of ``ModelRunner`` that all ranks execute."""

    batch: Batch
    num_drawn: int | None = None
    """Number of tokens drawn by the previous step, which rank 0 distributes, or None."""
    taken: tuple[int, ...] | None = None
    """Argument of ``ModelRunner.commit``, or None for ``ModelRunner.forward``."""


def follow(descriptor: int) -> None:
    """Run a rank with ``descriptor`` as its end of the connection, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Rank 0 handles this signal.
    line = Connection(descriptor)
    try:
        _follow(line, *line.recv())
    except (EOFError, ConnectionError):
        return
    except (ModelError, RunnerLost) as error:
        last_words: Exception = error
    except Exception as error:
        traceback.print_exc()
        last_words = RuntimeError(f"{type(error).__name__}: {error}")
    with suppress(OSError):
        line.send(last_words)
    sys.exit(1)


def _follow(
    line: Connection,
    number: int,
    config: EngineConfig,
    meeting: str,
    num_threads: int,
) -> NoReturn:
    # Left over if rank 0 is killed.
    atexit.register(shutil.rmtree, Path(meeting).parent, ignore_errors=True)
    line.send(None)
    device = Device.resolve(config.device).of_rank(number)
    if device.is_cpu:
        torch.set_num_threads(num_threads)
    device.make_current()
    group = TorchGroup(number, config.tp, meeting, device)
    runner = load_runner(config, Rank(number, config.tp, group))
    line.send(None)
    while True:
        order: Order = line.recv()
        drawn = None
        if order.taken is not None:
            runner.commit(order.batch, order.taken)
            continue
        if order.num_drawn is not None:
            place = torch.empty(order.num_drawn, dtype=torch.int64, device=device.torch_device)
            drawn = group.gather(place)[0]
        runner.forward(order.batch, drawn)


class Follower:
    """One rank with its process and connection."""

    def __init__(self, number: int) -> None:
        """Start the process."""
        self.number = number
        self.error: Exception | None = None
        """Reason why the process ends, if it has sent one."""
        self.line, theirs = Pipe()
        with theirs:
            descriptor = theirs.fileno()
            code = CODE.format(paths=[path or os.getcwd() for path in sys.path], fd=descriptor)
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[descriptor],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def receive(self, timeout_s: float) -> None:
        """Wait for a message. Raises OSError or EOFError if the rank has gone or nothing arrived,
        and RunnerLost if it has sent an error."""
        if not self.line.poll(timeout_s):
            raise TimeoutError("there was no report")
        self.error = self.line.recv()
        if self.error is not None:
            raise RunnerLost("it was not ready")


class Followers:
    """Ranks 1 to ``count - 1``. They end when this is closed or collected, or this process ends."""

    def __init__(self, config: EngineConfig, num_threads: int) -> None:
        """Start the processes and wait until all run. Raises RunnerLost if one ends."""
        self._count, self._sentence = config.tp, ""
        folder = tempfile.TemporaryDirectory(prefix="hybridcache-ranks-")
        self.meeting = str(Path(folder.name) / "meeting")
        """Path of the file through which the ranks connect."""
        self._all = [Follower(number) for number in range(1, self._count)]
        self._end = weakref.finalize(self, _end, self._all, folder)
        self.send((one.number, config, self.meeting, num_threads) for one in self._all)
        self.wait()

    def wait(self) -> None:
        """Wait for the next message of all. Raises RunnerLost if one has ended."""
        for one in self._all:
            try:
                one.receive(TIMEOUT_S)
            except (EOFError, OSError, RunnerLost) as error:
                raise self.lost(error) from None

    def send(self, messages: Iterable[object]) -> None:
        """Send a message to each rank. Raises RunnerLost if one has gone."""
        self.check()
        try:
            for one, message in zip(self._all, messages, strict=False):
                one.line.send(message)
        except OSError as error:
            raise self.lost(error) from None

    def lost(self, error: Exception) -> RunnerLost:
        """End all ranks, which cannot continue after ``error``. Returns the exception to raise
        instead, a sentence that names the rank."""
        if isinstance(error, RunnerLost | OSError | EOFError):
            self._sentence = self._what_happened(error)
        else:
            self._sentence = f"rank 0 failed within a step, and the others with it: {error!r}."
        for one in self._all:
            one.process.kill()
        self.close()
        return RunnerLost(self._sentence)

    def _what_happened(self, error: Exception) -> str:
        deadline = time.monotonic() + LAST_WORDS_S
        for one in self._all:
            with suppress(EOFError, OSError, RunnerLost):
                while one.error is None:
                    one.receive(max(0.01, deadline - time.monotonic()))
        for one in self._all:
            name = f"rank {one.number} of {self._count}"
            if one.error is None:
                with suppress(subprocess.TimeoutExpired):
                    how = describe_exit(one.process.wait(0.2))
                    return f"{name} {how}; start the engine again."
            elif not isinstance(one.error, RunnerLost):
                return f"{name} failed: {str(one.error).rstrip('.')}."
        silent = " and ".join(f"rank {one.number}" for one in self._all if one.error is None)
        return (
            f"{silent or 'a rank'} of {self._count} did not answer in time ({error}); start the "
            "engine again."
        )

    def check(self) -> None:
        """Raise RunnerLost if a rank has ended before ``close``."""
        if self._sentence:
            raise RunnerLost(self._sentence)
        if self._end.alive and any(one.process.poll() is not None for one in self._all):
            raise self.lost(EOFError("one has ended"))

    def close(self) -> None:
        """End all processes."""
        self._end()


def _end(followers: Sequence[Follower], folder: tempfile.TemporaryDirectory[str]) -> None:
    """End all ranks. A rank that waits for an order ends when its connection closes; one that
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


class LeadingRunner(ModelRunner):
    """Runner for ``--tp N``, the only one that scheduler and cache use. Every rank allocates, moves
    and saves the same rows and slots for its part of the model."""

    group: TorchGroup
    followers: Followers | None = None
    """The other ranks, set when all have loaded."""

    @classmethod
    def start(cls, config: EngineConfig) -> LeadingRunner:
        """Start the other ranks and load all parts. Raises ModelError or RunnerLost."""
        _, model = read_model(read_config(config.model_dir))
        shared_sizes(model, config.tp)  # Raises before any process starts.
        places = [Device.resolve(config.device).of_rank(number) for number in range(config.tp)]
        device = places[0]
        num_threads = torch.get_num_threads()
        if device.is_cpu:
            num_threads = max(1, num_threads // config.tp)
            torch.set_num_threads(num_threads)
        followers = Followers(config, num_threads)
        try:
            group = TorchGroup(0, config.tp, followers.meeting, device)
            runner = load_runner(config, Rank(0, config.tp, group), cls)
            assert isinstance(runner, cls)
            followers.wait()
        except RunnerLost as error:
            raise followers.lost(error) from error
        except BaseException:
            followers.close()
            raise
        runner.group, runner.followers = group, followers
        return runner

    @torch.inference_mode()
    def forward(self, batch: Batch, drawn: torch.Tensor | None = None) -> torch.Tensor:
        """See ``ModelRunner.forward``. Raises RunnerLost if a rank has gone."""
        with self._together(Order(batch, None if drawn is None else len(drawn))):
            if drawn is not None:
                self.group.gather(drawn.contiguous())
            return super().forward(batch, drawn)

    @torch.inference_mode()
    def commit(self, batch: Batch, taken: Sequence[int]) -> None:
        with self._together(Order(batch, taken=tuple(taken))):
            super().commit(batch, taken)

    @contextmanager
    def _together(self, order: Order) -> Iterator[None]:
        """Make all ranks execute the operation inside the context. Does nothing during the load,
        when each rank acts by itself."""
        if self.followers is None:
            yield
            return
        self.followers.send(itertools.repeat(order))
        try:
            yield
        except Exception as error:
            raise self.followers.lost(error) from error


CHECK_S = 1.0
"""Time between two checks of the other ranks while the engine is idle."""


class TensorParallelPlugin(Plugin):
    """Ends an idle engine if a rank has gone, and the ranks with the engine (setting ``tp``)."""

    _followers: Followers | None = None

    def open_manager(self, manager: CacheManager, runner: ModelRunner) -> None:
        self._followers = runner.followers if isinstance(runner, LeadingRunner) else None

    def on_idle(self) -> float | None:
        """See ``Plugin``. Raises RunnerLost if a rank has ended."""
        if self._followers is None:
            return None
        self._followers.check()
        return CHECK_S

    def close(self) -> None:
        if self._followers is not None:
            self._followers.close()

    def start_screen(self) -> Sequence[tuple[str, str]]:
        number = self.config.tp
        words = f"{number}, each with its part of every layer; memory is for all of them"
        return [("ranks", words)]
