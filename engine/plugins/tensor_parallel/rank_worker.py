"""Process of every rank except the first: it loads its part, then computes the same batches."""

from __future__ import annotations

import atexit
import shutil
import signal
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import torch

from engine.interfaces import RunnerLost
from engine.layers.linear import Rank
from engine.plugins.tensor_parallel.group import TIMEOUT_S, TorchGroup
from engine.plugins.tensor_parallel.worker_pool import Commit, Forward, RankReport, Start
from engine.runner.build import load_runner
from engine.runner.device import Device
from engine.weights.model_config import ModelError


def main(descriptor: int) -> None:
    """Run the rank with ``descriptor`` as its end of the connection, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Rank 0 handles this signal.
    line = Connection(descriptor)
    try:
        _run(line)
    except (EOFError, ConnectionError):
        return
    except ModelError as error:
        last_words = RankReport("refused", str(error))
    except RunnerLost as error:
        last_words = RankReport("lost", str(error))
    except Exception as error:
        traceback.print_exc()
        last_words = RankReport("failed", f"{type(error).__name__}: {error}")
    with suppress(OSError):
        line.send(last_words)
    sys.exit(1)


def _run(line: Connection) -> NoReturn:
    start: Start = line.recv()
    # Left over if rank 0 is killed.
    atexit.register(shutil.rmtree, Path(start.meeting).parent, ignore_errors=True)
    line.send(RankReport("here"))
    device = Device.resolve(start.config.device).of_rank(start.number)
    if device.is_cpu:
        torch.set_num_threads(start.num_threads)
    device.make_current()
    count = start.config.num_ranks
    group = TorchGroup(start.number, count, start.meeting, device)
    runner = load_runner(start.config, Rank(start.number, count, group))
    line.send(RankReport("ready"))
    group.set_timeout(TIMEOUT_S)
    while True:
        order: Forward | Commit = line.recv()
        if isinstance(order, Commit):
            runner.commit(order.batch, order.taken)
        elif order.num_drawn is None:
            runner.forward(order.batch)
        else:
            place = torch.empty(order.num_drawn, dtype=torch.int64, device=device.torch_device)
            runner.forward(order.batch, group.gather(place)[0])
