"""Rows, and the copies that a batch has to make."""

from __future__ import annotations

import numpy as np

from engine.requests.request import Request
from engine.requests.sampling_params import SamplingParams
from engine.schedule.cache_manager import CacheManager
from hybridcache.build import CacheConfig, build_prefix_cache
from hybridcache.policies.placement.rules import parse_placement


def make_manager(page_size: int = 1) -> CacheManager:
    cache = build_prefix_cache(CacheConfig(num_kv_tokens=512, num_slots=4, page_size=page_size))
    return CacheManager(cache, lambda: parse_placement("backoff"), num_rows=2, stateful=True)


def make_request(arrival: int, length: int = 100) -> Request:
    return Request(
        str(arrival),
        np.arange(length, dtype=np.int32),
        SamplingParams(),
        arrival=arrival,
        arrival_s=0.0,
        max_len=length + 16,
        seed=0,
    )


def prefill(manager: CacheManager, request: Request) -> None:
    assert manager.begin(request)
    assert manager.extend(request, request.prompt_len)
    manager.take_checkpoint_slots(request, request.prompt_len)
    manager.take_copies()
    request.computed_len = request.prompt_len
    manager.publish(request)


def test_a_begun_request_has_its_state_restored_and_its_row_written_once() -> None:
    manager = make_manager()
    first, second = make_request(0), make_request(1)
    prefill(manager, first)
    assert manager.begin(second) and manager.extend(second, 100)
    restores, writes = manager.take_copies()
    assert restores == (second.lease.restore,)
    assert [(row, start, len(indices)) for row, start, indices in writes] == [
        (second.row, 0, 64),
        (second.row, 64, 36),
    ]
    assert manager.take_copies() == ((), ())


def test_a_request_that_ends_before_the_batch_leaves_no_copies() -> None:
    manager = make_manager()
    first, second = make_request(0), make_request(1)
    prefill(manager, first)
    assert manager.begin(second) and manager.extend(second, 100)
    manager.abort(second)
    assert manager.take_copies() == ((), ())
    assert second.lease is second.row is None
    manager.check()


def test_rows_are_as_many_as_were_given() -> None:
    manager = make_manager()
    requests = [make_request(i, 10) for i in range(3)]
    assert [manager.begin(request) for request in requests] == [True, True, False]
    manager.abort(requests[0])
    assert manager.begin(requests[2])


def test_no_row_is_written_past_the_longest_the_request_can_get() -> None:
    manager = make_manager(page_size=64)
    request = make_request(0)
    assert manager.begin(request) and manager.extend(request, 100)
    assert len(request.lease.kv_indices) == 128
    _, [(_, start, indices)] = manager.take_copies()
    assert start + len(indices) == request.max_len == 116
