"""Tests of copies of rows between tiers, compared with copies of one row at a time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.plugins.tiers import tier_copies
from engine.plugins.tiers.tier_copies import BLOCK_BYTES, KEPT, MIN_RUN_BYTES, TierCopier, copy_rows
from engine.runner.device import HostCopy
from hybridcache.allocators.moves import DEVICE, DISK, HOST, Copy, Indices
from hybridcache.radix.tokens import EMPTY

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
        is_cpu=False, module=module, register=lambda host: is_locked, synchronize=lambda: None
    )


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter")
@pytest.mark.parametrize(
    "is_locked, src, is_gathered",
    [(True, range(0, 160, 2), True), (True, range(80), False), (False, range(0, 160, 2), False)],
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


class Streams(TorchDispatchMode):
    """Accesses of the host and of two streams, with the device's tensors on torch's meta device.

    Raises if an access is not ordered after an earlier one that writes the same memory or whose
    memory it writes: by a wait, an event, or because the host submitted it after its own access.
    Memory that another stream allocated must be kept by `record_stream`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current, self.num_waits, self.alive = "main", 0, []
        self.seen = {name: Counter() for name in ("host", "main", "side")}
        """Number of accesses of each, which precede the next one of this."""
        self.accesses, self.owners, self.foreign, self.kept = {}, {}, set(), set()
        streams = {name: SimpleNamespace(name=name) for name in ("main", "side")}
        for name, stream in streams.items():
            stream.wait_stream = lambda other, name=name: self.follow(name, self.seen[other.name])
            stream.synchronize = lambda name=name: self.wait(self.seen[name])
        self.module = SimpleNamespace(
            Stream=lambda: streams["side"],
            current_stream=lambda: streams[self.current],
            stream=self.use,
            Event=self.event,
        )

    def follow(self, name: str, earlier: Counter[str]) -> None:
        self.seen[name] |= earlier

    def wait(self, earlier: Counter[str]) -> None:
        self.num_waits += 1
        self.follow("host", earlier)

    def event(self) -> SimpleNamespace:
        earlier = Counter()
        return SimpleNamespace(
            record=lambda: earlier.update(self.seen[self.current]),
            synchronize=lambda: self.wait(earlier),
        )

    @contextmanager
    def use(self, stream):
        self.current, before = stream.name, self.current
        yield
        self.current = before

    def access(self, name: str, tensor: torch.Tensor, *, writes: bool) -> None:
        self.alive.append(tensor)  # Another storage must not get its address.
        storage = tensor.untyped_storage()._cdata
        self.follow(name, self.seen["host"])
        past = self.accesses.setdefault(storage, {})
        for (other, wrote), number in past.items():
            is_ordered = self.seen[name][other] >= number or other == name
            assert is_ordered or not (wrote or writes), f"{name} does not wait for {other}"
        self.seen[name][name] += 1
        past[name, writes] = self.seen[name][name]
        if name not in ("host", self.owners.get(storage, name)):
            self.foreign.add((storage, name))

    def keep(self, tensor: torch.Tensor, stream: SimpleNamespace) -> None:
        self.kept.add((tensor.untyped_storage()._cdata, stream.name))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        is_copy = (
            function is torch.ops.aten.copy_.default
        )  # Torch refuses those of the meta device.
        out = args[0] if is_copy else function(*args, **(kwargs or {}))
        if function.is_view or all(x.device.type == "cpu" for x in (*given, out)):
            return out
        if all(out.untyped_storage()._cdata != x.untyped_storage()._cdata for x in given):
            self.owners[out.untyped_storage()._cdata] = self.current
            self.alive.append(out)
        for x in given:
            if x is not out:
                self.access(self.current, x, writes=False)
        self.access(self.current, out, writes=True)
        return out


def test_every_access_to_rows_follows_those_it_depends_on() -> None:
    """Random loads, offloads and copies to disk between steps. The engine's thread waits only for
    data that it reads or writes itself."""
    order, draw, waits = Streams(), np.random.default_rng(5), Counter()
    empty, copy, wait, futures = torch.empty, copy_rows, HostCopy.wait, []

    def copied(to, dst, rows, src):
        for array, writes in ((rows, False), (to, True)):
            if array.ctypes.data == copier.host.data_ptr():
                order.access("host", copier.host, writes=writes)
        copy(to, dst, rows, src)

    def waited(self):
        for x in wait(self):
            order.access("host", x, writes=False)
        return [torch.zeros(1)]

    disk = SimpleNamespace(
        load=lambda rows: [(0, np.zeros((len(rows), 64), np.uint8))],
        offload=lambda kind, path, rows, read: futures.append(read(0, len(rows))),
        write_through=lambda kind, path, count, read: futures.append(read(0, count)),
    )
    with (
        patch.object(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k)),
        patch.object(torch, "get_device_module", lambda device: order.module),
        patch.object(torch.Tensor, "record_stream", lambda *given: order.keep(*given)),
        patch.object(tier_copies, "copy_rows", copied),
        patch.object(HostCopy, "wait", waited),
        patch.object(TierCopier, "_measure", lambda self: 1.0),
        order,
    ):
        rows = torch.zeros(40, 64, dtype=torch.uint8, device="meta")
        device = stub_device(order.module, is_locked=False)
        copier = TierCopier(rows, SimpleNamespace(slab_rows=4), device, 40, disk)
        pairs = [(DEVICE, HOST), (HOST, DEVICE), (DEVICE, DISK), (HOST, DISK), (DISK, HOST)]
        pairs += [(DISK, DEVICE), (DEVICE, KEPT), (HOST, KEPT)]
        for _ in range(100):
            tiers = pairs[draw.integers(len(pairs))]
            src, dst = (draw.permutation(40)[:5].astype(np.int32) for _ in tiers)
            before = order.num_waits
            copier.make(Copy("kv", tiers[0], src, tiers[1], dst, 5, ((), EMPTY)))
            waits[tiers] += order.num_waits - before
            assert order.foreign <= order.kept, "memory is reused while the other stream reads it"
            rows.add_(1)  # A step reads and writes the arena.
            if len(futures) > draw.integers(4):
                futures.pop(0)()
    assert waits.keys() == set(pairs)
    assert {pair for pair in pairs if waits[pair]} == {(HOST, DISK), (DISK, HOST), (HOST, KEPT)}
