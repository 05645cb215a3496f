"""Reports on a step, and on the sizes, rates and losses of the engine's cache."""

from __future__ import annotations

from dataclasses import dataclass

from hybridcache.scheduling.cache_manager import MemorySizes
from hybridcache.scheduling.planner import AdmissionReport


@dataclass(frozen=True, slots=True)
class StepReport:
    """Times and sizes of one step."""

    schedule_s: float
    forward_s: float
    sample_s: float
    wait_s: float
    """Time spent waiting for the device after the host's own work."""
    commit_s: float
    prefilled: tuple[tuple[int, int], ...]
    """(start, end) of each computed part of a prompt."""
    num_decode_tokens: int

    @property
    def num_prefill_tokens(self) -> int:
        return sum(end - start for start, end in self.prefilled)


@dataclass(frozen=True, slots=True)
class PoolReport:
    """Usage of one pool, in KV rows, state slots or bytes. ``free + cached + held == total``.

    In an arena, free memory is available to rows and slots alike, so their totals change.
    """

    total: int
    free: int
    cached: int
    held: int

    @classmethod
    def of(cls, free: int, cached: int, held: int) -> PoolReport:
        return cls(free + cached + held, free, cached, held)

    def with_slots(self, slots: PoolReport, memory: MemorySizes) -> PoolReport:
        """Return the bytes of these rows and of ``slots``. Free memory of an arena counts once."""
        parts = [(self.free, 0 if memory.slab_rows else slots.free)]
        parts += [(self.cached, slots.cached), (self.held, slots.held)]
        return PoolReport.of(*(n * memory.row_bytes + m * memory.slot_bytes for n, m in parts))


@dataclass(frozen=True, slots=True)
class TierReport:
    """Usage of one tier outside the device, in bytes. ``free + cached == total``."""

    tier: str
    """``host`` or ``disk``."""
    total: int
    free: int
    cached: int
    """Bytes of entries that were offloaded and are in no faster tier."""
    taken_in: int
    """Bytes offloaded to this tier since the start."""
    fetched: int
    """Bytes loaded back to the device since the start."""


@dataclass(frozen=True, slots=True)
class FolderReport:
    """Folder to which all cached entries are also written, in bytes."""

    total: int
    """Maximum size of the folder."""
    kept: int
    """Bytes that can be read from the folder, including entries that are also in a faster tier."""
    skipped: int
    """Number of runs and states not written, for lack of room or time, or after an error."""
    errors: int = 0
    """Number of file system errors and damaged records."""
    problem: str | None = None
    """Reason why the folder is not used any more, or None if it is."""


@dataclass(frozen=True, slots=True)
class CacheReport:
    """Sizes, rates and losses of one engine's cache."""

    prefix_cache: str
    eviction: str
    checkpoints: tuple[str, ...]
    grid: int
    page_size: int
    memory: str
    """``arena`` if KV rows and state slots share one memory, else ``pools``."""
    bytes: PoolReport
    kv: PoolReport
    slots: PoolReport
    num_running: int
    num_waiting: int
    token_hit_rate: float
    request_hit_rate: float
    usage: dict[str, int]
    """Counters since the start: requests, hits, prompt and cached tokens, tokens lost by cause,
    insertions and evictions. Requests with scores of their prompt do not count."""
    admission: str
    """Policy that orders waiting requests."""
    queue: AdmissionReport
    transfers: dict[str, int] | None = None
    """``TransferCounts`` since the start, or None if there is no exchange with other engines."""
    tiers: tuple[TierReport, ...] = ()
    """Tiers outside the device, fastest first."""
    folder: FolderReport | None = None
    """Folder with all cached entries, or None if they are not written."""
    num_prefilled: int = 0
    """Computed tokens, cached ones included, of the running prompts that are not complete."""
    num_to_prefill: int = 0
    """All tokens of these prompts."""
    age_s: float = 0.0
    """Seconds since the step after which the engine reported this; 0 if it was asked."""


def cache_kind(prefix_cache: str, memory: MemorySizes) -> str:
    """Return ``hybrid``, ``radix`` for a model without states, or ``none``."""
    return "radix" if prefix_cache == "hybrid" and not memory.is_stateful else prefix_cache
