"""Tests of the cache manager: request rows, and the copies that a batch has to make."""

from __future__ import annotations

import numpy as np

from engine.requests.request import Request
from engine.requests.spec import RequestSpec
from hybridcache.allocators.moves import Move
from hybridcache.cache import HybridRadixCache
from hybridcache.config import CacheConfig, build_prefix_cache
from hybridcache.policies.registry import parse_placement
from hybridcache.scheduling.cache_manager import CacheManager


def make_manager(page_size: int = 1) -> CacheManager:
    cache = build_prefix_cache(CacheConfig(num_kv_tokens=512, num_slots=4, page_size=page_size))
    return CacheManager(cache, parse_placement("backoff"), num_rows=2, stateful=True)


def make_request(arrival: int, length: int = 100) -> Request:
    return Request(
        RequestSpec(np.arange(length, dtype=np.int32), request_id=str(arrival)),
        arrival=arrival,
        arrival_s=0.0,
        max_len=length + 16,
        seed=0,
    )


class Table:
    """Request table of a runner."""

    def __init__(self) -> None:
        self.rows = np.full((2, 128), -1, np.int32)

    def write(self, manager: CacheManager) -> None:
        """Do the copies of a batch."""
        for row, start, indices in manager.take_step().row_writes:
            self.rows[row, start : start + len(indices)] = indices
        manager.step_done()

    def row(self, row: int, end: int) -> np.ndarray:
        return self.rows[row, :end]


def prefill(manager: CacheManager, request: Request, table: Table | None = None) -> None:
    assert manager.begin(request)
    assert manager.extend(request, request.prompt_len)
    manager.take_checkpoint_slots(request, request.prompt_len)
    (table or Table()).write(manager)
    request.computed_len = request.prompt_len
    manager.publish(request)


def test_begin_restores_a_state_and_writes_a_row_once() -> None:
    manager = make_manager()
    first, second = make_request(0), make_request(1)
    prefill(manager, first)
    assert manager.begin(second) and manager.extend(second, 100)
    copies = manager.take_step()
    manager.step_done()
    assert copies.restores == (second.lease.restore,)
    assert [(row, start, len(indices)) for row, start, indices in copies.row_writes] == [
        (second.row, 0, 100)
    ]
    assert not manager.take_step()


class Filler:
    """Holder of arena rows other than a request."""

    def __init__(self, cache: HybridRadixCache, num_rows: int) -> None:
        self.rows = cache.allocate_kv(num_rows)
        cache.arena.holders[self] = None

    def rows_moved(self, move: Move) -> int:
        return len(move.rename(self.rows))


def test_moved_rows_are_written_after_the_move_up_to_the_maximum_length() -> None:
    config = CacheConfig(
        memory="arena", total_bytes=192, kv_bytes_per_token=1, state_bytes=64, page_size=8
    )
    cache = build_prefix_cache(config)
    manager = CacheManager(cache, parse_placement("none"), num_rows=2, stateful=True)
    request = make_request(0, length=10)
    request.max_len = 20
    assert manager.begin(request) and manager.extend(request, 20)
    [(_, _, before)] = manager.take_step().row_writes
    manager.step_done()
    before = before.copy()
    freed, rest = Filler(cache, 40), Filler(cache, 64)
    del cache.arena.holders[freed]
    cache.free_kv(freed.rows)
    cache.free_kv(rest.rows[40:])
    rest.rows = rest.rows[:40].copy()
    assert len(request.lease.kv_indices) == 24
    slot = cache.allocate_slot()
    assert manager.has_moves and manager.must_wait_for_slab
    copies = manager.take_step()
    manager.step_done()
    [move] = copies.transfers
    moved = dict(zip(move.src.tolist(), move.dst.tolist(), strict=True))
    assert len(moved) == 24
    [(row, start, indices)] = copies.row_writes
    assert (row, start, indices.tolist()) == (
        request.row,
        0,
        [moved[old] for old in before.tolist()],
    )
    assert not manager.take_step()
    assert not manager.has_moves and not manager.must_wait_for_slab
    assert manager.lost_moves() is False
    cache.free_slot(slot)
