"""Memory of the runner: KV rows, states, the table of the rows of each running request, and the
copies of rows and states before and after each step.

Allocators assign rows and slots. This module does not use the assignment.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from engine.interfaces import TierCopies
from engine.layers.rank import Rank
from engine.runner.backends import Kernels
from engine.runner.device import Device
from engine.weights.model_config import ModelError
from hybridcache.allocators.arena import slab_rows
from hybridcache.allocators.moves import Move, Transfer
from hybridcache.geometry.checkpoints import CheckpointFormat, aligned
from hybridcache.geometry.sizes import KVSpec, ModelSizes, Spec
from hybridcache.geometry.units import GIB
from hybridcache.scheduling.memory import SLOTS_OF_ONE, MemorySizes
from kernels.state_copy.reference import Form
from kernels.upload import upload

STAGING_BYTES = GIB
"""Memory for states that prefills export, until they are narrowed. At least one state fits. A step
that exports more states is computed in pieces."""
CODES = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Checkpoints with fewer bits than running states (``--checkpoint-dtype``).

    States are narrowed when they are saved and widened when they are restored. Running states then
    have separate slots outside the cache's memory, one per row of the request table, and the
    cache's slots hold checkpoints only. The bytes of a slot are: the conv states unchanged, the
    codes of all recurrent states, and their scales.
    """

    slots: torch.Tensor
    """uint8 ``[S + 1, slot bytes]``, rows of any stride; the last row is for padding."""
    states: tuple[tuple[torch.Tensor, bool], ...]
    """Running states ``[L, own slots, ...]``, each with True if they are recurrent."""
    format: CheckpointFormat
    staging: range
    """Own slots for states that a prefill exports, until they are saved."""

    def save(self, copies: Sequence[tuple[int, int]], kernel: ModuleType) -> None:
        """Narrow states into checkpoints with a ``state_copy`` kernel: (own slot, checkpoint
        slot)."""
        if copies:
            sources, targets = self._indices(copies)
            for pool, form in self._forms():
                kernel.narrow_states(pool, sources, self.slots, targets, form)

    def restore(self, copies: Sequence[tuple[int, int]], kernel: ModuleType) -> None:
        """Widen checkpoints into running states with a ``state_copy`` kernel: (checkpoint slot, own
        slot)."""
        if copies:
            sources, targets = self._indices(copies)
            for pool, form in self._forms():
                kernel.widen_states(self.slots, sources, pool, targets, form)

    def _forms(self) -> Iterator[tuple[torch.Tensor, Form]]:
        """Yield the layout of each pool's states in a slot: conv states unchanged, codes of
        recurrent ones, then their scales."""
        sizes = [pool[:, 0].numel() for pool, _ in self.states]
        kinds = [is_recurrent for _, is_recurrent in self.states]
        codes, first = CODES[self.format.dtype], 0
        conv_bytes = sum(
            size * pool.element_size()
            for size, (pool, is_recurrent) in zip(sizes, self.states, strict=True)
            if not is_recurrent
        )
        first_code = aligned(conv_bytes)
        num_codes = sum(itertools.compress(sizes, kinds))
        first_scale = first_code + aligned(num_codes * codes.itemsize)
        for size, (pool, is_recurrent) in zip(sizes, self.states, strict=True):
            if not is_recurrent:
                yield pool, Form(pool.dtype, None, first, 0)
                first += size * pool.element_size()
                continue
            dims = None if self.format.per is None else self._dims(pool)
            yield pool, Form(codes, dims, first_code, first_scale)
            first_code += size * codes.itemsize
            if dims is not None:
                scaled = math.prod(n for d, n in enumerate(pool.shape[2:], 2) if d in dims)
                first_scale += 4 * len(pool) * scaled

    def _dims(self, pool: torch.Tensor) -> tuple[int, ...]:
        """Return the dimensions of states ``[N, L, ...]`` along which scales differ."""
        return (0, 1, *(2 + dim for dim in self.format.kept_dims(pool.dim() - 2)))

    def _indices(self, copies: Sequence[tuple[int, int]]) -> torch.Tensor:
        pairs = np.array(copies, dtype=np.int64).T.copy()
        return upload(pairs, torch.int64, self.slots.device)


CPU_SHARE = 0.25
CPU_MAX_BYTES = 4 * GIB
ACCELERATOR_SHARE = 0.9
"""Share of the memory that remains after weights, graphs and the largest step. The rest is for
sampling and fragmentation."""
MIN_KV_TOKENS = 256
MIN_SLOTS = 2
"""Minimum number of slots in a pool: one for a running request and one for a checkpoint."""


class MemoryPlan(MemorySizes):
    """``MemorySizes`` that fit on a device. One more row and slot are allocated for padding."""

    __slots__ = ()

    @classmethod
    def fit(
        cls,
        sizes: ModelSizes,
        dtype: torch.dtype,
        device: Device,
        *,
        kv_bytes: int | None,
        state_bytes: int | None,
        cache_bytes: int | None,
        page_size: int = 1,
        state_dtype: torch.dtype = torch.float32,
        reserved_bytes: int = 0,
        checkpoints: CheckpointFormat | None = None,
        num_ranks: int = 1,
    ) -> MemoryPlan:
        """Return the sizes for one rank; the given bytes are for all ``num_ranks``.

        The memory is one arena of ``cache_bytes``, or two pools if bytes are given for one of them.
        The other pool then has its given bytes, or half the default. The default on a CPU is a
        quarter of the memory that is free after ``reserved_bytes``, at most 4 GiB, and on other
        devices 90 % of it. Raises ModelError with the number of bytes that are needed.
        """
        row = kv_row_bytes(sizes, dtype)
        state = state_slot_bytes(sizes, dtype, state_dtype, checkpoints)
        owns = checkpoints is not None and state > 0
        if not row:
            raise ModelError("a model without a single attention layer is not supported.")
        kv_bytes, state_bytes, cache_bytes = (
            None if given is None else given // num_ranks
            for given in (kv_bytes, state_bytes, cache_bytes)
        )
        if kv_bytes is None and state_bytes is None:
            if cache_bytes is None:
                cache_bytes = default_cache_bytes(device, reserved_bytes, num_ranks)
            return replace(cls._arena(cache_bytes, row, state, page_size), owns_states=owns)
        if kv_bytes is None or (state_bytes is None and state):
            other = default_cache_bytes(device, reserved_bytes, num_ranks) // (2 if state else 1)
            kv_bytes = other if kv_bytes is None else kv_bytes
            state_bytes = other if state_bytes is None else state_bytes
        plan = cls._pools(kv_bytes, state_bytes or 0, row, state, page_size)
        return replace(plan, owns_states=owns)

    def agreed(self, rank: Rank, device: Device) -> MemoryPlan:
        """Return sizes that fit on every rank: those of the rank with the least memory."""
        if rank.group is None:
            return self
        own = [self.num_kv_tokens, self.num_slots]
        counts = torch.tensor(own, dtype=torch.int64, device=device.torch_device)
        tokens, slots = torch.stack(rank.group.gather(counts)).amin(0).tolist()
        return replace(self, num_kv_tokens=tokens, num_slots=slots)

    @classmethod
    def _arena(cls, num_bytes: int, row: int, state: int, page_size: int) -> MemoryPlan:
        slab = slab_rows(state, row, page_size) if state else 0
        num_rows = num_bytes // row // page_size * page_size
        least = MIN_KV_TOKENS + SLOTS_OF_ONE * slab
        if num_rows < least:
            states = f" and {SLOTS_OF_ONE} states" if state else ""
            raise ModelError(
                f"{_gib(num_bytes)} hold {num_rows} tokens of this model; at least {MIN_KV_TOKENS} "
                f"tokens{states}, {_gib(least * row)}, are needed."
            )
        return cls("arena", num_rows, num_rows // slab if slab else 0, row, state, page_size)

    @classmethod
    def _pools(
        cls, kv_bytes: int, state_bytes: int, row: int, state: int, page_size: int
    ) -> MemoryPlan:
        num_rows = kv_bytes // row // page_size * page_size
        num_slots = state_bytes // state if state else 0
        if num_rows < MIN_KV_TOKENS:
            raise ModelError(
                f"{_gib(kv_bytes)} for KV hold {num_rows} tokens of this model; "
                f"at least {MIN_KV_TOKENS} tokens, {_gib(MIN_KV_TOKENS * row)}, are needed."
            )
        if state and num_slots < MIN_SLOTS:
            raise ModelError(
                f"{_gib(state_bytes)} for states hold {num_slots} of this model's; "
                f"at least {MIN_SLOTS}, {_gib(MIN_SLOTS * state)}, are needed."
            )
        return cls("pools", num_rows, num_slots, row, state, page_size)

    @classmethod
    def smallest(
        cls,
        sizes: ModelSizes,
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        checkpoints: CheckpointFormat | None = None,
    ) -> MemoryPlan:
        """Return the smallest sizes on which steps can be rehearsed."""
        row = kv_row_bytes(sizes, dtype)
        state = state_slot_bytes(sizes, dtype, state_dtype, checkpoints)
        slab = slab_rows(state, row) if state else 0
        plan = cls._arena((MIN_KV_TOKENS + SLOTS_OF_ONE * slab) * row, row, state, 1)
        return replace(plan, owns_states=checkpoints is not None and state > 0)


def kv_row_bytes(sizes: ModelSizes, dtype: torch.dtype) -> int:
    """Return the bytes of one token in all layers."""
    return aligned(sizes.row_size * dtype.itemsize)


def state_slot_bytes(
    sizes: ModelSizes,
    dtype: torch.dtype,
    state_dtype: torch.dtype = torch.float32,
    checkpoints: CheckpointFormat | None = None,
) -> int:
    """Return the bytes of one sequence's conv and recurrent states in all layers, or of a
    checkpoint in the format ``checkpoints``. 0 for an attention-only model."""
    num_conv, num_recurrent = sizes.state_size("conv"), sizes.state_size("recurrent")
    if checkpoints is not None:
        return checkpoints.num_bytes(sizes, num_conv * dtype.itemsize)
    return aligned(num_conv * dtype.itemsize) + aligned(num_recurrent * state_dtype.itemsize)


def default_cache_bytes(device: Device, reserved_bytes: int = 0, num_ranks: int = 1) -> int:
    """Return the default size of the memory for KV and states. Ranks share a CPU; other devices
    belong to one rank."""
    if device.is_cpu:
        free_bytes = device.free_bytes() - reserved_bytes
        return min(int(free_bytes * CPU_SHARE), CPU_MAX_BYTES) // num_ranks
    return max(0, int((device.unused_bytes() - reserved_bytes) * ACCELERATOR_SHARE))


Pools = tuple[torch.Tensor, ...]
"""Tensors that one mixer declares, in its order: KV ``[N, ...]`` by row, states ``[S, ...]`` by
slot."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Tensors of a ``MemoryPlan``.

    The padding row and the padding slot share no byte with an allocated row or slot, nor with each
    other.
    """

    pools: tuple[Pools, ...]
    """Pools of each mixer."""
    padding_row: int
    padding_slot: int | None
    """Slot for padding, or None for an attention-only model."""
    step_slots: range
    """Slots outside the plan, for the states after each token of a verification."""
    states: Pools
    """All bytes of all states, as few tensors ``[L, S, ...]`` for copies of whole states; one
    tensor in an arena."""
    rows: torch.Tensor | None
    """Rows of an arena as uint8 ``[N, row_bytes]``, for moves. None for two pools, in which rows do
    not move."""
    checkpoints: Checkpoints | None = None
    """Checkpoints in a separate format, or None if checkpoints are stored like any other state."""

    @property
    def padding_checkpoint(self) -> int | None:
        """Slot for checkpoints that are not needed."""
        return self.padding_slot if self.checkpoints is None else len(self.checkpoints.slots) - 1

    @classmethod
    def allocate(
        cls,
        plan: MemorySizes,
        keeps: Sequence[tuple[Spec, ...]],
        dtype: torch.dtype,
        state_dtype: torch.dtype,
        device: Device,
        *,
        num_step_states: int = 0,
        num_scratch_rows: int = 0,
        checkpoints: CheckpointFormat | None = None,
        num_own_states: int = 0,
        num_staged: int = 0,
    ) -> Memory:
        """Allocate zeros for mixers that declare ``keeps``.

        There is room for the states of ``num_step_states`` verified tokens, and for
        ``num_scratch_rows`` after the padding row. With ``checkpoints`` in a separate format,
        ``num_own_states`` running states and ``num_staged`` exported ones are allocated next to
        them. Raises ModelError if there is not enough memory.
        """
        kept = [
            [_Kept(spec, state_dtype if _kind(spec) == "recurrent" else dtype) for spec in specs]
            for specs in keeps
        ]
        make = _allocate_arena if plan.memory == "arena" else _allocate_pools
        if checkpoints is None or not plan.owns_states:
            return make(plan, kept, device, num_step_states, num_scratch_rows)
        cached = make(plan, _part(kept, of_tokens=True), device, 0, num_scratch_rows)
        own = _allocate_pools(
            replace(plan, num_slots=num_own_states),
            _part(kept, of_tokens=False),
            device,
            num_step_states + num_staged,
            0,
        )
        slots = cached.states[0][0] if cached.states else None
        if slots is None:
            slots = allocate((plan.num_slots + 1, plan.state_bytes), torch.uint8, device)
        kinds = [_kind(one.spec) for one in dict.fromkeys(k for mixer in kept for k in mixer)]
        recurrent = [kind == "recurrent" for kind in kinds if kind != "kv"]
        steps = own.step_slots
        return Memory(
            tuple(
                _in_order(mixer, *both)
                for mixer, *both in zip(kept, cached.pools, own.pools, strict=True)
            ),
            cached.padding_row,
            own.padding_slot,
            steps[:num_step_states],
            own.states,
            cached.rows,
            Checkpoints(
                slots,
                tuple(zip(own.states, recurrent, strict=True)),
                checkpoints,
                steps[num_step_states:],
            ),
        )


@dataclass(frozen=True, slots=True)
class _Kept:
    """One declared tensor of a mixer, with its dtype."""

    spec: Spec
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes for one token or sequence."""
        return self.spec.size * self.dtype.itemsize


def _part(mixers: Sequence[Sequence[_Kept]], *, of_tokens: bool) -> list[list[_Kept]]:
    """Select the tensors that mixers declare per token, or per sequence."""
    return [[k for k in mixer if isinstance(k.spec, KVSpec) == of_tokens] for mixer in mixers]


def _in_order(mixer: Sequence[_Kept], of_tokens: Pools, of_sequences: Pools) -> Pools:
    parts = {True: iter(of_tokens), False: iter(of_sequences)}
    return tuple(next(parts[isinstance(kept.spec, KVSpec)]) for kept in mixer)


def _kind(spec: Spec) -> str:
    return "kv" if isinstance(spec, KVSpec) else spec.dtype


def _allocate_pools(
    plan: MemorySizes,
    mixers: Sequence[Sequence[_Kept]],
    device: Device,
    num_step_states: int,
    num_scratch_rows: int,
) -> Memory:
    """Allocate pools. Tensors of one name, shape and dtype are adjacent, so that few tensors hold
    all states."""
    groups = Counter(kept for mixer in mixers for kept in mixer)
    num_rows = plan.num_kv_tokens + 1 + num_scratch_rows
    units = {True: num_rows, False: plan.num_slots + 1 + num_step_states}
    made = {
        kept: allocate(
            (count, units[isinstance(kept.spec, KVSpec)], *kept.spec.shape), kept.dtype, device
        )
        for kept, count in groups.items()
    }
    layers = {kept: iter(tensor) for kept, tensor in made.items()}
    pools = tuple(tuple(next(layers[kept]) for kept in mixer) for mixer in mixers)
    states = tuple(tensor for kept, tensor in made.items() if not isinstance(kept.spec, KVSpec))
    if not states:
        return Memory(pools, plan.num_kv_tokens, None, range(0), (), None)
    first = plan.num_slots + 1
    steps = range(first, first + num_step_states)
    return Memory(pools, plan.num_kv_tokens, plan.num_slots, steps, states, None)


def _allocate_arena(
    plan: MemorySizes,
    mixers: Sequence[Sequence[_Kept]],
    device: Device,
    num_step_states: int,
    num_scratch_rows: int,
) -> Memory:
    """Allocate an arena: all rows, then padding and step slots, then scratch rows.

    After the last row, the first whole slab is the padding slot, followed by the step slots, the
    padding row and the scratch rows. In a slot, all conv states come first.
    """
    slab, row_bytes = plan.slab_rows, plan.row_bytes
    padding_slot = -(-plan.num_kv_tokens // slab) if slab else 0
    num_slots = padding_slot + 1 + num_step_states
    padding_row = num_slots * slab if slab else plan.num_kv_tokens
    rows = allocate((padding_row + 1 + num_scratch_rows, row_bytes), torch.uint8, device)
    sizes = Counter[str]()
    for kept in (kept for mixer in mixers for kept in mixer):
        sizes[_kind(kept.spec)] += kept.num_bytes
    place = {"kv": 0, "conv": 0, "recurrent": aligned(sizes["conv"])}

    def view(kept: _Kept) -> torch.Tensor:
        kind = _kind(kept.spec)
        first = place[kind]
        place[kind] += kept.num_bytes
        unit, count = (row_bytes, len(rows)) if kind == "kv" else (plan.slot_bytes, num_slots)
        return _view(rows, kept.dtype, (count, *kept.spec.shape), unit, first)

    pools = tuple(tuple(view(kept) for kept in mixer) for mixer in mixers)
    if not slab:
        return Memory(pools, padding_row, None, range(0), (), rows)
    states = _view(rows, torch.uint8, (num_slots, plan.state_bytes), plan.slot_bytes)[None]
    steps = range(padding_slot + 1, num_slots)
    return Memory(pools, padding_row, padding_slot, steps, (states,), rows)


def _view(
    rows: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    unit_bytes: int,
    first_byte: int = 0,
) -> torch.Tensor:
    """Return a view ``[units, ...]`` of an arena, starting at ``first_byte`` of every unit (a row
    or a slab)."""
    inner = [math.prod(shape[i + 1 :]) for i in range(1, len(shape))]
    strides = (unit_bytes // dtype.itemsize, *inner)
    return rows.flatten().view(dtype).as_strided(shape, strides, first_byte // dtype.itemsize)


class RequestTable:
    """KV indices of every running request: int32 ``[rows, max_model_len]``, on the host and on the
    device."""

    def __init__(self, num_rows: int, max_model_len: int, padding_index: int, device: Device):
        host = allocate((num_rows + 1, max_model_len), torch.int32, Device.resolve("cpu"))
        self.host: npt.NDArray[np.int32] = host.numpy()
        self.host[num_rows] = padding_index
        self.padding_row = num_rows
        self._is_shared = device.is_cpu
        self.device = host if self._is_shared else host.to(device.torch_device)

    def write(self, writes: Sequence[tuple[int, int, npt.NDArray[np.int32]]]) -> None:
        """Write KV indices at (row, start). One copy to the device per write."""
        for row, start, indices in writes:
            end = start + len(indices)
            self.host[row, start:end] = indices
            if not self._is_shared:
                self.device[row, start:end] = upload(indices, torch.int32, self.device.device)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: Device) -> torch.Tensor:
    """Allocate zeros. On a CPU, pages take memory only when they are written. Raises ModelError if
    there is not enough memory."""
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        if not device.is_cpu:
            return torch.zeros(shape, dtype=dtype, device=device.torch_device)
        untouched = np.zeros(num_bytes, dtype=np.uint8)
    except (MemoryError, torch.OutOfMemoryError):
        raise ModelError(
            f"{_gib(num_bytes)} cannot be allocated on {device.torch_device} "
            f"({_gib(device.free_bytes())} are free): lower --cache-gib, --host-gib or "
            "--max-running."
        ) from None
    return torch.from_numpy(untouched).view(dtype).view(shape)


def _gib(num_bytes: int) -> str:
    gib = num_bytes / GIB
    return f"{gib:.3g} GiB" if gib < 1000 else f"{gib:,.0f} GiB"


class RunningStates:
    """Own slots and step slots of running sequences. Works on integers; the caller makes the
    copies.

    A verification writes the state after each of its tokens into a step slot. The accepted state
    stays there: it is displaced. The sequence's next verification reads it from there, and uses the
    own slot, which is then unused, as one of its step slots. So a step needs one step slot for each
    verified token, however many states are displaced. Before any other operation the state is
    copied back to the sequence's own slot.
    """

    def __init__(self, step_slots: Sequence[int]) -> None:
        self._step_slots = frozenset(step_slots)
        self._free = list(reversed(step_slots))
        self._displaced: dict[int, int] = {}
        """Step slot of each displaced state, by the sequence's own slot."""
        self._verified: list[tuple[int, list[int]]] = []
        """Own slot and step slots of each sequence in the last verification."""

    def at(self, slot: int) -> int:
        """Return the slot with the newest state of the sequence with this own slot."""
        return self._displaced.get(slot, slot)

    @property
    def step_slots(self) -> list[list[int]]:
        """Slots of the states after each token, for each sequence of the last verification."""
        return [slots for _, slots in self._verified]

    def displaced(self, but: Collection[int] = ()) -> list[tuple[int, int]]:
        """Return (step slot, own slot) of the displaced states that must be copied back.

        Sequences in ``but`` and those being verified are left out. Call ``mark_returned`` after the
        copies.
        """
        if not self._displaced:
            return []
        stay = {*but, *(own for own, _ in self._verified)}
        return [(step, own) for own, step in self._displaced.items() if own not in stay]

    def mark_returned(self, copied: Sequence[tuple[int, int]]) -> None:
        """Record that the copies returned by ``displaced`` were made."""
        for step, own in copied:
            del self._displaced[own]
            self._free.append(step)

    def drop_verified(self) -> None:
        """Drop the states of the last verification, if its step failed before the commit."""
        for own, slots in self._verified:
            self._free += [slot for slot in slots if slot != own]
            if own in self._displaced:
                self._free.append(self._displaced.pop(own))
        self._verified = []

    def verify(self, sequences: Sequence[tuple[int, int]]) -> None:
        """Assign ``step_slots`` to each of these (own slot, number of tokens).

        No other state is displaced. Raises AssertionError if there are more tokens than step
        slots.
        """
        for own, count in sequences:
            last = [own] if own in self._displaced else []
            first = len(self._free) - count + len(last)
            assert first >= 0, "more tokens to verify than were planned"
            self._verified.append((own, self._free[first:][::-1] + last))
            del self._free[first:]

    def take(self, counts: Sequence[int]) -> None:
        """Accept the given number of tokens of each verified sequence. With 0 its state is
        unchanged."""
        for (own, slots), count in zip(self._verified, counts, strict=True):
            if count:
                before, taken = self._displaced.pop(own, None), slots.pop(count - 1)
                if taken != own:
                    self._displaced[own] = taken
                if before is not None:
                    self._free.append(before)
            self._free += [slot for slot in slots if slot != own]
        self._verified = []

    def check(self) -> None:
        """Raise AssertionError unless every step slot is free, holds the state of one sequence, or
        is assigned to one token."""
        given = [slot for own, slots in self._verified for slot in slots if slot != own]
        held = [*self._free, *self._displaced.values(), *given]
        assert len(held) == len(self._step_slots) and set(held) == self._step_slots
        assert not self._step_slots & set(self._displaced), "a step slot is used as an own slot"


class Copies:
    """Executes copies of rows and states, in the order of the device's operations."""

    def __init__(self, tensors: Memory, kernels: Kernels, device: Device) -> None:
        self.copier: TierCopies | None = None
        """Executes transfers between tiers; None if there is only the device."""
        self._tensors, self._device = tensors, device.torch_device
        self._cache_write, self._state_copy = kernels["cache_write"], kernels["state_copy"]

    def move(self, transfers: Sequence[Transfer]) -> None:
        """Execute ``transfers`` one after the other, because one may read rows that another
        wrote."""
        for transfer in transfers:
            if not isinstance(transfer, Move):
                assert self.copier is not None, "there is no tier outside the device"
                self.copier.make(transfer)
                continue
            rows = self._tensors.rows
            assert rows is not None, "rows of a pool do not move"
            pairs = np.stack([transfer.src, transfer.dst])
            sources, targets = upload(pairs, torch.int32, self._device)
            self._cache_write.move_rows(rows, sources, targets)

    def restore(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy checkpoints to running states: (checkpoint slot, own slot)."""
        if self._tensors.checkpoints is None:
            self.copy_states(copies)
        else:
            self._tensors.checkpoints.restore(copies, self._state_copy)

    def save(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy states to checkpoints: (slot of a state, checkpoint slot)."""
        if self._tensors.checkpoints is None:
            self.copy_states(copies)
        else:
            self._tensors.checkpoints.save(copies, self._state_copy)

    def return_states(self, running: RunningStates, but: Collection[int] = ()) -> None:
        """Copy displaced states back to their own slots, except those of the own slots ``but``."""
        if displaced := running.displaced(but):
            self.copy_states(displaced)
            running.mark_returned(displaced)

    def copy_states(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy states: (slot of a state, target slot)."""
        if not copies or not self._tensors.states:
            return
        pairs = np.array(copies, dtype=np.int32).T.copy()
        sources, targets = upload(pairs, torch.int32, self._device)
        self._state_copy.copy_states(self._tensors.states, sources, targets)
