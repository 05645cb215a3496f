"""Sizes of memory pools, choice of kernel backends, and devices."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from engine.config import BUILTIN_DIR
from engine.models import read_model
from engine.runner.device import Device
from engine.runner.memory import Memory
from engine.runner.memory_plan import (
    MemoryPlan,
    kv_row_bytes,
    state_slot_bytes,
)
from engine.weights.model_config import read_config

BUILTIN = read_config(BUILTIN_DIR)
MODEL = read_model(BUILTIN)[1].sizes
CPU = Device.resolve("cpu")


def allocate(plan, sizes, dtype, state_dtype=torch.float32):
    """Return the memory, and its pools by the name of their contents."""
    keeps = [layer.keeps for layer in sizes.layers]
    memory = Memory.allocate(plan, keeps, dtype, state_dtype, CPU)
    pools_by_name = {"key": [], "value": [], "conv": [], "recurrent": []}
    for specs, pools in zip(keeps, memory.pools, strict=True):
        for spec, pool in zip(specs, pools, strict=True):
            assert pool.shape[1:] == spec.shape
            pools_by_name[spec.name].append(pool)
    return memory, pools_by_name


def fit(model, **budget):
    return MemoryPlan.fit(model, torch.bfloat16, CPU, **budget)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
STATE_DTYPES = pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
PAGE_SIZES = pytest.mark.parametrize("page_size", [1, 64])


@DTYPES
@STATE_DTYPES
def test_pools_have_the_planned_size_plus_padding(dtype, state_dtype):
    row, state = kv_row_bytes(MODEL, dtype), state_slot_bytes(MODEL, dtype, state_dtype)
    plan = MemoryPlan("pools", 300, 4, row, state)
    memory, pools = allocate(plan, MODEL, dtype, state_dtype)
    kv, states = pools["key"] + pools["value"], pools["conv"] + pools["recurrent"]
    assert sum(tensor.nbytes for tensor in kv) == 301 * row
    assert sum(tensor.nbytes for tensor in states) == 5 * state
    assert sum(tensor.nbytes for tensor in memory.states) == 5 * state and len(memory.states) == 2
    assert (memory.padding_row, memory.padding_slot) == (300, 4)
    assert memory.rows is None and plan.total_bytes == 300 * row + 4 * state
    assert not any(pool.any() for pool in kv + states)
    assert len({pool.data_ptr() for pool in kv + states}) == len(kv + states)
    for tensor in memory.states:
        tensor.fill_(1)
    assert all((pool == 1).all() for pool in states)


@DTYPES
@STATE_DTYPES
@PAGE_SIZES
def test_each_arena_byte_belongs_to_one_row_and_one_slot(dtype, state_dtype, page_size):
    """Write through one view at a time and find the bytes: rows, slots and padding."""
    budget = {"cache_bytes": 6 * 2**20, "page_size": page_size, "state_dtype": state_dtype}
    plan = MemoryPlan.fit(MODEL, dtype, CPU, **budget)
    memory, pools = allocate(plan, MODEL, dtype, state_dtype)
    rows, slab = memory.rows, plan.slab_rows
    assert slab % page_size == 0 and plan.num_slots == plan.num_kv_tokens // slab
    state = state_slot_bytes(MODEL, dtype, state_dtype)
    for row in (0, 1, slab, plan.num_kv_tokens - 1, memory.padding_row):
        for pool in pools["key"] + pools["value"]:
            pool[row] = float("nan")
        touched = rows.any(dim=1).nonzero().flatten().tolist()
        assert touched == [row]
        # Each layer has a separate part of the row.
        written = (rows[row].view(dtype).float().isnan()).sum()
        assert written * dtype.itemsize == kv_row_bytes(MODEL, dtype)
        rows.zero_()
    for slot in (0, 1, plan.num_slots - 1, memory.padding_slot):
        first = slot * slab
        for pool in pools["conv"]:
            pool[slot] = float("nan")
        num_conv = rows.view(dtype).float().isnan().sum() * dtype.itemsize
        for pool in pools["recurrent"]:
            pool[slot] = float("nan")
        touched = rows.any(dim=1).nonzero().flatten()
        assert (first, first + slab) == (touched[0], touched[0] + slab)
        assert touched[-1] == first + -(-state // plan.row_bytes) - 1
        num_recurrent = sum(pool[slot].nbytes for pool in pools["recurrent"])
        assert num_conv == sum(pool[slot].nbytes for pool in pools["conv"])
        assert num_conv + num_recurrent == state
        assert all(pool[slot].isnan().all() for pool in pools["conv"])
        assert memory.states[0][0, slot].equal(
            rows.view(-1, plan.row_bytes)[first:].flatten()[:state]
        )
        rows.zero_()
    assert memory.padding_row >= plan.num_kv_tokens
    assert memory.padding_row // slab > memory.padding_slot
    assert memory.padding_slot * slab >= plan.num_kv_tokens


def test_only_the_device_module_names_cuda():
    for folder in ("engine", "kernels"):
        for path in (Path(__file__).parents[3] / folder).rglob("*.py"):
            if path.name != "device.py":
                assert not re.search(r"['\"]cuda\b|torch\.cuda", path.read_text()), path
