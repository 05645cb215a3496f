"""Ranks that share a model, as threads of this process: each family's parts make up the whole, and
a hit changes no bit. What processes add to it is in ``tests/engine/test_tensor_parallel.py``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.run.model_config import ModelError
from engine.run.model_runner import ModelRunner
from engine.run.ranks.rank import Rank
from engine.schedule.batch import Batch

NOT_SHARED = {
    "granite_moe_hybrid": "norms 1 groups of channels",
    "granite_moe_hybrid_dense": "norms 1 groups of channels",
    "kimi_linear": "can not share 3 key heads",
    "olmo_hybrid": "a norm runs over all heads",
    "olmo_hybrid_without_rope": "a norm runs over all heads",
}
"""Families and variants whose small models two ranks refuse, and why."""


class Threads:
    """A ``Group`` of threads."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=60)
        self._parts: list[Any] = [None] * count

    def of(self, number: int) -> Any:
        class Mine:
            def gather(_, x: torch.Tensor) -> list[torch.Tensor]:
                self._parts[number] = x.clone()
                self._barrier.wait()
                found = [part.clone() for part in self._parts]
                self._barrier.wait()
                return found

        return Mine()

    def abort(self) -> None:
        self._barrier.abort()


def together(count: int, config: EngineConfig, work: Callable[[ModelRunner], Any]) -> list[Any]:
    """What ``work`` makes of each rank's runner."""
    group = Threads(count)

    def run(number: int) -> Any:
        rank = Rank(number, count, group.of(number) if count > 1 else None)
        try:
            return work(ModelRunner(config, rank))
        except BaseException:
            group.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        jobs = [pool.submit(run, number) for number in range(count)]
        errors = [job.exception() for job in jobs]
    for error in errors:
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [job.result() for job in jobs]


def config_of(path: Any, **settings: Any) -> EngineConfig:
    budget = {"kv_gib": 0.02, "state_gib": 0.02, "max_running": 8}
    return EngineConfig(
        **({"model": str(path), "device": "cpu", "dtype": "float32"} | budget | settings)
    )


def cold_and_hit(driver_class: Any, tokens: list[int]) -> Callable[[ModelRunner], Any]:
    """Logits of a prompt and of tokens decoded behind it, computed cold, and again from the state
    at its last tile, beside another prompt."""

    def work(runner: ModelRunner) -> tuple[torch.Tensor, torch.Tensor]:
        driver = driver_class(runner)
        cold, write = driver.begin(tokens)
        end = len(tokens) // 64 * 64
        exports = () if cold.slot is None else ((end, driver.slot()),)
        segment = driver.prefill_segment(cold, len(tokens), exports=exports, logits="all")
        first = [runner.forward(Batch((segment,), (), (write,)))[end:]]
        first += [runner.forward(Batch((driver.decode_segment(cold, t),))) for t in (5, 7)]
        other, beside = driver.begin(tokens[:70])
        hit, again = driver.begin(tokens, write[2][:end])
        restores = () if hit.slot is None else ((exports[0][1], hit.slot),)
        segments = (
            driver.prefill_segment(other, 70),
            driver.prefill_segment(hit, len(tokens), logits="all"),
        )
        second = [runner.forward(Batch(segments, restores, (beside, again)))[1:]]
        second += [runner.forward(Batch((driver.decode_segment(hit, t),))) for t in (5, 7)]
        return torch.cat(first), torch.cat(second)

    return work


def test_two_ranks_compute_what_one_does(family, oracles, driver_class, random_tokens) -> None:
    config, work = (
        config_of(oracles(family).path),
        cold_and_hit(driver_class, random_tokens(150, 3)),
    )
    if family in NOT_SHARED:
        with pytest.raises(ModelError, match=NOT_SHARED[family]):
            together(2, config, work)
        return
    ((alone, _),) = together(1, config, work)
    (cold, hit), (other, _) = together(2, config, work)
    assert torch.equal(cold, hit)
    assert torch.equal(cold, other)
    assert (cold - alone).abs().max() < 1e-4
