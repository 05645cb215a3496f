"""Kernels on views of an arena: bits equal those on separate pools, and no other byte changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels.attention.reference
import kernels.cache_write.reference
import kernels.conv1d.reference
import kernels.gdn.reference
import kernels.mamba2.reference
import kernels.state_copy.reference
from kernels.attention.sequences import Sequences
from kernels.packed import Exports, Packed
from tests.kernels.arena import Arena, Sizes, make_arena

pytest.importorskip("triton")
import kernels.attention.fused
import kernels.cache_write.fused
import kernels.conv1d.fused
import kernels.gdn.fused
import kernels.kda.fused
import kernels.mamba2.fused
import kernels.mla.fused
import kernels.state_copy.fused

SIZES = Sizes(kv=(3, 2, 32), conv=(2, 24, 3), recurrent=(2, 2, 16, 16))
NAMES = ("attention", "cache_write", "conv1d", "gdn", "mamba2", "state_copy")
BACKENDS = pytest.mark.parametrize(
    "backend",
    [
        SimpleNamespace(**{name: vars(getattr(kernels, name))[kind] for name in NAMES})
        for kind in ("reference", "fused")
    ],
    ids=["reference", "fused"],
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
STATE_DTYPES = pytest.mark.parametrize(
    "state_dtype", [torch.float32, torch.bfloat16], ids=["s32", "s16"]
)
FAR = 2**31
"""Smallest offset that does not fit into 32 bits."""


def int32(values: Sequence[int], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def check_same_on_pools(
    arena: Arena, views: Sequence[torch.Tensor], action: Callable[..., torch.Tensor]
) -> None:
    """Check that ``action`` gives equal results on views of the arena and on copies of them."""
    before = arena.rows.clone()
    pools = [view.clone(memory_format=torch.contiguous_format) for view in views]
    expected = action(*pools)
    got = action(*views)
    assert got.isfinite().all() and torch.equal(got, expected)
    after = arena.rows.clone()
    arena.rows.copy_(before)
    for view, pool in zip(views, pools, strict=True):
        view.copy_(pool)
    assert torch.equal(arena.rows, after)


def decode_and_prefill(backend, keys, values, rows, device) -> torch.Tensor:
    """Write the KV of two sequences in all layers and return the attention over it."""
    torch.manual_seed(0)
    lengths = [len(own) for own in rows]
    table = torch.zeros(2, max(lengths), dtype=torch.int32, device=device)
    for i, own in enumerate(rows):
        table[i, : len(own)] = int32(own, device)
    where = {
        "table": table,
        "sequences": Sequences.of([0, 1], lengths, device),
        "scale": keys.shape[-1] ** -0.5,
    }
    packed, indices = Packed.from_lengths(lengths, device), int32([*chain(*rows)], device)
    outs = []
    for key_pool, value_pool in zip(keys, values, strict=True):
        shape = (sum(lengths), *key_pool.shape[1:])
        key, value = torch.randn(2, *shape, device=device).to(keys.dtype)
        query = torch.randn(shape[0], 2 * shape[1], shape[2], device=device).to(keys.dtype)
        backend.cache_write.write_kv(key, value, key_pool, value_pool, indices)
        prefill, decode = backend.attention.prefill_attention, backend.attention.decode_attention
        outs.append(prefill(query, key_pool, value_pool, packed=packed, **where))
        last = packed.cu_seqlens[1:].long() - 1
        outs.append(decode(query[last], key_pool, value_pool, **where))
    return torch.cat(outs)


@BACKENDS
@DTYPES
def test_attention_on_arena_rows(backend, dtype, device) -> None:
    arena = make_arena(30, dtype, torch.float32, device, SIZES)
    order = torch.randperm(len(arena.rows)).tolist()
    rows = [order[:70], list(range(80, 90))]
    rows[0] = [row for row in rows[0] if row not in rows[1]]
    check_same_on_pools(
        arena,
        (arena.keys, arena.values),
        lambda keys, values: decode_and_prefill(backend, keys, values, rows, device),
    )


def run_layers(backend, conv, recurrent, slots, device, dtype) -> torch.Tensor:
    """Run two prompts, one resumed and with an export, then decode, verify and copy.

    ``slots`` are those of the prompts, the exported state, its copy, and each step.
    """
    torch.manual_seed(1)
    (_, _, channels, reach), (layers, _, value_heads, key_dim, value_dim) = (
        conv.shape,
        recurrent.shape,
    )
    first, second, exported, free, *steps = slots
    packed = Packed.from_lengths([70, 3], device)
    verified = {
        "packed": Packed.from_lengths([2, 1], device),
        "slots": int32([first, second], device),
        "step_slots": int32(steps, device),
    }
    own = int32([first, second], device)
    where: dict[str, Any] = {
        "packed": packed,
        "slots": own,
        "resumed": torch.tensor([True, False], device=device),
        "exports": Exports.plan(packed, [(0, 64, exported)]),
    }
    outs = []
    for pool in (conv, recurrent):
        pool[:, first] = torch.randn(pool[:, first].shape, device=device).to(pool.dtype)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    for layer in range(layers):
        windows, states = conv[layer], recurrent[layer]
        taps, x = draw(channels, reach + 1), draw(73, channels)
        outs.append(backend.conv1d.prefill_conv1d(x, taps, None, states=windows, **where))
        outs.append(backend.conv1d.decode_conv1d(x[:2], taps, None, states=windows, slots=own))
        outs.append(backend.conv1d.decode_conv1d(x[:3], taps, None, states=windows, **verified))
        query, key = draw(2, 73, 1, key_dim)
        value, gate = draw(73, value_heads, value_dim), -torch.rand(73, value_heads, device=device)
        parameters = torch.randn(2, value_heads, device=device)
        outs.append(
            backend.gdn.chunk_gdn(query, key, value, gate, gate.exp(), states=states, **where)
        )
        mamba = (value, query, key)
        outs.append(
            backend.mamba2.chunk_mamba2(*mamba, gate, -gate, parameters[0], states=states, **where)
        )
        for count, step in ((2, {"slots": own}), (3, verified)):
            own_tokens = (*(x[:count] for x in mamba), gate[:count].to(dtype))
            outs.append(
                backend.mamba2.decode_mamba2(
                    *own_tokens, *parameters, parameters[0], states=states, **step
                )
            )
        tokens = (query, key, value, gate.to(dtype), gate.to(dtype))
        outs.append(
            backend.gdn.decode_gdn(*(x[:2] for x in tokens), *parameters, states=states, slots=own)
        )
        outs.append(
            backend.gdn.decode_gdn(*(x[:3] for x in tokens), *parameters, states=states, **verified)
        )
    backend.state_copy.copy_states(
        [conv, recurrent], int32([exported], device), int32([free], device)
    )
    return torch.cat([out.flatten() for out in outs])


@pytest.mark.full("s32-fp32-reference")
@BACKENDS
@DTYPES
@STATE_DTYPES
def test_states_on_arena_slots(backend, dtype, state_dtype, device) -> None:
    arena, slots = make_arena(9, dtype, state_dtype, device, SIZES), (4, 0, 3, 5, 8, 6, 7)
    check_same_on_pools(
        arena,
        (arena.conv, arena.recurrent),
        lambda conv, recurrent: run_layers(backend, conv, recurrent, slots, device, dtype),
    )


@BACKENDS
@settings(max_examples=10)
@given(
    order=st.permutations(range(30)),
    num_moved=st.integers(0, 15),
    width=st.sampled_from([1, 12, 96, 5000]),
    dtype=st.sampled_from([torch.uint8, torch.bfloat16, torch.float32]),
)
def test_move_rows_changes_only_the_targets(
    backend, order, num_moved, width, dtype, device
) -> None:
    """Sources and the gaps between rows keep their bytes."""
    bytes_ = torch.randint(256, (30, 2 * width, dtype.itemsize), dtype=torch.uint8, device=device)
    arena = bytes_.flatten(1).view(dtype)
    expected = arena.clone()
    sources, targets = order[:num_moved], order[num_moved : 2 * num_moved]
    expected[targets, :width] = expected[sources, :width]
    backend.cache_write.move_rows(arena[:, :width], int32(sources, device), int32(targets, device))
    assert torch.equal(arena.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.full("reference")
@BACKENDS
def test_offsets_past_32_bits(backend, device) -> None:
    """Only the last slabs of an arena of more than 2**31 elements are touched."""
    sizes = SIZES._replace(recurrent=(2, 4, 64, 64))
    slab_bytes = make_arena(1, torch.bfloat16, torch.bfloat16, "cpu", sizes).rows.numel()
    num_slabs = 2 * FAR // slab_bytes + 10
    far = make_arena(num_slabs, torch.bfloat16, torch.bfloat16, device, sizes, fill=None)
    near = make_arena(9, torch.bfloat16, torch.bfloat16, device, sizes, fill=0)
    last = num_slabs - 9
    assert last * far.conv.stride(1) >= FAR
    results = []
    for arena, first in ((far, last), (near, 0)):
        count = arena.slab_rows
        row = first * count
        rows = [list(range(row, row + 70)), list(range(row + 80, row + 70, -1))]
        attended = decode_and_prefill(backend, arena.keys, arena.values, rows, device)
        slots = range(first + 2, first + 9)
        scanned = run_layers(backend, arena.conv, arena.recurrent, slots, device, torch.bfloat16)
        sources = torch.arange(row, row + 70, dtype=torch.int32, device=device)
        backend.cache_write.move_rows(arena.rows, sources, sources + count)
        copied = int32([first + 3], device), int32([first + 4], device)
        backend.state_copy.copy_states([arena.slabs], *copied)
        results.append((attended, scanned, arena.rows[row:].clone()))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours.view(torch.uint8), expected.view(torch.uint8))


def test_non_contiguous_rows_and_slots_are_refused(device) -> None:
    """Only the kernels refuse them; the references accept any strides."""
    pool = torch.zeros(6, 4, 8, device=device).mT
    wide = torch.zeros(6, 8, 9, device=device)[..., :4]
    states = torch.zeros(3, 2, 16, 32, device=device)[..., ::2]
    new, index = torch.zeros(1, 8, 4, device=device), int32([0], device)
    token, value = torch.zeros(2, 1, 2, 16, device=device)
    gates = torch.zeros(4, 1, 2, device=device)
    x, taps = torch.zeros(1, 8, device=device), torch.zeros(8, 5, device=device)
    where = {"packed": Packed.from_lengths([1], device), "slots": index, "exports": None}
    where["resumed"] = index > 0
    write, move = kernels.cache_write.fused.write_kv, kernels.cache_write.fused.move_rows
    conv1d, gdn, mamba2 = kernels.conv1d.fused, kernels.gdn.fused, kernels.mamba2.fused
    kda = kernels.kda.fused
    three = (value, token, token)
    rates = torch.zeros(2, 2, 16, device=device)
    latents = {"table": index[None], "sequences": Sequences.of([0], [1], device), "scale": 1.0}
    latents["rank"] = 8
    calls = [
        lambda: write(new, new, pool, pool, index),
        lambda: write(new, new, torch.zeros(6, 8, 4, device=device), wide, index),
        lambda: move(pool[0], index, index),
        lambda: conv1d.prefill_conv1d(x, taps, None, states=pool, **where),
        lambda: conv1d.decode_conv1d(x, taps, None, states=pool, slots=index),
        lambda: gdn.chunk_gdn(token, token, value, *gates[:2], states=states, **where),
        lambda: gdn.decode_gdn(token, token, value, *gates, states=states, slots=index),
        lambda: mamba2.chunk_mamba2(*three, *gates[:2], gates[0, 0], states=states, **where),
        lambda: mamba2.decode_mamba2(*three, *gates, states=states, slots=index),
        lambda: kda.chunk_kda(token, token, value, value, gates[0], states=states, **where),
        lambda: kda.decode_kda(
            token, token, value, value, gates[0], gates[1], rates[0], states=states, slots=index
        ),
        lambda: kernels.mla.fused.decode_mla(states[:1, 0, :12, :12], wide[:, 0].mT, **latents),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="must be contiguous"):
            call()
