"""Compilation of all Triton kernels for NVIDIA and AMD targets: shared memory, registers, products.

No GPU is needed. `make triton-3.6` adds the version that comes with torch 2.11.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.kernels import machine_code
from tests.kernels.compiled import kept_folder

pytest.importorskip("triton")
HERE = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("aot", HERE / "aot.py")
aot = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(aot)


WGMMA_KERNELS = {
    *("solve_kernel", "weigh_kernel", "scan_kernel", "prefill_attention_kernel"),
    *("prefill_mla_kernel", "multiply_heads_kernel", "linear_kernel", "joined_kernel"),
    *("gate_up_kernel", "down_kernel"),
}
"""Kernels with products large enough for Hopper's tensor core instructions, in tiles of 64.

Decode attention is not: it has 16 rows.
"""


ALLOWED_SPILL_BYTES = {
    "gdn": 208,
    "gdn bfloat16_states": 208,
    "mamba2 large_state": 128,
    "gdn tiles_of_32": 32,
    "fp8_block_prefill": 8,
    "size_64_odd_group": 8,
}
"""Spilled bytes per thread by launch: Gated DeltaNet's solve with two warps and its tiles of 32,
states of 256 rows, gate and up of experts with scales by block, and decoding of small heads."""


SIZES = HERE / "launches" / "sizes.py"
LAUNCHES = [
    pytest.param(path, id=path.stem)
    for path in sorted((HERE / "launches").glob("*.py"))
    if path != SIZES
]


OTHER_TRITON = HERE.parent.parent / "out" / "triton-3.6.0"
TRITONS = [
    pytest.param(None, id="installed"),
    pytest.param(
        OTHER_TRITON,
        id="3.6.0",
        marks=pytest.mark.skipif(not OTHER_TRITON.exists(), reason="run `make triton-3.6` first"),
    ),
]
"""Folders with a version of Triton, or None for the installed one."""


def compiled(
    *launches: Path | str, triton: Path | None = None, options: Sequence[str | Path] = ()
) -> list[dict[str, object]]:
    """Return the records of ``aot.py`` for files of launches, or for single launches ``FILE:NAME``.
    One process compiles all, because its start takes as long as several kernels."""
    paths = [str(triton)] if triton else []
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    run = subprocess.run(
        [sys.executable, HERE / "aot.py", *launches, *options],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def assert_products_keep_their_registers(records: list[dict[str, object]]) -> None:
    products = [record for record in records if record.get("wgmma")]
    if any(record["products_in_danger"] is None for record in products):
        pytest.skip("the triton package has no nvdisasm")
    assert [record for record in products if record["products_in_danger"]] == []


FOUR_BITS = 6.5
FP8_ROWS = 180 / 128
"""Most instructions per weight: 180 for 16,384 weights in a program of 128 threads. Gate and up,
which share the loads of x, have 147."""


LOOPS = {
    ("linear", "int4_zeros_some"): (8, FOUR_BITS),
    ("moe", "fp8_rows_one"): (16, FP8_ROWS),
    **{("linear", f"int4{word}"): (8, FOUR_BITS) for word in ("_one", "_some", "_prefill")},
    **{("linear", f"int4_in_32{word}"): (8, FOUR_BITS) for word in ("_one", "_some")},
    ("linear", "int4_zeros_one"): (8, FOUR_BITS),
    ("linear", "mxfp4_one"): (8, FOUR_BITS),
    ("linear", "q4_k_one"): (4, 8.0),  # Half of the products add up x, for the minima.
    **{("moe", f"int4{word}"): (8, FOUR_BITS) for word in ("_one", "_some", "_prefill")},
    **{("moe", f"int4_in_32{word}"): (8, FOUR_BITS) for word in ("_some", "_prefill")},
    ("moe", "mxfp4_some"): (8, FOUR_BITS),
    ("moe", "q4_k_some"): (4, 8.3),  # 6.2 and 7.5: gate and up share sums of x.
    ("moe", "fp8_rows_some"): (16, FP8_ROWS),
    ("linear", "fp8_rows_one"): (16, FP8_ROWS),
    ("linear", "fp8_rows_some"): (16, 320 / 128),  # Scales of 64 tokens take 128.
}
"""Weights per product, and most instructions per weight, by folder and launch."""
BOTH = [("attention", "size_64_odd_group"), ("attention", "qwen3_next"), ("pointwise", "conv1d")]
BOTH += [("recurrences", name) for name in ("gdn", "kda", "mamba2")]
"""Launches that decode and verify."""
SHARES = pytest.mark.parametrize(
    ("loops", "both"),
    [
        pytest.param(2, 1, id="some"),
        pytest.param(len(LOOPS), len(BOTH), id="all", marks=pytest.mark.full),
    ],
)


@SHARES
def test_hopper_has_few_instructions_and_one_rounding(loops: int, both: int) -> None:
    """Loops have few instructions per weight, no conversions of floating-point numbers, and no
    divisions.

    Decoding and verification are two compilations of the same arithmetic. One with other
    multiply-adds would give a verified token other bits than a decoded one.
    """
    counted, pairs = list(LOOPS)[:loops], BOTH[:both]
    files = [f"{HERE / 'launches' / folder}.py:{name}" for folder, name in (*counted, *pairs)]
    with kept_folder() as folder:  # Triton does not compile an unchanged kernel again.
        (folder / "triton").mkdir(exist_ok=True)
        records = compiled(*files, options=("--targets", "sm_90", "--keep", folder / "triton"))
    by_launch = {key: [] for key in (*counted, *pairs)}
    for record in records:
        by_launch[record["folder"], record["launch"]].append(record)
    assert_products_keep_their_registers(records)
    for key in counted:
        found = [loop for record in by_launch[key] if record["wgmma"] for loop in record["loops"]]
        assert found, key
        weights_per_product, most = LOOPS[key]
        for instructions, products, conversions, divisions in found:
            assert instructions / (products * weights_per_product) <= most, key
            assert conversions == divisions == 0, key
    for key in pairs:
        decode, verify = [
            record["arithmetic"]
            for record in by_launch[key]
            if record["kernel"].startswith(("decode", "verify"))
        ]
        assert decode == verify and sum(decode.values()) > 0, key


def test_a_product_whose_operand_changes_is_found() -> None:
    """The first product runs on while its left operand R4 is loaded again; the second one not."""
    code = """
    .L_x_1:
        /*0010*/                   HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*0020*/                   HGMMA.64x16x16.F32.BF16 R24, R8, gdesc[UR8], R24, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, {left} ;
        /*0040*/                   LDS.128 R4, [R90] ;
        /*0050*/              @!P0 BRA `(.L_x_1) ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/                   STG.E desc[UR4][R2.64], R24 ;
        /*0080*/                   EXIT ;
    """
    assert machine_code.registers_in_danger(code.format(left="0x0")) == []
    assert machine_code.registers_in_danger(code.format(left="0x1")) == []
    [found] = machine_code.registers_in_danger(code.format(left="0x2"))
    assert "R4, gdesc" in found and "LDS.128 R4" in found
    early = code.replace("gsb0, 0x0", "gsb0, 0x1").format(left="0x1")
    assert any("STG.E" in line for line in machine_code.registers_in_danger(early))


def test_a_bound_that_an_outer_loop_carries_is_found() -> None:
    """The scan of prompts had one, and then began every part of a prompt at its first tile."""
    code = """
    %i_tile:2 = scf.for %i_stop = %10 to %11 step %c1 iter_args(%b = %b_0, %i_1 = %i_0) -> (f32)
      %b_2 = scf.for %i = {lower} to %i_until step %c1_0 iter_args(%b_1 = %b) -> (f32)  : i64 {{
    """
    assert aot.carried_bounds(code.format(lower="%i_1")) == 1
    assert aot.carried_bounds(code.format(lower="%i_0")) == 0


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("triton", TRITONS)
@pytest.mark.parametrize("target", aot.TARGETS)
def test_kernels_of_all_sizes_fit_a_target(target: str, triton: Path | None) -> None:
    """A test per target, so that the processes of pytest share the work."""
    records = compiled(SIZES, triton=triton, options=("--targets", target))
    assert_products_keep_their_registers(records)
    assert records
    assert [one for one in records if one["shared_bytes"] > aot.SHARED_BYTES[target]] == []


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("triton", TRITONS)
@pytest.mark.parametrize("launches", LAUNCHES)
def test_kernels_compile_and_fit_their_targets(launches: Path, triton: Path | None) -> None:
    records = compiled(launches, triton=triton)
    assert_products_keep_their_registers(records)
    assert [record for record in records if record["carried_bounds"]] == []
    assert {record["target"] for record in records} == set(aot.TARGETS)
    # A compiler that takes a kernel for undefined leaves nothing of it, and does not fail.
    nvidia = [record for record in records if record["target"] != "gfx942"]
    assert [record for record in nvidia if record["registers"] < 8] == []
    assert [r for r in records if r["shared_bytes"] > aot.SHARED_BYTES[r["target"]]] == []
    # float32 products have no tensor cores, and these targets are not tuned for speed.
    slow = ("sm_80", "sm_89", "sm_100")
    fast = [r for r in records if "float32" not in r["launch"] and r["target"] not in slow]
    assert [r for r in fast if r["spilled_bytes"] > ALLOWED_SPILL_BYTES.get(r["launch"], 0)] == []
    hopper = [r for r in fast if r["target"] == "sm_90"]
    assert [r for r in hopper if r["serialised"]] == []
    large = [r for r in hopper if "tiles_of_" not in r["launch"]]
    assert [
        r for r in large if r["kernel"] in WGMMA_KERNELS and r["num_warps"] > 2 and not r["wgmma"]
    ] == []
