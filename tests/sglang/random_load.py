"""Random requests through SGLang's scheduler with little memory, checked after every step."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT, Modality, MultimodalDataItem

from hybridcache.allocators.moves import DEVICE, HOST
from hybridcache.radix.tiers import TieredRadixCache
from tests.sglang.scheduler import ROOMS, VOCAB, CPUScheduler, hashes

NAMES = ((None, None), ("adapter", None), (None, "salt"), ("adapter", "salt"))
"""Adapters and salts. A conversation keeps its own, with few exceptions."""


class Served(NamedTuple):
    """Totals of a random load."""

    requests: int
    aborted: int
    retracted: int
    flushes: int
    prompt_tokens: int
    cached_tokens: int
    """Of the requests that finished, by SGLang's own count."""
    resumed_tokens: int
    """Tokens from the cache, with compared rows and states: of all requests until retracted."""
    steps: int
    waits: int
    """Calls of the cache that wait for a forward pass, with overlapped passes."""
    checkpoints_in_flight: int
    """Calls of ``checkpoint`` during such a pass."""
    accepted_drafts: int
    rejected_drafts: int
    loaded_rows: int
    """Rows of KV and states that were loaded from the host."""


def placeholders(image: int, length: int) -> list[int]:
    """Return the ids that SGLang puts in place of an image of ``length`` tokens."""
    item = MultimodalDataItem(modality=Modality.IMAGE)
    item.set_hash(image)
    if not hasattr(item, "padding_sequence"):  # SGLang 0.5.22
        return [item.pad_value] * length
    return item.padding_sequence(length)


class RandomLoad:
    """Conversations, mostly recent ones, that continue, fork and repeat; some are aborted."""

    def __init__(
        self, scheduler: CPUScheduler, seed: int, image_share: float = 0.0, most: int = 10_000
    ) -> None:
        """``image_share`` of the turns begin with one of three images of equal size. At most
        ``most`` requests wait or run at once."""
        self.most = most
        self.scheduler = scheduler
        self.image_share = image_share
        self.random = random.Random(seed)
        self.histories: list[tuple[tuple[str | None, str | None], list[int]]] = [(NAMES[0], [])]
        self.running: dict[str, Any] = {}
        self.submitted = self.aborted = self.retracted = self.flushes = self.steps = 0
        self.prompt_tokens = self.cached_tokens = 0

    def run(self, num_requests: int, *, check_every: int = 1) -> Served:
        """Serve ``num_requests`` until nothing runs.

        Raises AssertionError if memory leaked, or a request resumed from something other than its
        prefix.
        """
        draining = False
        while self.submitted < num_requests or self.running:
            left = 0 if draining else num_requests - self.submitted
            while left and len(self.running) < self.most and self.random.random() < 0.6:
                self._submit()
                left -= 1
            if self.running and self.random.random() < 0.01:
                self._abort()
            idle = not self.scheduler.step()
            self.steps += 1
            self._collect()
            if self.steps % check_every == 0:
                self.check()
            draining = draining or self.random.random() < 0.002
            if draining and idle:
                draining = False
                self.check(idle=True)
                assert self.scheduler.flush_cache()
                self.flushes += 1
        while self.scheduler.step():
            self.check()
        self.check(idle=True)
        return Served(
            self.submitted - self.aborted,
            self.aborted,
            self.retracted,
            self.flushes,
            self.prompt_tokens,
            self.cached_tokens,
            self.scheduler.tp_worker.resumed_tokens,
            self.steps,
            self.scheduler.num_waits,
            self.scheduler.num_checkpoints_in_flight,
            *self.scheduler.count_drafts(),
            self._num_loaded(),
        )

    def _num_loaded(self) -> int:
        tree = self.scheduler.tree_cache.tree
        is_tiered = isinstance(tree, TieredRadixCache)
        self.scheduler.metrics_reporter._log_hicache_stats()
        return tree.offload.copied_rows.get((HOST, DEVICE), 0) if is_tiered else 0

    def run_in_turn(self, num_requests: int) -> list[int]:
        """Serve ``num_requests`` one after the other. Returns the cached tokens of each."""
        hits = []
        for _ in range(num_requests):
            self._submit()
            [request] = self.running.values()
            while self.scheduler.step():
                self.check()
            self._collect()
            hits.append(request.cached_tokens)
        self.check(idle=True)
        return hits

    def _submit(self) -> None:
        pick, draw = self.random, self.random.randrange
        recent = self.histories[-3:] if pick.random() < 0.9 else self.histories
        names, history = pick.choice(recent)
        if pick.random() < 0.1:
            names = pick.choice(NAMES)
        if pick.random() < 0.3 or len(history) > 800:
            history = history[: draw(len(history) + 1)]
        if self.image_share and pick.random() < self.image_share:
            history = [*history, *placeholders(draw(3), 70), 7, 8, 9]
        tokens = history + [draw(VOCAB) for _ in range(draw(1, pick.choice((4, 40, 400))))]
        rid = f"r{self.submitted}"
        length = pick.choice((1, 3, 9, 70))
        extra_key, salt = names
        self.running[rid] = self.scheduler.submit(
            rid, tokens[:1200], length, extra_key=extra_key, cache_salt=salt
        )
        self.submitted += 1

    def _abort(self) -> None:
        rid = self.random.choice(list(self.running))
        request = self.running[rid]
        if not request.finished():
            self.scheduler.abort_request(AbortReq(rid=rid))
            del self.running[rid]
            self.aborted += 1

    def _collect(self) -> None:
        for rid, request in list(self.running.items()):
            if not request.finished():
                continue
            del self.running[rid]
            if isinstance(request.finished_reason, FINISH_ABORT):  # its transfer failed
                self.aborted += 1
                continue
            self._verify(request)
            self.retracted += request.retraction_count
            self.prompt_tokens += len(request.origin_input_ids)
            self.cached_tokens += request.cached_tokens
            names = request.extra_key, request.cache_salt
            self.histories.append((names, [*request.origin_input_ids, *request.output_ids]))
            if len(self.histories) > 60:
                del self.histories[self.random.randrange(60)]

    def _verify(self, request: Any) -> None:
        """Check that the answer is that of the model without a cache."""
        prompt, answer = request.origin_input_ids, request.output_ids
        chain = hashes(request, [*prompt, *answer])
        expected = [int(abs(value)) % VOCAB for value in chain[len(prompt) - 1 : -1]]
        assert list(answer) == expected, f"{request.rid}: wrong answer"

    def check(self, idle: bool = False) -> None:
        """Check SGLang's invariants and this cache's: every row and slot is free, cached or held by
        a request."""
        scheduler = self.scheduler
        tree = scheduler.tree_cache
        unfinished = [req for _, req in ROOMS.values() if req.kv.holds_kv or not req.finished()]
        held = [req for req in unfinished if req.kv.holds_kv or req.kv.holds_mamba]
        owners = [r.kv for r in held if r.kv.holds_kv]
        rows = sum(kv.kv_allocated_len - kv.cache_protected_len for kv in owners)
        rows += sum(len(rows) for sent in tree._sent.values() for rows in sent)
        tree.tree.check(held_tokens=rows)
        pool = scheduler.req_to_token_pool
        slots = pool.mamba_allocator.available_size() + sum(_slots(r.kv) for r in held)
        assert slots + tree.tree.num_checkpoints == pool.mamba_pool.size, "a state slot leaked"
        if idle:
            tree.sanity_check()
            assert not held and tree.full_protected_size() == 0, "something is still locked"


def _slots(kv: Any) -> int:
    tracking = kv.mamba_ping_pong_track_buffer
    return int(kv.holds_mamba) + (0 if tracking is None else int((tracking >= 0).sum()))
