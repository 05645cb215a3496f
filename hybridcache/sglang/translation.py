"""Translation between SGLang's and this project's settings, keys, metrics, allocators and states.

Types excepted, nothing here imports SGLang.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from hybridcache.allocators.moves import DEVICE, Copy, Indices, Transfer
from hybridcache.allocators.pools import BaseAllocator, PageAllocator, SlotAllocator
from hybridcache.policies.registry import DEFAULT_EVICTION, EVICTION_NAMES
from hybridcache.radix.api import Losses, PrefixMatch, Resumable, losses_of
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.tokens import Tokens

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.mamba import MambaSlotAllocator
    from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

# --- Settings -----------------------------------------------------------------------------------

PLAIN_LRU = "plain-lru"
"""Least recently used, under a name that is never SGLang's default."""
ADDED_EVICTION = ("survival", PLAIN_LRU)
"""Values added to ``--radix-eviction-policy``."""


def eviction_name(asked: str, is_explicit: bool | None = None) -> str:
    """Translate a value of ``--radix-eviction-policy`` into this project's policy name.

    ``is_explicit`` is False if nobody set it: SGLang's default is ``lru``, and for some models
    ``priority``. None if SGLang does not record that (0.5.22): then ``lru`` is its default.

    >>> [eviction_name(asked) for asked in ("lru", "plain-lru", "gdsf")]
    ['survival', 'lru', 'gdsf']
    >>> eviction_name("lru", is_explicit=True), eviction_name("priority", is_explicit=False)
    ('lru', 'survival')
    """
    defaults = {None: ("lru",), False: ("lru", "priority"), True: ()}[is_explicit]
    if asked in defaults:
        return DEFAULT_EVICTION
    return "lru" if asked == PLAIN_LRU else asked


def chosen_eviction(ctx: TreeCacheBuildContext, memory: Any) -> str:
    """Return the policy name of SGLang's settings."""
    is_explicit = getattr(memory, "_radix_eviction_policy_explicitly_set", None)
    return eviction_name(ctx.params.eviction_policy, is_explicit)


def why_not(
    ctx: TreeCacheBuildContext, memory: Any, disagg: Any, parallel: Any, spec: Any
) -> str | None:
    """Return a message for the first unsupported setting of SGLang's build context and of its other
    settings, or None if all are supported."""
    params = ctx.params
    has_windows = ctx.is_hybrid_swa or params.sliding_window_size is not None
    tiered, is_drafted = ctx.enable_hierarchical_cache, spec.speculative_algorithm is not None
    is_node = disagg.disaggregation_mode != "null"
    is_known = chosen_eviction(ctx, memory) in EVICTION_NAMES
    refused = {
        "models with sliding windows": has_windows,
        "--hicache-storage-backend": tiered and memory.hicache_storage_backend is not None,
        "--enable-hierarchical-cache on attention-only models": tiered and not ctx.is_hybrid_ssm,
        "--enable-hierarchical-cache with --pp-size > 1": tiered and params.pp_size > 1,
        "--enable-hierarchical-cache with --speculative-algorithm": tiered and is_drafted,
        "--disaggregation-mode with --speculative-algorithm": is_node and is_drafted,
        "--enable-hierarchical-cache with --disaggregation-mode decode": tiered
        and disagg.disaggregation_mode == "decode",
        "LMCache": memory.enable_lmcache,
        "FlexKV": memory.enable_flexkv,
        "--enable-unified-memory": memory.enable_unified_memory,
        "decode context parallelism": parallel.dcp_enabled,
        "--speculative-algorithm EAGLE on attention-only models": params.is_eagle
        and not ctx.is_hybrid_ssm,
        f"eviction policy {params.eviction_policy} (known: survival, lru)": not is_known,
    }
    for what, is_set in refused.items():
        if is_set:
            backend = "--radix-cache-backend hybridcache"
            return f"hybridcache does not support {what}: drop it, or {backend}"
    return None


# --- Keys ---------------------------------------------------------------------------------------

MAX_TOKEN = 2**31 - 1
NO_TOKEN = -1
"""Pseudo-token that equals no cached token. Appended if the next token of a key is unknown."""


def namespace_of(extra_key: str | None, cache_salt: str | None) -> Hashable:
    """Return the namespace of an adapter and a salt. Different ones share no prefixes."""
    return None if extra_key is None and cache_salt is None else (extra_key, cache_salt)


class TokenWords:
    """Tokens of SGLang's keys, int64, as the tree's, int32.

    SGLang replaces the placeholders of an image by ids above ``MAX_TOKEN`` that are made of the
    image's hash. Each of them gets a negative number of its own here, so that different images
    never share a prefix. A number is never reused.

    >>> words = TokenWords()
    >>> words.of(array("q", [7, 2**61, 2**61, 2**60]), 4).tolist()
    [7, -3, -3, -2]
    """

    def __init__(self, limit: int = 1 << 16) -> None:
        """Remember the ``limit`` most recent ids: SGLang makes four of each image. An id that
        returns later gets another number, so that its cached prefixes are not found."""
        self._limit = limit
        self._words: dict[int, int] = {}
        """Numbers by id, the least recently used first."""
        self._ids: dict[int, int] = {}
        self._next = NO_TOKEN - 1

    def of(self, ids: array[int], num_tokens: int) -> Tokens:
        """Return the first ``num_tokens`` of ``ids`` (int64) as int32[n]. O(n), and O(n log n) with
        images."""
        wide = np.frombuffer(ids, np.int64)[:num_tokens]
        narrow = wide.astype(np.int32)
        if len(wide) and wide.max() > MAX_TOKEN:
            places = np.flatnonzero(wide > MAX_TOKEN)
            distinct, numbers = np.unique(wide[places], return_inverse=True)
            words = [self._word(one) for one in distinct.tolist()]
            narrow[places] = np.array(words, np.int32)[numbers]
        return narrow

    def _word(self, token: int) -> int:
        word = self._words.pop(token, self._next)
        self._words[token] = word
        if word == self._next:
            self._next -= 1
            self._ids[word] = token
            if len(self._words) > self._limit:
                del self._ids[self._words.pop(next(iter(self._words)))]
        return word

    def prompt_of(self, key: RadixKey) -> Tokens:
        """Return the prompt of ``key``: its reusable tokens and the token after them. O(n)."""
        num_tokens = len(key)
        tokens = self.of(key.token_ids, num_tokens + 1)
        if len(tokens) > num_tokens:
            return tokens
        return np.append(tokens, np.int32(NO_TOKEN))

    def ids_of(self, tokens: Tokens) -> array[int]:
        """Return the ids of ``tokens``, int32[n], for events. O(n)."""
        wide = tokens.astype(np.int64)
        for word in np.unique(wide[wide < NO_TOKEN]).tolist():
            wide[wide == word] = self._ids.get(word, word)
        ids = array("q")
        ids.frombytes(wide.tobytes())
        return ids


# --- Placement ----------------------------------------------------------------------------------


EVERY_VARIABLE = "HYBRIDCACHE_SGLANG_EVERY"
"""Environment variable with the distance of stable positions in tokens; see ``branch_position``."""
STATES_VARIABLE = "HYBRIDCACHE_SGLANG_STATE_EVENTS"
"""Environment variable with 1 if KV events also report states, in vLLM's form."""
BOUNDARIES = "hybridcache_boundaries"
"""Key of a request's ``custom_params``: lengths that later prompts are known to share."""


def read_every(text: str | None) -> int | None:
    """Return the value of ``EVERY_VARIABLE``, or None if it is not set. Raises ValueError unless it
    is an integer above 0.

    >>> read_every(None), read_every("2048")
    (None, 2048)
    """
    if not text:
        return None
    if not text.isdecimal() or not int(text):
        raise ValueError(f"{EVERY_VARIABLE} must be an integer above 0 (got {text!r}).")
    return int(text)


def boundaries_of(req: Req | None) -> tuple[int, ...]:
    """Return the boundaries that a request declares. Values that are no positions are ignored."""
    params = None if req is None else req.sampling_params
    declared = (getattr(params, "custom_params", None) or {}).get(BOUNDARIES)
    listed = declared if isinstance(declared, list | tuple) else ()
    return tuple(one for one in listed if type(one) is int and one > 0)


def branch_position(
    prompt: Tokens,
    match: PrefixMatch,
    grid: int,
    boundaries: Sequence[int] = (),
    every: int | None = None,
) -> int | None:
    """Return the position of a shared prefix to save a state at, or None to save at the extend's
    end.

    An SGLang prefill saves one state: at its last grid position, counted from its start, or at the
    position returned by ``match_prefix`` (``mamba_branching_seqlen``) if that is inside the extend.
    The first of these that is behind ``match.cached_len`` is taken:

    - the fork: where ``prompt`` diverges from earlier prompts, ghosts included;
    - the deepest declared boundary;
    - the deepest multiple of ``every``, if that is set: a threshold that does not move with the
      lengths of the prompts.

    All are rounded down to a multiple of ``grid`` from ``cached_len``, as SGLang's kernels require.
    """
    cached_len, last = match.cached_len, len(prompt) - 1
    fork = min(match.seen_len, last) if match.forks else 0
    declared = max((one for one in boundaries if one <= last), default=0)
    for position in (fork, declared, last // every * every if every else 0):
        floored = position - (position - cached_len) % grid
        if floored > cached_len:
            return floored
    return None


# --- Metrics ------------------------------------------------------------------------------------


class LossMeter:
    """Counters of reused and lost tokens. ``grid`` is the distance of a prefill's states."""

    def __init__(self, grid: int, labels: Mapping[str, object]) -> None:
        from prometheus_client import Counter

        self._grid, names = grid, list(labels)
        self._cached = Counter(
            "hybridcache:cached_tokens", "Prompt tokens reused from the cache.", names
        ).labels(**labels)
        lost = Counter(
            "hybridcache:lost_tokens", "Prompt tokens not reused, by cause.", [*names, "cause"]
        )
        self._lost = {cause: lost.labels(**labels, cause=cause) for cause in Losses._fields}

    def record(self, match: PrefixMatch) -> None:
        """Count a request that has computed its first chunk."""
        lost = match.losses._asdict()
        # The tree's own grid is 1.
        below = min(match.losses.never_checkpointed, match.kv_match_len % self._grid)
        lost["never_checkpointed"] -= below
        lost["below_grid"] += below
        self._cached.inc(match.cached_len)
        for cause, tokens in lost.items():
            self._lost[cause].inc(tokens)


# --- Allocators ---------------------------------------------------------------------------------
#
# SGLang owns the free lists. Its indices are int64 tensors on the device; ours are int32 arrays on
# the host. Evicted rows are collected and freed in one call, because each free copies SGLang's
# whole free list.


class Counts(BaseAllocator):
    """Counts of an allocator of SGLang."""

    _theirs: BaseTokenToKVPoolAllocator | MambaSlotAllocator
    _num_owed = 0
    """Number of units that are collected, and count as free."""

    @property
    def num_unused(self) -> int:
        return int(self._theirs.available_size()) + self._num_owed

    @property
    def num_free(self) -> int:
        return self.num_unused

    @property
    def num_taken(self) -> int:  # type: ignore[override]
        return int(self._theirs.size) - self.num_unused


class RowView(Counts, PageAllocator):
    """KV rows of a ``BaseTokenToKVPoolAllocator``: 0 (padding) to ``size``.

    Call ``give_back`` after any operation that can evict. Collected rows count as free until then.
    """

    def __init__(
        self, theirs: BaseTokenToKVPoolAllocator, page_size: int, token_bytes: int
    ) -> None:
        self._theirs: BaseTokenToKVPoolAllocator = theirs
        self._owed: list[Indices] = []
        self._num_owed = 0
        self.page_size = page_size
        self.capacity = theirs.size + theirs.page_size
        self.unit_bytes = token_bytes
        self.budget = None

    def allocate(self, num_tokens: int) -> Indices | None:
        self.give_back()
        rows = self._theirs.alloc(-(-num_tokens // self.page_size) * self.page_size)
        return None if rows is None else to_host(rows)

    def free(self, rows: Indices) -> None:
        """Collect rows for the next ``give_back``. O(1)."""
        if len(rows):
            self._owed.append(rows)
            self._num_owed += len(rows)

    def give_back(self) -> None:
        if self._owed:
            rows = self._owed[0] if len(self._owed) == 1 else np.concatenate(self._owed)
            self._owed.clear()
            self._num_owed = 0
            self._theirs.free(self.to_device(rows))

    def to_device(self, rows: Indices) -> torch.Tensor:
        """Convert ``rows`` to SGLang's form: int64[n] on its device. O(n)."""
        return on_device(rows, self._theirs.device)

    def free_rows(self) -> Indices:
        page_size = self._theirs.page_size
        pages = to_host(self._theirs.get_all_free_pages())
        rows = pages[:, None] * page_size + np.arange(page_size, dtype=np.int32)
        return np.concatenate((rows.reshape(-1), *self._owed)).astype(np.int32)

    def check(self, num_reserved: int = 0) -> None:
        rows = self.free_rows()
        assert len(np.unique(rows)) == len(rows), "a KV row is free twice"
        assert not len(rows) or (rows.min() > 0 and rows.max() < self.capacity), (
            "a free KV row is out of range"
        )


class SlotView(Counts, SlotAllocator):
    """State slots 1 to ``size`` of a ``MambaSlotAllocator``. Slot 0 is padding."""

    def __init__(self, theirs: MambaSlotAllocator, state_bytes: int) -> None:
        self._theirs: MambaSlotAllocator = theirs
        self.capacity = theirs.size + 1
        self.unit_bytes = state_bytes
        self.budget = None
        self.is_taken = bytearray([1]) * self.capacity  # SGLang has the list of its free slots
        self._tensors = torch.arange(self.capacity, dtype=torch.int64, device=theirs.device)

    def allocate(self) -> int | None:
        slot = self._theirs.alloc(1)
        return None if slot is None else int(slot)

    def free(self, slot: int) -> None:
        """Free ``slot`` in SGLang. O(its free list)."""
        self._theirs.free(self.tensor(slot))

    def tensor(self, slot: int) -> torch.Tensor:
        """Return ``slot`` in SGLang's form, int64[1] on its device: a read-only view. O(1)."""
        return self._tensors[slot : slot + 1]

    def free_slots(self) -> list[int]:
        slots: list[int] = self._theirs.free_slots.tolist()
        return slots

    def check(self) -> None:
        slots = self.free_slots()
        assert len(set(slots)) == len(slots), "a slot is free twice"
        assert all(0 < slot < self.capacity for slot in slots), "a free slot is out of range"


def to_host(rows: torch.Tensor) -> Indices:
    """Copy rows to the host as int32[n], after all work of the current stream. O(n)."""
    copied: Indices = rows.cpu().numpy().astype(np.int32)
    return copied


def streams_of(device: str) -> Any:
    """Return torch's module of a device with streams, or None for a CPU."""
    return None if torch.device(device).type == "cpu" else torch.get_device_module(device)


def on_device(rows: Indices, device: Any) -> torch.Tensor:
    """Copy ``rows`` to a device as int64[n], from pinned memory: the host does not wait. O(n)."""
    there = torch.from_numpy(rows.astype(np.int64))
    if streams_of(str(device)) is None:
        return there
    return there.pin_memory().to(device, non_blocking=True)


class HostReader:
    """Copies of row and slot numbers to the host that do not wait for a forward pass.

    SGLang lets its scheduling stream wait for the next pass before it processes results, so a copy
    on that stream would wait too, and with it the streaming of all requests. Copies therefore run
    on a stream of their own, into pinned memory, and wait for themselves alone. No event is needed:
    the numbers of a request's rows and of its tracked states were written before the pass began
    whose results are processed.
    """

    def __init__(self, device: str) -> None:
        self._module = streams_of(device)
        self._stream: Any = None if self._module is None else self._module.Stream()
        self._buffers: dict[torch.dtype, torch.Tensor] = {}

    def read(self, numbers: torch.Tensor) -> Indices:
        """Return ``numbers``, int32[n] or int64[n], as int32[n]. O(n)."""
        if self._module is None:
            return to_host(numbers)
        count, dtype = len(numbers), numbers.dtype
        buffer = self._buffers.get(dtype)
        if buffer is None or len(buffer) < count:
            buffer = torch.empty(max(4096, 2 * count), dtype=dtype).pin_memory()
            self._buffers[dtype] = buffer
        with self._module.stream(self._stream):
            buffer[:count].copy_(numbers, non_blocking=True)
        self._stream.synchronize()
        copied: Indices = buffer[:count].numpy().astype(np.int32)
        return copied


# --- Host tier ------------------------------------------------------------------------------------


class PendingLoad(NamedTuple):
    """Offloaded prefix that a waiting request could resume from after a load."""

    resumable: Resumable
    prompt: Tokens
    namespace: Hashable


class HostTier:
    """Pinned memory for evicted KV rows and states, and the copies to and from SGLang's pools.

    All copies run on the scheduling stream, in the order of the decisions, after ``fence``: a pass
    in flight can still write rows that are free. The next pass waits for that stream. The host
    waits for nothing.
    """

    def __init__(
        self,
        kv: Sequence[torch.Tensor],
        states: Sequence[torch.Tensor],
        num_rows: int,
        state_rows: int,
        fence: Any,
    ) -> None:
        """Allocate ``num_rows`` rows. ``kv`` is [rows, ...] per layer, ``states`` [layers, slots,
        ...]; a state takes ``state_rows`` rows."""
        self._kv = [_bytes_of(one) for one in kv]
        self._states = [_bytes_of(layer) for one in states for layer in one]
        self._fence, self._device = fence, kv[0].device
        self._module = streams_of(str(self._device))
        row, state = (sum(one.shape[1] for one in of) for of in (self._kv, self._states))
        self._width = max(row, -(-state // state_rows))
        self._memory = torch.zeros(num_rows, self._width, dtype=torch.uint8)
        if self._module is not None:
            self._memory = self._memory.pin_memory()

    def run(self, transfers: Iterable[Transfer]) -> None:
        """Carry out the copies of a step plan. O(bytes)."""
        if self._module is not None:
            self._module.current_stream().wait_stream(self._fence)
        for one in transfers:
            assert isinstance(one, Copy)
            tensors = self._kv if one.kind == "kv" else self._states
            if one.src_tier == DEVICE:
                rows = on_device(one.src, self._device)
                packed = torch.cat([of[rows] for of in tensors], 1)
                if one.kind != "kv":
                    padding = len(one.dst) * self._width - packed.shape[1]
                    packed = torch.nn.functional.pad(packed, (0, padding))
                    packed = packed.reshape(len(one.dst), self._width)
                for here, there in _runs(one.dst):
                    width = packed.shape[1]
                    self._memory[there, :width].copy_(packed[here], non_blocking=True)
            else:
                rows = on_device(one.dst, self._device)
                packed = tensors[0].new_empty((len(one.src), self._width))
                for here, there in _runs(one.src):
                    packed[here].copy_(self._memory[there], non_blocking=True)
                if one.kind != "kv":
                    packed = packed.reshape(1, -1)
                first = 0
                for of in tensors:
                    of[rows] = packed[:, first : first + of.shape[1]]
                    first += of.shape[1]


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of ``tensor``, [n, ...], as uint8[n, bytes]."""
    return tensor.view(len(tensor), -1).view(torch.uint8)


def _runs(rows: Indices) -> Iterator[tuple[slice, slice]]:
    """Return the consecutive runs of ``rows`` as (place in ``rows``, rows)."""
    cuts = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
    for start, end in pairwise(cuts):
        yield slice(start, end), slice(int(rows[start]), int(rows[start]) + end - start)


# --- States of requests ---------------------------------------------------------------------------
#
# A request owns a live slot. With an *extra buffer* it also owns tracking slots, in which its
# forward passes save states at known lengths. The cache takes over a tracking slot without a copy,
# and a running request gets a fresh slot in exchange (``donate``).
#
# Without the extra buffer there is only the live state at the end of the computed tokens. It is
# copied while the request runs, and taken over when it finishes. If no slot is available, nothing
# is donated and the request continues. SGLang then does not overlap passes, so reading the number
# of the slot waits for no pass either.


@dataclass(frozen=True, slots=True)
class Offer:
    """State that a request can give to the cache."""

    position: int
    """Number of tokens it covers."""
    slot: torch.Tensor
    """Slot, int64[1]."""
    number: int
    """The same on the host."""
    keep: int | None = None
    """Index of its tracking slot, for a finished request with an extra buffer."""


class RequestStates:
    """States of the requests of one scheduler, and allocation of their slots. ``settle`` is called
    after evictions, before a freed slot is used."""

    def __init__(
        self,
        pool: HybridReqToTokenPool,
        slots: SlotView,
        settle: Callable[[], None],
        reader: HostReader,
        *,
        extra_buffer: bool,
    ) -> None:
        self._pool = pool
        self._slots = slots
        self._settle = settle
        self._reader = reader
        self.extra_buffer = extra_buffer
        """True if a prefill exports a state before its end."""

    def take_slot(self, cache: HybridRadixCache) -> torch.Tensor | None:
        """Allocate a slot, int64[1], evicting if needed. None if every state is locked."""
        allocator = self._pool.mamba_allocator
        slot: torch.Tensor | None = allocator.alloc(1)
        if slot is None and cache.evict(num_slots=1).num_slots:
            self._settle()
            slot = allocator.alloc(1)
        return slot

    def resume(
        self, cache: HybridRadixCache, req: Req, prompt: Tokens, found: PrefixMatch
    ) -> PrefixMatch:
        """Give ``req`` a live slot and register the copy of its checkpoint before the forward pass.

        If the only available slot is that of ``found.checkpoint``, the request takes it and resumes
        from the next shallower checkpoint. Without any slot it starts from zero. ``losses.refused``
        counts the difference. Returns the match to resume from. O(len(prompt)).
        """
        receipt = cache.lock(found.node)
        slot = None if req.kv.holds_mamba else self.take_slot(cache)
        cache.unlock(receipt)
        match = found
        if slot is None and not req.kv.holds_mamba:
            slot = self.take_slot(cache)
            now = cache.match(prompt, found.namespace)
            if slot is None or now.checkpoint is None:
                now = now._replace(cached_len=0, node=None, resumed=None)
            match = found._replace(
                cached_len=now.cached_len,
                kv_match_len=now.kv_match_len,
                losses=losses_of(found, now.cached_len),
                node=now.node,
                resumed=now.resumed,
            )
        if match.checkpoint is None:
            if slot is not None:
                self._pool.mamba_allocator.free(slot)
            return match
        if slot is not None:
            req.kv.mamba_pool_idx = slot[0]
        req.kv.mamba_cow_src_index = self._slots.tensor(match.checkpoint)
        req.kv.mamba_needs_clear = False
        return match

    def load(self, cache: HybridRadixCache, req: Req, pending: PendingLoad) -> PrefixMatch | None:
        """Load an offloaded prefix and let ``req`` resume from it. Returns its match, or None if
        there is no room, and then changes nothing in ``req``. O(tokens)."""
        slot = None if req.kv.holds_mamba else self.take_slot(cache)
        if slot is None and not req.kv.holds_mamba:
            return None
        if not cache.load(pending.resumable):
            if slot is not None:
                self._pool.mamba_allocator.free(slot)
            return None
        found = cache.match(pending.prompt, pending.namespace)
        assert found.checkpoint is not None and found.cached_len == pending.resumable.position
        if slot is not None:
            req.kv.mamba_pool_idx = slot[0]
        req.kv.mamba_cow_src_index = self._slots.tensor(found.checkpoint)
        req.kv.mamba_needs_clear = False
        return found

    def offer_running(self, cache: HybridRadixCache, req: Req, num_tokens: int) -> Offer | None:
        """Return the state that a running request donates after a chunk. None if there is none, or
        no slot to continue with."""
        position = req.kv.mamba_last_track_seqlen if self.extra_buffer else num_tokens
        slot = None if position is None else self.take_slot(cache)
        if slot is None:
            return None
        if self.extra_buffer:
            number = self._number(req, self._pool.get_mamba_ping_pong_keep_idx(req))
            return Offer(position, self._pool.donate_mamba_ping_pong_slot(req, slot), number)
        translate = self._pool.translate_mamba_indices
        live = req.kv.mamba_pool_idx.unsqueeze(0)
        self._pool.mamba_pool.copy_from(translate(live), translate(slot))
        return Offer(num_tokens, slot, int(slot))

    def offer_finished(self, req: Req, num_tokens: int) -> Offer | None:
        """Return the deepest state of a finished request with at most ``num_tokens`` tokens."""
        if self.extra_buffer:
            return self._tracked(req, num_tokens)
        unflushed = self._pool.mamba_pool.replayssm_write_pos
        live = req.kv.mamba_pool_idx
        if unflushed is not None:
            num_tokens -= int(unflushed[live])
            unflushed[live] = 0
        return Offer(num_tokens, live.unsqueeze(-1).clone(), int(live))

    def _tracked(self, req: Req, num_tokens: int) -> Offer | None:
        kv, pool = req.kv, self._pool
        position, index = kv.mamba_last_track_seqlen, pool.get_mamba_ping_pong_keep_idx(req)
        if position is not None and position > num_tokens:
            # The step in flight when the request ended went past its last token.
            if pool.mamba_ping_pong_track_buffer_size != 2:
                return None
            position, index = (
                kv.mamba_prev_track_seqlen,
                pool.get_mamba_ping_pong_other_idx(index),
            )
        if not position or position > num_tokens:
            return None
        number = self._number(req, index)
        slot = kv.mamba_ping_pong_track_buffer[index].unsqueeze(-1).clone()
        return None if number < 0 else Offer(position, slot, number, index)

    def _number(self, req: Req, index: int) -> int:
        """Return the number of a tracking slot, or -1 if there is none at ``index``."""
        return int(self._reader.read(req.kv.mamba_ping_pong_track_buffer[index : index + 1])[0])

    def settle_running(self, req: Req, offer: Offer, taken: bool) -> None:
        """Clean up after the offer of ``offer_running`` was inserted or rejected."""
        if not taken:
            self._pool.mamba_allocator.free(offer.slot)
        req.kv.mamba_last_track_seqlen = None
        req.kv.mamba_prev_track_seqlen = None

    def release(self, req: Req, offer: Offer | None, taken: bool) -> None:
        """Free the slots of an ended request, except one that the tree has ``taken``."""
        if self.extra_buffer:
            keep = offer.keep if offer is not None and taken else None
            self._pool.free_mamba_cache(req, mamba_ping_pong_track_buffer_to_keep=keep)
        elif not taken:
            self._pool.free_mamba_cache(req)
