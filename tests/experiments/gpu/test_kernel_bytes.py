"""Test of the bytes in the kernel benchmark against loads and stores counted by the interpreter."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from experiments.gpu.kernel_cases import Case, Setup
from tests.kernels import interpreter

pytest.importorskip("triton")
FOLDERS = ("gdn", "norm", "state_copy")


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


def cases() -> list[Case]:
    torch.manual_seed(0)
    setup = Setup("cpu", is_dry=True)
    modules = (
        importlib.import_module(f"experiments.gpu.kernel_cases.{folder}") for folder in FOLDERS
    )
    every = [case for module in modules for case in module.cases(setup)]
    return [case for case in every if case.moved_bytes is not None]


def test_declared_bytes_match_loads_and_stores(moved) -> None:
    names = []
    for case in cases():
        moved.clear()
        case.run()
        assert sum(moved) == case.moved_bytes, case.name
        assert case.moved_bytes < 1.1 * case.num_bytes, case.name
        names.append(case.name.split()[0])
    assert set(names) == {"gdn", "rms_norm", "gated_rms_norm", "state_copy"}
