"""Ollama's own runner on a hybrid model: one slot, a ring of checkpoints on the device.

Source: the published rules and defaults of its runner's input cache and recurrent cache (2026).

- *One slot*: its scheduler always serves hybrid architectures one request at a time.
  ``num_slots`` above 1 applies the rule for other architectures: the first slot that shares most
  of the prompt is taken, and its contents past the shared part are lost.
- *Checkpoints*: a ring of 32 per slot, reserved on the device. A forward pass is 512 tokens
  of a prompt, or one of decode. It leaves a checkpoint at its end if that is at least 16 tokens
  into the text, and at least 1,280 past the last checkpoint.
- *Resuming* is always from a checkpoint, even if the prompt continues the slot's text. The deepest
  one within the shared part is used, and those past it are lost. Without one, everything is
  computed again.

No host memory is used. Left out: context shift, forks between slots, the MLX runner.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from hybridcache.lab.baselines.protocol import BaselineConfig
from hybridcache.tokens import Tokens, common_prefix_len

PASS = 512
FIRST, INTERVAL = 16, 1280
"""Least tokens before the first checkpoint, and between checkpoints."""


@dataclass(slots=True, eq=False)
class _RunnerSlot:
    namespace: Hashable = None
    tokens: Tokens = field(default_factory=lambda: np.empty(0, np.int32))
    ring: list[int] = field(default_factory=list)
    """Ids before each checkpoint, in the order in which they will be overwritten."""
    is_running: bool = False


class OllamaCache:
    """Ollama's runner. The budget holds, for each slot, a state and its ring, and KV for the rest.
    A ring that would take more than three quarters of it is shorter; the real one is not."""

    def __init__(self, config: BaselineConfig, num_slots: int = 1, ring: int = 32) -> None:
        self.config = config
        room = 3 * config.budget_bytes // (4 * num_slots * config.state_bytes)
        self.ring = ring = max(1, min(ring, room - 1))
        reserved = num_slots * (1 + ring) * config.state_bytes
        row_bytes = config.kv_bytes_per_token * config.unit
        self.num_rows = max(0, config.budget_bytes - reserved) // row_bytes // num_slots
        """KV rows of each slot."""
        self.slots = [_RunnerSlot() for _ in range(num_slots)]
        self.spilled_bytes = 0

    def begin(self, tokens: Tokens, namespace: Hashable = None) -> OllamaSession | None:
        """Take the slot that shares most of the prompt. Returns None if all are taken, or if the
        prompt is longer than a slot. O(slots x prompt)."""
        free = [slot for slot in self.slots if not slot.is_running]
        if not free or len(tokens) > self.num_rows:
            return None
        shared = [
            common_prefix_len(slot.tokens, tokens) if slot.namespace == namespace else 0
            for slot in free
        ]
        best = max(range(len(free)), key=shared.__getitem__)
        return OllamaSession(self, free[best], tokens, namespace, shared[best])

    def check(self) -> None:
        """Check that texts and rings are within their bounds. Raises AssertionError otherwise.
        O(slots)."""
        for slot in self.slots:
            assert len(slot.tokens) <= self.num_rows, "a text longer than its slot"
            assert len(slot.ring) <= self.ring, "more checkpoints than the ring has"
            assert all(0 < at <= len(slot.tokens) for at in slot.ring), "past the text"


class OllamaSession:
    """One request in its slot."""

    fetched_bytes = 0

    def __init__(
        self,
        cache: OllamaCache,
        slot: _RunnerSlot,
        tokens: Tokens,
        namespace: Hashable,
        shared: int,
    ) -> None:
        self.cache, self.slot = cache, slot
        limit = min(shared, len(tokens) - 1)
        slot.ring = [at for at in slot.ring if at <= limit]
        self.cached_len = start = max(slot.ring, default=0)
        slot.namespace, slot.tokens, slot.is_running = namespace, tokens, True
        self.num_chunks = 0
        self._last = start
        step = max(1, PASS // cache.config.unit)
        for begun in range(start, len(tokens), step):
            self._pass(min(begun + step, len(tokens)))
            self.num_chunks += 1

    def finish(self, output: Tokens) -> None:
        """Decode ``output``, all but its last token computed. Call once."""
        slot, unit = self.slot, self.cache.config.unit
        computed = output[: max(0, len(output) - 1)] if unit == 1 else output
        before = len(slot.tokens)
        slot.tokens = np.concatenate((slot.tokens, computed))[: self.cache.num_rows]
        while (at := self._next(before)) <= len(slot.tokens):
            self._pass(at)
            before = at
        slot.is_running = False

    def _next(self, done: int) -> int:
        """Return the position at which decoding, after ``done`` ids, saves its next checkpoint."""
        unit = self.cache.config.unit
        wanted = self._last + -(-INTERVAL // unit) if self._last else -(-(FIRST + 1) // unit)
        return max(wanted, done + 1)

    def _pass(self, end: int) -> None:
        """End a forward pass after ``end`` ids."""
        slot, unit = self.slot, self.cache.config.unit
        since = (end - self._last) * unit
        if end * unit <= FIRST or (self._last and since < INTERVAL):
            return
        slot.ring = [*slot.ring, end][-self.cache.ring :]
        self._last = end
