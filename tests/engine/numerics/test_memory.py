"""Pools sized by bytes, the table of kernel backends, the table of devices."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest
import torch

from engine.backends import Kernels
from engine.device import Device
from engine.memory import (
    GIB,
    KVPool,
    MemoryPlan,
    RequestTable,
    StatePool,
    kv_row_bytes,
    state_slot_bytes,
)
from engine.model_config import ModelConfig, ModelError
from engine.models.builtin import BUILTIN_CONFIG
from hybridcache.costs import ModelGeometry

MODEL = ModelConfig.from_dict(BUILTIN_CONFIG)
ATTENTION_ONLY = ModelConfig.from_dict({**BUILTIN_CONFIG, "model_type": "qwen3"})
CPU = Device.resolve("cpu")
NOTHING = {"kv_bytes": None, "state_bytes": None, "cache_bytes": None}


def fit(model, **budget):
    return MemoryPlan.fit(model, torch.bfloat16, CPU, **{**NOTHING, **budget})


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
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: object())
    with pytest.raises(ModelError, match="pip uninstall kernels"):
        Kernels.choose(CPU)


@pytest.mark.parametrize("name", ["abacus", "xpu:7"])
def test_devices_that_are_not_there_are_named(name):
    with pytest.raises(ModelError, match=name):
        Device.resolve(name)


def test_cpu():
    assert CPU.is_cpu and CPU.free_bytes() > 0
    assert CPU.describe().startswith("cpu, ")
    CPU.synchronize()
