"""Products with AMX tiles: compiled code on an emulator, or on the processor if it has AMX."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels import library, native
from kernels.attention import native as attention
from kernels.library import FLAGS, LEVELS, SOURCES
from kernels.linear import reference
from kernels.linear.blocks import GGML_TYPES
from kernels.linear.groups import linear_groups
from kernels.linear.native import NativeInt8Linear, NativeLinear
from kernels.moe.native import NativeExperts
from tests.kernels.attention.test_attention import Cache
from tests.kernels.compiled import OneMethod, assert_close, kept_folder
from tests.kernels.linear.test_groups import Decoded, draw_numbers, make, pairs_of_products
from tests.kernels.test_scan import Scan, Sizes

FLAGS_OF = {level.name: level.flags for level in LEVELS if "avx512_vnni" in level.needs}
"""Compiler flags of the levels that code with tiles builds on: it also uses AVX512_VNNI."""
LEVEL_FLAGS = FLAGS_OF.get(library.level_name(), ())
EMULATOR = Path(__file__).parent / "amx_emulator.cpp"
AMX_FLAGS = (*LEVEL_FLAGS, "-shared", "-mamx-tile", "-mamx-bf16", "-mamx-int8")
HAS_TILES = "amx_tile" in library.processor_instructions()
"""True if the processor computes with tiles, whatever level is selected."""
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the emulator needs signals of Linux"),
    pytest.mark.skipif(library.find_compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(not LEVEL_FLAGS, reason="no AVX512_VNNI, or a level without it is selected"),
]
SOURCES_OF = {
    "prefill_attention": "attention/native_prefill.cpp",
    "chunk_gdn": "gdn/native_chunk.cpp",
    "chunk_kda": "kda/native_chunk.cpp",
    "chunk_mamba2": "mamba2/native_chunk.cpp",
    "linear_groups": "linear/native_groups.cpp",
    "experts_groups": "linear/native_groups.cpp",
    "pack_codes": "linear/native_groups.cpp",
    "linear": "linear/native.cpp",
    "permit_amx": "linear/native.cpp",
    "pack_words": "linear/native.cpp",
}
"""Sources with AMX code, by words in the names of their functions."""
ROWS = (0, 1, 5, 8, 16, 17, 33, 49, 140, 193)
SHAPES = [(130, 64), (70, 1100), (40, 36), (64, 30), (7, 2), (64, 512), (20, 288)]
"""Outputs and inputs: partial panels, and partial and several blocks of tiles."""


class AmxKernels:
    """Native functions with AMX: those of the library, if it has them, or compiled at their first
    use and kept like it. And the emulator."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._compiled = folder, {}
        self._library = native.shared_library() if library.level_name() == "amx" else None
        self.permission = ctypes.c_int64(7)
        self.permit_amx(ctypes.byref(self.permission))

    def __getattr__(self, name: str) -> Any:
        source = next((path for word, path in SOURCES_OF.items() if word in name), None)
        if source is None:
            raise AttributeError(name)
        if self._library is not None:
            return getattr(self._library, name)
        if source not in self._compiled:
            self._compiled[source] = self._compile(SOURCES / source, AMX_FLAGS)
        return getattr(self._compiled[source], name)

    @cached_property
    def emulator(self) -> ctypes.CDLL:
        emulator = self._compile(EMULATOR, (*LEVEL_FLAGS, "-shared"))
        emulator.end_emulation.restype = ctypes.c_int64
        return emulator

    def _compile(self, source: Path, flags: Sequence[str]) -> ctypes.CDLL:
        compiler = library.find_compiler()
        digest = hashlib.sha256(EMULATOR.read_bytes()).hexdigest()[:8]
        digest += library._fingerprint(compiler, flags)
        made = self._folder / f"{source.parent.name}-{source.stem}-{digest}.so"
        if not made.exists():
            new = made.with_suffix(f".{os.getpid()}")
            command = [compiler, *FLAGS, *flags, source, library._openmp(), "-o", new]
            subprocess.run(command, check=True)
            new.replace(made)
        return ctypes.CDLL(str(made))


@pytest.fixture(scope="module")
def kernels() -> Iterator[AmxKernels]:
    with kept_folder() as folder:
        yield AmxKernels(folder)


@pytest.fixture
def emulator(kernels, monkeypatch):
    """Run native functions that are compiled with AMX. Its instructions are emulated if needed."""
    monkeypatch.setattr(native, "shared_library", lambda: kernels)
    native.function.cache_clear()
    if not HAS_TILES:
        kernels.emulator.start_emulation()
    yield
    emulated = HAS_TILES or kernels.emulator.end_emulation()
    native.function.cache_clear()
    assert emulated


def test_permission_is_refused_without_amx(kernels) -> None:
    assert kernels.permission.value == HAS_TILES


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_compiled_code_equals_plain_tiles(emulator, shape, num_threads) -> None:
    torch.set_num_threads(num_threads)
    x, weight = (torch.randn(size, shape[1]).bfloat16() for size in (max(ROWS), shape[0]))
    bias, scale = torch.randn(shape[0]).bfloat16(), torch.rand(shape[0])
    amx, plain = (NativeLinear(weight, scale, bias, method) for method in ("amx", "plain_tiles"))
    expected = plain(x)
    for rows in ROWS:
        assert torch.equal(amx(x[:rows]), expected[:rows]), rows
    assert torch.equal(amx(x[7:28]), expected[7:28])


def test_attention_equals_plain_tiles(emulator) -> None:
    cache = Cache.filled([70, 17], 3, 1, 40, torch.bfloat16, "cpu")
    spans = [(0, 0, 70), (1, 16, 17)]
    amx, plain = (
        cache.prefill(OneMethod(attention, method, torch.bfloat16), spans)
        for method in ("amx", "plain_tiles")
    )
    for own, expected in zip(amx, plain, strict=True):
        assert torch.equal(own, expected)


@pytest.mark.full("kda")
@pytest.mark.parametrize("name", ["gdn", "kda", "mamba2"])
def test_scans_equal_plain_tiles(emulator, name) -> None:
    module = importlib.import_module(f"kernels.{name}.native")
    sizes = Sizes(2, 2, 48, 80)
    results = []
    for method in ("amx", "plain_tiles"):
        torch.manual_seed(0)
        scan = Scan(OneMethod(module, method, torch.bfloat16))
        prompt = scan.draw(90, sizes, torch.bfloat16)
        results.append(scan.run(prompt, [70, 20], torch.randn(2, 2, 48, 80), [0, 1]))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1][:2], results[1][1][:2])


@pytest.mark.parametrize("shape", [(130, 64), (70, 1101), (20, 300)])
def test_integers_are_exact(emulator, shape) -> None:
    x = torch.randint(-127, 128, (140, shape[1])).float()
    x[:, 0] = 127
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    product = NativeInt8Linear(weight, torch.ones(shape[0]), None, "amx")
    expected = (x.double() @ weight.double().T).float()
    for rows in (1, 9, 17, 140):
        assert torch.equal(product(x[:rows]), expected[:rows]), rows


@pytest.mark.parametrize("number", [8, 12, 14, 23])
def test_groups_equal_the_reference(emulator, number) -> None:
    """Formats with and without factors and minima, and with tiles of half a unit."""
    format = GGML_TYPES[number]
    numbers = draw_numbers(format, 70, 512)
    x = torch.randn(49, 512)
    product = make(format, numbers, 512, "amx")
    expected = linear_groups(x, Decoded(format), numbers)
    for rows in (5, 8, 17, 49):
        assert torch.equal(product(x[:rows]), expected[:rows]), rows


def test_experts_equal_their_products(emulator) -> None:
    """Some experts have too few rows for tiles, and tiles of others have missing rows."""
    products = pairs_of_products(
        (GGML_TYPES[12], GGML_TYPES[14]), "amx", torch.float32, 3, 256, 256, False
    )
    hidden, weights = torch.randn(30, 256) * 0.1, torch.rand(30, 1)
    chosen = torch.tensor([0] * 19 + [1] * 3 + [2] * 8, dtype=torch.int32)[:, None]
    found = NativeExperts(products, False)(hidden, weights, chosen)
    for (up, down), part in zip(products, hidden.split([19, 3, 8]), strict=True):
        inner = up(part).relu().square()
        rows = slice(0, len(part))
        assert torch.equal(found[rows], down(inner) * weights[rows])
        found, weights = found[len(part) :], weights[len(part) :]


def test_words_after_a_panel_are_not_read_as_numbers(emulator) -> None:
    """Rows end within a tile, and the next words are infinite weights of the next panel."""
    weight = torch.randn(128, 34).bfloat16()
    weight[64:] = torch.inf
    x = torch.rand(20, 34).bfloat16() + 1
    for method in ("amx", "plain_tiles"):
        out = NativeLinear(weight, None, None, method)(x)
        assert out[:, :64].isfinite().all()
        assert out[:, 64:].isinf().all()


def test_plain_tiles_are_close_to_the_product() -> None:
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
