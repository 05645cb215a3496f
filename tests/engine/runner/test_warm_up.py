"""Graphs and kernels that the warm-up prepares, so that no request waits; on a counting device."""

from __future__ import annotations

import os
import traceback
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from engine import EngineConfig
from engine.engine import Engine, load_runner
from engine.plugins.speculation.drafters import TreeDrafter
from engine.requests.request import SamplingParams
from engine.runner.memory import ACCELERATOR_SHARE
from engine.runner.predictor import Newest
from engine.runner.sampler import Drawn, Sampler
from engine.schedule.drafting import Drafting
from engine.weights.model_config import ModelError
from tests.engine.device_models import QWEN3_NEXT_80B, TINY, write_geometry
from tests.refused import refused
from tests.selection import is_quick
from tests.stub_device import FREE_BYTES, stubbed

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="launches are intercepted in the interpreter",
    )
]
SHAPES = {
    "tiny": TINY,
    "large": QWEN3_NEXT_80B
    | {"num_hidden_layers": 2, "full_attention_interval": 2, "num_experts": 16, "vocab_size": 512},
}
MIXES = (
    SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=5, temperature=0.8, top_p=0.9, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=7, repetition_penalty=1.1, frequency_penalty=0.3, ignore_eos=True),
)


def make_engine(tmp_path, shape: str = "tiny", **settings) -> Engine:
    path = write_geometry(tmp_path, SHAPES[shape])
    sizes = {"token_budget": 200, "max_running": 7, "max_model_len": 600, "cache_gib": 0.05}
    config = EngineConfig(model=path, load_format="dummy", **sizes | settings)
    runner = load_runner(config)
    return Engine(config, runner=runner, sampler=Sampler())


def serve(engine: Engine, seed: int, num_requests: int = 40) -> None:
    """Serve prompts of many lengths; some share a prefix, some have prompt logprobs."""
    random = np.random.default_rng(seed)
    common = random.integers(0, 256, 400).tolist()
    waiting = num_requests
    while waiting or engine.has_work():
        for _ in range(min(waiting, int(random.integers(0, 4)))):
            shared = int(random.integers(0, 400))
            own = random.integers(0, 256, int(random.integers(1, 150))).tolist()
            scored = {"prompt_logprobs": 1} if random.random() < 0.2 else {}
            engine.submit(common[:shared] + own, MIXES[random.integers(len(MIXES))], **scored)
            waiting -= 1
        engine.step()


@pytest.fixture
def fixed_drafts(monkeypatch) -> None:
    """Replace the drafter by one that always has drafts and ignores their acceptance."""
    random = np.random.default_rng(0)

    def propose(self, wanted):
        return [np.zeros(random.integers(1, most + 1), np.int32) for _, most in wanted]

    monkeypatch.setattr(TreeDrafter, "propose", propose)
    monkeypatch.setattr(Drafting, "learn", lambda *draft: None)


@pytest.mark.full("none-all-tiny")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("graphs", ["all", "decode", "off"])
@pytest.mark.parametrize("draft", ["none", "tree:4"])
def test_requests_need_no_capture_or_compilation(
    monkeypatch, tmp_path, fixed_drafts, shape, graphs, draft
) -> None:
    with stubbed(monkeypatch) as (device, launches):
        engine = make_engine(tmp_path, shape, graphs=graphs, draft=draft, cache_gib=0.22)
        num_graphs, compiled = device.counts["graphs"], set(launches.seen)
        assert compiled and (num_graphs > 0) == (graphs != "off")
        steps = []
        commit = engine.runner.commit
        monkeypatch.setattr(
            engine.runner, "commit", lambda b, taken: (steps.append(b), commit(b, taken))[1]
        )
        for seed in range(1 if is_quick() and shape == "tiny" else 3):
            serve(engine, seed)
            engine.reset_prefix_cache()
        drafted = [b for b in steps if any(s.num_drafts for s in b.segments)]
        kinds = {all(s.is_decode for s in b.segments) for b in drafted}
        assert kinds == (set() if draft == "none" else {True, False})
        assert device.counts["graphs"] == num_graphs
        assert launches.seen == compiled


@pytest.mark.full
@pytest.mark.parametrize("cached_mib, draft", [(0, "none"), (100, "none"), (0, "tree:4")])
def test_pools_leave_memory_for_graphs(monkeypatch, tmp_path, cached_mib, draft) -> None:
    """The size of pools follows from the free memory after a rehearsal. Its graphs take as much as
    the real ones, and memory that torch cached during loading counts as free."""
    with stubbed(monkeypatch) as (device, _):
        device.counts["cached MiB"] = cached_mib
        runner = make_engine(tmp_path, draft=draft, cache_gib=None).runner
        num_graphs = 4 + 3 * len(runner.graphs.prefills.buckets)  # Three pieces for two layers.
        if runner.graphs.verifies is not None:
            assert runner.graphs.verifies.buckets == [(size, 600) for size in (32, 16, 8, 4)]
            num_graphs += 4
        assert (runner.graphs.verifies is None) == (draft == "none")
        needed = 2**20 * (64 + num_graphs)
        assert runner.warmed.num_bytes == needed
        budget = int((FREE_BYTES - needed) * ACCELERATOR_SHARE)
        assert 0 <= budget - runner.memory.total_bytes < runner.memory.row_bytes


def test_the_largest_graph_has_the_rows_of_the_largest_step(monkeypatch, tmp_path) -> None:
    """Steps of up to 211 tokens have rows in multiples of four, which a multi-token head reads."""
    with stubbed(monkeypatch):
        settings = {"draft": "mtp:2", "max_running": 5, "token_budget": 199}
        runner = make_engine(tmp_path, max_model_len=200, **settings).runner
        assert runner.loaded.settings.most_step_tokens == 211
        assert runner.graphs.prefills.buckets[0] == 212


@pytest.mark.parametrize("graphs", ["auto", "off"])
def test_guesses_at_every_position_need_no_capture_or_compilation(
    monkeypatch, tmp_path, graphs
) -> None:
    with stubbed(monkeypatch) as (device, launches):
        runner = make_engine(tmp_path, draft="mtp:3", graphs=graphs).runner
        compiled, num_graphs = set(launches.seen), device.counts["graphs"]
        replayed = Mock(wraps=runner.drafts.predictor._replay)
        monkeypatch.setattr(runner.drafts.predictor, "_replay", replayed)
        for position in range(1, 70):
            count = 1 + position % 3
            runner.drafts.guess([Newest(0, 0, 0, position)] * count, [3, 1, 2][:count])
        assert launches.seen == compiled
        assert device.counts["graphs"] == num_graphs
        assert replayed.call_count == (3 * 69 if num_graphs else 0)


@pytest.mark.parametrize("work", ["LoadedModel.load", "measure"])
def test_a_device_with_too_little_memory_gets_a_sentence(monkeypatch, tmp_path, work) -> None:
    with stubbed(monkeypatch):
        monkeypatch.setattr(f"engine.runner.build.{work}", Mock(side_effect=torch.OutOfMemoryError))
        refused("too little memory", make_engine, tmp_path, kind=ModelError)


WAITING_CALLS = """
    item tolist numpy cpu __bool__ __int__ __float__ __index__ __contains__ nonzero argwhere unique
    masked_select equal
    allclose is_nonzero bincount
""".split()  # noqa: SIM905


class WaitRecorder(TorchFunctionMode):
    """Record of calls for which the host must wait for the device or for a copy to it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        is_copy = name in ("tensor", "as_tensor", "from_numpy")
        index = args[1] if name in ("__getitem__", "__setitem__") else ()
        parts = index if isinstance(index, tuple) else (index,)
        if (
            name in WAITING_CALLS
            or is_copy
            or any(isinstance(part, list | np.ndarray) for part in parts)
            or any(getattr(part, "dtype", None) == torch.bool for part in parts)
            or (name == "repeat_interleave" and "output_size" not in (kwargs or {}))
        ):
            frame = next(
                f for f in reversed(traceback.extract_stack()[:-1]) if "torch/" not in f.filename
            )
            if not frame.filename.endswith("kernels/upload.py"):
                self.found.add(f"{name} in {frame.filename}:{frame.lineno}")
        return func(*args, **(kwargs or {}))


class OperatorWaitRecorder(TorchDispatchMode):
    """Record of the same waits inside operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        is_masked = (
            name.startswith("index")
            and any(getattr(part, "dtype", None) == torch.bool for part in args[1] or ())
            if name in ("index", "index_put", "index_put_")
            else False
        )
        if is_masked or name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2"):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.full
@pytest.mark.parametrize("graphs, draft", [("all", "none"), ("off", "none"), ("all", "tree:4")])
def test_step_waits_only_for_its_tokens(monkeypatch, tmp_path, fixed_drafts, graphs, draft) -> None:
    with stubbed(monkeypatch) as (device, _):
        engine = make_engine(tmp_path, graphs=graphs, draft=draft, cache_gib=0.04)
        wait, num_waits = Drawn.wait, device.counts["waits"]
        watch, hidden = WaitRecorder(), OperatorWaitRecorder()

        def allowed(drawn):
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                return wait(drawn)

        monkeypatch.setattr(Drawn, "wait", allowed)
        with watch, hidden:
            serve(engine, 3)
        assert not watch.found and not hidden.found
        assert device.counts["waits"] == num_waits
