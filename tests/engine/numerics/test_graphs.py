"""Graphs, with a recorder that repeats the work itself where a device would repeat its launches:
padding, buckets and buffers must change nothing. The kernels are the Triton ones, interpreted:
theirs read lengths from the device, as graphs need."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from engine.config import EngineConfig
from engine.run.device import TRAITS, Device
from engine.run.graphs import PREFILL_BUCKETS, bucket_for, decode_buckets
from engine.run.model_config import ModelError
from engine.run.model_runner import ModelRunner
from engine.schedule.batch import Batch


class Recorder:
    """Runs the work once, as a capture's rehearsal does, and again for every replay."""

    def __init__(self):
        self.num_recorded = 0

    def __call__(self, work):
        self.num_recorded += 1
        work()
        return work


def serve(driver, prompts, num_steps):
    """Logits of every step: all prompts at once, then decoding; the second sequence stops after one
    step."""
    begun = [driver.begin(prompt) for prompt in prompts]
    segments = tuple(driver.prefill_segment(s, len(s.tokens)) for s, _ in begun)
    logits = [driver.runner.forward(Batch(segments, (), tuple(w for _, w in begun)))]
    for step in range(num_steps):
        active = [s for rank, (s, _) in enumerate(begun) if rank != 1 or step == 0]
        segments = tuple(driver.decode_segment(s, 7 + step) for s in active)
        logits.append(driver.runner.forward(Batch(segments)))
    return logits


def test_prefill_pieces(model, drivers, random_tokens):
    driver = drivers(model)
    prompts = [random_tokens(length, seed=length) for length in (70, 3, 128)]
    plain = serve(driver, prompts, 3)
    recorder = Recorder()
    driver.reset()
    driver.runner.use_graphs("all", recorder)
    driver.runner.graphs = (
        None,
        driver.runner.graphs[1],
    )  # the CPU's kernels read lengths from the host
    try:
        graphed = serve(driver, prompts, 3)
    finally:
        driver.runner.use_graphs("off")
    layers = driver.runner.config.sizes.layers
    num_pieces = sum(bool(layer.mixers) for layer in layers) + 1  # one before each mixer, the end
    assert recorder.num_recorded == 2 * num_pieces  # buckets of 256 and 64
    for expected, found in zip(plain, graphed, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize(
    "memory", [{"kv_gib": 0.001, "state_gib": 0.002}, {"cache_gib": 0.003}], ids=["pools", "arena"]
)
def test_decode_graphs(oracles, drivers, random_tokens, memory):
    path = str(oracles("qwen3_5").path)
    words = "attention=fused,gdn=fused,conv1d=fused,cache_write=fused"
    config = EngineConfig(
        model=path,
        device="cpu",
        dtype="float32",
        kernels=words,
        max_model_len=96,
        **memory,
    )
    driver = type(drivers("qwen3_5"))(ModelRunner(config))
    prompts = [random_tokens(length, seed=length) for length in (5, 2, 3)]
    plain = serve(driver, prompts, 2)
    driver.reset()
    recorder = Recorder()
    driver.runner.use_graphs("decode", recorder)
    graphed = serve(driver, prompts, 2)
    assert recorder.num_recorded == 2  # of 4 sequences (3 and one of padding), and of 2
    for expected, found in zip(plain, graphed, strict=True):
        assert torch.equal(expected, found)


def test_buckets():
    for max_running in (1, 3, 8, 64, 65, 300):
        sizes = decode_buckets(max_running)
        assert sizes[-1] >= max_running
        assert all(a < b for a, b in itertools.pairwise(sizes))
    assert bucket_for(1, PREFILL_BUCKETS) == 64
    assert bucket_for(64, PREFILL_BUCKETS) == 64
    assert bucket_for(65, PREFILL_BUCKETS) == 128
    assert bucket_for(PREFILL_BUCKETS[-1] + 1, PREFILL_BUCKETS) is None


def test_a_device_without_graphs_says_so():
    config = EngineConfig(device="cpu", graphs="all", cache_gib=0.01)
    with pytest.raises(ModelError, match="has no graphs"):
        ModelRunner(config)


def test_graphs_need_kernels_that_read_lengths_on_the_device(drivers, monkeypatch):
    runner = drivers("qwen3_5").runner
    monkeypatch.setattr(runner, "device", Device(torch.device("cpu"), TRAITS["cuda"]))
    runner.use_graphs("auto")
    assert runner.graphs == (None, None)
    with pytest.raises(ModelError, match=r"others serve for .*attention.*--graphs off"):
        runner.use_graphs("all")


def test_all_graphs_of_a_recorder_share_one_pool(monkeypatch):
    handles, pools, calls = itertools.count(1), [], []

    class Graph:
        def replay(self):
            calls.append("replay")

    @contextmanager
    def capture(graph, pool):
        pools.append(pool)
        yield

    module = SimpleNamespace(
        CUDAGraph=Graph,
        graph=capture,
        graph_pool_handle=lambda: next(handles),
        synchronize=lambda device: calls.append("synchronize"),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    record = Device(torch.device("cuda:0"), TRAITS["cuda"]).recorder()
    first, second = record(lambda: calls.append("first")), record(lambda: None)
    first()
    second()
    assert pools == [1, 1]
    assert calls == ["first", "synchronize", "first", "synchronize", "replay", "replay"]
