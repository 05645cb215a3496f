"""Tests of copies of rows between tiers, compared with copies of one row at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.plugins.tiers import tier_copies
from engine.plugins.tiers.tier_copies import BLOCK_BYTES, MIN_RUN_BYTES, TierCopier, copy_rows
from hybridcache.tokens import Indices

ROWS = 4000
Order = Callable[[np.random.Generator, int], Indices]


def at_random(draw: np.random.Generator, count: int) -> Indices:
    return draw.permutation(ROWS)[:count].astype(np.int32)


def consecutive(draw: np.random.Generator, count: int) -> Indices:
    first = int(draw.integers(0, ROWS - count + 1))
    return np.arange(first, first + count, dtype=np.int32)


def descending(draw: np.random.Generator, count: int) -> Indices:
    return consecutive(draw, count)[::-1].copy()


def in_runs(draw: np.random.Generator, count: int) -> Indices:
    """Return rows in runs of seventeen, at random places."""
    places = draw.permutation(ROWS // 17)[: -(-count // 17)]
    return (places[:, None] * 17 + np.arange(17)).reshape(-1)[:count].astype(np.int32)


ORDERS = (at_random, consecutive, descending, in_runs)


@given(
    st.integers(0, 2**32),
    st.sampled_from([1, 7, 640, 4096]),
    st.integers(0, ROWS // 2),
    st.sampled_from(ORDERS),
    st.sampled_from(ORDERS),
)
def test_copies_equal_those_of_one_row_at_a_time(
    seed: int, row_bytes: int, count: int, src_order: Order, dst_order: Order
) -> None:
    draw = np.random.default_rng(seed)
    rows = draw.integers(0, 256, (ROWS, row_bytes), np.uint8)
    found = np.zeros_like(rows)
    expected = found.copy()
    src, dst = src_order(draw, count), dst_order(draw, count)
    for origin, place in zip(src.tolist(), dst.tolist(), strict=True):
        expected[place] = rows[origin]
    copy_rows(found, dst, rows, src)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("row_bytes", [640, MIN_RUN_BYTES, BLOCK_BYTES + 64])
def test_rows_of_any_size_are_copied_in_runs_and_singly(row_bytes: int) -> None:
    """Cover several blocks, and rows larger than one."""
    draw, num_rows = np.random.default_rng(row_bytes), max(8, 3 * BLOCK_BYTES // row_bytes)
    rows = draw.integers(0, 256, (num_rows, row_bytes), np.uint8)
    for src in (np.arange(num_rows), draw.permutation(num_rows)):
        found = np.zeros_like(rows)
        copy_rows(found, np.arange(num_rows, dtype=np.int32), rows, src.astype(np.int32))
        assert np.array_equal(found, rows[src])
        assert np.array_equal(tier_copies._gathered(rows, src.astype(np.int32)), rows[src])


def stub_device(module: MagicMock, is_locked: bool) -> SimpleNamespace:
    """Return a device whose streams are those of ``module``."""
    return SimpleNamespace(
        is_cpu=False,
        module=module,
        register=lambda host: is_locked,
        synchronize=lambda: None,
    )


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter")
@pytest.mark.parametrize(
    "is_locked, src, is_gathered",
    [
        (True, range(0, 160, 2), True),
        (True, range(80), False),
        (False, range(0, 160, 2), False),
    ],
)
def test_scattered_rows_of_locked_memory_are_gathered_by_a_kernel(
    is_locked: bool, src: range, is_gathered: bool
) -> None:
    fused = pytest.importorskip("kernels.cache_write.fused")
    device = stub_device(MagicMock(stream=lambda stream: nullcontext()), is_locked)
    with (
        patch.object(fused, "gather_rows", wraps=fused.gather_rows) as gather,
        patch.object(torch.Tensor, "record_stream", lambda x, stream: None),
    ):
        memory = SimpleNamespace(slab_rows=1)
        copier = TierCopier(torch.zeros(4, 640, dtype=torch.uint8), memory, device, 200, None)
        copier.host.copy_(torch.randint(256, copier.host.shape))
        gather.reset_mock()
        taken = copier._load(np.array(src, dtype=np.int32))
    assert torch.equal(taken, copier.host[list(src)])
    assert gather.called == is_gathered


def test_loads_do_not_wait_for_the_current_step() -> None:
    """The memory belongs to the side stream, and only the reader waits for the copy."""
    main, active, allocated_on = MagicMock(), [], []

    @contextmanager
    def use(stream):
        active.append(stream)
        yield
        active.pop()

    def allocate(*shape, **options):
        allocated_on.append(active[-1] if active else main)
        return empty(*shape, **options)

    module = MagicMock(stream=use, current_stream=lambda: active[-1] if active else main)
    device = stub_device(module, is_locked=False)
    empty = torch.empty
    with patch.object(torch.Tensor, "record_stream", lambda x, stream: None):
        memory = SimpleNamespace(slab_rows=1)
        copier = TierCopier(torch.zeros(4, 64, dtype=torch.uint8), memory, device, 20, None)
        side = copier._stream
        side.reset_mock()
        main.reset_mock()
        with patch.object(torch, "empty", allocate):
            copier._load(np.arange(3, dtype=np.int32))
    assert allocated_on == [side]
    side.wait_stream.assert_not_called()
    main.wait_stream.assert_called_once_with(side)
