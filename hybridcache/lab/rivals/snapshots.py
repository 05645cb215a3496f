"""Rebuilt trees with a state at few positions: TensorRT-LLM's snapshots, and Ollama's MLX runner.

Sources: pull requests 16598 and 18272 of NVIDIA/TensorRT-LLM; pull requests 15058, 15914 and issue
18267 of ollama/ollama. None of the rules was compared with the system's own counters.

- *TensorRT-LLM*, reuse per conversation: blocks of 32 tokens. States are saved at the stable
  boundaries of the conversation, which the caller declares, and at the end of the KV match if that
  is deeper than the state (a branch), both floored to a block. The KV of the whole prompt is kept.
  Nothing is saved in decode.
- *Ollama*: a trie with states at multiples of 8,192 tokens and at the end of the answer. A prompt
  that leaves the last one before its end, as with a thinking template, falls back to a multiple.

Eviction and the division of the memory are those of ``SglangCache``, which is an assumption. A
running request holds one state, and only memory limits how many run.
"""

from __future__ import annotations

from hybridcache.lab.rivals.protocol import BaselineConfig
from hybridcache.lab.rivals.sglang import SglangCache
from hybridcache.lab.traces.prefix_tree import PrefixNode
from hybridcache.radix.tokens import Tokens

BLOCK = 32
STEP = 8192


class TensorRtCache(SglangCache):
    """TensorRT-LLM with snapshots at conversation boundaries and branches."""

    takes = ("boundaries",)

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config)
        self.slots_per_request, self.max_running = 1, self.num_slots
        self.grid = max(1, BLOCK // config.unit)
        self.decode_interval = 1 << 62  # none
        self._bare = 0
        """End of the extend that is inserted without a state."""

    def positions(
        self, start: int, end: int, cached_len: int, kv_len: int, boundaries: tuple[int, ...]
    ) -> list[int]:
        floored = {one // self.grid * self.grid for one in (*boundaries, kv_len)}
        last = end // self.grid * self.grid
        self._bare = 0 if last in floored else last
        return sorted(one for one in floored | {last} if max(start, cached_len) < one <= end)

    def insert(self, root: PrefixNode, tokens: Tokens) -> PrefixNode:
        """See ``SglangCache``; the end of an extend gets no state."""
        num_states = len(self.states)
        node = super().insert(root, tokens)
        if len(tokens) == self._bare and len(self.states) > num_states:
            self.drop_state(node)
        return node


class OllamaCache(SglangCache):
    """Ollama's MLX runner with states at multiples of ``STEP`` and at the end of an answer."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__(config, placement="end")
        self.max_running = self.num_slots
        self.step = max(1, STEP // config.unit)

    def positions(
        self, start: int, end: int, cached_len: int, kv_len: int, boundaries: tuple[int, ...]
    ) -> list[int]:
        return list(range((start // self.step + 1) * self.step, end + 1, self.step))
