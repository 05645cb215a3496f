"""SGLang's KV events, generated from changes of this project's tree.

SGLang's recorder identifies a page by the hash of its path, which it stores at its nodes. Here a
small record per node stores it. SGLang has no events for checkpoints.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from typing import Any

import numpy as np
from sglang.srt.mem_cache.events import KVCacheEventRecorder
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import split_node_hash_value

from hybridcache.api import Listener
from hybridcache.policies.protocol import Item
from hybridcache.radix.tree import RadixNode
from hybridcache.tokens import Tokens


class _Shadow:
    """Attributes of a node that the recorder reads."""

    __slots__ = ("event_hash_value", "hash_value", "key", "parent")

    def __init__(self, parent: _Shadow | None, key: Any) -> None:
        self.parent = parent
        self.key = key
        self.hash_value: list[str] | None = None if parent is not None else []
        self.event_hash_value: list[str] | None = None


class EventRecorder(Listener):
    """Listener that feeds SGLang's recorder. O(tokens) hashes if events are enabled."""

    def __init__(self, params: Any) -> None:
        self.recorder = KVCacheEventRecorder(
            enabled=params.enable_kv_cache_events,
            page_size=params.page_size,
            dynamo_format=params.dynamo_kv_event_format,
            lora_names=params.kv_event_lora_names,
        )
        self._page_size: int = params.page_size
        self._root = _Shadow(None, RadixKey(array("q")))
        self._shadows: dict[int, _Shadow] = {}

    def restart(self) -> None:
        """Report that all contents were discarded."""
        self._shadows.clear()
        self.recorder.record_all_cleared()

    def kv_stored(self, node: RadixNode) -> None:
        assert node.kv is not None and node.parent is not None
        above = node.parent.kv
        parent = self._root if above is None else self._shadows[above.serial]
        shadow = _Shadow(parent, _key(node.tokens, _namespace(node)))
        self._shadows[node.kv.serial] = shadow
        self.recorder.record_store(shadow)

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        assert upper.kv is not None and lower.kv is not None
        shadow, length = self._shadows[lower.kv.serial], upper.end - upper.start
        top = _Shadow(shadow.parent, shadow.key[:length])
        for name in ("hash_value", "event_hash_value"):
            halves = split_node_hash_value(getattr(shadow, name), length, self._page_size)
            for half, hashes in zip((top, shadow), halves, strict=True):
                setattr(half, name, hashes)
        shadow.parent, shadow.key = top, shadow.key[length:]
        self._shadows[upper.kv.serial] = top

    def kv_removed(self, node: RadixNode) -> None:
        assert node.kv is not None
        self.recorder.record_remove(self._shadows.pop(node.kv.serial))

    def checkpoint_stored(self, node: RadixNode) -> None:
        """Ignored: SGLang has no such event."""

    def checkpoint_removed(self, node: RadixNode) -> None:
        """Ignored: SGLang has no such event."""

    def chosen(self, item: Item) -> None:
        """Ignored: SGLang has no such event."""


def _namespace(node: RadixNode) -> Hashable:
    while node.parent is not None:
        node = node.parent
    return node.key


def _key(tokens: Tokens, namespace: Any) -> Any:
    extra_key, cache_salt = (None, None) if namespace is None else namespace
    ids = array("q")
    ids.frombytes(tokens.astype(np.int64).tobytes())
    return RadixKey(ids, extra_key, cache_salt=cache_salt)
