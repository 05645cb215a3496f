"""Sizes of memory pools, choice of kernel backends, and devices."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine import EngineConfig
from engine.config import BUILTIN_DIR, ConfigError
from engine.models import read_model
from engine.runner import device as device_module
from engine.runner.device import Device, host_free_bytes
from engine.runner.memory import (
    MIN_KV_TOKENS,
    Memory,
    MemoryPlan,
    check_sizes,
    kv_row_bytes,
    state_slot_bytes,
)
from engine.weights.model_config import read_config
from hybridcache.geometry.units import GIB

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


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
STATE_DTYPES = pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
PAGE_SIZES = pytest.mark.parametrize("page_size", [1, 64])


@DTYPES
@STATE_DTYPES
@PAGE_SIZES
def test_each_arena_byte_belongs_to_one_row_and_one_slot(dtype, state_dtype, page_size):
    """Write through one view at a time and find the bytes: rows, slots and padding."""
    state = state_slot_bytes(MODEL, dtype, state_dtype)
    smallest = MemoryPlan.of(MIN_KV_TOKENS, 3, kv_row_bytes(MODEL, dtype), state, page_size)
    plan = smallest.fit(CPU, 6 * 2**20)
    memory, pools = allocate(plan, MODEL, dtype, state_dtype)
    rows, slab = memory.rows, plan.slab_rows
    assert slab % page_size == 0 and plan.num_slots == plan.num_kv_tokens // slab
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


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Return a function that writes a file of a system whose root is ``tmp_path``."""

    def write(path, content):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")

    monkeypatch.setattr(device_module, "SYSTEM", tmp_path)
    return write


def write_meminfo(system, **gib):
    lines = [f"{name}: {int(size * GIB) // 1024} kB" for name, size in gib.items()]
    system("proc/meminfo", "\n".join([*lines, "HugePages_Total: 0"]))


def write_group(system, folder, limit, used, idle, **more):
    system(f"{folder}/memory.stat", f"anon 1\ninactive_file {idle}")
    for name, value in {"max": limit, "current": used, **more}.items():
        system(f"{folder}/memory.{name}", value)


CGROUP = "sys/fs/cgroup"


def test_limits_of_control_groups_count_with_those_of_parents(system):
    write_meminfo(system, MemAvailable=20)
    system("proc/self/cgroup", "0::/pod/one/task")
    assert host_free_bytes() == 20 * GIB, "there are no files of groups"
    write_group(system, f"{CGROUP}/pod/one/task", "max", 10, 0)
    write_group(system, f"{CGROUP}/pod/one", 9 * GIB, 2 * GIB, GIB, high="max")
    write_group(system, f"{CGROUP}/other", 5, 0, 0)
    assert host_free_bytes() == 8 * GIB
    write_group(system, f"{CGROUP}/pod", 7 * GIB, 2 * GIB, 0)
    assert host_free_bytes() == 5 * GIB
    system(f"{CGROUP}/pod/one/memory.high", 4 * GIB)
    assert host_free_bytes() == 3 * GIB
    write_group(system, CGROUP, 3 * GIB, 2 * GIB, 0)
    assert host_free_bytes() == GIB
    system(f"{CGROUP}/memory.current", 4 * GIB)
    assert host_free_bytes() == 0


def test_more_memory_than_a_container_has_is_refused(system):
    write_meminfo(system, MemAvailable=20, MemTotal=20)
    system("proc/self/cgroup", "0::/")
    write_group(system, CGROUP, 4 * GIB, 0, 0)
    config = EngineConfig(cache_gib=3, host_gib=2)
    with pytest.raises(ConfigError, match=r"and host_gib: 5\.0 GiB are needed, but 4\.0 GiB"):
        check_sizes(config, CPU)
    check_sizes(EngineConfig(cache_gib=3, host_gib=0), CPU)  # 0: no host tier
    write_group(system, CGROUP, 5 * GIB, 0, 0)
    check_sizes(config, CPU)


def test_host_memory_is_registered_until_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later tier may get the same addresses. CUDA registers no address twice."""
    registered: dict[int, int] = {}

    def register(address: int, num_bytes: int, flags: int) -> int:
        if address in registered:
            return 712
        registered[address] = num_bytes
        return 0

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=registered.pop)
    monkeypatch.setattr(Device, "module", SimpleNamespace(cudart=lambda: runtime))
    host = torch.zeros(8)
    assert CPU.register(host) and list(registered.values()) == [host.nbytes]
    assert not CPU.register(host)
    del host
    assert registered == {}
