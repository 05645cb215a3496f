"""What cache and policies remember, kept in the folder beside what they hold.

It is written when there is nothing to compute, and now and then where there always is; a process
that is killed forgets what it learnt since. Who has no memory writes none.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from engine.plugins.tiers.disk import Disk
from hybridcache.export.warm_state import Memory, pack, unpack, write_memory
from hybridcache.policies.protocol import PlacementPolicy
from hybridcache.variants import TieredRadixCache

NAME = "memory"
IDLE_EVERY_S, BUSY_EVERY_S = 1.0, 30.0
SHARE = 0.005
"""Of the engine's time that may go into it."""

logger = logging.getLogger(__name__)


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
