"""Sizes of memory pools, choice of kernel backends, and devices."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.config import BUILTIN_DIR, ConfigError, EngineConfig
from engine.models import read_model
from engine.plugins import engine_config
from engine.runner import device as device_module
from engine.runner import memory_plan
from engine.runner.backends import Kernels
from engine.runner.build import load_runner
from engine.runner.device import TRAITS, Device
from engine.runner.loaded_model import LoadedModel
from engine.runner.memory import Memory
from engine.runner.memory_plan import (
    ACCELERATOR_SHARE,
    MemoryPlan,
    default_cache_bytes,
    kv_row_bytes,
    state_slot_bytes,
)
from engine.runner.step_inputs import RequestTable
from engine.weights.model_config import ModelError, read_config
from hybridcache.geometry.model import ModelGeometry
from hybridcache.geometry.units import GIB
from kernels.native import shared_library

BUILTIN = read_config(BUILTIN_DIR)
MODEL = read_model(BUILTIN)[1].sizes
ATTENTION_ONLY = read_model({**BUILTIN, "model_type": "qwen3"})[1].sizes
CPU = Device.resolve("cpu")
NO_BUDGET = {"kv_bytes": None, "state_bytes": None, "cache_bytes": None}


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
    return MemoryPlan.fit(model, torch.bfloat16, CPU, **{**NO_BUDGET, **budget})


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
STATE_DTYPES = pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
PAGE_SIZES = pytest.mark.parametrize("page_size", [1, 64])


@DTYPES
@STATE_DTYPES
def test_row_and_slot_bytes_equal_the_geometry(dtype, state_dtype):
    names = (str(dtype_).removeprefix("torch.") for dtype_ in (dtype, dtype, state_dtype))
    dtypes = dict(zip(("kv_dtype", "conv_dtype", "state_dtype"), names, strict=True))
    geometry = ModelGeometry.from_config(BUILTIN, **dtypes)
    assert kv_row_bytes(MODEL, dtype) == geometry.kv_bytes_per_token
    assert state_slot_bytes(MODEL, dtype, state_dtype) == geometry.state_bytes


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
    plan = MemoryPlan.fit(MODEL, dtype, CPU, **{**NO_BUDGET, **budget})
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


def test_arena_of_an_attention_only_model_has_no_slots():
    plan = fit(ATTENTION_ONLY, cache_bytes=GIB // 64)
    assert (plan.memory, plan.num_slots, plan.slab_rows) == ("arena", 0, 0)
    memory, _ = allocate(plan, ATTENTION_ONLY, torch.bfloat16)
    assert memory.states == () and memory.padding_slot is None
    assert memory.padding_row == plan.num_kv_tokens
    assert memory.rows.shape == (plan.num_kv_tokens + 1, plan.row_bytes)


def test_single_budget_makes_an_arena():
    plan = fit(MODEL, cache_bytes=GIB)
    row, state = plan.row_bytes, plan.state_bytes
    assert plan.memory == "arena" and plan.num_kv_tokens == GIB // row
    assert plan.slab_rows == -(-state // row) and plan.num_slots == GIB // row // plan.slab_rows
    assert plan.max_request_len == plan.num_kv_tokens - 3 * plan.slab_rows
    whole = fit(ATTENTION_ONLY, cache_bytes=GIB)
    assert whole.max_request_len == whole.num_kv_tokens == GIB // whole.row_bytes


def test_separate_budgets_make_two_pools():
    plan = fit(MODEL, kv_bytes=GIB // 4, state_bytes=GIB // 8)
    row, state = plan.row_bytes, plan.state_bytes
    assert (plan.memory, plan.slab_rows, plan.slot_bytes) == ("pools", 0, state)
    assert (plan.num_kv_tokens, plan.num_slots) == (GIB // 4 // row, GIB // 8 // state)
    assert fit(MODEL, kv_bytes=GIB // 4).num_slots > 0
    assert fit(MODEL, state_bytes=GIB // 4).num_kv_tokens > 0
    assert fit(ATTENTION_ONLY, kv_bytes=GIB // 4).memory == "pools"


@pytest.mark.parametrize(
    ("config", "budget", "sentence"),
    [
        (
            MODEL,
            {"cache_bytes": 5 * 10**5},
            "0.000466 GiB hold 781 tokens .* 256 tokens and 3 states, ",
        ),
        (ATTENTION_ONLY, {"cache_bytes": 10**5}, "hold 39 tokens .* 256 tokens, .*, are needed"),
        (MODEL, {"kv_bytes": 10**5}, "for KV hold .* at least 256 tokens, "),
        (MODEL, {"kv_bytes": GIB, "state_bytes": 10**5}, "for states hold 0 .* at least 2, "),
    ],
)
def test_too_little_memory_is_refused_in_one_sentence(config, budget, sentence):
    with pytest.raises(ModelError, match=sentence) as error:
        fit(config, **budget)
    assert str(error.value).count(". ") == 0 and str(error.value).endswith("are needed.")


def test_rows_are_whole_pages():
    plan = fit(MODEL, kv_bytes=GIB // 4 + 12_345, page_size=48)
    assert plan.num_kv_tokens % 48 == 0


def test_request_table_writes_rows():
    table = RequestTable(3, 10, padding_index=99, device=CPU)
    table.write([(1, 2, np.array([7, 8], np.int32)), (2, 0, np.array([5], np.int32))])
    assert table.device[1].tolist() == [0, 0, 7, 8, 0, 0, 0, 0, 0, 0]
    assert table.device[2, 0] == 5
    assert table.device[table.padding_row].tolist() == [99] * 10


def test_kernels_are_chosen_by_name():
    chosen = Kernels.choose(CPU, "attention=fused, norm=reference")
    assert chosen.words() == {}  # No kernel is in use.
    assert chosen["attention"].__name__ == "kernels.attention.fused"
    backend = "reference" if shared_library() is None else "native"
    assert chosen["gdn"].__name__ == f"kernels.gdn.{backend}"
    assert chosen.words() == {"attention": "fused", "gdn": backend}
    assert {"moe", "norm", "state_copy"} < set(chosen)
    for text, sentence in (
        ("attn=fused", "unknown kernel 'attn'; choose from activation, attention"),
        ("gdn=cutlass", "no backend 'cutlass'; choose reference or fused or native"),
        ("gdn", "no backend ''"),
    ):
        with pytest.raises(ModelError, match=sentence):
            Kernels.choose(CPU, text)


def test_model_loads_only_the_kernels_that_it_uses():
    runner = load_runner(EngineConfig(device="cpu", cache_gib=0.01))
    assert {"attention", "gdn", "conv1d"} < set(runner.kernels.words())
    assert "moe" not in runner.kernels.words()


def test_distribution_that_shadows_our_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.0")
    with pytest.raises(ConfigError, match="pip uninstall kernels"):
        Kernels.choose(CPU)


@pytest.mark.parametrize("name", ["abacus", "xpu:7"])
def test_missing_devices_are_named(name):
    with pytest.raises(ModelError, match=name):
        Device.resolve(name)


def test_cpu_device():
    assert CPU.is_cpu and CPU.free_bytes() > 0
    assert CPU.describe().startswith("cpu, ")
    CPU.synchronize()


def test_device_index_beyond_the_count_is_refused(monkeypatch):
    module = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, current_device=lambda: 1
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert Device.resolve("cuda:1").torch_device.index == 1
    assert Device.resolve("cuda").torch_device.index == 1
    with pytest.raises(ModelError, match="'cuda:2' is not available"):
        Device.resolve("cuda:2")


def test_make_current_selects_the_device(monkeypatch):
    chosen = []
    module = SimpleNamespace(set_device=chosen.append)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    Device(torch.device("cuda:1"), TRAITS["cuda"]).make_current()
    CPU.make_current()
    assert chosen == [torch.device("cuda:1")]


def test_only_the_device_module_names_cuda():
    for folder in ("engine", "kernels"):
        for path in (Path(__file__).parents[3] / folder).rglob("*.py"):
            if path.name != "device.py":
                assert not re.search(r"['\"]cuda\b|torch\.cuda", path.read_text()), path


def test_memory_of_graphs_is_subtracted_from_pools(monkeypatch):
    device = Device(torch.device("cuda:0"), TRAITS["cuda"])
    monkeypatch.setattr(Device, "free_bytes", lambda self: 10 * GIB)
    assert default_cache_bytes(device) == int(10 * GIB * ACCELERATOR_SHARE)
    assert default_cache_bytes(device, 4 * GIB) == int(6 * GIB * ACCELERATOR_SHARE)
    assert default_cache_bytes(device, 11 * GIB) == 0


@pytest.mark.parametrize(
    ("device", "sizes", "sentence"),
    [
        ("cpu", {"cache_gib": 11}, "cache_gib takes 11 GiB, but 10 GiB of memory are available"),
        ("cpu", {"cache_gib": 6, "host_gib": 5}, "cache_gib and host_gib take 11 GiB, but 10"),
        ("cpu", {"kv_gib": 6, "state_gib": 5}, "kv_gib and state_gib take 11 GiB"),
        ("cpu", {"draft": "tree:2", "draft_index_mib": 2e4}, "draft_index_mib takes 19.5 GiB"),
        ("cuda:0", {"cache_gib": 9}, "cache_gib takes 9 GiB, but 8 GiB of memory of cuda:0 are"),
        ("cuda:0", {"host_gib": 11}, "host_gib takes 11 GiB, but 10 GiB of host memory are"),
    ],
)
def test_sizes_above_the_available_memory_are_refused(monkeypatch, device, sizes, sentence):
    monkeypatch.setattr(memory_plan, "host_free_bytes", lambda: 10 * GIB)
    monkeypatch.setattr(Device, "unused_bytes", lambda self: 8 * GIB)
    place = Device(torch.device(device), TRAITS[device.partition(":")[0]])
    with pytest.raises(ConfigError, match=sentence):
        memory_plan.check_sizes(engine_config(**sizes), place)
    memory_plan.check_sizes(engine_config(cache_gib=4, host_gib=4), place)


def test_sizes_are_checked_before_the_weights_are_read(monkeypatch):
    monkeypatch.setattr(LoadedModel, "load", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(ConfigError, match="cache_gib takes 900,000 GiB"):
        load_runner(EngineConfig(device="cpu", cache_gib=900_000))


def test_limit_of_a_container_counts(monkeypatch, tmp_path):
    files = {"max": "1000", "current": "900", "stat": "anon 100\ninactive_file 300"}
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    monkeypatch.setattr(device_module, "CGROUP", tmp_path)
    assert device_module.host_free_bytes() == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert device_module.host_free_bytes() > 10**6


def test_absurd_number_of_layers_is_refused():
    with pytest.raises(
        ModelError, match=r"num_hidden_layers must be at most .* \(got 1000000000\)"
    ):
        read_model({**BUILTIN, "num_hidden_layers": 10**9})
