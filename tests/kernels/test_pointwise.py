"""Norms, rotary embedding, activations and cache writes, compared with their formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels.activation.reference
import kernels.cache_write.reference
import kernels.linear.reference
import kernels.norm.reference
import kernels.rotary.reference
from tests.kernels.compiled import BY_DTYPE, assert_close, by_backend

pytest.importorskip("triton")
import kernels.activation.fused
import kernels.cache_write.fused
import kernels.norm.fused
import kernels.rotary.fused

SHAPES = pytest.mark.parametrize("shape", [(1, 64), (5, 300), (3, 4, 48), (0, 16), (2, 3, 2, 7)])


def randn(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).to(device)


def rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x * (x.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight.double()


@by_backend("norm")
@BY_DTYPE
@SHAPES
def test_rms_norm_equals_the_formula(backend, shape, dtype, device) -> None:
    x, residual = (randn(*shape, dtype=dtype, device=device) for _ in range(2))
    weight = torch.randn(shape[-1], device=device)
    assert_close(backend.rms_norm(x, weight, 1e-5), rms(x, weight, 1e-5).to(dtype))
    normed, total = backend.rms_norm(x, weight, 1e-5, residual=residual)
    assert_close(total, x + residual)
    assert_close(normed, rms(total, weight, 1e-5).to(dtype))


@pytest.mark.parametrize("size", [128, 640])
def test_norms_quantise_their_results_once(size, device) -> None:
    """With the bits of a norm, and of the rows of a product."""
    torch.manual_seed(2)
    x, gate = (torch.randn(3, 4, size).to(torch.bfloat16).to(device) for _ in range(2))
    weight, eps = torch.randn(size, device=device), 1e-6
    first, residual = x[:, 0], gate[:, 0]
    for other in (None, residual):
        quantized, total = kernels.norm.fused.rms_norm_rows(first, weight, eps, residual=other)
        expected = kernels.norm.fused.rms_norm(first, weight, eps, residual=other)
        normed, stream = (expected, first) if other is None else expected
        assert torch.equal(quantized.x, normed) and torch.equal(total, stream)
        assert_quantized(quantized)
    quantized = kernels.norm.fused.gated_rms_norm_rows(x, weight, gate, eps)
    normed = kernels.norm.fused.gated_rms_norm(x, weight, gate, eps)
    assert torch.equal(quantized.x, normed.flatten(1))
    assert_quantized(quantized)
    assert_quantized(quantized[1:3])


def assert_quantized(quantized) -> None:
    rows, scale = kernels.linear.reference.quantize_rows(quantized.x.cpu())
    assert torch.equal(quantized.rows.cpu().view(torch.uint8), rows.view(torch.uint8))
    assert torch.equal(quantized.scale.cpu(), scale)


@by_backend("norm")
@BY_DTYPE
@pytest.mark.parametrize("gate_first", [False, True], ids=["norm-first", "gate-first"])
@pytest.mark.parametrize("weights", [(40,), (3, 40)], ids=["heads", "groups"])
def test_gated_norm_of_strided_heads_and_groups(
    backend, dtype, weights, gate_first, device
) -> None:
    """Each head of a token has separate statistics, and each group its weights, too."""
    projected = randn(6, 7, 40, dtype=dtype, device=device)
    x, gate, weight = projected[:, 1:4], projected[:, 4:], torch.randn(weights, device=device)
    opened = torch.nn.functional.silu(gate.double())
    expected = rms(x * opened, weight, 1e-6) if gate_first else rms(x, weight, 1e-6) * opened
    got = backend.gated_rms_norm(x, weight, gate, 1e-6, gate_first=gate_first)
    assert_close(got, expected.to(dtype))


@by_backend("rotary")
@BY_DTYPE
@settings(max_examples=8)
@given(
    num_tokens=st.integers(0, 4),
    heads=st.tuples(st.integers(1, 5), st.integers(1, 3)),
    half=st.integers(1, 8),
    passed=st.integers(0, 9),
)
def test_rotate_equals_complex_multiplication(
    backend, dtype, num_tokens, heads, half, passed, device
) -> None:
    size = 2 * half + passed
    projected = randn(num_tokens, sum(heads) + 1, size, dtype=dtype, device=device)
    query, key = projected[:, : heads[0]], projected[:, heads[0] + 1 :]
    angles = torch.rand(num_tokens, half, device=device) * 6
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1).to(dtype) for f in (torch.cos, torch.sin))
    for x, out in zip((query, key), backend.rotate(query, key, cos, sin), strict=True):
        pairs = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
        turns = torch.complex(cos[:, None, :half].double(), sin[:, None, :half].double())
        turned = pairs * turns
        expected = torch.cat([turned.real, turned.imag, x[..., 2 * half :].double()], dim=-1)
        assert_close(out, expected.to(dtype))


@by_backend("rotary")
@BY_DTYPE
@pytest.mark.parametrize("size, turned", [(24, 8), (16, 16), (40, 0)])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 6])
def test_rotate_and_write_equals_its_parts(
    backend, dtype, size, turned, has_norms, num_tokens, device
) -> None:
    """The parts are those of the same backend, which round after each of them."""
    name = backend.__name__.rpartition(".")[2]
    norm, cache_write = (getattr(getattr(kernels, x), name) for x in ("norm", "cache_write"))
    projected = randn(num_tokens, 9 * size, dtype=dtype, device=device)[:, size:]
    query, key, value = (
        x.unflatten(1, (-1, size)) for x in projected.split([4 * size, 2 * size, 2 * size], dim=1)
    )
    norms = (torch.randn(size, device=device), torch.randn(size, device=device))
    angles = torch.rand(num_tokens, turned // 2, device=device) * 6
    cos, sin = (torch.cat([f(angles)] * 2, dim=-1).to(dtype) for f in (torch.cos, torch.sin))
    options = {"norms": norms, "eps": 1e-6} if has_norms else {}
    options |= {"angles": (cos, sin)} if turned else {}
    pools = randn(20, 2, 2, size, dtype=dtype, device=device)
    expected = pools.clone()
    indices = torch.randperm(20)[:num_tokens].to(device)
    out = backend.rotate_and_write(query, key, value, *pools.unbind(1), indices, **options)
    if has_norms:
        query, key = norm.rms_norm(query, norms[0], 1e-6), norm.rms_norm(key, norms[1], 1e-6)
    if turned:
        query, key = backend.rotate(query, key, cos, sin)
    cache_write.write_kv(key, value, *expected.unbind(1), indices)
    assert_close(out, query)
    assert_close(pools, expected)
    others = [row for row in range(20) if row not in indices]
    assert torch.equal(pools[others], expected[others])


@by_backend("activation")
@BY_DTYPE
@pytest.mark.parametrize("shape", [(1, 2), (5, 600), (3, 4, 34), (0, 16), (2, 2100)])
def test_silu_and_mul_equals_the_formula(backend, shape, dtype, device) -> None:
    x = randn(*shape, dtype=dtype, device=device)
    gate, up = x.double().chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    assert_close(backend.silu_and_mul(x), expected.to(dtype))


@by_backend("activation")
@BY_DTYPE
def test_sigmoid_mul_of_views_and_single_gates(backend, dtype, device) -> None:
    projected = randn(5, 3, 80, dtype=dtype, device=device)
    for x, gate in (
        (projected[..., :40], projected[..., 40:]),
        (projected[:, 0], projected[:, 1, :1]),
        (projected[:0, 0], projected[:0, 1]),
    ):
        expected = x.double() * gate.double().sigmoid()
        assert_close(backend.sigmoid_mul(x, gate), expected.to(dtype))
        opened = torch.nn.functional.silu(gate.double().expand(x.shape))
        assert_close(backend.silu_mul(x, gate.expand(x.shape)), (x * opened).to(dtype))


@by_backend("activation")
@BY_DTYPE
@pytest.mark.parametrize("shape", [(1, 2), (5, 600), (0, 16)])
def test_relu_squared_equals_the_formula(backend, shape, dtype, device) -> None:
    x = randn(*shape, dtype=dtype, device=device)
    assert_close(backend.relu_squared(x), x.double().relu().square().to(dtype))
    views = randn(6, 2, 5, dtype=dtype, device=device).transpose(0, 1)
    assert_close(backend.relu_squared(views), views.double().relu().square().to(dtype))


@BY_DTYPE
@pytest.mark.parametrize("size", [40, 97, 1024])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_reference_rows_are_independent_of_the_batch(size, dtype, num_threads) -> None:
    """Bits do not depend on the position: after the last full vector, or between threads."""
    norm, activation = kernels.norm.reference, kernels.activation.reference
    torch.set_num_threads(num_threads)
    x, gate = torch.randn(2, 300, 2 * size).to(dtype)
    weight = torch.randn(2 * size)
    for f in (
        lambda rows: activation.silu_and_mul(x[rows]),
        lambda rows: activation.sigmoid_mul(x[rows], gate[rows]),
        lambda rows: activation.silu_mul(x[rows], gate[rows]),
        lambda rows: norm.rms_norm(x[rows], weight, 1e-6),
        lambda rows: norm.gated_rms_norm(x[rows], weight, gate[rows], 1e-6),
        lambda rows: norm.gated_rms_norm(x[rows], weight, gate[rows], 1e-6, gate_first=True),
    ):
        batched = f(slice(None))
        for rows in (slice(0, 1), slice(3, 10), slice(7, 200), slice(299, 300)):
            assert torch.equal(f(rows), batched[rows])


@by_backend("cache_write")
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_cache_write_changes_only_its_rows(backend, index_dtype, device) -> None:
    storage = randn(20, 2, 3, 24, dtype=torch.bfloat16, device=device)
    key_pool, value_pool = storage[:, 0], storage[:, 1]
    expected = storage.clone()
    projected = randn(6, 8, 24, dtype=torch.bfloat16, device=device)
    key, value = projected[:, 1:4], projected[:, 5:]
    indices = torch.randperm(20)[:6].to(device)
    backend.write_kv(key, value, key_pool, value_pool, indices.to(index_dtype))
    expected[indices, 0], expected[indices, 1] = key, value
    assert torch.equal(storage, expected)
    rows, pool = projected[:, 0], storage[:, 0, 2]
    backend.write_rows(rows, pool, indices.to(index_dtype))
    expected[indices, 0, 2] = rows
    assert torch.equal(storage, expected)
