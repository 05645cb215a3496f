"""Pools sized by bytes, the table of kernel backends, the table of devices."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.config import ConfigError
from engine.run.backends import Kernels
from engine.run.device import TRAITS, Device
from engine.run.memory import (
    ACCELERATOR_SHARE,
    KVPool,
    MemoryPlan,
    RequestTable,
    StatePool,
    default_cache_bytes,
    kv_row_bytes,
    state_slot_bytes,
)
from engine.run.model_config import ModelConfig, ModelError
from engine.run.models.builtin import BUILTIN_CONFIG
from hybridcache.geometry.model import ModelGeometry
from hybridcache.units import GIB

MODEL = ModelConfig.from_dict(BUILTIN_CONFIG)
ATTENTION_ONLY = ModelConfig.from_dict({**BUILTIN_CONFIG, "model_type": "qwen3"})
CPU = Device.resolve("cpu")
NO_STEP = {"kv_bytes": None, "state_bytes": None, "cache_bytes": None}


def fit(model, **budget):
    return MemoryPlan.fit(model, torch.bfloat16, CPU, **{**NO_STEP, **budget})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pools_are_as_large_as_the_geometry_says(dtype):
    word = str(dtype).removeprefix("torch.")
    geometry = ModelGeometry.from_config(BUILTIN_CONFIG, kv_dtype=word, conv_dtype=word)
    assert kv_row_bytes(MODEL, dtype) == geometry.kv_bytes_per_token
    assert state_slot_bytes(MODEL, dtype) == geometry.state_bytes
    kv = KVPool(MODEL, 300, dtype, CPU)
    states = StatePool(MODEL, 4, dtype, CPU)
    padded_kv = sum(tensor.nbytes for tensor in (kv.key, kv.value))
    assert padded_kv == 301 * geometry.kv_bytes_per_token
    assert sum(tensor.nbytes for tensor in states.tensors) == 5 * geometry.state_bytes
    assert kv.padding_row == 300 and states.padding_slot == 4
    assert all(not tensor.any() for tensor in (kv.key, kv.value, *states.tensors))


def test_one_budget_is_halved_and_an_attention_only_model_takes_it_whole():
    plan = fit(MODEL, cache_bytes=GIB)
    assert plan.kv_bytes == plan.state_bytes == GIB // 2
    assert plan.num_kv_tokens == GIB // 2 // kv_row_bytes(MODEL, torch.bfloat16)
    assert plan.num_slots == GIB // 2 // state_slot_bytes(MODEL, torch.bfloat16)
    whole = fit(ATTENTION_ONLY, cache_bytes=GIB)
    assert (whole.kv_bytes, whole.state_bytes, whole.num_slots) == (GIB, 0, 0)


def test_budgets_of_their_own():
    plan = fit(MODEL, kv_bytes=GIB // 4, state_bytes=GIB // 8)
    assert (plan.kv_bytes, plan.state_bytes) == (GIB // 4, GIB // 8)
    assert fit(MODEL, kv_bytes=GIB // 4).num_slots > 0


def test_rows_are_whole_pages():
    plan = fit(MODEL, kv_bytes=GIB // 4 + 12_345, page_size=48)
    assert plan.num_kv_tokens % 48 == 0


def test_request_table():
    table = RequestTable(3, 10, padding_index=99, device=CPU)
    table.write([(1, 2, np.array([7, 8], np.int32)), (2, 0, np.array([5], np.int32))])
    assert table.device[1].tolist() == [0, 0, 7, 8, 0, 0, 0, 0, 0, 0]
    assert table.device[2, 0] == 5
    assert table.device[table.padding_row].tolist() == [99] * 10


def test_kernels_are_chosen_by_word():
    chosen = Kernels.choose(CPU, "attention=fused, norm=reference")
    words = chosen.words()
    assert words.pop("attention") == "fused"
    assert set(words.values()) == {"reference"}
    for text, sentence in (
        ("attn=fused", "no kernel 'attn'; there are activation, attention"),
        ("gdn=cutlass", "no backend 'cutlass'; reference or fused"),
        ("gdn", "no backend ''"),
    ):
        with pytest.raises(ModelError, match=sentence):
            Kernels.choose(CPU, text)


def test_the_distribution_that_would_shadow_ours_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9.0")
    with pytest.raises(ConfigError, match="pip uninstall kernels"):
        Kernels.choose(CPU)


@pytest.mark.parametrize("name", ["abacus", "xpu:7"])
def test_devices_that_are_not_there_are_named(name):
    with pytest.raises(ModelError, match=name):
        Device.resolve(name)


def test_cpu():
    assert CPU.is_cpu and CPU.free_bytes() > 0
    assert CPU.describe().startswith("cpu, ")
    CPU.synchronize()


def test_a_device_beyond_those_there_are_is_refused(monkeypatch):
    module = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, current_device=lambda: 1
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    assert Device.resolve("cuda:1").torch_device.index == 1
    assert Device.resolve("cuda").torch_device.index == 1
    with pytest.raises(ModelError, match="'cuda:2' is not available"):
        Device.resolve("cuda:2")


def test_the_current_device_is_the_one_asked_for(monkeypatch):
    chosen = []
    module = SimpleNamespace(set_device=chosen.append)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    Device(torch.device("cuda:1"), TRAITS["cuda"]).make_current()
    CPU.make_current()
    assert chosen == [torch.device("cuda:1")]


def test_no_module_but_the_table_names_a_device():
    for folder in ("engine", "kernels"):
        for path in (Path(__file__).parents[3] / folder).rglob("*.py"):
            if path.name != "device.py":
                assert not re.search(r"['\"]cuda\b|torch\.cuda", path.read_text()), path


def test_memory_kept_for_graphs_is_no_memory_for_pools(monkeypatch):
    device = Device(torch.device("cuda:0"), TRAITS["cuda"])
    monkeypatch.setattr(Device, "free_bytes", lambda self: 10 * GIB)
    assert default_cache_bytes(device) == int(10 * GIB * ACCELERATOR_SHARE)
    assert default_cache_bytes(device, 4 * GIB) == int(6 * GIB * ACCELERATOR_SHARE)
    assert default_cache_bytes(device, 11 * GIB) == 0


def test_more_layers_than_any_model_has_are_refused_at_once():
    with pytest.raises(ModelError, match="num_hidden_layers can not be 1000000000"):
        ModelConfig.from_dict({**BUILTIN_CONFIG, "num_hidden_layers": 10**9})


def test_sixteen_bit_states_are_sized_as_the_geometry_says():
    geometry = ModelGeometry.from_config(BUILTIN_CONFIG, state_dtype="bfloat16")
    assert state_slot_bytes(MODEL, torch.bfloat16, torch.bfloat16) == geometry.state_bytes
    states = StatePool(MODEL, 4, torch.bfloat16, CPU, torch.bfloat16)
    assert sum(tensor.nbytes for tensor in states.tensors) == 5 * geometry.state_bytes
    halved = fit(MODEL, state_bytes=GIB, kv_bytes=GIB, state_dtype=torch.bfloat16)
    assert halved.num_slots == GIB // geometry.state_bytes
