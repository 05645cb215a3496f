"""The memory below the device's, put together: host rows, a folder on disk, and what was in it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from engine.config import ConfigError, EngineConfig
from engine.interfaces import Below, Runner
from engine.plugins.tiers.disk import Disk
from engine.plugins.tiers.fetch_cost import MeasuredExchange
from engine.plugins.tiers.policy_state import Remembering
from engine.plugins.tiers.prefixes import Piece, covering
from engine.plugins.tiers.records import RecordStore
from engine.plugins.tiers.staging import Staging
from engine.plugins.tiers.weights_digest import save_digest
from engine.plugins.tiers.write_through import Keeping
from engine.schedule.batch import KEPT
from engine.schedule.fetching import Fetcher
from engine.schedule.plan import Plan
from engine.schedule.report import FolderReport, LowerReport, TierReport
from hybridcache.allocators.arena import slab_rows
from hybridcache.allocators.moves import DEVICE, DISK, HOST, Copy
from hybridcache.allocators.pages import MAX_ROWS
from hybridcache.geometry.units import GIB, format_bytes
from hybridcache.policies.placement.rules import Placement
from hybridcache.scheduling.cache_manager import CacheManager
from hybridcache.scheduling.memory import MemorySizes
from hybridcache.variants import TieredRadixCache

if TYPE_CHECKING:
    from engine.text.tokenizer import Tokenizer

USUAL_DISK = 2.5
"""Bytes of a folder for one of device and host memory: all that these hold is kept there too, and
as much again has room below them."""
ROWS_SHARE = 0.875
"""Part of a folder that rows may take: the rest is for tokens, heads and partly filled blocks."""
REMEMBERED, MAX_REMEMBERED_BYTES = 32, 1 << 25
"""One part in so many of a folder, and at most so much, is for a file of what is remembered."""

logger = logging.getLogger(__name__)


class LowerSizes(NamedTuple):
    """Bytes of the tiers below the device, and of what the folder has of the last of them."""

    host: int = 0
    disk: int = 0
    store: int = 0
    """Of all records."""
    memory: int = 0
    """Of the file of what cache and policies remember, of which there may be two for a moment."""

    @classmethod
    def of(cls, config: EngineConfig, memory: MemorySizes) -> LowerSizes:
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


class LowerMemory:
    """What an engine with lower tiers has beside its cache and its runner."""

    def __init__(
        self,
        config: EngineConfig,
        sizes: LowerSizes,
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
        self._below: Below = runner.attach(rows.get(HOST, 0), self.disk)
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
            HOST: self._below.host_bytes_per_s,
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
    return {
        **runner.identity(),
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
