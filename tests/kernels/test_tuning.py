"""Tuned launch parameters: none may split a sum or change bits between batches."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import tuning
from kernels.packed import Packed

pytest.importorskip("triton")
from kernels import target
from kernels.recurrence import scan_config
from tests.kernels.compiled import triton_functions
from tests.kernels.records import taking

OF_OUTPUTS = {"HEADS", "BM", "BT", "BV", "BC", "BLOCK_BYTES"}
"""Tile sizes along output dimensions, which are never summed over."""
OF_LAUNCHES = {"num_warps", "num_stages"}
OF_LAYERS = {"dtype", "weight_dtype", "state_dtype", "K", "V", "D", "G", "C", "W", "M", "N"}
SUMS = {"sum", "cumsum", "reduce", "associative_scan", "cumprod", "xor_sum", "atomic_add"}
SUMS |= {"histogram"}


def calls_of(function: Any) -> Iterator[str]:
    """Yield the names of called functions, nested calls included; ``tl.name`` is ``.name``.

    Without additions of the constant 1, which count programs.
    """
    seen, waiting = set(), [function]
    while waiting:
        function = waiting.pop()
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Attribute):
                if "atomic_add(counter, 1, " not in ast.unparse(node):
                    yield f".{node.func.attr}"
            elif isinstance(node.func, ast.Name) and node.func.id not in seen:
                seen.add(node.func.id)
                inner = function.__globals__.get(node.func.id)
                if hasattr(inner, "fn"):
                    waiting.append(inner.fn)
                yield node.func.id


@pytest.mark.parametrize("kernel", tuning.TUNABLES)
def test_tuning_cannot_change_bits_between_batches(kernel) -> None:
    tunable = tuning.TUNABLES[kernel]
    folder, _, name = kernel.partition(".")
    function = triton_functions(folder)[name]
    parameters = set(inspect.signature(function).parameters)
    chosen = {parameter for config in tunable.candidates for parameter in config}
    assert chosen <= OF_OUTPUTS | OF_LAUNCHES
    assert chosen - OF_LAUNCHES <= parameters
    assert set(tunable.keys) <= OF_LAYERS | {"tokens"}
    if "tokens" in tunable.keys:
        assert {f".{name}" for name in SUMS}.isdisjoint(calls_of(function))


def test_tuning_keys_depend_only_on_the_layer(device) -> None:
    """Keys are equal for all batches, and for decode and verification."""
    from kernels.conv1d import fused as conv1d
    from kernels.gdn import fused as gdn
    from kernels.mamba2 import fused as mamba2
    from kernels.norm import fused as norm

    all_keys = []
    parameters = torch.randn(2, 2, device=device)
    for count in (1, 3):
        slots = torch.arange(count, dtype=torch.int32, device=device)
        q, k, v = torch.randn(3, count, 2, 16, device=device)
        a, b = torch.randn(2, count, 2, device=device)
        states = torch.zeros(2 * count, 2, 16, 16, device=device)
        x, taps = torch.randn(count, 8, device=device), torch.randn(8, 4, device=device)
        windows = torch.zeros(count, 8, 3, device=device)
        packed = Packed.from_lengths([1] * count, device)
        where = {"packed": packed, "slots": slots, "exports": None}
        where["resumed"] = torch.ones(count, dtype=torch.bool, device=device)
        steps = {"packed": packed, "slots": slots, "step_slots": slots + count}
        with tuning.using({}) as keys:
            prompt, token = (q, k, v, -a.abs(), b.sigmoid()), (q, k, v, a, b, *parameters)
            taking(gdn.chunk_gdn)(*prompt, states=states, **where)
            for at in ({"slots": slots}, steps):
                taking(gdn.decode_gdn)(*token, states=states, **at)
            prompt, token = (v, q, k, -a.abs(), b.abs(), b[0]), (v, q, k, a, *parameters, b[0])
            taking(mamba2.chunk_mamba2)(*prompt, states=states, **where)
            for at in ({"slots": slots}, steps):
                taking(mamba2.decode_mamba2)(*token, states=states, **at)
            conv1d.prefill_conv1d(x, taps, None, states=windows, **where)
            conv1d.decode_conv1d(x, taps, None, states=windows, slots=slots)
            norm.rms_norm(x, taps[:, 0], 1e-6)
        assert keys[2] == keys[3] == ("gdn.decode_kernel", (torch.float32, 16, 16))
        assert keys[-5] == keys[-4] == ("mamba2.decode_kernel", (torch.float32, 16, 16))
        assert {kernel for kernel, _ in keys} <= set(tuning.TUNABLES)
        all_keys.append(keys)
    assert all_keys[0] == all_keys[1]


@pytest.mark.parametrize(
    ("backend", "arch", "expected"),
    [("cuda", 80, 4), ("cuda", 90, 4), ("cuda", 100, 2), ("cuda", 120, 2), ("hip", "gfx942", 4)],
)
def test_number_of_warps_of_a_recurrence_is_limited(backend, arch, expected, monkeypatch) -> None:
    """More warps than the limit would race, and tuning might not notice the race."""
    use_target(monkeypatch, backend, arch, 227)
    gated = partial(scan_config, tile_size=64, operands=2, matrices=2)
    for num_warps in (2, 4, 8):
        config = gated(torch.bfloat16, 128, 128, num_warps=num_warps)
        assert config["num_warps"] == min(num_warps, expected)
    for shape in ((torch.float32, 128, 128), (torch.bfloat16, 256, 64)):
        assert gated(*shape)["num_warps"] <= expected


@pytest.mark.parametrize(
    ("backend", "arch", "kib", "stages"),
    [
        ("cuda", 80, 163, {128: 2, 256: 2}),
        ("cuda", 89, 99, {128: 2, 256: 1}),
        ("cuda", 90, 227, {128: 2, 256: 2}),
        ("cuda", 100, 227, {128: 2, 256: 2}),
        ("hip", "gfx942", 64, {128: 2, 256: 1}),
    ],
)
def test_stages_of_a_scan_fit_the_shared_memory(backend, arch, kib, stages, monkeypatch) -> None:
    use_target(monkeypatch, backend, arch, kib)
    gated = partial(scan_config, tile_size=64, operands=2, matrices=2)
    for width, expected in stages.items():
        assert gated(torch.bfloat16, width, 128)["num_stages"] == expected
    assert gated(torch.float32, 128, 128)["num_stages"] == 1


def use_target(monkeypatch, backend: str, arch: int | str, kib: int) -> None:
    """Let `kernels.target` report a device with ``kib`` KiB of shared memory."""
    active = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_target=lambda: SimpleNamespace(backend=backend, arch=arch),
    )
    monkeypatch.setattr(target, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(target, "knobs", SimpleNamespace(runtime=SimpleNamespace(interpret=False)))
    monkeypatch.setattr(target, "_shared_bytes", lambda device: kib * 1024)
    monkeypatch.setattr(target, "_architecture", target._architecture.__wrapped__)
