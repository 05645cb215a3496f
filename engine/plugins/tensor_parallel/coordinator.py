"""Tensor parallelism in rank 0: its runner makes the other ranks compute every batch with it, and
its plugin ends the engine if one of them has ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from engine.config import EngineConfig
from engine.core import Plugin
from engine.interfaces import Runner, RunnerLost
from engine.layers.linear import Rank
from engine.models import read_model
from engine.plugins.tensor_parallel.group import TIMEOUT_S, TorchGroup
from engine.plugins.tensor_parallel.worker_pool import Commit, Followers, Forward
from engine.runner.build import load_runner
from engine.runner.device import Device
from engine.runner.loading import shared_sizes
from engine.runner.model_runner import ModelRunner
from engine.schedule.scheduler import Batch
from engine.weights.model_config import read_config
from hybridcache.scheduling.cache_manager import CacheManager


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
        shared_sizes(model, config.num_ranks)  # Raises before any process starts.
        places = [
            Device.resolve(config.device).of_rank(number) for number in range(config.num_ranks)
        ]
        device = places[0]
        num_threads = torch.get_num_threads()
        if device.is_cpu:
            num_threads = max(1, num_threads // config.num_ranks)
            torch.set_num_threads(num_threads)
        followers = Followers(config, num_threads)
        try:
            group = TorchGroup(0, config.num_ranks, followers.meeting, device)
            runner = load_runner(config, Rank(0, config.num_ranks, group), cls)
            assert isinstance(runner, cls)
            followers.wait_for("ready")
            group.set_timeout(TIMEOUT_S)
        except RunnerLost as error:
            raise followers.lost(error) from error
        except BaseException:
            followers.close()
            raise
        runner.group, runner.followers = group, followers
        return runner

    @torch.inference_mode()
    def forward(self, batch: Batch, drawn: torch.Tensor | None = None) -> torch.Tensor:
        """See ``Runner.forward``. Raises RunnerLost if a rank has gone."""
        num_drawn = None if drawn is None else len(drawn)
        with self._together(Forward(batch, num_drawn)):
            if drawn is not None:
                self.group.gather(drawn.contiguous())
            return super().forward(batch, drawn)

    @torch.inference_mode()
    def commit(self, batch: Batch, taken: Sequence[int]) -> None:
        """See ``Runner.commit``."""
        with self._together(Commit(batch, tuple(taken))):
            super().commit(batch, taken)

    @contextmanager
    def _together(self, order: Forward | Commit) -> Iterator[None]:
        """Make all ranks execute the operation inside the context. Does nothing during the load,
        when each rank acts by itself."""
        if self.followers is None:
            yield
            return
        self.followers.order(order)
        try:
            yield
        except Exception as error:
            raise self.followers.lost(error) from error
        except BaseException as error:
            self.followers.lost(error)
            raise


CHECK_S = 1.0
"""Time between two checks of the other ranks while the engine is idle."""


class TensorParallelPlugin(Plugin):
    """Ends an idle engine if a rank has gone, and the ranks with the engine (setting ``tp``)."""

    name = "tensor_parallel"
    _followers: Followers | None = None

    def open_manager(self, manager: CacheManager, runner: Runner) -> None:
        self._followers = runner.followers if isinstance(runner, LeadingRunner) else None

    def on_idle(self) -> float | None:
        """See ``StepHooks``. Raises RunnerLost if a rank has ended."""
        if self._followers is None:
            return None
        self._followers.check()
        return CHECK_S

    def close(self) -> None:
        if self._followers is not None:
            self._followers.close()

    def start_screen(self) -> Sequence[tuple[str, str]]:
        number = self.config.num_ranks
        words = f"{number}, each with its part of every layer; memory is for all of them"
        return [("ranks", words)]
