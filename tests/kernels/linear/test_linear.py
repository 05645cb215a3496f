"""Linear layers, full precision and 8-bit: results, and independence of the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.linear import int8, reference
from kernels.linear import native as compiled
from kernels.native import has, kernel_choices, shared_library
from tests.kernels.compiled import BY_DTYPE, assert_close, by_backend

fused = pytest.importorskip("kernels.linear.fused")
BACKENDS = by_backend("linear")


def quantized_product(backend, weight, bias=None, format="int8"):
    return backend.prepare_8bit(*backend.quantize(weight, format), bias, weight.dtype)


@BACKENDS
@BY_DTYPE
@settings(max_examples=6)
@given(
    num_tokens=st.sampled_from([0, 1, 3, 17, 70]),
    num_outputs=st.sampled_from([1, 40, 130]),
    size=st.sampled_from([8, 100, 1100]),
    biased=st.booleans(),
)
def test_linear_equals_the_product(
    backend, dtype, num_tokens, num_outputs, size, biased, device
) -> None:
    x = torch.randn(num_tokens, size + 8).to(dtype).to(device)[:, :size]
    weight = torch.randn(num_outputs, size).to(dtype).to(device)
    bias = torch.randn(num_outputs).to(dtype).to(device) if biased else None
    expected = x.double() @ weight.double().T
    expected = (expected + bias.double() if biased else expected).to(dtype)
    scale = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
    assert_close(backend.linear(x, weight, bias), expected, scale=scale)
    assert_close(backend.prepare(weight, bias)(x), expected, scale=scale)


@BACKENDS
@pytest.mark.parametrize("format", ["int8", "fp8", "fp8 blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 1100), (66, 200)])
def test_8_bit_weights_equal_the_product(backend, format, dtype, num_tokens, size, device) -> None:
    """Few tokens and a long row use parallel spans. Blocks are 128 wide like those of fp8
    checkpoints, and the last one is partial. The interpreter converts int8 to bfloat16 by its
    bits."""
    kind, *blocks = format.split()
    weight = torch.randn(70, size, device=device)
    x, bias = (torch.randn(*shape).to(dtype).to(device) for shape in ((num_tokens, size), (70,)))
    quantized, scale = backend.quantize(weight, kind)
    each = scale[:, None]
    if blocks:
        scale = torch.rand(70, -(-size // reference.SCALE_BLOCK), device=device) / 448
        each = scale.repeat_interleave(128, dim=1)[:, :size]
    product = x.double() @ (quantized.double() * each.double()).T + bias.double()
    assert_close(backend.linear_8bit(x, quantized, scale, bias), product.to(dtype), factor=2)
    if blocks:
        prepared = backend.prepare_8bit(quantized, scale, bias, dtype)
        assert_close(prepared(x), product.to(dtype), factor=2)


def fp8_row_error(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the bound of ``reference.linear_fp8`` on its error against float64, ``[T, M]``."""
    num_blocks = -(-x.shape[1] // 128)
    scale = reference.quantize_rows(x)[1].double().repeat_interleave(128, 1)[:, : x.shape[1]]
    rounded = torch.maximum(x.double().abs() / 16, scale / 1024) @ weight.double().abs().T
    sums = x.double().abs() @ weight.double().abs().T
    on_tensor_cores = 2.0**-13 if x.device.type == "cuda" else 0.0
    return rounded * 1.0001 + sums * (num_blocks * 2.0**-23 + on_tensor_cores) + 1e-30


@pytest.mark.parametrize("backend", [reference, fused], ids=["reference", "fused"])
@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize("num_tokens, size", [(1, 1100), (3, 128), (66, 200), (130, 1100)])
def test_error_of_fp8_activations_is_bounded(backend, num_tokens, size, in_blocks, device) -> None:
    """Rows and their elements differ by orders of magnitude, and one block is zero."""
    x = torch.randn(num_tokens, size + 4, device=device)[:, 2:-2]
    x *= torch.logspace(-20, 3, num_tokens, device=device)[:, None]
    x *= torch.logspace(0, -5, size, device=device)
    x[0, :128] = 0.0
    quantized, scale = reference.quantize(torch.randn(70, size, device=device), "fp8")
    if in_blocks:
        scale = torch.rand(70, -(-size // 128), device=device)
    bias = torch.randn(70, device=device)
    weight = reference.widened(quantized, scale, torch.float32)
    product = backend.linear_fp8(x, quantized, scale)
    error = (product.double() - x.double() @ weight.double().T).abs()
    assert (error <= fp8_row_error(x, weight)).all()
    assert (error > 0).any()
    prepared = backend.prepare_8bit(quantized, scale, bias, x.dtype, fp8_rows=True)
    # Hopper's tensor cores keep about 13 bits of a sum of fp8 products.
    factor = 2 if device == "cpu" else 100
    assert_close(prepared(x), reference.linear_fp8(x, quantized, scale, bias), factor)


def test_fp8_rows_have_the_bits_of_the_reference(device) -> None:
    """Halfway values, the largest and the least numbers included."""
    x = torch.randn(40, 300, device=device) * torch.logspace(-34, 37, 40, device=device)[:, None]
    x[0], x[1, 0], x[3, ::2] = 0.0, 448.0, 17.0
    x[1, 1:100] = torch.arange(1.0, 100.0, device=device) * 2.0**-9
    for rows in (x, x.bfloat16()):
        (found, scale), (expected, expected_scale) = (
            backend.quantize_rows(rows) for backend in (fused, reference)
        )
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scale, expected_scale)
    x[2, 5], x[4, 299] = torch.nan, torch.inf
    quantized, scale = reference.quantize(torch.randn(20, 300, device=device), "fp8")
    for backend in (fused, reference):
        out = backend.linear_fp8(x[:6], quantized, scale)
        assert out.isfinite().all(dim=1).tolist() == [True, True, False, True, False, True]
        assert not out[[2, 4]].isfinite().any()


def test_rows_in_fp8_are_independent_of_the_batch(device) -> None:
    """Few tokens are quantised by the product, and more by a kernel before it."""
    x, weight = (torch.randn(*shape, device=device) for shape in ((70, 300), (70, 300)))
    product = fused.prepare_8bit(*fused.quantize(weight, "fp8"), None, x.dtype, fp8_rows=True)
    joined = fused.join([product, fused.prepare(weight[:8])])
    whole, joined_whole = product(x), joined(x)
    assert torch.equal(joined_whole[:, :70], whole)
    for rows in (slice(0, 1), slice(0, 33), slice(4, 68), slice(2, 70)):
        assert torch.equal(product(x[rows]), whole[rows])
        assert torch.equal(joined(x[rows]), joined_whole[rows])


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_quantized_weights_are_close(format) -> None:
    """Error bounds: half an int8 step of the channel's largest weight, or half a unit of fp8's last
    digit."""
    weight = torch.randn(3, 8, 64) * torch.logspace(-20, 3, 24).view(3, 8, 1)
    quantized, scale = reference.quantize(weight, format)
    assert quantized.element_size() == 1
    error = (quantized.float() * scale[..., None] - weight).abs()
    largest = weight.abs().amax(dim=-1, keepdim=True)
    allowed = (
        largest / 254 if format == "int8" else torch.maximum(weight.abs() / 16, largest / 2**17)
    )
    assert (error <= allowed * 1.001).all()
    assert (reference.quantize(torch.zeros(2, 4), format)[0].float() == 0).all()


@BY_DTYPE
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("shape", [(64, 96), (513, 1000), (7, 300), (2048, 2048)])
def test_reference_rows_are_independent_of_the_batch(shape, dtype, num_threads) -> None:
    torch.set_num_threads(num_threads)
    x, weight = torch.randn(200, shape[1]).to(dtype), torch.randn(shape).to(dtype)
    quantized, scale = reference.quantize(weight, "int8")
    for f in (
        lambda rows: reference.linear(x[rows], weight),
        lambda rows: reference.linear_8bit(x[rows], quantized, scale),
        *(
            lambda rows, product=product: product(x[rows])
            for product in (
                quantized_product(reference, weight),
                quantized_product(reference, weight, format="fp8"),
                compiled.prepare(weight),
            )
        ),
    ):
        batched = f(slice(None))
        for first, last in ((0, 1), (5, 7), (64, 67), (101, 200), (0, 132)):
            assert torch.equal(f(slice(first, last)), batched[first:last])


def native_product(method: str, weight: torch.Tensor):
    if method.startswith("int8_"):
        quantized, scale = reference.quantize(weight.float(), "int8")
        return compiled.NativeInt8Linear(quantized, scale, None, method.removeprefix("int8_"))
    return compiled.NativeLinear(weight, None, None, method)


@pytest.mark.full(
    "2-lanes-2048x2048",
    "2-pairs-2048x2048",
    "1-halves-2048x2048",
    "2-amx-2048x2048",
    "2-int8_lanes-2048x2048",
    "2-int8_amx-2048x2048",
)
@pytest.mark.parametrize(
    "shape", [(8192, 2048), (2048, 2048), (2048, 8192), (513, 1000)], ids=lambda s: f"{s[0]}x{s[1]}"
)
@pytest.mark.parametrize("method", ["lanes", "pairs", "halves", "amx", "int8_lanes", "int8_amx"])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_native_rows_are_independent_of_the_batch(method, shape, num_threads) -> None:
    """Sizes of real models: 1 to 130 rows, and the boundaries of the blocks of 192 rows."""
    dtype = torch.float32 if method == "lanes" else torch.bfloat16
    name = f"linear_{method}_float32" if "int8" in method else f"linear_{str(dtype)[6:]}_{method}"
    if not has(name) or ("amx" in method and kernel_choices()["linear_bfloat16"] != "amx"):
        pytest.skip("the processor or the compiler lacks the method")
    torch.set_num_threads(num_threads)
    x, weight = torch.randn(400, shape[1]).to(dtype), torch.randn(shape).to(dtype)
    product = native_product(method, weight)
    whole = product(x)
    for rows in (*range(1, 131), 191, 192, 193, 383, 384, 385):
        assert torch.equal(product(x[:rows]), whole[:rows]), rows
    for first, last in ((3, 5), (64, 67), (101, 200), (185, 199), (199, 400)):
        assert torch.equal(product(x[first:last]), whole[first:last]), (first, last)


class TestInt8Activations:
    """int8 weights and activations on the CPU: integer sums, so all methods give the same bits."""

    @BY_DTYPE
    @pytest.mark.parametrize("biased", [False, True])
    def test_all_methods_are_equal_and_close_to_the_product(
        self, dtype, biased, monkeypatch
    ) -> None:
        x = torch.randn(70, 1100).to(dtype) * torch.logspace(-20, 3, 70)[:, None].to(dtype)
        weight, bias = torch.randn(130, 1100).to(dtype), torch.randn(130).to(dtype)
        bias = bias if biased else None
        quantized, scale = reference.quantize(weight, "int8")
        product = quantized_product(reference, weight, bias)(x)
        expected = x.double() @ (quantized.double() * scale.double()[:, None]).T
        expected = expected + bias.double() if biased else expected
        # Half a step of 127 for each of the 1100 activations.
        error = (product.double() - expected).abs().amax(dim=1)
        largest = x.double().abs().amax(dim=1)
        weights = (quantized.double() * scale.double()[:, None]).norm(dim=1).max()
        allowed = 5 * largest * weights / (254 * 3**0.5)
        assert (error <= allowed + 2.0**-7 * expected.abs().amax(dim=1)).all()
        single_rows = torch.cat(
            [quantized_product(reference, weight, bias)(row[None]) for row in x]
        )
        assert torch.equal(single_rows, product)
        if shared_library() is not None:
            assert torch.equal(quantized_product(compiled, weight, bias)(x), product)
        monkeypatch.setattr(int8, "is_exact", lambda: False)
        assert torch.equal(quantized_product(reference, weight, bias)(x), product)

    @pytest.mark.parametrize(("single_rows", "size"), [(0, 4096), (64, 4096), (0, 1)])
    def test_largest_sums_are_exact(self, single_rows, size, monkeypatch) -> None:
        """4096 products of 127 and 127 exceed the integers that float32 represents exactly."""
        monkeypatch.setattr(int8, "single_rows", lambda *shape: single_rows)
        weight = torch.full((65, size), 127, dtype=torch.int8)
        weight[:, 0] = torch.arange(65)
        x = torch.full((3, size), 127.0)
        x[1] = -x[1]
        exact = (x.double() @ weight.double().T).float() / 1.0
        for product in (torch._int_mm, int8.multiply_by_spans):
            monkeypatch.setattr(int8, "product_of_many", lambda *shape, chosen=product: chosen)
            assert torch.equal(int8.Int8Linear(weight, torch.ones(65), None)(x), exact)
        if kernel_choices()["linear_int8"] != "reference":
            assert torch.equal(compiled.NativeInt8Linear(weight, torch.ones(65), None)(x), exact)

    def test_zero_nan_and_infinite_rows(self) -> None:
        weight = torch.randn(40, 64)
        x = torch.randn(3, 64)
        x[1], x[2, 5] = 0.0, torch.nan
        for backend in (reference, *([compiled] if shared_library() is not None else [])):
            product = quantized_product(backend, weight)
            out = product(x)
            assert torch.equal(out[1], torch.zeros(40))
            assert out[2].isnan().all()
            assert torch.equal(out[:1], product(x[:1]))
            x[2, 5], x[2, 63] = torch.inf, 0.0
            assert not product(x)[2].isfinite().any()
            x[2, 5], x[2, 63] = 0.0, torch.nan
            assert product(x)[2].isnan().all()
            x[2, 5] = torch.nan


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0)])
def test_the_last_program_adds_the_spans(order, device, monkeypatch) -> None:
    """Spans are added in their order by any program, and the counters are zero afterwards."""
    x, weight = torch.randn(3, 1600, device=device), torch.randn(70, 1600, device=device)
    assert fused.span_of(*weight.shape) == 640
    product = fused.prepare(weight)
    expected = product(x)
    assert not product.counters.any()
    if device == "cpu":  # On a device the order is arbitrary.
        from triton.runtime.interpreter import InterpreterBuilder

        set_place = InterpreterBuilder.set_grid_idx
        places = {place: order[place] for place in range(3)}
        monkeypatch.setattr(
            InterpreterBuilder,
            "set_grid_idx",
            lambda builder, x, y, z: set_place(builder, x, y, places[z]),
        )
    assert torch.equal(product(x), expected)
    assert not product.counters.any()


@pytest.mark.parametrize("format", [None, "int8", "fp8"])
@pytest.mark.parametrize("num_outputs", [70, 330])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 66])
def test_joined_products_have_the_bits_of_each(format, num_outputs, num_tokens, device) -> None:
    """Outputs and gates may have different numbers of spans."""
    weight, gates = (torch.randn(size, 1100, device=device) for size in (num_outputs, 8))
    x = torch.randn(num_tokens, 1100, device=device)
    product = fused.prepare(weight)
    if format is not None:
        product = fused.prepare_8bit(*fused.quantize(weight, format), None, x.dtype)
    parts = [product, fused.prepare(gates)]
    joined = fused.join(parts)
    assert isinstance(joined, fused.Joined)
    expected = torch.cat([part(x) for part in parts], dim=1)
    for _ in range(2):
        assert torch.equal(joined(x), expected)
    assert not joined.counters.any()


@pytest.mark.gpu
@pytest.mark.parametrize("format", [None, "int8", "fp8", "fp8 rows"])
@pytest.mark.parametrize("shape", [(2048, 4096), (12288, 2048), (512, 2048)])
def test_row_count_changes_no_bit(shape, format, device) -> None:
    if device != "cuda":
        pytest.skip("the test is for tensor cores")
    x = torch.randn(1024, shape[1], dtype=torch.bfloat16, device=device)
    weight = torch.randn(shape, device=device)
    if format is None:
        product = fused.prepare(weight.bfloat16())
    else:
        quantized, scale = fused.quantize(weight, format.split()[0])
        product = fused.prepare_8bit(quantized, scale, None, x.dtype, fp8_rows=format == "fp8 rows")

    whole = product(x)
    for rows in (1, 2, 16, 17, 33, 64, 65, 128, 300):
        assert torch.equal(product(x[:rows]), whole[:rows]), rows


def test_span_depends_only_on_the_weight() -> None:
    """Spans are whole tiles of 128, and a wide weight is not split."""
    for num_outputs, size in ((2048, 2048), (2048, 4096), (64, 512), (151936, 2048), (3, 100)):
        span = fused.span_of(num_outputs, size)
        assert span % 128 == 0
        assert span >= min(512, size)
    assert fused.span_of(151936, 2048) == 2048
    assert fused.span_of(2048, 4096) == 512
