"""Configuration and construction of a cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Self

from hybridcache.allocators.moves import DISK, HOST
from hybridcache.allocators.pools import (
    ArenaAllocator,
    ByteBudget,
    PageAllocator,
    SlotAllocator,
    slab_rows,
)
from hybridcache.policies.eviction.lru import LRU
from hybridcache.policies.eviction.priority_classes import PriorityClasses
from hybridcache.policies.registry import DEFAULT_EVICTION, EvictionSpec, make_eviction
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.protocol import EvictionPolicy
from hybridcache.radix.tokens import require_bool, require_grid, require_index
from hybridcache.radix.tree import ItemBytes

GRID = 64
"""Default checkpoint grid, tokens: the chunk length of the kernels."""


class Settings:
    """Settings that refuse the words of other parts of the project, and name the right one."""

    __slots__ = ()
    _elsewhere: ClassVar[Mapping[str, str]] = {}
    """The right setting, by the word that another part uses for it."""

    def __new__(cls, *_: object, **settings: object) -> Self:
        for name in cls._elsewhere.keys() & settings:
            raise TypeError(f"there is no setting {name!r}: {cls._elsewhere[name]}")
        return super().__new__(cls)


PLACED = "the placement is an argument of Lease.begin and CacheManager: parse_placement('end')"


@dataclass(frozen=True, slots=True)
class CacheConfig(Settings):
    """Sizes and policies of a prefix cache.

    Memory is given as two pool sizes (``num_kv_tokens``, ``num_slots``), or as one number of bytes
    for KV and states (``total_bytes``, ``memory``).

    >>> from hybridcache import CacheConfig
    >>> CacheConfig(num_kv_tokens=1000, num_slots=4).eviction
    'survival'
    """

    _elsewhere: ClassVar = {"policy": "use eviction", "placement": PLACED, "checkpoints": PLACED}
    prefix_cache: str = "hybrid"
    """hybrid, radix (attention-only models) or none."""
    num_kv_tokens: int = 0
    """KV rows in all, tokens."""
    num_slots: int | None = None
    """State slots in all; a hybrid cache must be given them."""
    total_bytes: int | None = None
    """One budget for KV and states, bytes; instead of the two pool sizes."""
    memory: str = "budget"
    """Division of total_bytes: arena (rows and slots are views of the same bytes; rows may move) or
    budget (only bytes are counted, for simulations: tensors for all row and slot numbers would take
    twice as many)."""
    kv_bytes_per_token: int = 0
    """Bytes of one token's KV; 0: not known."""
    state_bytes: int = 0
    """Bytes of one state; 0: not known."""
    page_size: int = 1
    """Tokens of one KV page."""
    grid: int = GRID
    """Checkpoints are at multiples of it and of page_size, tokens; one of the two must divide the
    other."""
    eviction: EvictionSpec = DEFAULT_EVICTION
    """Eviction policy: a name, or a policy of your own."""
    priority_classes: bool = True
    """Evict KV that nothing can resume from, and checkpoints with a deeper one on their unforked
    path, before others."""
    host_bytes: int = 0
    """Host memory for entries evicted from the device, bytes; 0: none."""
    disk_bytes: int = 0
    """Disk for entries evicted from the tier above, bytes; 0: none."""
    ghost_bytes: int = 16 << 20
    """Host memory for the tokens of ghosts, bytes."""
    debug: bool = False
    """Find misuse when it happens (``hybridcache.radix.debug``), for tests."""

    def __post_init__(self) -> None:
        for one in fields(self):
            name, value, kind = one.name, getattr(self, one.name), str(one.type)
            if kind == "int" or (kind == "int | None" and value is not None):
                least = int(name in ("page_size", "grid"))
                object.__setattr__(self, name, require_index(value, name, least))
        require_bool(self.priority_classes, "priority_classes")
        require_bool(self.debug, "debug")
        known = {"prefix_cache": ("hybrid", "radix", "none"), "memory": ("arena", "budget")}
        for name, words in known.items():
            if (value := getattr(self, name)) not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)} (got {value!r}).")
        require_grid(self.grid, self.page_size)
        has_pools = bool(self.num_kv_tokens or self.num_slots)
        if has_pools == (self.total_bytes is not None):
            raise ValueError("give either num_kv_tokens and num_slots, or total_bytes")
        if has_pools and self.memory == "arena":
            raise ValueError("memory='arena' needs total_bytes instead of pool sizes")
        if has_pools and self.num_kv_tokens < self.page_size:
            raise ValueError(
                f"num_kv_tokens must be at least one page of {self.page_size} tokens (got "
                f"{self.num_kv_tokens})"
            )
        if has_pools and self.num_slots is None and self.prefix_cache == "hybrid":
            raise ValueError(
                "num_slots must be given for a hybrid cache (0 if no state is ever saved); use "
                "prefix_cache='radix' for a model without states"
            )
        make_eviction(self.eviction)
        # They cannot both be 1: a state never weighs as little as a token.
        are_known = self.kv_bytes_per_token > 0 < self.state_bytes and self.unit_bytes != (1, 1)
        needs_both = self.prefix_cache != "radix" and (self.total_bytes or self.tier_bytes)
        if needs_both and not are_known:
            raise ValueError(
                "kv_bytes_per_token and state_bytes must be given with total_bytes, host_bytes or "
                "disk_bytes, because rows and states are counted in bytes there. "
                "hybridcache.ModelGeometry computes both for a model; one without states needs "
                "prefix_cache='radix'"
            )
        for name, num_bytes in self.tier_bytes.items():
            if self.prefix_cache != "hybrid":
                raise ValueError(
                    f"{name}_bytes needs a hybrid cache, because tiers store KV for its states "
                    f"(prefix_cache is {self.prefix_cache!r}): set it to 0"
                )
            if num_bytes < self.state_bytes + self.page_size * self.kv_bytes_per_token:
                raise ValueError(
                    f"{name}_bytes must hold at least one state of {self.state_bytes} bytes and "
                    f"one page of KV (got {num_bytes}); 0 turns the tier off"
                )

    @property
    def tier_bytes(self) -> dict[str, int]:
        """Bytes of each tier below the device, by name, the nearest first."""
        sizes = {HOST: self.host_bytes, DISK: self.disk_bytes}
        return {name: size for name, size in sizes.items() if size}

    @property
    def item_bytes(self) -> ItemBytes:
        """Weights of one token's KV and of one state, by which policies compare items.

        If the sizes of two pools are unknown, both pools weigh the same: a state counts as many
        tokens as there are per slot.
        """
        if self.prefix_cache == "radix":
            return ItemBytes(self.unit_bytes.kv_token, 0)
        if self.unit_bytes != (1, 1):
            return self.unit_bytes
        return ItemBytes(1, max(self.num_kv_tokens // max(self.num_slots or 0, 1), 1))

    @property
    def unit_bytes(self) -> ItemBytes:
        """Bytes of one token's KV and of one state, or 1 for each that is not known."""
        return ItemBytes(max(self.kv_bytes_per_token, 1), max(self.state_bytes, 1))


def build_prefix_cache(config: CacheConfig) -> HybridRadixCache:
    """Return a new cache with its own allocators; a ``TieredRadixCache`` if there is a host or disk
    tier.

    The tables of the allocators take 4 bytes of host memory per row.

    >>> from hybridcache import CacheConfig, build_prefix_cache
    >>> cache = build_prefix_cache(CacheConfig(num_kv_tokens=1000, num_slots=4))
    >>> len(cache.allocate_kv(10))
    10
    """
    if not isinstance(config, CacheConfig):
        raise TypeError(f"config must be a CacheConfig (got {type(config).__name__}).")
    cache = build_on(config, *_allocators(config))
    cache.make = partial(build_prefix_cache, config)
    return cache


def _allocators(config: CacheConfig) -> tuple[PageAllocator, SlotAllocator]:
    """Return the allocators of rows and slots that ``config`` describes."""
    total_bytes, (row_bytes, state_bytes) = config.total_bytes, config.unit_bytes
    num_tokens, num_slots, budget = config.num_kv_tokens, config.num_slots or 0, None
    has_states = config.prefix_cache != "radix"
    if config.memory == "arena" and total_bytes is not None:
        arena = ArenaAllocator(
            total_bytes, row_bytes, state_bytes if has_states else 0, config.page_size
        )
        return arena, arena.slots
    if total_bytes is not None:
        num_tokens = total_bytes // row_bytes
        num_slots = total_bytes // state_bytes if has_states else 0
        budget = ByteBudget(total_bytes)
    num_tokens -= num_tokens % config.page_size
    pages = PageAllocator(num_tokens, config.page_size, row_bytes, budget)
    return pages, SlotAllocator(num_slots, state_bytes, budget)


def build_on(config: CacheConfig, pages: PageAllocator, slots: SlotAllocator) -> HybridRadixCache:
    """Return a new cache with the given allocators of rows and slots."""
    policy = build_policy(config)
    options: dict[str, Any] = {
        "grid": config.grid,
        "item_bytes": config.item_bytes,
        "ghost_bytes": config.ghost_bytes,
        "keeps": config.prefix_cache != "none",
    }
    # The modules of tiers and of misuse are loaded only where they are needed.
    if not config.tier_bytes:
        if not config.debug:
            return HybridRadixCache(pages, slots, policy, **options)
        from hybridcache.radix.debug import DebugCache

        return DebugCache(pages, slots, policy, **options)
    from hybridcache.radix.offload import Tier
    from hybridcache.radix.tiers import TieredRadixCache

    kind = TieredRadixCache
    if config.debug:
        from hybridcache.radix.debug import DebugTieredCache as kind
    cache, tiers = kind(pages, slots, policy, **options), []
    row_bytes, page_size = config.kv_bytes_per_token, config.page_size
    for name, num_bytes in config.tier_bytes.items():
        num_rows = num_bytes // row_bytes
        rows = PageAllocator(num_rows - num_rows % page_size, page_size, row_bytes)
        shared = policy.for_tier()
        policy = build_policy(config) if shared is None else shared
        tiers.append(Tier(name, rows, policy, shared is not None))
    cache.attach(tuple(tiers), slab_rows(config.state_bytes, row_bytes, page_size))
    return cache


def build_policy(config: CacheConfig) -> EvictionPolicy:
    """Return the eviction policy that ``config`` names.

    This is one instance that sees all items, or, with priority classes, one instance per class.
    """
    make = make_eviction(config.eviction)
    if make is LRU:
        return LRU(config.priority_classes)
    policy = make()
    if policy.orders_classes or not config.priority_classes:
        return policy
    return PriorityClasses(policy, make(), make())
