"""The AMX product: its compiled code on an emulator, or on the processor if it has AMX."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import library, native
from kernels.library import COMPILERS, FLAGS, SOURCES, THIS_PROCESSOR
from kernels.linear import reference
from kernels.linear.native import NativeInt8Linear, NativeLinear

AMX_FLAGS = (*THIS_PROCESSOR, "-shared", "-mamx-tile", "-mamx-bf16", "-mamx-int8")
IS_PERMITTED = native.kernel_choices()["linear_bfloat16"] == "amx"
pytestmark = pytest.mark.skipif(
    native.kernel_choices()["linear_bfloat16"] == "reference"
    or sys.platform != "linux"
    or platform.machine() != "x86_64",
    reason="no C++ compiler, or no AVX-512",
)
ROWS = (0, 1, 5, 8, 16, 17, 33, 49, 140, 193)
SHAPES = [(130, 64), (70, 1100), (40, 36), (64, 30), (7, 2), (64, 512), (20, 288)]
"""Outputs and inputs: partial panels, and partial and several blocks of tiles."""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """Return the linear kernels with AMX and the emulator, compiled for this test."""
    folder = tmp_path_factory.mktemp("amx")
    compiler = next(filter(None, map(shutil.which, COMPILERS)))
    openmp = library._openmp()
    sources = {
        "linear": (SOURCES / "linear/native.cpp", AMX_FLAGS),
        "emulator": (Path(__file__).parent / "amx_emulator.cpp", (*THIS_PROCESSOR, "-shared")),
    }
    started = [
        subprocess.Popen([compiler, *FLAGS, *flags, source, *openmp, "-o", folder / f"{name}.so"])
        for name, (source, flags) in sources.items()
    ]
    assert [process.wait() for process in started] == [0, 0]
    linear, emulator = (ctypes.CDLL(str(folder / f"{name}.so")) for name in sources)
    emulator.end_emulation.restype = ctypes.c_int64
    return linear, emulator


@pytest.fixture
def emulator(libraries, monkeypatch):
    """Run native functions from the library with AMX. Its instructions are emulated if needed."""
    linear, emulator = libraries
    monkeypatch.setattr(native, "shared_library", lambda: linear)
    native.function.cache_clear()
    if not IS_PERMITTED:
        emulator.start_emulation()
    yield
    emulated = emulator.end_emulation()
    native.function.cache_clear()
    assert IS_PERMITTED or emulated > 0


def test_permission_is_refused_without_amx(libraries) -> None:
    answer = ctypes.c_int64(7)
    libraries[0].permit_amx(ctypes.byref(answer))
    assert answer.value == IS_PERMITTED


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_compiled_code_equals_plain_tiles(emulator, shape, num_threads) -> None:
    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    x, weight = (torch.randn(size, shape[1]).bfloat16() for size in (max(ROWS), shape[0]))
    bias, scale = torch.randn(shape[0]).bfloat16(), torch.rand(shape[0])
    amx, plain = (NativeLinear(weight, scale, bias, method) for method in ("amx", "plain_tiles"))
    expected = plain(x)
    for rows in ROWS:
        assert torch.equal(amx(x[:rows]), expected[:rows]), rows
    assert torch.equal(amx(x[7:28]), expected[7:28])


@pytest.mark.parametrize("shape", [(130, 64), (70, 1101), (20, 300)])
def test_integers_are_exact(emulator, shape) -> None:
    torch.manual_seed(0)
    x = torch.randint(-127, 128, (140, shape[1])).float()
    x[:, 0] = 127
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    product = NativeInt8Linear(weight, torch.ones(shape[0]), None, "amx")
    expected = (x.double() @ weight.double().T).float()
    for rows in (1, 9, 17, 140):
        assert torch.equal(product(x[:rows]), expected[:rows]), rows


def test_words_after_a_panel_are_not_read_as_numbers(emulator) -> None:
    """Rows end within a tile, and the next words are infinite weights of the next panel."""
    weight = torch.randn(128, 34).bfloat16()
    weight[64:] = torch.inf
    x = torch.rand(20, 34).bfloat16() + 1
    for method in ("amx", "plain_tiles"):
        out = NativeLinear(weight, None, None, method)(x)
        assert out[:, :64].isfinite().all()
        assert out[:, 64:].isinf().all()


def test_plain_tiles_are_close_to_the_product(assert_close) -> None:
    x, weight = torch.randn(40, 1100).bfloat16(), torch.randn(70, 1100).bfloat16()
    out = NativeLinear(weight, None, None, "plain_tiles")(x)
    assert_close(out, (x.double() @ weight.double().T).bfloat16())


def test_int8_methods_are_equal() -> None:
    quantized, scale = reference.quantize(torch.randn(70, 1100), "int8")
    x = torch.randn(40, 1100)
    lanes, tiles = (
        NativeInt8Linear(quantized, scale, None, method)(x) for method in ("lanes", "plain_tiles")
    )
    assert torch.equal(lanes, tiles)
