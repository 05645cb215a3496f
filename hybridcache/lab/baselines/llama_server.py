"""llama-server on a hybrid model: slots, a prompt cache in host memory, checkpoints per slot.

Source: the server's published rules (late 2026) and defaults: ``--parallel`` automatic (4 slots
over one KV buffer), ``--slot-prompt-similarity 0.1``, ``--cache-ram``, ``--cache-idle-slots``,
``--ctx-checkpoints 32``, ``--checkpoint-min-step 8192``, batches of 2,048 tokens, 512 per pass.

- *A slot* holds one text, its KV and the state at its very end; slots share nothing. A request
  takes the free slot that shares most with the prompt, if that is more than a tenth of it.
  Otherwise it takes the least recently used slot.
- *The prompt cache* holds whole texts with KV, end state and the checkpoints of their slot. The
  oldest is evicted first.
- *Saving*: a slot's text is saved when it is about to be lost. That is the case if less than half
  of it would be kept, or if the slot was taken as the oldest. A text contained in a saved one is
  not saved, and saved prefixes of a new text are removed. When a request starts, every other free
  slot is saved and cleared.
- *Loading*: after saving, a cached text is moved to the slot. It must keep more of itself and of
  the prompt than the slot's text does, and at least a quarter of itself. If the KV buffer has no
  room for it next to the other slots, the slot is left empty.
- *Resuming*: from the end of the slot's text if all of it is a prefix of the prompt. Otherwise
  from the newest checkpoint within the shared part, or else from the start. Later checkpoints are
  erased, so a second branch is computed again.
- *Checkpoints* are in host memory and contain the state alone. They are saved within the last pass
  and four tokens before the prompt's end, and at the resumed position if that is within the last
  pass. Decoding saves none. When the list is full, checkpoints of earlier requests within the
  minimum step are removed first, then the oldest.

``host_bytes`` covers everything: the cache gets the memory that the checkpoints of the slots leave.
If the checkpoints alone exceed it, the oldest are removed (the real server does not count them).
The KV buffer has the budget less one state per slot.

Left out: checkpoints at the starts of user messages (traces do not contain them), context shift,
chunks reused by shifting (impossible for hybrid models), drafts, and slot files.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from hybridcache.lab.baselines.protocol import BaselineConfig
from hybridcache.tokens import Tokens, common_prefix_len

MIN_STEP = 8192
BATCH, PASS = 2048, 512
_NOTHING = np.empty(0, np.int32)


@dataclass(slots=True, eq=False)
class _Text:
    """Contents of a slot or of an entry of the cache."""

    namespace: Hashable = None
    tokens: Tokens = field(default_factory=lambda: _NOTHING)
    checkpoints: list[tuple[int, int]] = field(default_factory=list)
    """(ids before it, number of the request that made it), oldest first."""

    def shared(self, namespace: Hashable, tokens: Tokens) -> int:
        """Return the number of ids that ``tokens`` shares with the text from its start."""
        return common_prefix_len(self.tokens, tokens) if self.namespace == namespace else 0


@dataclass(slots=True, eq=False)
class _ServerSlot:
    text: _Text = field(default_factory=_Text)
    last_used: int = 0
    is_running: bool = False


class LlamaServerCache:
    """llama-server. ``num_slots`` is ``--parallel``; ``max_checkpoints`` is
    ``--ctx-checkpoints``."""

    def __init__(
        self, config: BaselineConfig, num_slots: int = 4, max_checkpoints: int = 32
    ) -> None:
        self.config = config
        self.row_bytes = config.kv_bytes_per_token * config.unit
        self.num_rows = max(0, config.budget_bytes - num_slots * config.state_bytes)
        self.num_rows //= self.row_bytes
        self.max_checkpoints = max_checkpoints
        self.slots = [_ServerSlot() for _ in range(num_slots)]
        self.cache: list[_Text] = []
        """Saved texts, oldest first."""
        self.cache_bytes = 0
        self.clock = self.spilled_bytes = 0

    def begin(self, tokens: Tokens, namespace: Hashable = None) -> LlamaServerSession | None:
        """Take a slot and compute the prompt. Returns None if no slot or too little KV is free.
        O(texts x prompt)."""
        running = [slot for slot in self.slots if slot.is_running]
        used = sum(len(slot.text.tokens) for slot in running)
        if len(running) == len(self.slots) or len(tokens) > self.num_rows - used:
            return None
        self.clock += 1
        slot, fetched = self._take_slot(tokens, namespace)
        slot.is_running, slot.last_used = True, self.clock
        for other in self.slots:
            if not other.is_running:
                self._save(other.text)
                other.text = _Text()
        return LlamaServerSession(self, slot, tokens, namespace, fetched)

    def check(self) -> None:
        """Check that KV and host memory are within their bounds and that the cache's size is that
        of its texts. Raises AssertionError otherwise. O(texts)."""
        assert self.num_free >= 0, "more KV than there is room for"
        assert self.cache_bytes == sum(map(self._size, self.cache)), "the cache's books"
        assert self.host_used <= self.config.host_bytes, "more host memory than there is"
        for text in (*self.cache, *(slot.text for slot in self.slots)):
            assert len(text.checkpoints) <= self.max_checkpoints, "too many checkpoints"
            assert all(0 < at <= len(text.tokens) for at, _ in text.checkpoints), "past the text"

    @property
    def num_free(self) -> int:
        """Free rows of the KV buffer. O(slots)."""
        return self.num_rows - sum(len(slot.text.tokens) for slot in self.slots)

    @property
    def host_used(self) -> int:
        """Bytes of the cache and of the slots' checkpoints. O(slots)."""
        live = sum(len(slot.text.checkpoints) for slot in self.slots)
        return self.cache_bytes + live * self.config.state_bytes

    def add_checkpoint(self, text: _Text, position: int) -> None:
        """Save the state after ``position`` ids of a slot's text, which is computed up to there."""
        kept, place, last = text.checkpoints, 0, None
        while len(kept) + 1 >= self.max_checkpoints and place < len(kept):
            at, made_by = kept[place]
            at *= self.config.unit
            if made_by != self.clock and last is not None and at <= last + MIN_STEP:
                del kept[place]
            else:
                last, place = at, place + 1
        del kept[: max(0, len(kept) + 1 - self.max_checkpoints)]
        kept.append((position, self.clock))
        self.spilled_bytes += self.config.state_bytes
        while self.host_used > self.config.host_bytes:
            if self.cache:
                self._drop(self.cache[0])
            else:
                longest = max(self.slots, key=lambda slot: len(slot.text.checkpoints))
                del longest.text.checkpoints[0]

    def _take_slot(self, tokens: Tokens, namespace: Hashable) -> tuple[_ServerSlot, int]:
        """Return the slot for a prompt, with the text to continue from, and the number of bytes
        loaded for it."""
        free = [slot for slot in self.slots if not slot.is_running]
        best = max(free, key=lambda slot: slot.text.shared(namespace, tokens))
        shared = best.text.shared(namespace, tokens)
        if 10 * shared > len(tokens):
            if 2 * shared >= len(best.text.tokens):
                return best, 0
        else:
            best = min(free, key=lambda slot: slot.last_used)
        self._save(best.text)
        return best, self._load(best, tokens, namespace)

    def _save(self, text: _Text) -> None:
        """Copy a slot's text to the cache, if it fits there."""
        size, length = self._size(text), len(text.tokens)
        if not length or size + self.host_used - self.cache_bytes > self.config.host_bytes:
            return
        if any(old.shared(text.namespace, text.tokens) == length for old in self.cache):
            return
        for old in list(self.cache):
            if old.shared(text.namespace, text.tokens) == len(old.tokens):
                self._drop(old)
        while self.cache and size + self.host_used > self.config.host_bytes:
            self._drop(self.cache[0])
        self.cache.append(_Text(text.namespace, text.tokens, list(text.checkpoints)))
        self.cache_bytes += size
        self.spilled_bytes += length * self.row_bytes + self.config.state_bytes

    def _load(self, slot: _ServerSlot, tokens: Tokens, namespace: Hashable) -> int:
        """Load the cached text that serves ``tokens`` best into ``slot``, if it is better than the
        slot's own. Returns the number of bytes copied to the device."""
        shared, length = slot.text.shared(namespace, tokens), len(slot.text.tokens)
        found = None
        for text in self.cache:
            now, size = text.shared(namespace, tokens), len(text.tokens)
            keeps_more = not length or now * length > shared * size
            if 4 * now >= size and keeps_more and now > shared:
                found, shared, length = text, now, size
        if found is None:
            return 0
        slot.text = _Text()
        if len(found.tokens) > self.num_free:
            return 0
        self._drop(found)
        slot.text = found
        return len(found.tokens) * self.row_bytes + self.config.state_bytes

    def _size(self, text: _Text) -> int:
        states = 1 + len(text.checkpoints)
        return len(text.tokens) * self.row_bytes + states * self.config.state_bytes

    def _drop(self, text: _Text) -> None:
        self.cache.remove(text)
        self.cache_bytes -= self._size(text)


class LlamaServerSession:
    """One request in its slot."""

    def __init__(
        self,
        cache: LlamaServerCache,
        slot: _ServerSlot,
        tokens: Tokens,
        namespace: Hashable,
        fetched_bytes: int,
    ) -> None:
        self.cache, self.slot, self.tokens = cache, slot, tokens
        self.fetched_bytes = fetched_bytes
        text, state_bytes = slot.text, cache.config.state_bytes
        shared = text.shared(namespace, tokens)
        start = shared
        if shared < len(text.tokens) or shared == len(tokens):
            usable = [at for at, _ in text.checkpoints if at <= min(shared, len(tokens) - 1)]
            start = usable[-1] if usable else 0
            self.fetched_bytes += state_bytes * bool(usable)
        kept = [one for one in text.checkpoints if one[0] <= start]
        slot.text = _Text(namespace, tokens[:start], kept)
        self.cached_len = start
        self.num_chunks = self._prefill(start)

    def _prefill(self, start: int) -> int:
        """Compute the prompt in batches, with a checkpoint before each that begins near its end.
        Returns the number of batches."""
        cache, text, length = self.cache, self.slot.text, len(self.tokens)
        unit = cache.config.unit
        stops = {(length * unit - before) // unit for before in (PASS + 4, 4)}
        num_batches = 0
        while start < length:
            end = min(start + max(1, BATCH // unit), length)
            end = min((stop for stop in stops if start < stop < end), default=end)
            text.tokens = self.tokens[:start]
            if start and (end == length or length * unit < end * unit + PASS):
                cache.add_checkpoint(text, start)
            start = end
            num_batches += 1
        text.tokens = self.tokens
        return num_batches

    def finish(self, output: Tokens) -> None:
        """Decode ``output``, all but its last token computed; the slot keeps everything. Call
        once."""
        cache, text = self.cache, self.slot.text
        computed = output[: max(0, len(output) - 1)] if cache.config.unit == 1 else output
        text.tokens = np.concatenate((text.tokens, computed[: cache.num_free]))
        self.slot.is_running = False
