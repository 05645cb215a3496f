"""Graphs: padding, buckets and buffers must not change results.

The recorder repeats the work where a device would repeat its launches. The interpreted Triton
kernels read lengths from the device, which graphs require.
"""

from __future__ import annotations

import gc
import itertools
import os
import weakref
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from engine import EngineConfig
from engine.engine import load_runner
from engine.runner.device import Device
from engine.runner.steps import PrefillGraphs
from kernels.attention import fused
from kernels.moe import fused as moe
from tests.engine.device_models import QWEN3_NEXT_80B, write_geometry
from tests.engine.small_models import STEPS, VERIFIED, Driver, assert_equal_results, random_tokens
from tests.engine.test_hits_change_nothing import ATTENTION_ONLY, HYBRID, SIDE_BY_SIDE
from tests.stub_device import stubbed

KERNEL_OPTION = ",".join(
    f"{name}=fused"
    for name in ("attention", "cache_write", "conv1d", "gdn", "kda", "mamba2", "mla", "moe")
)
OPTIONS = {"device": "cpu", "dtype": "float32", "kernels": KERNEL_OPTION, "max_model_len": 96}


class Recorder:
    """Recorder that runs the work once at the capture, and again for each replay."""

    def __init__(self):
        self.num_recorded = 0

    def __call__(self, work):
        self.num_recorded += 1
        work()
        return work


def serve(driver, prompts, num_steps):
    """Return the logits of one prefill of all prompts and of decode steps.

    The second sequence stops after one step.
    """
    sequences, first = driver.start(prompts)
    logits = [first]
    for step in range(num_steps):
        active = [s for rank, s in enumerate(sequences) if rank != 1 or step == 0]
        logits.append(driver.decode(active, [7 + step] * len(active)))
    return logits


@pytest.fixture
def check_launch_bounds(monkeypatch):
    """Check that attention gets at most as many tokens and keys as it is launched for.

    If the lengths differ from those of the launch, all keys must be one chunk.
    """
    launch = fused.verify_attention

    def checked(query, *pools, sequences, packed, **options):
        lengths, kv_lens = packed.cu_seqlens.diff(), sequences.kv_len_table
        num_tokens, num_heads, size = query.shape
        assert num_tokens == packed.cu_seqlens[-1] == sum(packed.lengths)
        assert lengths.max() <= max(packed.lengths) and kv_lens.max() <= max(sequences.kv_lens)
        if tuple(lengths.tolist()) != packed.lengths:
            assert fused.is_one_chunk(num_tokens, max(sequences.kv_lens), num_heads, size)
        return launch(query, *pools, sequences=sequences, packed=packed, **options)

    monkeypatch.setattr(fused, "verify_attention", checked)


SIZES = ATTENTION_ONLY | {"vocab_size": 199}
MODELS = {
    "attention": SIZES | {"num_hidden_layers": 1},
    "states": HYBRID | {"vocab_size": 199, "num_hidden_layers": 2, "mlp_only_layers": []},
    "mamba2": SIZES
    | {
        "model_type": "granitemoehybrid",
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_d_conv": 4,
        "shared_intermediate_size": 32,
        "num_local_experts": 0,
    },
    "latents": {name: size for name, size in SIZES.items() if name != "head_dim"}
    | {
        "model_type": "kimi_linear",
        "num_key_value_heads": 2,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "linear_attn_config": {
            "num_heads": 2,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
            "full_attn_layers": [2],
            "kda_layers": [1],
        },
        "num_experts": 4,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "moe_intermediate_size": 16,
    },
}


@pytest.fixture
def make_verify_driver(tmp_path):
    """Return a function that makes a driver with drafts and without graphs."""

    def make(model="states", draft="tree:4"):
        path = write_geometry(tmp_path, MODELS[model])
        settings = {"load_format": "dummy", "max_running": 6, "graphs": "off", "cache_gib": 0.002}
        config = EngineConfig(model=path, draft=draft, **OPTIONS | settings)
        return Driver(load_runner(config))

    return make


@pytest.mark.full
@pytest.mark.parametrize(
    "options",
    [{}, {"draft": "mtp:4"}, {"model": "attention"}, {"model": "mamba2"}, {"model": "latents"}],
    ids=["tree", "mtp", "attention", "mamba2", "latents"],
)
def test_verify_graphs_change_no_bit(options, make_verify_driver, check_launch_bounds, monkeypatch):
    """Sequences have drafts or not, and fill a graph or less.

    A graph is replayed for other lengths than those of its capture. A longer sequence needs another
    graph.
    """
    driver = make_verify_driver(**options)
    expected = driver.verify(VERIFIED, STEPS)
    driver.reset()
    monkeypatch.setattr("engine.runner.verification.KV_BOUNDS", (10, 40))
    recorder = Recorder()
    driver.runner.use_graphs("decode", recorder)
    graphs = driver.runner.graphs.verifies
    assert graphs.buckets == [(size, kv) for size in (32, 16, 8, 4) for kv in (96, 40, 10)]
    assert_equal_results(expected, driver.verify(VERIFIED, STEPS))
    used = [(8, 10), (32, 40), (4, 40), (8, 40)]
    assert recorder.num_recorded == len(used) + 1  # One for a step without drafts.
    driver.runner.use_graphs("decode", recorder)
    for bucket in used:
        driver.runner.graphs.verifies.capture(bucket)
    driver.reset()
    assert_equal_results(expected, driver.verify(VERIFIED, STEPS))
    assert recorder.num_recorded == 2 * (len(used) + 1)


@pytest.fixture
def filled_with_nan(monkeypatch):
    """Fill the buffers of prefill graphs with NaN before each step, as rows after the tokens may
    be."""
    run = PrefillGraphs.run

    def run_on_nan(graphs, token_ids, step):
        for buffer in (graphs._hidden, graphs._residual, *itertools.chain(*graphs._buffers)):
            buffer.fill_(torch.nan)
        found = run(graphs, token_ids, step)
        return None if found is None else found[: step.num_tokens]

    monkeypatch.setattr(PrefillGraphs, "run", run_on_nan)


@pytest.mark.parametrize("kind", ["states", "mamba2", "latents", "parallel"])
def test_graphs_of_pieces_change_no_bit(kind, tmp_path, filled_with_nan):
    """A cold prompt, then the prompt's tail after a hit with a decode of another sequence."""
    path = write_geometry(tmp_path, (MODELS | {"parallel": SIDE_BY_SIDE})[kind])
    options = {"device": "cpu", "load_format": "dummy", "max_model_len": 256, "cache_gib": 0.02}
    driver = Driver(load_runner(EngineConfig(model=path, **options)))
    tokens, recorder = random_tokens(150, 2, 160), Recorder()
    plain = driver.cold_and_mixed(tokens)
    driver.reset()
    driver.runner.use_graphs("all", recorder)
    driver.runner.graphs = driver.runner.graphs._replace(decodes=None)
    assert all(map(torch.equal, driver.cold_and_mixed(tokens), plain))
    assert recorder.num_recorded > 1 and torch.equal(plain[1][1:], plain[0][64:])


@pytest.mark.full
def test_graphs_of_pieces_round_rows_alone(tmp_path, filled_with_nan, monkeypatch):
    """Experts and products of rows in fp8, which neither share scales with rows of NaN nor sum
    them."""
    monkeypatch.setattr("engine.runner.steps.PREFILL_BUCKETS", (8, 16))
    path = write_geometry(tmp_path, MODELS["states"])
    used = {"quantization": "fp8", "fp8_activations": True, "load_format": "dummy"}
    kernels = {"kernels": "linear=fused,moe=fused,norm=fused", "cache_gib": 0.02}
    driver = Driver(load_runner(EngineConfig(model=path, **OPTIONS | used | kernels)))
    tokens, recorder = random_tokens(5, 2, 160), Recorder()
    plain = driver.cold(tokens, all_logits=True)
    driver.runner.use_graphs("all", recorder)
    assert torch.equal(driver.cold(tokens, all_logits=True), plain)
    assert recorder.num_recorded == 3 and plain.isfinite().all()


def test_graphs_do_not_keep_their_runner(tmp_path):
    """The memory of a rehearsal is free before that of the engine is allocated."""
    path = write_geometry(tmp_path, MODELS["states"])
    options = OPTIONS | {"load_format": "dummy", "cache_gib": 0.02, "draft": "mtp"}
    runner = load_runner(EngineConfig(model=path, **options, graphs="off"))
    runner.use_graphs("all", lambda work: work)
    rows = weakref.ref(runner.tensors.rows)
    gc.disable()
    try:
        del runner
        assert rows() is None
    finally:
        gc.enable()


@pytest.mark.full
def test_padding_of_graphs_is_not_routed(make_verify_driver, monkeypatch):
    """Steps of a prefill, of decodes, and of decodes with drafts."""
    driver, rows = make_verify_driver(), []
    launch = moe.launch

    def recording(*arguments, **options):
        weights, experts = launch(*arguments, **options)
        rows.append((len(experts), int((experts >= 0).all(dim=1).sum())))
        return weights, experts

    monkeypatch.setattr(moe, "launch", recording)
    driver.runner.use_graphs("all", Recorder())
    serve(driver, VERIFIED, 2)
    driver.reset()
    driver.verify(VERIFIED, STEPS[:1])
    assert set(rows) == {(64, 64), (64, 13), (8, 5), (4, 4)}  # The first is a capture.


def test_graphs_of_a_recorder_share_one_pool(monkeypatch):
    """A graph repeats launches by address, and keeps no tensor alive that was made before it."""
    handles, captures, calls = itertools.count(1), [], []

    @contextmanager
    def capture(graph, pool, stream=None, capture_error_mode="global"):
        captures.append((pool, stream, capture_error_mode))
        yield

    module = SimpleNamespace(
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: calls.append("replay")),
        Stream=lambda device: f"a stream of {device}",
        graph=capture,
        graph_pool_handle=lambda: next(handles),
        synchronize=lambda device: calls.append("synchronize"),
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    record = Device(torch.device("cuda:0")).recorder()
    tensor = torch.zeros(1)
    alive = weakref.ref(tensor)
    first, second = record(lambda x=tensor: calls.append("first")), record(lambda: None)
    del tensor
    gc.collect()
    assert alive() is not None
    first()
    second()
    # The default stream may be of another device. A global capture fails if other threads call one.
    assert captures == [(1, "a stream of cuda:0", "thread_local")] * 2
    assert calls == ["first", "synchronize", "first", "synchronize", "replay", "replay"]
    del first
    gc.collect()
    assert alive() is None


LAUNCHES = {
    "rms_norm_kernel": 6,
    "linear_kernel": 6,
    "joined_kernel": 1,
    "decode_kernel": 2,
    "route_kernel": 2,
    "gate_up_kernel": 2,
    "down_kernel": 2,
    "rotate_kernel": 1,
    "decode_attention_kernel": 1,
    "combine_splits_kernel": 1,
}
"""Launches of a decode step at Qwen3-Next-80B-A3B's sizes with 8-bit weights.

A layer with Gated DeltaNet, one with attention, and the head. Fewer are an improvement. In 16 bits
the projections of a layer are one product, which saves two launches.
"""


@pytest.mark.full
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="stubs the interpreter")
def test_launches_of_a_decode_step_are_those_of_the_documentation(tmp_path, monkeypatch):
    """Each launch takes 2 to 4 microseconds on a device, more than the work of few tokens."""
    pytest.importorskip("triton")
    sizes = {"num_hidden_layers": 2, "full_attention_interval": 2, "num_experts": 16}
    path = write_geometry(tmp_path, QWEN3_NEXT_80B | sizes | {"vocab_size": 512})
    with stubbed(monkeypatch) as (_, launches):
        config = EngineConfig(
            model=path,
            load_format="dummy",
            quantization="int8",
            max_running=64,
            max_model_len=2048,
            warm_up=False,
        )
        runner = load_runner(config)
        names = Counter()
        record = launches.record

        def count(executor, *args, **kwargs):
            names[executor.fn.__name__] += 1
            record(executor, *args, **kwargs)

        launches.record = count
        found = {}
        for num_tokens in (8, 64):
            names.clear()
            with torch.inference_mode():
                runner.graphs.decodes.capture((num_tokens, 2048))
            found[num_tokens] = dict(names)
    assert found == {8: LAUNCHES, 64: LAUNCHES}
