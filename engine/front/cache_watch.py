"""Data of the page about an engine: changes of the tree, requests and memory.

Each reader has a watch. Without one the cache has no listener, and a step does no work for the
page.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from engine.core import EngineCore
from engine.errors import JsonObject
from engine.requests.request import Request
from hybridcache.adapters.watch.page import FORM
from hybridcache.adapters.watch.recorder import (
    Record,
    Recorder,
    node_id,
    show_namespace,
    slabs_record,
)
from hybridcache.command.extras import version

Progress = tuple[str, int, int, int | None]
"""State of a request, tokens computed, tokens of the answer, and id of the node of its lease."""
POOLS_EVERY_S = 0.25
"""Seconds between two looks at the memory and its slabs."""
MAX_NODES = 100_000
"""Maximum size of a tree for the page. Sending this many nodes takes a fifth of a second between
two steps."""


class Watch:
    """Follows one engine for a reader. Called in the engine's thread, between two steps."""

    def __init__(self, engine: EngineCore) -> None:
        """Raises ValueError if the tree has more nodes than a page can show."""
        self._engine = engine
        self._recorder = Recorder()
        self._ended = [self._of_ended(ended) for _, ended in engine.recent.listed()]
        self._shown: dict[str, Progress] = {}
        """State that was last reported, by id of each running request."""
        self._pools: list[Record] = []
        """Latest records of the memory and, with an arena, of its slabs."""
        self._pools_s = -math.inf
        if (num_nodes := engine.cache.num_nodes) > MAX_NODES:
            raise ValueError(
                f"The tree has {num_nodes:,} nodes, and a page shows {MAX_NODES:,} at most: "
                "/v1/cache has an outline."
            )
        engine.cache.subscribe(self._recorder)
        engine.on_end.append(self._on_end)

    def close(self) -> None:
        """Stop the watch: remove its listeners from the engine."""
        self._engine.cache.unsubscribe(self._recorder)
        self._engine.on_end.remove(self._on_end)

    def whole(self) -> JsonObject:
        """Return the state with which a page starts; called before ``take``. O(tree)."""
        return {"form": FORM, "meta": self._meta(), "records": self.take()}

    def take(self) -> list[Record]:
        """Return the changes since the last call; empty if there are none.

        O(changes + requests), and four times a second O(slabs).
        """
        engine, going = self._engine, {}
        records = self._recorder.take()
        records += self._ended
        self._ended = []
        for request in engine.requests:
            state = _progress(request)
            going[request.request_id] = state
            if self._shown.get(request.request_id) != state:
                records.append(_request_record(request, state))
        self._shown = going
        records += self._pool_changes()
        if not records:
            return []
        by_namespace, others = engine.cache.stats.by_namespace.values(), engine.cache.stats.others
        counted = sum(usage.requests for usage in by_namespace) + others.requests
        return [["time", round(engine.clock(), 4), counted], *records]

    def node(self, id_: int) -> JsonObject | None:
        """Return details of one node, or None if it is not resident. O(path).

        ``tokens`` are its last 4,096 ids, or None if it belongs to a tenant.
        """
        node = self._recorder.nodes.get(id_)
        if node is None or node.kv is None:
            return None
        root = node
        while root.parent is not None:
            root = root.parent
        item = node.kv if node.checkpoint is None else node.checkpoint
        arena = self._engine.cache.arena
        rows = node.kv.indices
        return {
            "id": id_,
            "start": node.start,
            "end": node.end,
            "tokens": None if root.key is not None else node.tokens[-4096:].tolist(),
            "locks": node.locks,
            "frees_bytes": item.size_bytes,
            "recompute_tokens": item.span,
            "slabs": [] if arena is None else sorted(set((rows // arena.slab_rows).tolist())),
        }

    def _meta(self) -> JsonObject:
        engine = self._engine
        memory, report, arena = engine.runner.memory, engine.report(), engine.cache.arena
        return {
            "title": engine.model_name,
            "version": version(),
            "kv_bytes": memory.row_bytes,
            "state_bytes": memory.state_bytes if memory.is_stateful else 0,
            "total_bytes": memory.total_bytes,
            "memory": report.memory,
            "slab_rows": arena.slab_rows if arena is not None and arena.num_slabs else None,
            "num_slabs": 0 if arena is None else arena.num_slabs,
            "grid": report.grid,
            "eviction": report.eviction,
            "checkpoints": list(report.checkpoints),
        }

    def _on_end(self, ended: Request) -> None:
        self._ended.append(self._of_ended(ended))

    def _of_ended(self, ended: Request) -> Record:
        node = node_id(self._engine.cache.match(ended.tokens, ended.namespace).node)
        reason, num_tokens = ended.finish_reason or "abort", len(ended.tokens)
        progress = reason, num_tokens, num_tokens - ended.prompt_len, node
        return _request_record(ended, progress, ended.finished_s)

    def _pool_changes(self) -> list[Record]:
        engine, now_s = self._engine, self._engine.clock()
        if now_s - self._pools_s < POOLS_EVERY_S:
            return []
        before, arena = self._pools, engine.cache.arena
        self._pools, self._pools_s = [_memory_record(engine)], now_s
        if arena is not None:
            self._pools.append(slabs_record(arena))
        return [record for record in self._pools if record not in before]


def _request_record(one: Request, progress: Progress, finished_s: float | None = None) -> Record:
    """Return the record of a request."""
    state, computed_len, answer_len, node = progress
    shown = {
        "id": one.request_id,
        "conversation": one.session.number,
        "namespace": show_namespace(one.namespace),
        "state": state,
        "prompt": one.prompt_len,
        "computed": computed_len,
        "answer": answer_len,
        "cached": one.cached_len,
        "losses": None if one.losses is None else one.losses._asdict(),
        "node": node,
        "preemptions": one.num_preemptions,
        "arrived_s": one.arrival_s,
        "scheduled_s": one.scheduled_s,
        "first_token_s": one.first_token_s,
        "finished_s": finished_s,
    }
    return ["request", shown]


def _memory_record(engine: EngineCore) -> Record:
    report = engine.report()
    pools = {"bytes": report.bytes, "kv": report.kv, "slots": report.slots}
    usage, queue = report.usage, report.queue
    going = [request for request in engine.requests if request.lease is not None]
    shown: dict[str, object] = {
        **{name: [pool.free, pool.cached, pool.held] for name, pool in pools.items()},
        # Of ended requests, as the other shares of the page: a long prompt is counted at its start.
        "prompt_tokens": usage["prompt_tokens"] - sum(one.prompt_len for one in going),
        "cached_tokens": usage["cached_tokens"] - sum(one.cached_len for one in going),
        "evicted_tokens": usage["evicted_tokens"],
        "evicted_checkpoints": usage["evicted_slots"],
        "running": report.num_running,
        "waiting": report.num_waiting,
        "sessions": [queue.live_sessions, queue.waiting_sessions],
        "admission": _admission_text(report.admission, queue.figures),
    }
    return ["memory", shown]


def _admission_text(policy: str, figures: Mapping[str, float | str]) -> str:
    """Return policy, limit and reason on one line."""
    reason = figures.get("reason", "")
    numbers = [f"{name} {value:g}" for name, value in figures.items() if not isinstance(value, str)]
    return "; ".join(filter(None, [policy, str(reason), ", ".join(numbers)]))


def _progress(request: Request) -> Progress:
    lease, answer_len = request.lease, request.num_tokens - request.prompt_len
    if lease is None:
        return "waiting", 0, answer_len, None
    state = "prefill" if request.is_prefilling else "decode"
    return state, request.computed_len, answer_len, node_id(lease.node)
