"""Test of the bytes in the kernel benchmark against loads and stores counted by the interpreter."""

from __future__ import annotations

import os

import pytest

from experiments.gpu.kernel_cases import Setup, plans
from tests.kernels import interpreter

pytest.importorskip("triton")


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every load and store, without masked elements."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs the Triton interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    interpreter.repair()
    counted: list[int] = []

    def counting(access):
        def run(builder, pointers, *rest):
            values_and_mask = rest[:2]
            mask = values_and_mask[0 if access.__name__.endswith("load") else 1]
            width = pointers.get_element_ty().primitive_bitwidth // 8
            counted.append(int(mask.data.sum()) * width)
            return access(builder, pointers, *rest)

        return run

    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(InterpreterBuilder, name, counting(getattr(InterpreterBuilder, name)))
    return counted


def test_declared_bytes_match_loads_and_stores(moved) -> None:
    setup, groups = Setup("cpu", is_dry=True), ("recurrences", "pointwise")
    every = [(plan.name, plan.case(setup)) for plan in plans(True, *groups)]
    names = []
    for name, case in every:
        if case.moved_bytes is None:
            continue
        moved.clear()
        case.run()
        assert sum(moved) == case.moved_bytes, name
        assert case.moved_bytes < 1.1 * case.num_bytes, name
        names.append(" ".join(name.split()[1:3]))
    assert {"decode gdn", "norm rms_norm", "gated norm", "state copy"} == set(names)
