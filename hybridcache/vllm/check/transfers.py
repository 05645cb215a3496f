"""Transfers of the check: identities of rows and states, between device, host and a remote node.

A transfer reads its source and writes its destination at its end, up to ``late`` steps after the
step that started it, and after the tokens of that step are computed. So a block that is reused or
resumed from without a fence shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingWorkerMetadata
from vllm.v1.outputs import KVConnectorOutput

GARBAGE = -1
"""Content of memory in which no state is known to be."""


class _Running(NamedTuple):
    """Transfer that has started."""

    end_step: int
    move: Callable[[], None]
    request_id: str | None
    """Request that waits for a load. None for stores, and for loads within their step."""
    blocks: np.ndarray
    """Blocks of the device that a load writes."""


class Transfers:
    """Worker of OffloadingConnector and of RemotePrefill."""

    def __init__(self, contents: Any, live: Mapping[str, Any], options: Any) -> None:
        self.contents, self.live, self.options = contents, live, options
        self._chance = random.Random(options.seed + 1)
        self._host: dict[int, tuple[np.ndarray, int]] = {}
        """Rows and state of each chunk of host memory."""
        self._queued: dict[int, Any] = {}
        """Stores that the next step starts."""
        self._running: dict[Any, _Running] = {}
        self._done: dict[int, int] = {}
        self._received: set[str] = set()
        self._failed: set[str] = set()

    def start(self, meta: Any, step: int) -> None:
        """Carry out what must precede the computation of a step, and start its other transfers."""

        def add(key: Any, move: Callable[[], None], blocks: Any, request_id: Any = None) -> None:
            end = step + self._chance.randint(0, self.options.late)
            self._running[key] = _Running(end, move, request_id, np.array(blocks, np.intp))

        if isinstance(meta, RemoteMetadata):
            for request_id, length, tables in meta.loads:
                move = partial(self._receive, self.live[request_id].prefix, length, tables)
                blocks = [block for table in tables for _, block in table]
                add(request_id, move, blocks, request_id)
            return
        stores = dict(meta.store_jobs)
        for number in meta.jobs_to_flush or ():
            job = stores.pop(number, None) or self._queued.pop(number, None)
            if job is not None:
                self._store(job)
                self._done[number] = 1
            elif number in self._running:
                self._end(number)
        for number, job in self._queued.items():
            add(number, partial(self._store, job), ())
        self._queued = stores
        for number, job in meta.load_jobs.items():
            if getattr(job, "sync", False):
                self._load(job)
                self._done[number] = 1
            else:
                add(number, partial(self._load, job), job.dst_spec.block_ids, job.req_id)

    def finish(self, step: int) -> KVConnectorOutput:
        """End the transfers that are due, and return what the worker reports of this step."""
        for key in [key for key, one in self._running.items() if one.end_step <= step]:
            self._end(key)
        output = KVConnectorOutput(
            finished_recving=self._received,
            kv_connector_worker_meta=OffloadingWorkerMetadata(completed_jobs=self._done)
            if self._done
            else None,
        )
        if self._failed:
            output.failed_recving = self._failed
        self._done, self._received, self._failed = {}, set(), set()
        return output

    def _end(self, key: Any) -> None:
        one = self._running.pop(key)
        if one.request_id is not None:
            self._received.add(one.request_id)
        if one.request_id is not None and self._chance.random() < self.options.failures:
            self._failed.add(one.request_id)
            self.contents.report.failed_loads += 1
            self.contents.rows[one.blocks] = self.contents.state[one.blocks] = GARBAGE
        else:
            one.move()
        if key != one.request_id:
            self._done[key] = 1

    def _store(self, job: Any) -> None:
        contents = self.contents
        for block, chunk in zip(job.src_spec.block_ids, job.dst_spec.block_ids, strict=True):
            self._host[int(chunk)] = contents.rows[block].copy(), contents.state[block]
        contents.report.stored_blocks += len(job.src_spec.block_ids)

    def _load(self, job: Any) -> None:
        contents = self.contents
        for chunk, block in zip(job.src_spec.block_ids, job.dst_spec.block_ids, strict=True):
            contents.rows[block], contents.state[block] = self._host[int(chunk)]
        contents.report.loaded_blocks += len(job.dst_spec.block_ids)

    def _receive(self, prefix: np.ndarray, length: int, tables: Any) -> None:
        """Write the rows and the state of the first ``length`` tokens, as another node has them."""
        contents, size = self.contents, self.contents.size
        for index, block in tables[0]:
            rows = prefix[index * size + 1 : min((index + 1) * size, length) + 1]
            contents.rows[block, : len(rows)] = rows
        for index, block in (one for table in tables[1:] for one in table):
            contents.state[block] = prefix[length] if index == (length - 1) // size else GARBAGE
        contents.report.loaded_blocks += sum(map(len, tables))


class RemoteMetadata(KVConnectorMetadata):
    """Loads of one step: request, length in tokens, and (index, block) to write by group."""

    def __init__(self, loads: list[tuple[str, int, list[list[tuple[int, int]]]]]) -> None:
        self.loads = loads


class RemotePrefill(KVConnectorBase_V1, SupportsHMA):
    """Scheduler side of a decode node whose prompts other nodes compute, up to the last token.

    ``kv_connector_extra_config``: ``share`` of the prompts that another node computes (default 1),
    and ``divergent``: the state always travels, and attention from the end of the local rows on,
    as with NIXL (default true).
    """

    asked_tokens = external_tokens = 0
    """Tokens of prompts that another node computed, and number of these that travelled."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        given = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._share, self._divergent = given.get("share", 1.0), given.get("divergent", True)
        self._chance: dict[str, float] = {}
        self._random = random.Random(0)
        self._loads: list[Any] = []

    @property
    def supports_divergent_local_hybrid_hits(self) -> bool:
        return bool(self._divergent)

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        count = request.num_prompt_tokens - 1 - num_computed_tokens
        chance = self._chance.setdefault(request.request_id, self._random.random())
        if count <= 0 or request.num_preemptions or chance >= self._share:
            return 0, False
        return count, True

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            self.asked_tokens += request.num_prompt_tokens
            self.external_tokens += num_external_tokens
            tables = [
                [(at, one.block_id) for at, one in enumerate(group) if is_new(one)]
                for group in blocks.blocks
            ]
            self._loads.append((request.request_id, request.num_prompt_tokens - 1, tables))

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        loads, self._loads = self._loads, []
        return RemoteMetadata(loads)

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, Any]:
        return False, None

    # The worker side is ``Transfers``.
    def start_load_kv(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_for_layer_load(self, *args: Any) -> None: ...
    def save_kv_layer(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_for_save(self) -> None: ...


def is_new(block: Any) -> bool:
    """Return whether the cache did not have this block."""
    return not block.is_null and block.block_hash is None
