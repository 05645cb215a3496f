"""Tensor parallelism with ranks as threads: results of each family, and exact hits.

``tests/engine/plugins/tensor_parallel/test_tensor_parallel.py`` tests ranks as processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.config import EngineConfig
from engine.runner.build import load_runner
from engine.runner.model_runner import ModelRunner
from engine.weights.checkpoint import WeightFiles
from engine.weights.model_config import ModelError
from engine.weights.parameters import Parameter
from engine.weights.ranks import Cut, Rank
from tests.engine.small_models import Driver, random_tokens
from tests.refused import refused

REFUSED = {
    "granite_moe_hybrid": "has 1 groups of channels",
    "granite_moe_hybrid_dense": "has 1 groups of channels",
    "kimi_linear": "cannot divide 3 key heads",
    "olmo_hybrid": "norms over all heads",
    "olmo_hybrid_without_rope": "norms over all heads",
}
"""Error of two ranks, by family or variant, for small models that cannot be split."""


class ThreadGroup:
    """Source of ``Group`` objects for the threads of one run."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=120)
        self._parts: list[Any] = [None] * count

    def of(self, number: int) -> Any:
        class RankGroup:
            def gather(_, x: torch.Tensor) -> list[torch.Tensor]:
                self._parts[number] = x.clone()
                self._barrier.wait()
                parts = [part.clone() for part in self._parts]
                self._barrier.wait()
                return parts

        return RankGroup()

    def abort(self) -> None:
        self._barrier.abort()


def run_ranks(count: int, config: EngineConfig, work: Callable[[ModelRunner], Any]) -> list[Any]:
    """Return the result of ``work`` for the runner of each rank."""
    group = ThreadGroup(count)

    def run(number: int) -> Any:
        rank = Rank(number, count, group.of(number) if count > 1 else None)
        try:
            return work(load_runner(config, rank))
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


def test_two_ranks_agree_with_one(family, oracles) -> None:
    sizes = {"dtype": "float32", "cache_gib": 0.04, "max_running": 8}
    config = EngineConfig(model=str(oracles(family).path), device="cpu", **sizes)
    tokens = random_tokens(150, 3)

    def work(runner: ModelRunner) -> tuple[torch.Tensor, torch.Tensor]:
        return Driver(runner).cold_and_mixed(tokens)

    if family in REFUSED:
        refused(REFUSED[family], run_ranks, 2, config, work, kind=ModelError)
        return
    ((single, mixed_single),) = run_ranks(1, config, work)
    (cold, mixed), other = run_ranks(2, config, work)
    assert torch.equal(mixed[1:], cold[64:])
    assert torch.equal(cold, other[0]) and torch.equal(mixed, other[1])
    assert (cold - single).abs().max() < 1e-4
    assert (mixed - mixed_single).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rank_reads_only_its_part(dtype, tmp_path) -> None:
    tensors = {
        "rows": torch.randn(8, 3),
        "stacked": torch.randn(4, 6, 5),
        "cols": torch.randn(9, 8),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    cuts = {
        "rows": Cut(8, torch.tensor([6, 1, 2])),
        "stacked": Cut(6, torch.tensor([1, 2, 4]), 1),
        "cols": Cut(8, torch.arange(4, 8), 1),
    }
    expected = {name: cut.of(tensors[name]) for name, cut in cuts.items()}
    parameters = {
        name: Parameter(torch.empty(part.shape, dtype=dtype), cut=cuts[name])
        for name, part in expected.items()
    }

    class Part:
        def parameters(self) -> Any:
            return parameters.items()

        def seal(self) -> None:
            pass

    files = WeightFiles(tmp_path)
    files.check(parameters.items(), tied=False)
    files.fill(Part())
    for name, part in expected.items():
        assert torch.equal(parameters[name].target, part.to(dtype)), name
