"""Devices of the tensors of all steps, on torch's meta device: it computes nothing, cannot be read
by the host, and is not the CPU."""

from __future__ import annotations

import gc
import os
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from engine import EngineConfig
from engine.plugins.tensor_parallel.coordinator import TorchGroup
from engine.requests.logit_rules import FREE, Repeats
from engine.requests.request import SamplingInput, SamplingParams
from engine.runner.build import captures, load_runner, rehearsals
from engine.runner.device import Device
from engine.runner.memory import MemoryPlan
from engine.runner.sampler import Sampler
from engine.schedule.scheduler import Batch
from engine.weights.ranks import ALONE, Rank
from kernels.attention import splits
from tests.engine.device_models import QWEN3_NEXT_80B, write_geometry
from tests.engine.runner.test_graphs import MODELS
from tests.engine.runner.test_sampler import LiveBytes
from tests.stub_device import StubDevice

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="launches are intercepted in the interpreter"
)
WAITS = {torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
"""Operations whose results have a size or value that the host needs."""


def storages(tree) -> set[StorageWeakRef]:
    tensors = [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
    return {StorageWeakRef(x.untyped_storage()) for x in tensors}


class Watch(TorchDispatchMode):
    """Refuses operations on tensors of both devices, waits for the device, and in a capture every
    tensor of the host: a replay would read memory that was freed."""

    is_capturing = False

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.made = set(), set()
        """Storages that captures read, and those that the present capture has made."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = [x.device.type == "meta" for x in tensors]
        if self.is_capturing or any(on_device):
            assert all(on_device), f"{function} gets tensors of the host"
            assert function not in WAITS, f"{function} waits for the device"
        if function is torch.ops.aten.index.Tensor and any(on_device):
            indices = [x for x in args[1] if x is not None]
            assert all(x.dtype is not torch.bool for x in indices), "a mask waits for the device"
        out = function(*args, **(kwargs or {}))
        if self.is_capturing:
            self.outer |= storages(tensors) - self.made
            self.made |= storages(out) - self.outer
        return out

    def recorder(self):
        """Return a recorder that computes the work once, and captures it."""

        def record(work):
            work()
            self.is_capturing = True
            work()
            self.is_capturing = False
            self.made.clear()
            return work

        return record


@pytest.fixture
def watch(monkeypatch):
    """Replace all devices but the CPU by the meta device; Triton checks arguments and runs
    nothing."""
    from triton.runtime.interpreter import GridExecutor

    watch, resolve, empty = Watch(), Device.resolve, torch.empty
    device = StubDevice(torch.device("meta"))
    replaced = {
        (Device, "resolve"): lambda name: resolve("cpu") if name == "cpu" else device,
        (StubDevice, "supports"): lambda self, quantization: True,
        (StubDevice, "recorder"): lambda self: watch.recorder(),
        (torch, "empty"): lambda *args, pin_memory=False, **settings: empty(*args, **settings),
        (GridExecutor, "__call__"): lambda *args, **options: launch(watch, *args, **options),
    }
    for (owner, name), function in replaced.items():
        monkeypatch.setattr(owner, name, function)
    # The values that a step reads: drafts, and drawn tokens.
    monkeypatch.setattr("torch.nn.utils.rnn.pad_sequence", read_drafts)
    monkeypatch.setattr("engine.runner.sampler.HostCopy", Mock())
    monkeypatch.setattr("engine.weights.checkpoint.Dummy.draw", Mock())
    return watch


def launch(watch, executor, *args, **kwargs) -> None:
    """Check the arguments of a kernel."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    for tensor in tensors:
        assert tensor.device.type == "meta", f"{executor.fn.__name__}: {tensor.shape}"
    if watch.is_capturing:
        watch.outer |= storages(tensors) - watch.made


def read_drafts(guessed) -> torch.Tensor:
    assert all(tokens.device.type == "meta" for tokens in guessed)
    with _disable_current_modes():
        return torch.zeros(len(guessed[0]), len(guessed))


@pytest.mark.full("options1-states", "options2-mamba2")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"draft": "mtp:3", "checkpoint_dtype": "int8"},
        {"draft": "tree:4", "checkpoint_dtype": "fp8"},
        {"draft": "tree:3", "quantization": "fp8", "fp8_activations": True},
    ],
)
def test_steps_compute_on_the_device(watch, tmp_path, name, options) -> None:
    if "mtp" in options.get("draft", "") and name != "states":
        pytest.skip("only this family has a multi-token head")
    sizes = {"max_running": 4, "max_model_len": 96, "cache_gib": 0.01, "token_budget": 128}
    path = write_geometry(tmp_path, MODELS[name])
    config = EngineConfig(
        model=path, load_format="dummy", dtype="bfloat16", warm_up=False, **sizes | options
    )
    with watch, torch.inference_mode():
        runner = load_runner(config)
        for kind in captures(runner):
            for capture in kind:
                capture()
        for batch in rehearsals(runner):
            runner.forward(batch)
        for work in runner.drafts.rehearsals() if runner.drafts else ():
            work()
    gc.collect()
    assert watch.outer and not any(storage.expired() for storage in watch.outer)


def test_no_step_takes_more_memory_than_the_first_rehearsal(watch, tmp_path, monkeypatch) -> None:
    """The plan of memory measures it: 255 decodes with long contexts and a prompt. Their partial
    outputs are bounded by the memory of the device, here an H200's."""
    monkeypatch.setattr(splits, "workspace_bytes", lambda: 141 * 10**9 // splits.WORKSPACE_SHARE)
    monkeypatch.setattr(StubDevice, "free_bytes", lambda self: 2**36)
    sizes = {"num_hidden_layers": 2, "full_attention_interval": 2, "num_experts": 16}
    path = write_geometry(tmp_path, QWEN3_NEXT_80B | sizes)
    settings = {"max_running": 256, "max_model_len": 131072, "token_budget": 2048}
    config = EngineConfig(model=path, load_format="dummy", warm_up=False, cache_gib=9, **settings)
    most = []
    with torch.inference_mode():
        with watch:
            runner = load_runner(config)
        first, *others = rehearsals(runner)
        decodes = [one for one in first.segments if one.is_decode]
        for batch in (first, *others[:3], Batch(tuple(decodes + decodes[:1]))):
            with watch, LiveBytes() as live:
                runner.forward(batch)
            most.append(live.most)
    assert len(decodes) == 255 and most[0] == max(most) > 500e6


def test_ranks_exchange_on_the_device(watch, tmp_path, monkeypatch) -> None:
    """Steps of both ranks, which have no graphs, make equal exchanges of contiguous memory, and the
    host waits for nothing."""
    fit = MemoryPlan.fit  # Before the first step, it reads the number of rows of all ranks.
    monkeypatch.setattr(MemoryPlan, "fit", lambda self, *given: fit(self, *given[:3], ALONE))
    options = {"load_format": "dummy", "max_model_len": 96, "warm_up": False, "cache_gib": 0.01}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    path = write_geometry(tmp_path, MODELS["states"] | heads)
    config = EngineConfig(model=path, dtype="bfloat16", max_running=4, **options)
    sizes = [], []
    for number, own in enumerate(sizes):

        def allgather(outputs, inputs, own=own):
            parts = *outputs[0], *inputs
            assert all(x.device.type == "meta" and x.is_contiguous() for x in parts)
            (size,) = {x.numel() for x in parts}
            own.append(size)
            return Mock()

        group = TorchGroup.__new__(TorchGroup)
        group._count, group._group = 2, Mock(allgather=allgather)
        with watch, torch.inference_mode():
            runner = load_runner(config, Rank(number, 2, group))
            for batch in rehearsals(runner):
                runner.forward(batch)
        assert not captures(runner)
    assert sizes[0] == sizes[1] != []


NUMBERS = np.arange(3)
RULINGS = {
    "free": FREE,
    "mask": FREE._replace(mask=np.full(38, 255, np.uint8)),
    "added": FREE._replace(added=(NUMBERS, np.ones(3, np.float32))),
    "repeats": FREE._replace(repeats=Repeats(NUMBERS, np.ones((2, 3)))),
}


@pytest.mark.parametrize("ruling", RULINGS.values(), ids=RULINGS)
def test_draws_are_made_on_the_device(watch, ruling) -> None:
    mixes = [{}, {"top_k": 5}, {"top_p": 0.9, "logprobs": 2}, {"temperature": 0.0}]
    params = [SamplingParams(**{"temperature": 0.7} | mix) for mix in mixes]
    requests = [SamplingInput(one, 1, 2, ruling) for one in params]
    logits = torch.zeros(5, 300, dtype=torch.bfloat16, device="meta")
    with watch:
        Sampler().launch(logits[:4], requests, range(4))
        Sampler().launch(logits, requests, (0, 2, 3, 4))
        for row, request in enumerate(requests):
            Sampler().launch(logits, [request], [row])
        Sampler().score(logits[:3], [1, 2, 3], 2)
