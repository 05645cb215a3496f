"""Builds a model runner in two phases: the weights, then the memory from a plan."""

from __future__ import annotations

from typing import TypeVar

import torch

from engine.config import EngineConfig
from engine.layers.rank import ALONE, Rank
from engine.runner.device import Device
from engine.runner.exactness import check_exactness
from engine.runner.loaded_model import LoadedModel
from engine.runner.memory_plan import MemoryPlan, check_sizes
from engine.runner.model_runner import ModelRunner
from engine.runner.warm_up import measure, warm_up
from engine.weights.model_config import ModelError
from hybridcache.geometry.units import GIB, counted

Kind = TypeVar("Kind", bound=ModelRunner)


def load_runner(config: EngineConfig, rank: Rank = ALONE) -> ModelRunner:
    """Load the model that ``config`` names, and allocate its memory. Raises ModelError."""
    return load_runner_as(ModelRunner, config, rank)


def load_runner_as(kind: type[Kind], config: EngineConfig, rank: Rank) -> Kind:
    """Load a runner of a subclass; see ``load_runner``."""
    check_sizes(config, Device.resolve(config.device))  # Before anything slow.
    loaded = LoadedModel.load(config, rank)
    config = loaded.settings
    check_sizes(config, loaded.device)
    warms_up = config.warm_up and not loaded.device.is_cpu
    reserved_bytes = (
        _rehearsed_bytes(loaded) if warms_up else loaded.step_state_bytes + loaded.own_state_bytes
    )
    plan = MemoryPlan.fit(
        loaded.sizes,
        loaded.dtype,
        loaded.device,
        cache_bytes=_bytes(config.cache_gib),
        page_size=config.page_size,
        state_dtype=loaded.state_dtype,
        reserved_bytes=reserved_bytes,
        checkpoints=loaded.checkpoints,
        num_ranks=rank.count,
    ).agreed(rank, loaded.device)
    exactness = check_exactness(loaded)
    runner = kind(loaded, plan, _max_model_len(loaded, plan))
    runner.exactness = exactness
    if warms_up:
        try:
            runner.warmed = warm_up(runner)
        except torch.OutOfMemoryError:
            raise ModelError(
                "there is no memory left for graphs and the largest step: reduce --cache-gib, or "
                "use --graphs off."
            ) from None
    return runner


def _rehearsed_bytes(loaded: LoadedModel) -> int:
    """Measure the bytes to keep free for tables, graphs and the largest step, on the smallest
    memory."""
    longest = loaded.settings.max_model_len or loaded.config.max_len
    free_bytes = loaded.device.unused_bytes()
    smallest = MemoryPlan.smallest(
        loaded.sizes, loaded.dtype, loaded.state_dtype, loaded.checkpoints
    )
    runner = ModelRunner(loaded, smallest, longest)
    return max(0, free_bytes - loaded.device.unused_bytes()) + measure(runner)


def _bytes(gib: float | None) -> int | None:
    return None if gib is None else int(gib * GIB)


def _max_model_len(loaded: LoadedModel, plan: MemoryPlan) -> int:
    asked, longest = loaded.settings.max_model_len, plan.max_request_len
    if asked is None:
        return min(loaded.config.max_len, longest)
    if asked > longest:
        need = (asked + plan.num_kv_tokens - longest) * plan.row_bytes / GIB
        what = "its KV and states" if plan.slab_rows else "KV"
        raise ModelError(
            f"one request of max_model_len {asked} needs {need:.3g} GiB for {what}; "
            f"there is room for {counted(longest, 'token')}."
        )
    return asked
