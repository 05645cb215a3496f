"""llama.cpp's server: no tree, but the last prompt of each slot and checkpoints along it.

Source: pull requests 16382, 19408, 20087 and 22929 of ggml-org/llama.cpp, and the defaults of its
server in November 2026. The rules were not compared with the server's own counters. Rules that
decide its hit rates:

- A request goes to the idle slot whose content shares most with the prompt, if that is more than a
  tenth of the prompt, else to the least recently used one. What that slot held is lost.
- A prompt that continues the whole content of its slot resumes from the live state. Otherwise it
  resumes at the deepest checkpoint within the shared part, and deeper checkpoints are erased.
- Checkpoints are saved at the start of the last user message, 512 + 4 and 4 tokens before the end
  of the prompt, and 8,192 tokens after the last one. A slot has at most 32; the oldest goes first.
- All slots share the KV cells. If they run out, the least recently used idle slot is cleared.

Left out: the copies of whole prompts in host memory (``--cache-ram``) and files of slots.
Checkpoints are in host memory, and so not part of the size.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from hybridcache.lab.rivals.protocol import BaselineConfig, PeerSession
from hybridcache.radix.tokens import Tokens, common_prefix_len

SLOTS = 4
CHECKPOINTS = 32
MIN_STEP = 8192
BEFORE_END = (512 + 4, 4)
LEAST_SHARE = 0.1
"""Share of a prompt that a slot must hold to be chosen for it."""


@dataclass(slots=True, eq=False)
class _Slot:
    namespace: Hashable = None
    tokens: Tokens = field(default_factory=lambda: np.empty(0, np.int32))
    checkpoints: list[int] = field(default_factory=list)
    """Positions, ascending."""
    is_running: bool = False
    time: int = 0

    def clear(self) -> None:
        """Forget the content."""
        self.tokens, self.checkpoints = self.tokens[:0], []


class LlamaCppCache:
    """llama.cpp's server with ``num_slots`` slots, which share the KV cells of the budget."""

    takes = ("boundaries",)

    def __init__(self, config: BaselineConfig, num_slots: int = SLOTS) -> None:
        self.config = config
        states_bytes = num_slots * config.state_bytes
        row_bytes = config.kv_bytes_per_token * config.unit
        self.num_tokens = max(0, config.budget_bytes - states_bytes) // row_bytes
        self.slots = [_Slot() for _ in range(num_slots)]
        self.clock = 0

    def begin(
        self, tokens: Tokens, namespace: Hashable = None, boundaries: tuple[int, ...] = ()
    ) -> LlamaCppSession | None:
        """See ``Baseline``. ``boundaries``: the last one inside the prompt starts its last part."""
        idle = [slot for slot in self.slots if not slot.is_running]
        held = sum(len(slot.tokens) for slot in self.slots if slot.is_running)
        if not idle or held + len(tokens) > self.num_tokens:
            return None
        shared = {
            slot: common_prefix_len(slot.tokens, tokens) if slot.namespace == namespace else 0
            for slot in idle
        }
        slot = max(idle, key=lambda one: (shared[one], one.time))
        if shared[slot] <= LEAST_SHARE * len(tokens):
            slot = min(idle, key=lambda one: one.time)
        cached_len, limit = shared[slot], len(tokens) - 1
        if not 0 < cached_len == len(slot.tokens) <= limit:  # Deeper checkpoints are erased.
            slot.checkpoints = [one for one in slot.checkpoints if one <= min(cached_len, limit)]
            cached_len = slot.checkpoints[-1] if slot.checkpoints else 0
        self.clock += 1
        slot.time, slot.is_running = self.clock, True
        slot.namespace, slot.tokens = namespace, tokens
        self._make_room()
        self._save(slot, cached_len, boundaries)
        return LlamaCppSession(self, slot, cached_len)

    def check(self) -> None:
        """Raise AssertionError if cells or checkpoints are inconsistent. O(checkpoints)."""
        assert sum(len(slot.tokens) for slot in self.slots) <= self.num_tokens, "too many cells"
        for slot in self.slots:
            assert slot.checkpoints == sorted({*slot.checkpoints}), "checkpoints are not in order"
            assert len(slot.checkpoints) <= CHECKPOINTS
            assert all(0 < position <= len(slot.tokens) for position in slot.checkpoints)

    def _make_room(self) -> None:
        """Clear idle slots until the cells suffice."""
        for slot in sorted(self.slots, key=lambda one: one.time):
            if sum(len(one.tokens) for one in self.slots) <= self.num_tokens:
                return
            if not slot.is_running:
                slot.clear()

    def _save(self, slot: _Slot, cached_len: int, boundaries: tuple[int, ...]) -> None:
        """Save the checkpoints of a prompt that is computed from ``cached_len`` on."""
        length, unit = len(slot.tokens), self.config.unit
        wanted = {length - max(1, before // unit) for before in BEFORE_END}
        wanted |= {max((one for one in boundaries if one < length), default=0)}
        last = slot.checkpoints[-1] if slot.checkpoints else 0
        wanted |= set(range(last + MIN_STEP // unit, length, MIN_STEP // unit))
        new = sorted(one for one in wanted if one >= cached_len and last < one < length)
        slot.checkpoints = [*slot.checkpoints, *new][-CHECKPOINTS:]


class LlamaCppSession(PeerSession):
    """One request in its slot."""

    def __init__(self, cache: LlamaCppCache, slot: _Slot, cached_len: int) -> None:
        self.cache, self.slot, self.cached_len = cache, slot, cached_len
        self.num_chunks = 1

    def finish(self, output: Tokens) -> None:
        """Keep prompt and answer, whose last token is not computed, in the slot if they fit."""
        cache, slot = self.cache, self.slot
        running = sum(len(one.tokens) for one in cache.slots if one.is_running)
        computed = output[: max(0, len(output) - 1)]
        if running + len(computed) <= cache.num_tokens:
            slot.tokens = np.concatenate((slot.tokens, computed))
            cache._make_room()
        slot.is_running = False
