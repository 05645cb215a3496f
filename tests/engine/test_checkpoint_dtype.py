"""Tests of narrow checkpoint formats: exact without rounding, independent of the batch with
rounding, and of the size that the geometry gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import RequestOutput, SamplingParams
from hybridcache.geometry.checkpoints import CODE_BYTES, SCALINGS, CheckpointFormat
from hybridcache.geometry.units import GIB
from kernels.state_copy.narrow import LARGEST, narrow, widen
from tests.engine.drafted import drafting_engine
from tests.engine.test_hits_change_nothing import prompts

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=2)


def tokens_and_logprobs(outputs: list[RequestOutput]) -> list[object]:
    return [(output.token_ids, output.logprobs) for output in outputs]


@pytest.mark.full("int8")
@pytest.mark.parametrize("spec", ["int8", "fp8:row"])
def test_hits_on_rounded_checkpoints_do_not_depend_on_the_batch(tmp_path: Path, spec: str) -> None:
    runs = []
    for is_together in (False, True):
        engine = drafting_engine(tmp_path, checkpoint_dtype=spec, exact=True, cache_gib=0.004)
        for prompt in prompts():
            engine.generate([prompt], GREEDY)
        groups = [prompts()] if is_together else [[prompt] for prompt in prompts()]
        runs.append([output for group in groups for output in engine.generate(group, GREEDY)])
    alone, together = runs
    assert tokens_and_logprobs(alone) == tokens_and_logprobs(together)
    assert [o.cached_len for o in alone] == [o.cached_len for o in together]
    assert sum(output.cached_len for output in alone) > 1000


@pytest.mark.full
@pytest.mark.parametrize("draft", ["none", "mtp:2"])
def test_a_step_with_many_checkpoints_is_computed_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, draft: str
) -> None:
    """Check that staging for one or two states gives the bits, hits and scores of staging for
    all."""
    runs, staged = [], []
    for num_bytes in (GIB, 1, 40_000):
        monkeypatch.setattr("engine.runner.loading.STAGING_BYTES", num_bytes)
        settings = {"checkpoints": ("every:64",), "draft": draft, "cache_gib": 0.01}
        engine = drafting_engine(tmp_path, checkpoint_dtype="int8", exact=True, **settings)
        staged.append(len(engine.runner.tensors.checkpoints.staging))
        outputs = engine.generate(prompts(), GREEDY, prompt_logprobs=0)
        outputs += engine.generate(prompts(), GREEDY)
        runs.append(
            [*tokens_and_logprobs(outputs), *((o.cached_len, o.prompt_logprobs) for o in outputs)]
        )
        assert sum(output.cached_len for output in outputs) > 1000
    assert runs[0] == runs[1] == runs[2]
    assert staged[0] == 1024 // 64 + 16 and staged[1] == 1 and 1 < staged[2] < 8


@pytest.mark.parametrize("spec", ["bfloat16", "int8:head", "fp8:row", "int8:column"])
def test_slots_have_the_size_that_the_geometry_gives(tmp_path: Path, spec: str) -> None:
    budget: dict[str, object] = {"checkpoint_dtype": spec, "cache_gib": 0.002}
    runner = drafting_engine(tmp_path, **budget).runner
    held = runner.tensors.checkpoints
    assert runner.memory.state_bytes == runner.geometry.state_bytes == held.slots.shape[1]
    conv, recurrent = (states for states, _ in held.forms)
    format = CheckpointFormat.parse(spec)
    size = recurrent[:, 0].numel() * CODE_BYTES[format.dtype]
    size += 4 * len(recurrent) * format.num_scales(tuple(recurrent.shape[2:]))
    size += conv[:, 0].numel() * conv.element_size()
    assert size <= runner.memory.state_bytes < size + 48
    native = drafting_engine(tmp_path, **(budget | {"checkpoint_dtype": "auto"})).runner
    assert native.tensors.checkpoints is None
    total = 2 * GIB // 1000 / runner.memory.slot_bytes
    assert runner.memory.num_slots == pytest.approx(total, abs=2)


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("per", SCALINGS)
def test_codes_are_close_and_do_not_depend_on_other_rows(dtype: torch.dtype, per: str) -> None:
    x = torch.randn(3, 4, 16, 8) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None, None]
    x[1, 2] = 0.0
    dims = (0, *(1 + dim for dim in CheckpointFormat("int8", per).kept_dims(3)))
    codes, scales = narrow(x, dtype, dims)
    others = tuple(dim for dim in range(4) if dim not in dims)
    largest = x.abs().amax(others, keepdim=True)
    assert scales.shape == largest.shape
    step = 0.51 / 127 if dtype is torch.int8 else 1 / 28
    assert ((widen(codes, scales) - x).abs() <= step * largest + 1e-28).all()
    alone = narrow(x[1:2], dtype, dims)
    assert torch.equal(alone[0].view(torch.uint8), codes[1:2].view(torch.uint8))
    assert torch.equal(alone[1], scales[1:2])
