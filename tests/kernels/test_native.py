"""Shared parts of the native kernels: the floating-point mode of a region."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from kernels import library
from kernels.gdn import native as gdn
from kernels.kda import native as kda
from kernels.mamba2 import native as mamba2
from kernels.native import has, kernel_choices, shared_library
from tests.kernels.test_scan import Scan, Sizes

pytestmark = pytest.mark.skipif(not has("decode_gdn_float32_float32"), reason="no C++ compiler")
NATIVE_CHUNKS = pytest.mark.skipif(
    not has("chunk_gdn_float32_lanes"), reason="no native scan of prompts"
)

SIZES, TOKENS = Sizes(groups=3, heads=3, key=32, value=48), 150
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
DECAYS = pytest.mark.parametrize("decay", [-0.01, -1.0, -10.0, -100.0])


@pytest.fixture(autouse=True)
def restored_mode() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)


def chunk(module: Any, decay: float) -> list[torch.Tensor]:
    scan = Scan(module)
    prompt = scan.draw(TOKENS, SIZES, torch.float32)
    prompt.tokens[3][:] = decay * (0.5 + torch.rand(TOKENS, SIZES.heads))
    states = torch.zeros(1, *scan.state_shape(SIZES))
    return [scan.chunk(prompt, [TOKENS], states, [0], resumed=[False]), states]


def decode(module: Any, decay: float) -> list[torch.Tensor]:
    """Decode a token that writes nothing, with states that are nearly subnormal."""
    scan, count = Scan(module), 8
    step = scan.draw_steps(count, SIZES, torch.float32)
    *_, a, b = step.tokens
    rate, bias = step.parameters
    a.zero_(), bias.zero_()
    b.fill_(-200.0), rate.fill_(math.log(-decay / math.log(2)))
    states = torch.randn(count, *scan.state_shape(SIZES)) * 1e-37
    return [scan.decode(step, states, range(count)), states]


KERNELS = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(partial(chunk, gdn), marks=NATIVE_CHUNKS, id="chunk_gdn"),
        pytest.param(partial(chunk, mamba2), marks=NATIVE_CHUNKS, id="chunk_mamba2"),
        pytest.param(partial(decode, gdn), id="decode_gdn"),
        pytest.param(partial(decode, kda), id="decode_kda"),
    ],
)


@KERNELS
@DECAYS
@pytest.mark.parametrize("num_threads", [1, 2])
def test_bits_do_not_depend_on_the_mode_of_the_threads(kernel, decay, num_threads) -> None:
    """`torch.set_flush_denormal` changes the calling thread and no worker of an existing pool."""
    torch.set_num_threads(num_threads)
    results = []
    for flush in (False, True):
        torch.manual_seed(0)
        torch.set_flush_denormal(flush)
        results.append(kernel(decay))
        kept = torch.tensor([SMALLEST_NORMAL / 4]) * 1.0
        assert (kept == 0) == flush
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


@KERNELS
@DECAYS
def test_results_have_no_subnormal_numbers(kernel, decay) -> None:
    """Operations with them take a hundred times as long."""
    for result in kernel(decay):
        assert result.isfinite().all()
        assert not ((result != 0) & (result.abs() < SMALLEST_NORMAL)).any()


def test_choices_name_a_method_of_each_operation() -> None:
    choices = kernel_choices()
    names = ["linear_float32", "linear_bfloat16", "prompts_float32", "prompts_bfloat16"]
    if not has("chunk_gdn_float32_lanes"):
        assert {choices[name] for name in [*names, "linear_int8"]} == {"reference"}
        return
    assert choices["linear_float32"] == choices["prompts_float32"] == "lanes"
    assert choices["linear_bfloat16"] in ("amx", "pairs", "halves")
    assert choices["prompts_bfloat16"] in ("amx", "pairs", "lanes")
    assert choices["linear_int8"] in ("amx", "lanes", "reference")


OWN_INSTRUCTIONS = {
    "sse4": r"\t(pshufb|pmulld|pextrd|blendvps|roundps)\b",
    "avx2": r"\t(v[a-z]|(andn|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|movbe|lzcnt)\b)|%ymm",
    "avx512": r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])",
    "avx512-vnni": r"\tvpdp[bw]",
    "avx512-bf16": r"\tv(dpbf16|cvtne)",
    "amx": r"\t(tdp|tileload|ldtilecfg)",
    "none": r"\tv(perm[it]?2?b|p(multishift|madd52|popcnt|sh[lr]d|(compress|expand)[bw])|gf2p8)",
}
"""Instructions that each level of x86-64 has and those before it do not, as objdump prints them."""


@pytest.mark.skipif(
    getattr(library.selected_level(), "name", "") not in OWN_INSTRUCTIONS
    or shutil.which("objdump") is None,
    reason="needs objdump, and a level of instructions (make test-environments)",
)
def test_a_level_has_no_instructions_of_higher_ones() -> None:
    """The compiler checks that for intrinsics, and not for statements in assembler."""
    command = ["objdump", "-d", "--no-show-raw-insn", shared_library()._name]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    levels = list(OWN_INSTRUCTIONS)
    own = levels.index(library.selected_level().name)
    assert re.search(OWN_INSTRUCTIONS[levels[own]], code)
    for name in levels[own + 1 :]:
        found = re.search(f".*({OWN_INSTRUCTIONS[name]}).*", code)
        assert found is None, (name, found)
