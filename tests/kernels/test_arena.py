"""Kernels on views of an arena: bits equal those on separate pools, and no other byte changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
from tests.kernels import test_scan
from tests.kernels.arena import Arena, Sizes, make_arena
from tests.kernels.compiled import BY_DTYPE, int32
from tests.kernels.test_scan import STATE_DTYPES, Scan, Step

pytest.importorskip("triton")
import kernels.attention.fused
import kernels.cache_write.fused
import kernels.conv1d.fused
import kernels.gdn.fused
import kernels.kda.fused
import kernels.mamba2.fused
import kernels.mla.fused
import kernels.state_copy.fused
from tests.refused import refused

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
FAR = 2**31
"""Smallest offset that does not fit into 32 bits."""


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
@BY_DTYPE
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
    layers, _, channels, reach = conv.shape
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
        for module in (backend.gdn, backend.mamba2):
            scan, sizes = Scan(module, device), test_scan.Sizes(1, *recurrent.shape[2:])
            prompt, pair = scan.draw(73, sizes, dtype), (first, second)
            export = [(0, 64, exported)]
            outs.append(scan.chunk(prompt, [70, 3], states, pair, export, [True, False]))
            step = scan.draw_steps(3, sizes, dtype)
            two = Step([part[:2] for part in step.tokens], step.parameters)
            outs.append(scan.decode(two, states, pair))
            outs.append(scan.verify(step)(*step.tokens, states=states, **verified))
    backend.state_copy.copy_states(
        [conv, recurrent], int32([exported], device), int32([free], device)
    )
    return torch.cat([out.flatten() for out in outs])


@pytest.mark.full("s32-fp32-reference")
@BACKENDS
@BY_DTYPE
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
    x, taps = torch.zeros(1, 8, device=device), torch.zeros(8, 5, device=device)
    where = {"packed": Packed.from_lengths([1], device), "slots": index, "exports": None}
    where["resumed"] = index > 0
    write, move = kernels.cache_write.fused.write_kv, kernels.cache_write.fused.move_rows
    conv1d = kernels.conv1d.fused
    latents = {"table": index[None], "sequences": Sequences.of([0], [1], device), "scale": 1.0}
    latents["rank"] = 8
    calls = [
        lambda: write(new, new, pool, pool, index),
        lambda: write(new, new, torch.zeros(6, 8, 4, device=device), wide, index),
        lambda: move(pool[0], index, index),
        lambda: conv1d.prefill_conv1d(x, taps, None, states=pool, **where),
        lambda: conv1d.decode_conv1d(x, taps, None, states=pool, slots=index),
        lambda: kernels.mla.fused.decode_mla(states[:1, 0, :12, :12], wide[:, 0].mT, **latents),
    ]
    for module in (kernels.gdn.fused, kernels.kda.fused, kernels.mamba2.fused):
        scan, sizes = Scan(module, device), test_scan.Sizes(1, 2, 16, 16)
        prompt, step = (draw(1, sizes, torch.float32) for draw in (scan.draw, scan.draw_steps))
        calls.append(partial(scan.chunk, prompt, [1], states, [0]))
        calls.append(partial(scan.decode, step, states, [0]))
    for call in calls:
        refused("must be contiguous", call)
