"""Host and disk tiers below the device's memory, with write-through and saved policy state."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from engine.config import ConfigError, EngineConfig
from engine.core import EngineCore, Plugin
from engine.plugins.tiers.disk import Disk
from engine.plugins.tiers.prefixes import RecordPart, covering
from engine.plugins.tiers.records import MEMORY_NAME, RecordStore
from engine.plugins.tiers.staging import MeasuredExchange, Staging, is_kept
from engine.plugins.tiers.tier_copies import KEPT, TierCopier
from engine.runner.backends import digest_of
from engine.runner.model_runner import ModelRunner
from engine.schedule.report import CacheReport, FolderReport, StepReport, TierReport
from engine.text.tokenizer import Tokenizer
from hybridcache.allocators.moves import DEVICE, DISK, HOST, Copy, Indices
from hybridcache.config import CacheConfig
from hybridcache.geometry.units import GIB, format_bytes
from hybridcache.radix.api import Listener
from hybridcache.radix.cache import HybridRadixCache
from hybridcache.radix.offload import path_of
from hybridcache.radix.protocol import PlacementPolicy
from hybridcache.radix.tiers import TieredRadixCache
from hybridcache.radix.tokens import EMPTY, Tokens
from hybridcache.radix.tree import Kind, RadixNode
from hybridcache.radix.warm_state import WarmState, pack, unpack, write_memory
from hybridcache.scheduling.cache_manager import CacheManager


class WriteThrough(Listener):
    """Listener that queues write-through copies of entries that become resident.

    It ignores loaded entries: they are on disk already, and their bytes have not arrived yet.
    """

    followed: TieredRadixCache

    def __init__(self) -> None:
        self._node: RadixNode | None = None
        self._path: tuple[Hashable, Tokens] | None = None
        """Path of ``_node``, the last copied one: a state is mostly stored right after its KV."""

    def kv_stored(self, node: RadixNode) -> None:
        if not self.followed.is_loading and node.kv is not None:
            self._queue("kv", node, node.kv.indices.copy())

    def checkpoint_stored(self, node: RadixNode) -> None:
        if not self.followed.is_loading and node.checkpoint is not None:
            self._queue("checkpoint", node, np.array([node.checkpoint.slot], np.int32))

    def _queue(self, kind: Kind, node: RadixNode, rows: Indices) -> None:
        if self._node is not node:
            self._node, self._path = node, path_of(node)
        copy = Copy(kind, DEVICE, rows, KEPT, EMPTY, node.end, self._path)
        self.followed.steps.transfers.append(copy)


IDLE_EVERY_S, BUSY_EVERY_S = 1.0, 30.0
"""Minimum seconds between two saves of the policy state, while the engine is idle and busy."""
SHARE = 0.005
"""Maximum share of the engine's time spent on saving."""
USUAL_DISK = 2.5
"""Default size of the folder, relative to device and host memory. It holds all entries of these,
and as much again for the disk tier."""
FREE_SHARE = 0.9
"""Maximum share of the free disk for the default size of the folder."""
ROWS_SHARE = 0.875
"""Maximum share of rows in a folder. The rest is for tokens, heads and partly filled blocks."""
REMEMBERED, MAX_REMEMBERED_BYTES = 32, 1 << 25
"""Room for the file of policy state: the folder's size divided by this number, and its maximum."""

logger = logging.getLogger(__name__)


class TierPlugin(Plugin):
    """Tiers of one engine and its policy state (settings ``host_gib`` and ``state_dir``)."""

    _cache: TieredRadixCache
    _manager: CacheManager
    exchange: MeasuredExchange

    def __init__(self, config: EngineConfig) -> None:
        """Raise StoreError if the folder cannot be used: before the model is loaded."""
        super().__init__(config)
        self._store_bytes = 0
        """Maximum size of all records."""
        state_dir = config.state_dir
        weights_dir = None if config.load_format == "dummy" else config.model_dir
        self._store = None if state_dir is None else RecordStore(Path(state_dir), weights_dir)
        self.disk: Disk | None = None
        self._saved_state: WarmState | None = None
        """Policy state in the folder, until all of it is restored."""
        self._placement: Sequence[PlacementPolicy] = ()
        self._has_changes = False
        """True if something was computed since the policy state was saved."""
        self._saved_at, self._took_s = time.perf_counter(), 0.0

    def size_cache(self, cache: CacheConfig, runner: ModelRunner) -> CacheConfig:
        """Add the tiers that the settings select. Raises ConfigError if none are possible."""
        memory, tiers = runner.memory, self.config
        if not memory.slab_rows or self.config.prefix_cache != "hybrid":
            raise ConfigError(
                "host and disk tiers require a model with states, the hybrid prefix cache and one "
                "arena: omit host_gib and state_dir."
            )
        host, disk = int((tiers.host_gib or 0) * GIB), 0
        least = (memory.slab_rows + memory.page_size) * memory.row_bytes
        if tiers.host_gib is not None:
            _check_tier("host_gib", host, least)
        if tiers.state_dir is not None:
            above = memory.total_bytes + host
            folder = _folder_bytes(Path(tiers.state_dir), tiers.disk_gib, int(above * USUAL_DISK))
            # There may be two files of the policy state for a moment.
            self._store_bytes = folder - 2 * min(folder // REMEMBERED, MAX_REMEMBERED_BYTES)
            usable = int(self._store_bytes * ROWS_SHARE)
            disk = max(0, usable // 2, usable - above)
            _check_tier("state_dir" if tiers.disk_gib is None else "disk_gib", disk, least)
        return replace(cache, host_bytes=host, disk_bytes=disk)

    def open_cache(
        self, cache: HybridRadixCache, runner: ModelRunner, tokenizer: Tokenizer | None
    ) -> MeasuredExchange:
        """Open the tiers of the new ``cache``, and return the rule for loads from them. Raises
        StoreError for another fingerprint or an unusable folder."""
        assert isinstance(cache, TieredRadixCache), "the cache was made with tiers"
        self._cache = cache
        rows = {tier.name: tier.pages.capacity for tier in cache.offload.tiers}
        if self._store is not None:
            self._open_disk(self._store, runner, tokenizer, rows[DISK])
        copier = partial(TierCopier, disk=self.disk)
        host = {HOST: runner.attach_tiers(copier, rows.get(HOST, 0))}
        disk, geometry = self.disk, runner.geometry
        self.exchange = MeasuredExchange(
            geometry, lambda: host | ({} if disk is None else {DISK: disk.bytes_per_s})
        )
        if disk is not None:
            cache.subscribe(WriteThrough())
        return self.exchange

    def _open_disk(
        self, store: RecordStore, runner: ModelRunner, tokenizer: Tokenizer | None, num_rows: int
    ) -> None:
        folder, memory = store.folder, runner.memory
        # Entries are found by token ids: another chat template changes nothing about them.
        words = digest_of(((tokenizer and tokenizer.as_json()) or "").encode())
        identity = {**runner.identity(store.weights_digest), "tokenizer": words}
        store.open(identity, empties=self.config.state_dir_mismatch == "empty")
        self.disk = disk = Disk(
            store,
            max_bytes=self._store_bytes,
            row_bytes=memory.row_bytes,
            state_rows=memory.slab_rows,
            num_rows=num_rows,
        )
        self._store = None
        try:
            state = unpack(store.read_file(MEMORY_NAME))
            state.recall_tree(self._cache)
            self._saved_state = state
        except FileNotFoundError:
            pass
        except Exception as error:  # Whoever may write into the folder can write anything.
            if isinstance(error, MemoryError):
                raise
            disk.num_errors += 1
            logger.warning(
                "%s is ignored (%s): the policies start without history.",
                folder / MEMORY_NAME,
                error,
            )
        self.adopt()

    def open_manager(self, manager: CacheManager, runner: ModelRunner) -> Staging | None:
        """See ``Plugin``. The loader reads from disk for waiting requests."""
        self._manager = manager
        if self.disk is None:
            return None
        self._placement = manager.placement.rules
        state, self._saved_state = self._saved_state, None
        if state is not None and (unfit := state.recall_policies(self._cache, self._placement)):
            logger.warning(
                "The state of other policies (%s) in %s is ignored: eviction and placement start "
                "without history.",
                ", ".join(unfit),
                self.config.state_dir,
            )
        return Staging(manager, self.disk, self.exchange)

    @property
    def has_work(self) -> bool:
        """See ``Plugin``: transfers wait for a batch."""
        return self._manager.has_moves

    def attach(self, engine: EngineCore, manager: CacheManager) -> None:
        engine.observers.append(self._learn)
        engine.on_emptied.append(self._on_emptied)

    def _learn(self, report: StepReport) -> None:
        """Record a step that was computed, and save the policy state if a save is due."""
        self.exchange.learn(report)
        self._has_changes |= bool(report.prefilled or report.num_decode_tokens)
        self._save_if_due(BUSY_EVERY_S)

    def on_idle(self) -> float | None:
        return self._save_if_due(IDLE_EVERY_S)

    def _save_if_due(self, every_s: float) -> float | None:
        """Save the policy state if it changed and a save is due. O(1), or O(tree).

        Returns the seconds until the next save, or None if there are no changes.
        """
        disk = self.disk
        if disk is None or disk.is_off or not self._has_changes:
            return None
        start = time.perf_counter()
        left = self._saved_at + max(every_s, self._took_s / SHARE) - start
        if left > 0:
            return left
        body = write_memory(self._cache, self._placement)
        self._has_changes, self._saved_at = False, time.perf_counter()
        self._took_s = self._saved_at - start
        disk.write_file(MEMORY_NAME, lambda: pack(body))
        return None

    def completed(self, report: CacheReport) -> CacheReport:
        """See ``Plugin``. O(tiers)."""
        return replace(report, tiers=tuple(self._tier_reports()), folder=self._folder_report())

    def _tier_reports(self) -> Iterator[TierReport]:
        offload = self._cache.offload
        for tier in offload.tiers:
            taken_in = sum(n for (_, to), n in offload.copied_rows.items() if to == tier.name)
            fetched = offload.copied_rows.get((tier.name, DEVICE), 0)
            total, free = tier.pages.capacity, tier.pages.num_free
            rows = total, free, total - free, taken_in, fetched
            yield TierReport(tier.name, *(n * offload.row_bytes for n in rows))

    def _folder_report(self) -> FolderReport | None:
        if (disk := self.disk) is None:
            return None
        return FolderReport(
            disk.max_bytes, disk.num_bytes, disk.num_skipped, disk.num_errors, disk.problem
        )

    def adopt(self) -> int:
        """Add the newest states on disk that fit to the cache. Returns their number. O(records)."""
        disk, cache = self.disk, self._cache
        if disk is None or disk.is_off:
            return 0
        prefixes, tier = disk.prefixes, cache.offload.tiers[cache.offload.names.index(DISK)]
        num_adopted = 0
        for number in reversed(prefixes.newest_states(tier.pages.num_free, disk.state_rows)):
            namespace, tokens = prefixes.path(number)
            taken = cache.adopt(tokens, namespace)
            if taken is None:
                continue
            start, kv_rows, state_rows = taken
            pieces = prefixes.find(namespace, tokens)
            disk.prefixes.bind(kv_rows, covering(pieces, start, len(tokens)))
            disk.prefixes.bind(state_rows, [RecordPart(number, 0, len(state_rows))])
            num_adopted += 1
        return num_adopted

    def _on_emptied(self, was_lost: bool) -> None:
        """Adopt the entries on disk again if the rows were lost, and remove them if the cache was
        emptied on request; see ``EngineCore.on_emptied``."""
        self._cache = cast("TieredRadixCache", self._manager.cache)  # There may be another one.
        steps, disk = self._cache.steps, self.disk
        if was_lost:
            steps.take_transfers()
            if disk is not None:
                disk.recover()
                logger.warning("The cache restarts with %d states from disk.", self.adopt())
        elif disk is not None:
            transfers = steps.take_transfers()
            steps.transfers += [one for one in transfers if not is_kept(one)]
            disk.clear()
            disk.remove_file(MEMORY_NAME)

    def close(self) -> None:
        """See ``Plugin``. Writes all pending entries and releases the folder."""
        if self._store is not None:  # The engine was not built.
            self._store.close()
        if self.disk is not None:
            self._took_s = 0.0  # The last save is due, however long others took.
            self._save_if_due(0.0)
            self.disk.close()

    def start_screen(self) -> Sequence[tuple[str, str]]:
        rows = [
            ("host", f"{format_bytes(tier.total)} for entries that leave the device")
            for tier in self._tier_reports()
            if tier.tier == HOST
        ]
        if (folder := self._folder_report()) is not None:
            words = (
                f"{format_bytes(folder.kept)} kept of {format_bytes(folder.total)} at most, for "
                f"the next start too, in {self.config.state_dir}"
            )
            rows.append(("disk", words))
        return rows


def _check_tier(name: str, size: int, least: int) -> None:
    """Raise ConfigError if a tier of ``size`` bytes is too small for a state."""
    if size < least:
        raise ConfigError(
            f"{name} has room for {format_bytes(size)}, too little for a single state with a page "
            f"of KV ({format_bytes(least)}): give it more, or omit it."
        )


def _folder_bytes(folder: Path, gib: float | None, usual: int) -> int:
    """Return the size of the folder: ``gib``, or the usual one within ``FREE_SHARE`` of the disk.

    Raises ConfigError if ``gib`` is more than the whole disk.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    disk = shutil.disk_usage(existing)
    if gib is not None:
        if gib * GIB > disk.total:
            raise ConfigError(
                f"disk_gib {gib:g} is more than the disk of {folder} ({format_bytes(disk.total)}): "
                "use less, or omit it."
            )
        return int(gib * GIB)
    used = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return min(usual, int(disk.free * FREE_SHARE) + used)
