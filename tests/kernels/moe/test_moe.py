"""Mixture of experts: routing with ties, grouped products, and independence of the batch."""

from __future__ import annotations

import os
from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.linear.formats import Format, Matrix, Plain
from kernels.linear.reference import quantize
from kernels.moe import reference
from tests.kernels.compiled import BY_DTYPE, assert_close, by_backend

fused = pytest.importorskip("kernels.moe.fused")
norms = pytest.importorskip("kernels.norm.fused")
BACKENDS = by_backend("moe")


def layer(
    num_tokens, num_experts, hidden, inner, dtype, device, seed=0, gated=True
) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = {
        "hidden": (num_tokens, hidden),
        "logits": (num_tokens, num_experts),
        "w13": (num_experts, (1 + gated) * inner, hidden),
        "w2": (num_experts, hidden, inner),
    }
    return {
        name: (torch.randn(shape) * (0.3 if name[0] == "w" else 1)).to(dtype).to(device)
        for name, shape in shapes.items()
    }


def formula(hidden, weights, experts, w13, w2, shared_gate=None) -> torch.Tensor:
    """Compute the output token by token in float64."""
    if shared_gate is not None:
        weights = torch.cat([weights.double(), shared_gate.double().sigmoid()], dim=1)
        shared = torch.full_like(experts[:, :1], len(w13) - 1)
        experts = torch.cat([experts, shared], dim=1)
    out = torch.zeros_like(hidden, dtype=torch.float64)
    for t, (row, chosen) in enumerate(zip(weights.double(), experts.long(), strict=True)):
        for weight, expert in zip(row, chosen, strict=True):
            inner = w13[expert].double() @ hidden[t].double()
            if len(inner) == w2.shape[2]:
                inner = inner.relu().square()
            else:
                gate, up = inner.chunk(2)
                inner = torch.nn.functional.silu(gate) * up
            out[t] += weight * (w2[expert].double() @ inner)
    return out.to(hidden.dtype)


@BACKENDS
@BY_DTYPE
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (20, 1), (20, 3), (33, 4)])
def test_route_selects_the_most_probable_experts(
    backend, num_experts, k, renormalise, dtype, device
) -> None:
    """The lower index wins a tie."""
    logits = torch.randn(12, num_experts + 1).to(dtype).to(device)[:, :num_experts]
    logits[9], logits[10:] = 1.0, torch.randint(2, (2, num_experts), device=device).to(dtype)
    weights, experts = backend.route(logits, k, renormalise)
    expected, order = logits.float().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    expected = expected[:, :k] / (expected[:, :k].sum(dim=-1, keepdim=True) if renormalise else 1)
    assert experts.dtype == torch.int32
    assert torch.equal(experts.long(), order[:, :k])
    assert_close(weights, expected)


@BACKENDS
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("renormalise", [True, False])
def test_route_sigmoid_uses_the_bias_only_to_select(backend, renormalise, has_bias, device) -> None:
    """Scores may be negative, and the lower index wins a tie."""
    torch.manual_seed(4)
    logits, bias = torch.randn(9, 21).to(device)[:, :20], torch.randn(20).to(device)
    logits[0], bias[3:6] = 1.0, -2.0
    bias[7:9] = 0.5
    selection_bias = bias if has_bias else None
    weights, experts = backend.route_sigmoid(
        logits, selection_bias, 3, renormalise, scale=2.5, eps=1e-6
    )
    scores = logits.double().sigmoid()
    order = (logits.sigmoid() + (bias if has_bias else 0)).sort(descending=True, stable=True)[1]
    expected = scores.gather(1, order[:, :3])
    if renormalise:
        expected /= expected.sum(dim=-1, keepdim=True) + 1e-6
    assert experts.dtype == torch.int32
    assert torch.equal(experts.long(), order[:, :3])
    assert_close(weights, (2.5 * expected).float())
    for count in (0, 1, 4):
        part = backend.route_sigmoid(
            logits[:count], selection_bias, 3, renormalise, scale=2.5, eps=1e-6
        )
        assert torch.equal(part[0], weights[:count])


@BACKENDS
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
def test_nan_and_infinite_logits_give_valid_experts(backend, bad, device) -> None:
    """An index in the padding of 20 experts to 32 would read outside the weights."""
    logits = torch.randn(6, 20)
    logits[1], logits[2, 3], logits[3, ::2], logits[4, -1] = bad, bad, bad, bad
    _, experts = backend.route(logits.to(device), 4, True)
    assert ((experts >= 0) & (experts < 20)).all()
    _, experts = backend.route_sigmoid(logits.to(device), torch.zeros(20, device=device), 4, True)
    assert ((experts >= 0) & (experts < 20)).all()


@BACKENDS
@BY_DTYPE
@settings(max_examples=4)
@given(
    num_tokens=st.sampled_from([0, 1, 5, 30]),
    num_experts=st.sampled_from([3, 8]),
    sizes=st.sampled_from([(32, 16), (40, 70)]),
    gated=st.booleans(),
    seed=st.integers(0, 9),
)
def test_experts_equal_the_formula(
    backend, dtype, num_tokens, num_experts, sizes, gated, seed, device
) -> None:
    case = layer(num_tokens, num_experts, *sizes, dtype, device, seed, gated)
    weights, experts = reference.route(case["logits"], 2, True)
    arguments = (case["hidden"], weights, experts, case["w13"], case["w2"])
    assert_close(backend.experts(*arguments), formula(*arguments), factor=2)
    prepared = backend.prepare(case["w13"], case["w2"])
    assert_close(prepared(*arguments[:3]), formula(*arguments), factor=2)
    up, down = (
        Matrix(Plain(dtype), {"weight": case[name]}, case[name].shape[2]) for name in ("w13", "w2")
    )
    of_products = Format.experts(up.format, backend, up, down, dtype)
    assert_close(of_products(*arguments[:3]), formula(*arguments), factor=2)


@pytest.mark.full("2-True-fp8 blocks-reference")
@BACKENDS
@pytest.mark.parametrize("format", ["int8", "fp8", "fp8 blocks"])
@pytest.mark.parametrize(("num_tokens", "gated"), [(2, True), (30, True), (30, False)])
def test_8_bit_experts_equal_the_formula(backend, format, num_tokens, gated, device) -> None:
    kind, *blocks = format.split()
    sizes = (160, 140) if blocks else (32, 24)
    case = layer(num_tokens, 4, *sizes, torch.float32, device, gated=gated)
    weights, experts = reference.route(case["logits"], 2, True)
    parts, widened = [], []
    for w in (case["w13"], case["w2"]):
        quantized, scale = quantize(w, kind)
        each = scale[..., None]
        if blocks:
            scale = torch.rand(*w.shape[:2], 2, device=device) / 448
            each = scale.repeat_interleave(128, dim=2)[..., : w.shape[2]]
        parts += [quantized, scale]
        widened.append(quantized.float() * each)
    routed = case["hidden"], weights, experts
    if blocks:
        out = backend.prepare_8bit(*parts, torch.float32)(*routed)
    else:  # Prepared products of int8 may round activations.
        out = backend.experts_8bit(*routed, *parts)
    assert_close(out, formula(*routed, *widened), factor=2)


@BACKENDS
@BY_DTYPE
@pytest.mark.parametrize("format", [None, "int8"])
@pytest.mark.parametrize("num_tokens", [0, 1, 16, 17, 40])
def test_the_last_expert_can_be_shared(backend, dtype, format, num_tokens, device) -> None:
    """It is computed for all tokens, whose results do not depend on the batch."""
    if format and dtype == torch.bfloat16:
        pytest.skip("the interpreter converts int8 to bfloat16 by its bits")
    case = layer(num_tokens, 6, 48, 40, dtype, device)
    scores = case["logits"]
    if format is None:
        run = backend.prepare(case["w13"], case["w2"])
        w13, w2 = case["w13"], case["w2"]
    else:
        eight_bit = [part for name in ("w13", "w2") for part in quantize(case[name], format)]
        names = "w13", "w13_scale", "w2", "w2_scale"
        run = partial(backend.experts_8bit, **dict(zip(names, eight_bit, strict=True)))
        w13, w2 = (eight_bit[i].float() * eight_bit[i + 1][..., None] for i in (0, 2))

    def output(rows: slice) -> torch.Tensor:
        routed = backend.route(scores[rows, :5], 3, True)
        return run(case["hidden"][rows], *routed, shared_gate=scores[rows, 5:])

    weights, experts = reference.route(scores[:, :5], 3, True)
    whole = output(slice(None))
    expected = formula(case["hidden"], weights, experts, w13, w2, scores[:, 5:])
    assert_close(whole, expected, factor=2)
    for first, last in ((0, 1), (3, 5), (7, 31)):
        assert torch.equal(output(slice(first, last)), whole[first:last])


@pytest.mark.full
@settings(max_examples=24)
@given(
    num_tokens=st.integers(17, 60),
    k=st.integers(1, 3),
    num_experts=st.sampled_from([3, 5, 16]),
    part=st.sampled_from([4, 8, 128]),
    is_routed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_have_each_pair_once(
    num_tokens, k, num_experts, part, is_routed, seed, device
) -> None:
    """Pairs are sorted by expert and token and padded to whole blocks, with any number of counting
    parts, or in the launch of routing."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    experts = scores.topk(k, dim=-1).indices.int().to(device)
    with patch.object(fused, "PART", part):
        blocks = fused.make_blocks(experts, num_experts)
    if is_routed:  # Padding is not routed; counts are zero again afterwards.
        live = (scores[:, 0] > 0.1).to(device)
        prepared = fused.prepare(*(torch.empty(num_experts, 2, 2, device=device) for _ in range(2)))
        prepared.route(scores.to(device), k, True, live=live)
        _, (experts, blocks) = prepared.route(scores.to(device), k, True, live=live)
        assert torch.equal(experts, fused.route(scores.to(device), k, True, live)[1])
    count = int(blocks.count)
    assert count <= blocks.num_blocks
    pairs = blocks.pairs[: count * blocks.rows].view(count, blocks.rows).tolist()
    flat = experts.flatten().tolist()
    num_pairs = len(flat)
    for rows, expert in zip(pairs, blocks.experts[:count].tolist(), strict=True):
        real_pairs = [pair for pair in rows if pair < num_pairs]
        assert rows == real_pairs + [num_pairs] * (blocks.rows - len(real_pairs))
        assert {flat[pair] for pair in real_pairs} == {expert}
    real_pairs = [pair for rows in pairs for pair in rows if pair < num_pairs]
    expected = [pair for pair in range(num_pairs) if flat[pair] != reference.NO_EXPERT]
    assert real_pairs == sorted(expected, key=lambda pair: (flat[pair], pair))


@pytest.mark.gpu
@pytest.mark.parametrize("format", [None, "int8", "fp8", "fp8 rows"])
def test_row_count_changes_no_bit(format, device) -> None:
    """The counts cover blocks of 1, 16, 32 and 64 rows at the sizes of a large model."""
    if device != "cuda":
        pytest.skip("the test is for tensor cores")
    inputs = layer(1024, 32, 2048, 512, torch.bfloat16, device)
    hidden, logits = inputs.pop("hidden"), inputs.pop("logits")
    weights, experts = fused.route(logits, 10, True)
    if format is None:
        product = fused.prepare(**inputs)
    else:
        kind, *rows = format.split()
        eight_bit = [part for w in inputs.values() for part in fused.quantize_experts(w, kind)]
        product = fused.prepare_8bit(*eight_bit, torch.bfloat16, fp8_rows=bool(rows))
    whole = product(hidden, weights, experts)
    counts = (1, 4, 16, 17, 40, 64, 100, 128, 200, 300)
    most = 128 if format == "fp8 rows" else 64
    found = {fused.make_blocks(experts[:n], 32, most).rows for n in counts}
    assert found == {16, 32, 64, 128} - ({128} if most == 64 else set())
    for n in counts:
        assert torch.equal(product(hidden[:n], weights[:n], experts[:n]), whole[:n]), n


@pytest.mark.full("3-True", "40-False")
@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize("num_tokens", [3, 40, 100])
def test_fp8_rows_equal_the_reference_in_any_batch(num_tokens, in_blocks, device) -> None:
    """Blocks of 128 rows are used for 100 tokens of two experts."""
    inputs = layer(num_tokens, 3, 136, 20, torch.float32, device)
    weights, experts = reference.route(inputs["logits"][:, :2], 2, True)
    parts = []
    for w in (inputs["w13"], inputs["w2"]):
        quantized, scale = reference.quantize_experts(w, "fp8")
        if in_blocks:
            scale = scale[..., None] * torch.tensor([1.0, 0.5], device=device)
            scale = scale[..., : -(-w.shape[2] // 128)].contiguous()
        parts += [quantized, scale]
    if in_blocks:
        parts[3] = parts[3].squeeze(-1)  # A row has one block.
    shared_gate = inputs["logits"][:, 2:]
    expected = reference.experts_8bit(
        inputs["hidden"], weights, experts, *parts, shared_gate, fp8_rows=True
    )
    product = fused.prepare_8bit(*parts, torch.float32, fp8_rows=True)
    out = product(inputs["hidden"], weights, experts, shared_gate=shared_gate)
    # One rounding to the next fp8 number in the middle is 1/16 of an element. Hopper's tensor cores
    # keep about 13 bits of a sum of fp8 products, so more elements are rounded in another way.
    assert (out - expected).norm() < (2e-3 if device == "cpu" else 1e-2) * expected.norm()
    if num_tokens < 100:
        full = fused.experts_8bit(inputs["hidden"], weights, experts, *parts, shared_gate)
        assert 1e-3 * full.norm() < (out - full).norm() < 0.1 * full.norm()
    for rows in (slice(0, 1), slice(1, 3), slice(0, 17)):
        own = (x[rows] for x in (inputs["hidden"], weights, experts))
        assert torch.equal(product(*own, shared_gate=shared_gate[rows]), out[rows])


@BY_DTYPE
@pytest.mark.parametrize("has_shared", [False, True])
def test_a_norm_adds_up_experts_with_the_bits_of_their_sum(has_shared, dtype, device) -> None:
    """Rows after those of tokens are zero, and so are tokens without experts."""
    case = layer(5, 4, 128, 16, dtype, device)
    live = torch.tensor([1, 1, 0, 1, 1], device=device)
    routed = fused.route(case["logits"][:, :3], 2, True, live)
    gate = case["logits"][:, 3:] if has_shared else None
    prepared = fused.prepare(case["w13"], case["w2"])
    sums = prepared.sums(case["hidden"], *routed, gate)._replace(num_rows=8)
    weight, residual = torch.rand(128, device=device), torch.randn(8, 128, device=device).to(dtype)
    whole = sums.sum()
    assert torch.equal(whole[:5], prepared(case["hidden"], *routed, gate)) and not whole[5:].any()
    for norm in (norms.rms_norm, norms.rms_norm_rows):
        (got, total), (expected, added) = (
            norm(x, weight, 1e-6, residual=residual) for x in (sums, whole)
        )
        assert torch.equal(total, added)
        for name in ("x", "rows", "scale") if norm is norms.rms_norm_rows else ("data",):
            assert torch.equal(getattr(got, name).float(), getattr(expected, name).float())


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Addresses of the elements of every load."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs the Triton interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    found: list[torch.Tensor] = []
    load = InterpreterBuilder.create_masked_load

    def recording(builder, pointers, mask, *rest):
        found.append(torch.from_numpy(pointers.data[mask.data].astype("int64")))
        return load(builder, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", recording)
    return found


@pytest.mark.full("40-21-False", "16-9-True", "3-0-False")
@pytest.mark.parametrize("has_shared", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_live"), [(4, 3), (16, 9), (40, 21), (80, 65), (3, 0)])
def test_padding_rows_read_no_expert(num_tokens, num_live, has_shared, device, addresses) -> None:
    """Padding rows have logits of experts 6 and 7, which no token selects."""
    inputs = layer(num_tokens, 9, 32, 16, torch.float32, device)
    logits, hidden, gate = inputs["logits"][:, :8], inputs["hidden"], inputs["logits"][:, 8:]
    logits[:num_live, 6:], logits[num_live:, 6:] = -50.0, 50.0
    live = torch.arange(num_tokens, device=device) < num_live
    weights = [inputs["w13"], inputs["w2"]]
    shared = {"shared_gate": gate} if has_shared else {}
    for name in ("route", "route_sigmoid"):
        bias = (torch.zeros(8, device=device),) if name == "route_sigmoid" else ()
        routed = getattr(fused, name)(logits, *bias, 2, True, live=live.long())
        expected = getattr(reference, name)(logits, *bias, 2, True, live=live.long())
        assert torch.equal(routed[1], expected[1])
        assert (routed[1][num_live:] == reference.NO_EXPERT).all()
        addresses.clear()
        out = fused.experts(hidden, *routed, *weights, **shared)
        used = set(routed[1][:num_live].flatten().tolist()) | ({8} if has_shared else set())
        for weight in weights:
            ranks = (torch.cat(addresses) - weight.data_ptr()) // weight[0].nbytes
            assert set(ranks[(ranks >= 0) & (ranks < len(weight))].tolist()) == used
        plain = reference.experts(hidden, *expected, *weights, **shared)
        torch.testing.assert_close(out, plain)
        if not has_shared:
            assert not out[num_live:].any() and not plain[num_live:].any()
        own = (x[:num_live] for x in (hidden, *routed))
        own_shared = {name: x[:num_live] for name, x in shared.items()}
        assert torch.equal(out[:num_live], fused.experts(*own, *weights, **own_shared))


def test_blocks_of_fp8_rows_have_little_padding() -> None:
    """Rows of work, with padding, for experts with 80 and 160 rows: 8,192 and 16,384 pairs of 512
    experts are the prefill of 4,096 and 8,192 tokens of Qwen3-Next. A block of 128 rows would be
    filled to 62 %."""
    padded = {}
    for mean in (1, 16, 20, 40, 80, 128, 160):
        rows = fused.rows_per_block(mean, fused.MOST_FP8_ROWS)
        padded[mean] = rows, -(-mean // rows) * rows
    assert padded == {
        1: (16, 16), 16: (16, 16), 20: (32, 32), 40: (64, 64), 80: (32, 96), 128: (128, 128),
        160: (64, 192),
    }  # fmt: skip
