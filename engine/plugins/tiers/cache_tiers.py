"""The memory below the device's, put together: host rows, a folder on disk, and what was in it."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from engine.config import ConfigError, EngineConfig
from engine.interfaces import HostTier, Runner, TierCopies
from engine.plugins.tiers.disk import Disk
from engine.plugins.tiers.prefixes import Piece, covering
from engine.plugins.tiers.records import RecordStore
from engine.plugins.tiers.staging import MeasuredExchange, Staging
from engine.plugins.tiers.weights_digest import load_digest, save_digest
from engine.schedule.batch import KEPT
from engine.schedule.fetching import Fetcher
from engine.schedule.plan import Plan
from engine.schedule.report import FolderReport, LowerReport, TierReport
from hybridcache.allocators.arena import slab_rows
from hybridcache.allocators.moves import DEVICE, DISK, HOST, Copy, StepQueue
from hybridcache.allocators.pages import MAX_ROWS
from hybridcache.api import Listener
from hybridcache.export.warm_state import Memory, pack, unpack, write_memory
from hybridcache.geometry.units import GIB, format_bytes
from hybridcache.policies.placement.rules import Placement
from hybridcache.policies.protocol import Item, PlacementPolicy
from hybridcache.radix.tree import RadixNode
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.memory import MemorySizes
from hybridcache.tokens import Indices, Tokens
from hybridcache.variants import TieredRadixCache

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer


NO_ROWS: Indices = np.empty(0, np.int32)


class Keeping(Listener):
    """Listens to a cache while something is published into it, and at no other time: what is
    fetched was kept before, and its bytes are not there yet."""

    def __init__(self, steps: StepQueue) -> None:
        self._steps = steps
        self._is_publishing = False

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """What becomes resident in here was computed, and is to be kept."""
        self._is_publishing = True
        try:
            yield
        finally:
            self._is_publishing = False

    def kv_stored(self, node: RadixNode) -> None:
        if self._is_publishing and node.kv is not None:
            rows = node.kv.indices.copy()
            self._steps.add(Copy("kv", DEVICE, rows, KEPT, NO_ROWS, node.end, _path(node)))

    def checkpoint_stored(self, node: RadixNode) -> None:
        if self._is_publishing and node.checkpoint is not None:
            slot = np.array([node.checkpoint.slot], np.int32)
            path = _path(node)
            self._steps.add(Copy("checkpoint", DEVICE, slot, KEPT, NO_ROWS, node.end, path))

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        pass

    def kv_removed(self, node: RadixNode) -> None:
        pass

    def checkpoint_removed(self, node: RadixNode) -> None:
        pass

    def chosen(self, item: Item) -> None:
        pass


def _path(node: RadixNode) -> tuple[Hashable, Tokens]:
    """(namespace, tokens from the first to the end of ``node``). O(position)."""
    parts: list[Tokens] = []
    while node.parent is not None:
        parts.append(node.tokens)
        node = node.parent
    return node.key, np.concatenate(parts[::-1])


NAME = "memory"
IDLE_EVERY_S, BUSY_EVERY_S = 1.0, 30.0
SHARE = 0.005
"""Of the engine's time that may go into it."""


class Remembering:
    """The file ``memory`` of one folder. The engine's thread calls it; the disk's writes."""

    def __init__(
        self,
        cache: TieredRadixCache,
        disk: Disk,
        folder: Path,
        max_bytes: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``max_bytes``: of the file, of which there may be two for a moment."""
        self._cache, self._disk, self._path = cache, disk, folder / NAME
        self._max_bytes = max_bytes
        self._clock = clock
        self._placement: Sequence[PlacementPolicy] = ()
        self._memory: Memory | None = None
        self._saved_at, self._took_s = clock(), 0.0
        self.has_news = False
        """Something was computed since."""
        self._has_warned = False

    def recall_tree(self) -> None:
        """Let the cache, which is empty, know what it has seen before: what is on disk is adopted
        after. O(file)."""
        try:
            memory = unpack(self._path.read_bytes())
            memory.recall_tree(self._cache)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            logger.warning("%s is left out, %s: what was learnt is learnt anew.", self._path, error)
            return
        self._memory = memory

    def recall_policies(self, placement: Sequence[PlacementPolicy]) -> None:
        """Let the cache's policies and the rules of ``placement`` know what they knew. O(file)."""
        self._placement = placement
        memory, self._memory = self._memory, None
        if memory is None:
            return
        unfit = memory.recall_policies(self._cache, placement)
        if unfit:
            logger.warning(
                "What other words had learnt (%s) is left out of %s: eviction and placement begin "
                "anew there.",
                ", ".join(unfit),
                self._path,
            )

    def rest(self, *, is_idle: bool) -> float | None:
        """Between two steps: write what is new, if it is time; else the seconds until then. None:
        nothing is new. O(1), or O(tree)."""
        if not (self.has_news and self._disk.is_writable):
            return None
        every = max(IDLE_EVERY_S if is_idle else BUSY_EVERY_S, self._took_s / SHARE)
        left = self._saved_at + every - self._clock()
        if left > 0:
            return left
        self.save()
        return None

    def save(self) -> None:
        """Write what is new. O(tree)."""
        if not (self.has_news and self._disk.is_writable):
            return
        start = self._clock()
        body = write_memory(self._cache, self._placement)
        self.has_news, self._saved_at = False, self._clock()
        self._took_s = self._saved_at - start
        self._disk.write_file(NAME, lambda: self._packed(body))

    def _packed(self, body: bytes) -> bytes | None:
        """The content of the file, made in the disk thread. None if it would be too large."""
        data = pack(body)
        if len(data) <= self._max_bytes:
            return data
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "What is learnt is not written to %s: it would take %s of at most %s bytes.",
                self._path,
                f"{len(data):,}",
                f"{self._max_bytes:,}",
            )
        return None

    def forget(self) -> None:
        """The cache was emptied because somebody wanted it."""
        if not self._disk.is_read_only:
            self._disk.remove_file(NAME)


USUAL_DISK = 2.5
"""Bytes of a folder for one of device and host memory: all that these hold is kept there too, and
as much again has room below them."""
ROWS_SHARE = 0.875
"""Part of a folder that rows may take: the rest is for tokens, heads and partly filled blocks."""
REMEMBERED, MAX_REMEMBERED_BYTES = 32, 1 << 25
"""One part in so many of a folder, and at most so much, is for a file of what is remembered."""

logger = logging.getLogger(__name__)


class TierSizes(NamedTuple):
    """Bytes of the tiers below the device, and of what the folder has of the last of them."""

    host: int = 0
    disk: int = 0
    store: int = 0
    """Of all records."""
    memory: int = 0
    """Of the file of what cache and policies remember, of which there may be two for a moment."""

    @classmethod
    def of(cls, config: EngineConfig, memory: MemorySizes) -> TierSizes:
        """What ``config`` asks for below ``memory``. ConfigError: nothing can be below it."""
        if not config.has_lower:
            return cls()
        if not memory.slab_rows or config.prefix_cache != "hybrid":
            raise ConfigError(
                "host and disk tiers are for a model with states, the hybrid prefix cache and one "
                "arena: leave host_gib and state_dir out."
            )
        host = int((config.host_gib or 0) * GIB)
        state_rows = slab_rows_of(memory)
        least = (state_rows + memory.page_size) * memory.row_bytes
        _check_tier("host_gib", config.host_gib, host, least, memory.row_bytes)
        if config.state_dir is None:
            return cls(host)
        above = memory.total_bytes + host
        folder = int(above * USUAL_DISK if config.disk_gib is None else config.disk_gib * GIB)
        remembered = min(folder // REMEMBERED, MAX_REMEMBERED_BYTES)
        store = folder - 2 * remembered
        usable = int(store * ROWS_SHARE)
        disk = max(0, usable // 2, usable - above)
        _check_tier("disk_gib", config.disk_gib, disk, least, memory.row_bytes)
        return cls(host, disk, store, remembered)


class CacheTiers:
    """What an engine with lower tiers has beside its cache and its runner."""

    def __init__(
        self,
        config: EngineConfig,
        sizes: TierSizes,
        cache: TieredRadixCache,
        runner: Runner,
        tokenizer: Tokenizer | None,
    ) -> None:
        """StoreError, in one sentence: the folder has another fingerprint, or cannot be used."""
        self._cache = cache
        self.folder = None if config.state_dir is None else Path(config.state_dir)
        rows = {tier.name: tier.pages.capacity for tier in cache.offload.tiers}
        self.disk: Disk | None = None
        self.remembering: Remembering | None = None
        if self.folder is not None:
            memory = runner.memory
            state = memory.row_bytes, slab_rows_of(memory)
            fields = fingerprint_of(config, runner, tokenizer)
            store = RecordStore.open(self.folder, fields, sizes.store)
            if config.load_format != "dummy" and "weights" in fields:
                save_digest(self.folder, config.model_dir, fields["weights"])
            self.disk = Disk(store, row_bytes=state[0], state_rows=state[1], num_rows=rows[DISK])
            self.remembering = Remembering(cache, self.disk, self.folder, sizes.memory)
            self.remembering.recall_tree()
            self.adopt()
            if self.disk.is_read_only:
                cache.offload.close(DISK)
                logger.warning(
                    "Another engine writes to %s, or nobody may: what is there is read, and "
                    "nothing of this engine is kept.",
                    self.folder,
                )
        self._host: HostTier = runner.attach_tiers(partial(_copier, self.disk), rows.get(HOST, 0))
        self.exchange = MeasuredExchange(runner.geometry, self._bytes_per_s)
        self.keeping: Keeping | None = None
        if self.disk is not None:
            self.keeping = Keeping(cache.steps)
            cache.subscribe(self.keeping)

    def recall(self, placement: Placement) -> None:
        """Let the policies know what they knew when the folder was written last."""
        if self.remembering is not None:
            self.remembering.recall_policies(placement.rules)

    def rest(self) -> float | None:
        """There is nothing to compute: seconds until this is to be called again, if nothing comes;
        None: not before."""
        self._follow_disk()
        return None if self.remembering is None else self.remembering.rest(is_idle=True)

    def fetcher(self, manager: CacheManager) -> Fetcher | None:
        """Reads from disk for requests that wait."""
        return None if self.disk is None else Staging(manager, self.disk, self.exchange)

    def _bytes_per_s(self) -> Mapping[str, float | None]:
        disk = self.disk
        return {
            HOST: self._host.host_bytes_per_s,
            DISK: None if disk is None else disk.bytes_per_s,
        }

    def step_done(self, plan: Plan, seconds: float) -> None:
        """A step was computed in ``seconds``."""
        self.exchange.learn(plan, seconds)
        self._follow_disk()
        if self.remembering is not None and plan.tasks:
            self.remembering.has_news = True
            self.remembering.rest(is_idle=False)

    def _follow_disk(self) -> None:
        """Bring the cache's disk tier in line with the state of the disk.

        The tier is closed while nothing can be written, and rows that cannot be read are dropped
        from the tree. While the file system hangs, all of them are; what is on disk is adopted
        again when it responds.
        """
        disk, lower = self.disk, self._cache.offload
        if disk is None:
            return
        disk.settle()
        if disk.is_writable:
            lower.open(DISK)
        else:
            lower.close(DISK)
        if self._cache.steps.num_transfers:
            return  # rows that a transfer is about to fill are not lost
        if disk.has_lost_rows:
            self._cache.drop_lost(DISK, disk.is_lost)
            disk.has_lost_rows = False
        elif disk.is_detached and not disk.is_hung:
            disk.is_detached = False
            logger.warning("%s responds again: it holds %d states.", self.folder, self.adopt())

    def report(self) -> LowerReport:
        """What lies where, in bytes. O(tiers)."""
        disk, lower = self.disk, self._cache.offload
        tiers = []
        for tier in lower.tiers:
            taken_in = sum(n for (_, to), n in lower.copied_rows.items() if to == tier.name)
            rows = (
                tier.pages.capacity,
                tier.pages.num_free,
                tier.pages.capacity - tier.pages.num_free,
                taken_in,
                lower.copied_rows.get((tier.name, DEVICE), 0),
            )
            tiers.append(TierReport(tier.name, *(n * lower.row_bytes for n in rows)))
        folder = None
        if disk is not None:
            folder = FolderReport(
                disk.max_bytes,
                disk.num_bytes,
                disk.is_writable,
                disk.num_skipped,
                disk.num_errors,
                disk.problem,
            )
        return LowerReport(tuple(tiers), folder)

    def adopt(self) -> int:
        """Let the cache, which has nothing of it, know what the disk holds, the newest at most that
        its tier has room for; states adopted. O(records)."""
        disk, cache = self.disk, self._cache
        if disk is None or disk.is_detached:
            return 0
        prefixes, tier = disk.prefixes, cache.offload.tiers[cache.offload.names.index(DISK)]
        newest = prefixes.newest_states(tier.pages.num_free, disk.state_rows)
        num_adopted = 0
        for number in reversed(newest):
            namespace, tokens = prefixes.path(number)
            taken = cache.adopt(tokens, namespace)
            if taken is None:
                continue
            start, kv_rows, state_rows = taken
            pieces = prefixes.find(namespace, tokens)
            disk.bind(kv_rows, covering(pieces, start, len(tokens)))
            disk.bind(state_rows, [Piece(number, 0, len(state_rows))])
            num_adopted += 1
        return num_adopted

    def reset(self) -> None:
        """The cache was emptied because somebody wanted it: nothing is kept either."""
        if self.disk is not None:
            steps = self._cache.steps
            for transfer in steps.take_transfers():
                if not (isinstance(transfer, Copy) and transfer.dst_tier == KEPT):
                    steps.add(transfer)
            self.disk.clear()
        if self.remembering is not None:
            self.remembering.forget()

    def start_over(self) -> None:
        """The cache was emptied because nobody knows what its rows hold: what is whole on disk is
        known again."""
        self._cache.steps.take_transfers()
        if self.disk is not None:
            self.disk.settle()
            self.disk.unbind_all()
            logger.warning("The cache begins anew with %d states from disk.", self.adopt())

    def close(self) -> None:
        """Write what is left."""
        if self.remembering is not None:
            self.remembering.save()
        if self.disk is not None:
            self.disk.close()


def _copier(disk: Disk | None, *arena: Any) -> TierCopies:
    """Make the copier of ``Runner.attach_tiers``. Imports torch."""
    from engine.plugins.tiers.tier_copies import TierCopier

    rows, memory, device, num_host_rows = arena
    return TierCopier(rows, memory, device, num_host_rows, disk)


def slab_rows_of(memory: MemorySizes) -> int:
    """Rows of the arena that hold a state."""
    return slab_rows(memory.state_bytes, memory.row_bytes, memory.page_size)


def _check_tier(name: str, gib: float | None, size: int, least: int, row_bytes: int) -> None:
    """ConfigError: no tier of ``size`` bytes can be made, or it could hold nothing."""
    if gib is None:
        return
    if size < least:
        raise ConfigError(
            f"{name} {gib:g} is too little for a single state with a page of KV, which take "
            f"{format_bytes(least)}: give more, or leave it out."
        )
    if size // row_bytes >= MAX_ROWS:
        most = MAX_ROWS * row_bytes / GIB
        raise ConfigError(
            f"{name} {gib:g} is more memory than can be numbered by tokens of "
            f"{format_bytes(row_bytes)}: give at most {most:,.0f}."
        )


def fingerprint_of(
    config: EngineConfig, runner: Runner, tokenizer: Tokenizer | None
) -> dict[str, str]:
    """Everything that the bytes of KV and states, and the tokens that name them, depend on."""
    template = None if tokenizer is None else tokenizer.chat_template
    digest = None
    if config.load_format != "dummy" and config.state_dir is not None:
        digest = load_digest(Path(config.state_dir), config.model_dir)
    return {
        **runner.identity(digest),
        "row bytes": str(runner.memory.row_bytes),
        "state bytes": str(runner.memory.state_bytes),
        "page size": str(config.page_size),
        "checkpoint grid": str(config.grid),
        "exact": str(config.exact),
        "tokenizer": _digest(None if tokenizer is None else tokenizer.as_json()),
        "chat template": _digest(None if template is None else template.source),
    }


def _digest(text: str | None) -> str:
    return "none" if text is None else hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
