"""Matrices of small integers in groups of columns: checkpoints, and products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial

import pytest
import torch

from kernels.activation import native as native_activation
from kernels.linear import grouped, native, reference
from kernels.linear.blocks import GGML_TYPES, Blocks
from kernels.linear.eight_bits import EightBits
from kernels.linear.formats import Matrix
from kernels.linear.grouped import Grouped
from kernels.linear.groups import UNIT, GroupFormat, Groups, linear_groups, quantize_units
from kernels.linear.native import NativeGroups
from kernels.moe import native as native_experts
from kernels.moe import reference as experts
from kernels.native import DTYPES, has
from tests.kernels.compiled import BY_DTYPE, assert_close
from tests.selection import EMULATED

METHODS = [method for method in ("half_lanes", "lanes") if has(f"linear_groups_{method}_float32")]
NEEDS_NATIVE = pytest.mark.skipif(not METHODS, reason="no C++ compiler, or no AVX2")
BY_METHOD = pytest.mark.parametrize("method", METHODS or [None])
FORMATS = [
    *(form for form in GGML_TYPES.values() if isinstance(form, Blocks) and form.block >= UNIT),
    Grouped(4, 32), Grouped(4, 64, True, torch.float16), Grouped(4, 128),
    Grouped(8, 32, True, torch.float32), Grouped(8, 128),
]  # fmt: skip
BY_FORMAT = pytest.mark.parametrize(
    "format", FORMATS, ids=lambda form: form.describe().replace(" ", "-")
)


@dataclass(frozen=True)
class Decoded(GroupFormat):
    """A format whose fields are the parts of `Groups`, with the sizes of another one."""

    like: GroupFormat

    bits = property(lambda self: self.like.bits)
    group = property(lambda self: self.like.group)
    block = property(lambda self: self.like.block)
    zero = property(lambda self: self.like.zero)
    table = property(lambda self: self.like.table)
    fields = property(lambda self: {})

    def describe(self) -> str:
        return self.like.describe()

    def decoded(self, fields: Mapping[str, torch.Tensor]) -> Groups:
        return Groups(**fields)


def draw_numbers(format: GroupFormat, num_outputs: int, size: int) -> dict[str, torch.Tensor]:
    """Draw codes and factors of all values that have room, and scales from a normal distribution.

    In an emulator, subnormal scales are 0. Its conversion of float16 (VCVTPH2PS) follows the mode
    in which subnormal operands are 0, and that of processors does not.
    """
    torch.manual_seed(0)
    empty = Matrix.empty(format, (num_outputs, size), torch.zeros)
    found = format.decoded(empty.fields)
    parts = {one.name: getattr(found, one.name) for one in fields(Groups)}
    drawn = {}
    for name, part in parts.items():
        if part is None:
            continue
        if part.is_floating_point():
            drawn[name] = (torch.randn(part.shape) * 0.01).to(part.dtype)
            if EMULATED:
                drawn[name][drawn[name].abs() < torch.finfo(part.dtype).tiny] = 0.0
        elif name == "scale":
            drawn[name] = torch.randint(110, 124, part.shape, dtype=part.dtype)
        else:
            limits = torch.iinfo(part.dtype)
            top = 2**format.bits if name == "codes" else limits.max + 1
            drawn[name] = torch.randint(limits.min, top, part.shape, dtype=part.dtype)
    return drawn


def make(format, numbers, size, method, bias=None, dtype=torch.float32) -> NativeGroups:
    return NativeGroups(Decoded(format), numbers, size, bias, dtype, method)


def test_mixed_columns_and_odd_groups_are_refused() -> None:
    packed, order = torch.zeros(8, 32, dtype=torch.int32), torch.arange(256) // 128
    order[[0, 200]] = order[[200, 0]]
    with pytest.raises(ValueError, match="not together"):
        grouped.from_compressed_tensors(packed, torch.ones(8, 2), 256, 128, g_idx=order)
    with pytest.raises(ValueError, match="got 4 bits, 16 columns"):
        grouped.from_compressed_tensors(packed, torch.ones(8, 16), 256, 16)


@pytest.mark.parametrize("bits, group", [(4, 32), (4, 128), (8, 64)])
def test_quantized_weights_are_close(bits, group) -> None:
    """An element beyond the last code, at the end of the shorter side of the range, has an error of
    up to one step, others of half a step. A scale in bfloat16 differs by up to 1/256 before codes
    are rounded."""
    weight = torch.randn(3, 8, 300) * torch.logspace(-20, 3, 24).view(3, 8, 1)
    weight[0, 0] = 0.0
    format = Grouped(bits, group)
    matrix = Matrix(format, format.quantized(weight), 300)
    assert matrix.shape == (3, 8, 300)
    largest = torch.nn.functional.pad(weight, (0, -300 % group)).unflatten(-1, (-1, group))
    step = largest.abs().amax(dim=-1).repeat_interleave(group, dim=-1)[..., :300] / format.zero
    error = (matrix.widened(torch.float32) - weight).abs()
    assert (error <= step * (1 + 2**-8 * (format.zero + 1))).all()
    is_rounded = weight.abs() < (format.zero - 1) * step
    assert (error <= step / 2 * (1 + 2**-7))[is_rounded].all()
    assert is_rounded.float().mean() > 0.8


def test_columns_and_rows_can_be_cut_out() -> None:
    format = Grouped(4, 32)
    matrix = Matrix(format, format.quantized(torch.randn(60, 256)), 256)
    whole = matrix.widened(torch.float32)
    assert format.unit == 64
    assert torch.equal(
        matrix.columns(torch.arange(64, 192)).widened(torch.float32), whole[:, 64:192]
    )
    rows = matrix.split([25, 35])[1]
    assert torch.equal(rows.widened(torch.float32), whole[25:])
    x = torch.randn(30, 256)[:, 64:192]
    product = rows.columns(torch.arange(64, 192)).format.product(
        native, rows.columns(torch.arange(64, 192)), None, x.dtype
    )
    assert_close(product(x), x @ whole[25:, 64:192].T, factor=1000)


@BY_FORMAT
def test_error_of_the_reference_is_that_of_the_activations(format) -> None:
    """An activation has an error of half its scale, and each part of a weight is rounded in float32
    with every unit and block."""
    numbers, form = draw_numbers(format, 30, 768), Decoded(format)
    x = torch.randn(5, 768) * torch.logspace(-20, 3, 5)[:, None] * torch.logspace(0, -4, 768)
    x[0, :96] = 0.0
    weight = form.widened(numbers, 768).double()
    without = {name: part for name, part in numbers.items() if name not in ("minimum", "minima")}
    parts = form.widened(without, 768).double()
    parts = parts.abs() + (parts - weight).abs()
    half_step = quantize_units(x)[1].double().repeat_interleave(UNIT, dim=1) / 2
    allowed = half_step @ weight.abs().T * 1.00001
    allowed += (x.double().abs() + half_step) @ parts.T * 2**-23 * (768 // UNIT + 4)
    error = (linear_groups(x, form, numbers).double() - x.double() @ weight.T).abs()
    assert (error <= allowed).all()
    assert (error > 0).any()


@NEEDS_NATIVE
@BY_METHOD
@BY_FORMAT
@BY_DTYPE
def test_products_have_the_bits_of_the_reference(format, method, dtype) -> None:
    """The last panel of outputs, chunk of columns and tile of rows are partial."""
    if not has(f"linear_groups_{method}_{DTYPES[dtype]}"):
        pytest.skip("plain tiles are for float32")
    numbers = draw_numbers(format, 50, 1280)
    x, bias = torch.randn(19, 1290)[:, 3:-7].to(dtype), torch.randn(50).to(dtype)
    x[0, 64:96] = 0.0
    expected = linear_groups(x, Decoded(format), numbers, bias)
    assert torch.equal(make(format, numbers, 1280, method, bias, dtype)(x), expected)
    assert expected.isfinite().all() and expected.any()


@NEEDS_NATIVE
@BY_METHOD
@pytest.mark.parametrize("num_threads", [1, 2])
@BY_FORMAT
def test_rows_and_outputs_are_independent_of_the_others(format, method, num_threads) -> None:
    torch.set_num_threads(num_threads)
    size = 256 if isinstance(format, Blocks) else 232
    numbers = draw_numbers(format, 129, size)
    x, product = torch.randn(64, size), make(format, numbers, size, method)
    whole = product(x)
    assert torch.equal(whole[7:8], linear_groups(x[7:8], Decoded(format), numbers))
    for rows in (0, 1, 2, 3, 8, 17, 25, 50):
        assert torch.equal(product(x[:rows]), whole[:rows]), rows
        assert torch.equal(product(x[7 : 7 + rows]), whole[7 : 7 + rows]), rows
    few = {name: part[:3] for name, part in numbers.items()}
    assert torch.equal(make(format, few, size, method)(x), whole[:, :3])


def pairs_of_products(formats, method, dtype, num_experts, width, inner, gated):
    """Return the first and the last product of each expert."""
    shapes = (inner * (1 + gated), width), (width, inner)
    stacks = []
    for format, (rows, size) in zip(formats, shapes, strict=True):
        numbers = draw_numbers(format, num_experts * rows, size)
        each = ({name: part[first : first + rows] for name, part in numbers.items()}
                for first in range(0, num_experts * rows, rows))  # fmt: skip
        stacks.append([make(format, part, size, method, None, dtype) for part in each])
    return list(zip(*stacks, strict=True))


@NEEDS_NATIVE
@BY_METHOD
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("numbers", [(12, 14), (2, 12), (14, 8)])
def test_experts_have_the_bits_of_their_products(method, numbers, gated) -> None:
    formats = [GGML_TYPES[number] for number in numbers]
    compare_experts(pairs_of_products(formats, method, BF16, 5, 256, 256, gated), BF16, gated)


@NEEDS_NATIVE
@pytest.mark.parametrize("rows", [32, 40])
def test_matrices_that_are_packed_together_have_products_of_their_own(rows) -> None:
    """32 rows are whole panels, so one call packs all matrices."""
    format, x = GGML_TYPES[14], torch.randn(3, 512)
    stack = Matrix.empty(format, (3, rows, 512), torch.empty)
    blocks = stack.fields["blocks"].random_().unflatten(-1, (2, -1))
    blocks[..., -2:] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    products = format.products(native, stack, torch.float32)
    assert (
        len({product._packed["codes"].data_ptr() for product in products}) == (rows == 40) * 2 + 1
    )
    for one, product in zip(stack, products, strict=True):
        expected = format.product(native, one, None, torch.float32)(x)
        assert product.num_outputs == rows and torch.equal(product(x), expected)


BF16 = torch.bfloat16
WORD_METHODS = [
    *(("int8", "lanes", dtype) for dtype in (torch.float32, BF16)),
    *(("float32", method, torch.float32) for method in ("lanes", "int8_plain_tiles")),
    *(("bfloat16", method, BF16) for method in ("pairs", "halves", "plain_tiles")),
]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("kind", "method", "dtype"), WORD_METHODS, ids=str)
def test_experts_of_words_have_the_bits_of_their_products(kind, method, dtype, gated) -> None:
    if method == "int8_plain_tiles":
        kind, method = "int8", "plain_tiles"
    is_int8 = kind == "int8"
    if not has(f"experts_{kind}_{method}" + f"_{str(dtype)[6:]}" * is_int8):
        pytest.skip("this processor lacks the method")

    def make_one(rows: int, size: int) -> native.NativeProduct:
        scale = torch.rand(rows) + 0.5
        if is_int8:
            weight = torch.randint(-128, 128, (rows, size), dtype=torch.int8)
            return native.NativeInt8Linear(weight, scale / 512, None, method)
        return native.NativeLinear(torch.randn(rows, size).to(dtype) / 16, scale, None, method)

    products = [(make_one(200 * (1 + gated), 256), make_one(256, 200)) for _ in range(5)]
    compare_experts(products, dtype, gated)


def compare_experts(products, dtype, gated) -> None:
    """Compare experts without tokens, with few and with many, rows without an expert, and more rows
    than are computed at a time. ReLU is exact in every library; SiLU is that of the native kernels.
    In bfloat16, so is the sigmoid of a shared expert."""
    together = native_experts.prepare_products(products, gated)
    assert isinstance(together, native_experts.NativeExperts)
    activate = native_activation.silu_and_mul if gated else native_activation.relu_squared
    one_by_one = partial(experts.sum_of_products, products=products, activate=activate)
    hidden = (torch.randn(1100, 300) * 0.1).to(dtype)[:, 10:266]
    weights, chosen = torch.rand(1100, 2), torch.randint(4, (1100, 2), dtype=torch.int32)
    chosen[:, 1] += (chosen[:, 1] == chosen[:, 0]).int()
    chosen[5] = experts.NO_EXPERT
    chosen[20:, 0] = 2
    expected = one_by_one(hidden, weights, chosen)
    assert torch.equal(expected[5], torch.zeros(256, dtype=dtype)) and expected[0].any()
    for num_threads, rows in ((1, 1), (1, 9), (2, 1100), (2, 0)):
        torch.set_num_threads(num_threads)
        found = together(hidden[:rows], weights[:rows], chosen[:rows])
        assert torch.equal(found, expected[:rows])
    if dtype is BF16:
        gate = torch.randn(9, 1).to(dtype)
        shared = together(hidden[:9], weights[:9], chosen[:9], gate)
        assert torch.equal(shared, one_by_one(hidden[:9], weights[:9], chosen[:9], gate))


@NEEDS_NATIVE
def test_products_of_several_formats_write_into_one_result() -> None:
    x = torch.randn(7, 300)[:, :256]
    parts = [make(GGML_TYPES[12], draw_numbers(GGML_TYPES[12], 40, 256), 256, METHODS[0])]
    parts += [native.prepare(torch.randn(24, 256), torch.randn(24))]
    parts += [native.prepare_8bit(*reference.quantize(torch.randn(9, 256), "int8"), None, x.dtype)]
    parts += [make(GGML_TYPES[14], draw_numbers(GGML_TYPES[14], 3, 256), 256, METHODS[0])]
    found = native.join(parts)(x)
    assert torch.equal(found, torch.cat([part(x) for part in parts], dim=1))
    assert found.is_contiguous()


@BY_DTYPE
@pytest.mark.parametrize(
    "format",
    [form for form in GGML_TYPES.values() if isinstance(form, Blocks)],
    ids=Blocks.describe,
)
def test_rows_are_looked_up_with_the_bits_of_the_widened_weight(format, dtype) -> None:
    """Exponents are those of normal numbers."""
    rows = torch.randint(256, (40, 3 * format.elements), dtype=torch.uint8)
    if format.describe() == "MXFP4":
        rows[:, :: format.elements] &= 127
        rows[:, :: format.elements] |= 2
    matrix = Matrix(format, {"blocks": rows}, 3 * format.columns)
    index = torch.tensor([3, 39, 0, 3, *range(5, 22)])
    found = torch.full((len(index), matrix.num_columns), 7.0, dtype=dtype)
    native.look_up(matrix, index, found)
    expected = matrix.widened(dtype)[index]
    assert torch.equal(found.nan_to_num(1e5), expected.nan_to_num(1e5)) and expected.any()


@NEEDS_NATIVE
@BY_METHOD
def test_more_rows_than_are_quantised_at_a_time(method) -> None:
    numbers = draw_numbers(GGML_TYPES[12], 20, 256)
    x, product = torch.randn(2100, 256), make(GGML_TYPES[12], numbers, 256, method)
    whole = product(x)
    for first in (0, 1000, 1020, 2040):
        assert torch.equal(product(x[first : first + 50]), whole[first : first + 50])


@NEEDS_NATIVE
@BY_METHOD
@BY_FORMAT
@pytest.mark.parametrize("largest", [False, True])
def test_extreme_integers_do_not_saturate(format, method, largest) -> None:
    numbers = draw_numbers(format, 20, 256)
    for name, part in numbers.items():
        if not part.is_floating_point() and name != "scale":
            limits = torch.iinfo(part.dtype)
            part.fill_(limits.max if largest else limits.min)
    numbers["codes"].fill_(2**format.bits - 1 if largest else 0)
    if format.table is not None and not largest:
        numbers["codes"].fill_(min(range(16), key=format.table.__getitem__))
    x = torch.ones(8, 256)
    x[1], x[2, ::2], x[3, ::5], x[7] = -1.0, -1.0, -0.7, 0.0
    expected = linear_groups(x, Decoded(format), numbers)
    assert torch.equal(make(format, numbers, 256, method)(x), expected)


@NEEDS_NATIVE
@BY_METHOD
@BY_FORMAT
def test_extreme_scales(format, method) -> None:
    """Zeros, negative, large, and subnormal float16 numbers. Subnormal float32 numbers are 0."""
    numbers = draw_numbers(format, 16, 256)
    smallest = -14 if EMULATED else -24  # see draw_numbers
    values = torch.tensor([0.0, -0.0, 2.0**-14, 2.0**smallest, -60000.0, 1.0])
    if numbers["scale"].dtype is torch.uint8:
        numbers["scale"][:6] = torch.tensor([2, 3, 4, 128, 150, 170], dtype=torch.uint8)[:, None]
    else:
        numbers["scale"][:6] = values[:, None].to(numbers["scale"].dtype)
    if "minimum" in numbers:
        numbers["minimum"][:6] = values.flip(0)[:, None].half()
    x = torch.randn(9, 256)
    x[1::3] *= 1e20
    x[2::3] *= 1e-20
    expected = linear_groups(x, Decoded(format), numbers)
    found = make(format, numbers, 256, method)(x)
    is_normal = expected.abs() > 1e-34
    assert is_normal.float().mean() > 0.7
    assert torch.equal(found[is_normal], expected[is_normal])
    assert (found[~is_normal].abs() <= 1e-34).all()


@NEEDS_NATIVE
@BY_METHOD
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_stay_in_their_row(method, bad) -> None:
    format, size = GGML_TYPES[12], 256
    numbers = draw_numbers(format, 20, size)
    product, x = make(format, numbers, size, method), torch.randn(9, size)
    before = product(x)
    for place in (0, 17, 255):
        rows = x.clone()
        rows[3, place] = bad
        found = product(rows)
        assert not found[3].isfinite().any()
        kept = [0, 1, 2, *range(4, 9)]
        assert torch.equal(found[kept], before[kept])


@NEEDS_NATIVE
@BY_FORMAT
def test_packed_weights_are_as_small_as_those_of_the_file(format) -> None:
    """Factors of 4 bits, in Q2_K, get a byte."""
    size = 4096
    packed = make(format, draw_numbers(format, 64, size), size, METHODS[0])
    bits = packed.num_bytes * 8 / (64 * size)
    assert bits <= {"Q2_K": 3.2}.get(format.describe(), format.num_bits * 1.05)


@NEEDS_NATIVE
@pytest.mark.parametrize("num_outputs, num_blocks", [(35, 3), (16, 1), (3, 9)])
@pytest.mark.parametrize(
    "format", [form for form in FORMATS if isinstance(form, Blocks)], ids=Blocks.describe
)
def test_blocks_are_packed_as_their_decoded_numbers_are(format, num_outputs, num_blocks) -> None:
    """Rows are cut out of wider ones. Byte 3 has no NaN, whose bits change with the minimum's sign
    in torch."""
    size = format.elements
    rows = torch.randint(256, (num_outputs, (num_blocks + 2) * size), dtype=torch.uint8)
    rows = rows[:, size:-size]
    rows[:, 3::size] &= 0xBF
    blocks, size = {"blocks": rows}, num_blocks * format.columns
    assert has(f"pack_{format.name.lower()}")
    found = format.decoded(blocks)
    parts = {one.name: getattr(found, one.name) for one in fields(Groups)}
    numbers = {name: part for name, part in parts.items() if part is not None}
    expected = native.pack_groups(Decoded(format), numbers, size)
    packed = native.pack_groups(format, blocks, size)
    assert packed.keys() == expected.keys()
    for name, part in packed.items():
        assert part.dtype is expected[name].dtype
        assert torch.equal(part.view(torch.uint8), expected[name].view(torch.uint8)), name


@pytest.mark.parametrize("format", [GGML_TYPES[2], Grouped(4, 32)], ids=["Q4_0", "int4"])
def test_layers_and_experts_use_the_product_of_their_backend(format) -> None:
    """Weights are widened where no product exists."""
    weight = torch.randn(4, 48, 64) * 0.2
    up = Matrix(format, format.quantized(weight), 64)
    down = Matrix(format, format.quantized(torch.randn(4, 64, 64)[:, :, :32] * 0.2), 32)
    hidden, chosen = torch.randn(6, 64), torch.randint(4, (6, 2), dtype=torch.int32)
    weights = torch.rand(6, 2)
    bias = torch.randn(48)
    for linear, moe in ((reference, experts), (native, native_experts)):
        has_product = bool(METHODS) and linear is native
        assert format.has_product(linear) == has_product
        assert not GGML_TYPES[40].has_product(linear)
        product = format.product(linear, up[1], bias, torch.float32)
        assert isinstance(product, NativeGroups) == has_product
        exact = hidden @ up[1].widened(torch.float32).T + bias
        assert_close(product(hidden), exact, factor=1000 if has_product else 1)
        half = format.product(linear, up[1], None, torch.float16)(hidden.half())
        assert_close(half, (exact - bias).half())
        of_all = format.experts(moe, up[:, :32], down, torch.float32)
        expected = moe.experts(
            hidden, weights, chosen, up[:, :32].widened(torch.float32), down.widened(torch.float32)
        )
        assert_close(of_all(hidden, weights, chosen), expected, factor=2000 if has_product else 1)


fused = pytest.importorskip("kernels.linear.fused")
fused_experts = pytest.importorskip("kernels.moe.fused")
IN_WORDS = [form for form in FORMATS if fused.has_groups(form)]


def test_formats_of_four_bits_have_products_on_a_device() -> None:
    names = {form.describe() for form in IN_WORDS}
    groups = {f"int4 in groups of {size} columns" for size in (32, 64, 128)}
    assert names == {"Q4_0", "Q4_1", "Q4_K", "MXFP4"} | groups


@pytest.mark.parametrize("format", IN_WORDS, ids=lambda form: form.describe().replace(" ", "-"))
@pytest.mark.parametrize("num_columns", [256, 300])
@pytest.mark.parametrize("has_zeros", [True, False])
def test_products_of_words_are_those_of_the_widened_weight(
    format, num_columns, has_zeros, device
) -> None:
    """With zeros for each group, of as many bits as codes, and the last part of a span."""
    numbers = draw_numbers(format, 70, num_columns)
    can_have = format.table is None and "minimum" not in numbers
    if can_have and (has_zeros or "zeros" in numbers):
        numbers["zeros"] = torch.randint(16, numbers["scale"].shape, dtype=torch.uint8)
    run, expected = product_of_words(format, numbers, num_columns, 5, device)
    assert_close(run().cpu(), expected)


@pytest.mark.parametrize("format", [Grouped(4, 64, True), GGML_TYPES[12]], ids=["int4", "Q4_K"])
def test_products_of_words_do_not_depend_on_the_batch(format, device) -> None:
    """More tokens than spans are computed in parallel for, and few."""
    run, _ = product_of_words(format, draw_numbers(format, 70, 512), 512, 70, device)
    whole = run()
    for rows in (slice(3, 4), slice(5, 22)):
        assert torch.equal(run(rows), whole[rows])


def product_of_words(format, numbers, num_columns, num_tokens, device):
    """Return a product of random rows, by a slice of them, and its values."""
    decoded = Decoded(format)
    x, bias = torch.randn(num_tokens, num_columns), torch.randn(70)
    on_device = {name: part.to(device) for name, part in numbers.items()}
    place = num_columns, bias.to(device), torch.float32
    product = fused.prepare_groups(decoded, on_device, *place)
    weight = decoded.widened(numbers, num_columns).double()
    expected = (x.double() @ weight.T + bias).float()
    return lambda rows=slice(None): product(x[rows].to(device)), expected


@pytest.mark.parametrize("num_tokens", [2, 20])
def test_experts_multiply_matrices_of_two_formats(num_tokens, device) -> None:
    """Words, and words with weights of 8 bits or in full precision. The last expert is shared."""
    torch.manual_seed(1)
    dtype = torch.bfloat16
    weights = torch.randn(3, 48, 128) * 0.2, torch.randn(3, 128, 24) * 0.2
    up, down = (Matrix.of(weight) for weight in weights)
    up, low, eight = (
        one.quantized(format)
        for one, format in ((up, Grouped(4, 64)), (down, Grouped(4, 32)), (down, EightBits("fp8")))
    )
    hidden = torch.randn(num_tokens, 128).to(dtype)
    chosen_weights, chosen = experts.route(torch.randn(num_tokens, 2), 2, True)
    gate = torch.randn(num_tokens, 1).to(dtype)
    arguments = [part.to(device) for part in (hidden, chosen_weights, chosen, gate)]
    for second in (low, eight, down) if num_tokens == 2 else (low,):
        run = up.format.experts(fused_experts, up.to(device), second.to(device), dtype)
        wide = [one.widened(dtype) for one in (up, second)]
        out = run(*arguments)
        expected = experts.experts(hidden, chosen_weights, chosen, *wide, gate)
        assert_close(out.cpu(), expected, factor=2)
        part = run(*(tensor[1:3] for tensor in arguments))
        assert torch.equal(part, out[1:3])
