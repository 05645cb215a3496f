"""Who is told when something enters or leaves a cache: event streams, studies, tests."""

from __future__ import annotations

from typing import Protocol

from hybridcache.policies.protocol import Item
from hybridcache.radix.node import RadixNode


class Listener(Protocol):
    """Called right after (stored, split) or right before (chosen, removed) the change. Must not change the cache.

    A resident node is known by the serial of its KV, ``node.kv.serial``: unique for as long as the cache lives.
    """

    def kv_stored(self, node: RadixNode) -> None:
        """``node`` became resident. Its parent was before it."""
        ...

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        """``lower`` was cut in two; ``upper`` is the new one, above it."""
        ...

    def kv_removed(self, node: RadixNode) -> None:
        """A leaf's KV goes; its checkpoint went before."""
        ...

    def checkpoint_stored(self, node: RadixNode) -> None:
        """``node`` has a checkpoint at its end now; its KV was resident before."""
        ...

    def checkpoint_removed(self, node: RadixNode) -> None:
        """The checkpoint at the end of ``node`` goes; the KV stays for now."""
        ...

    def chosen(self, item: Item) -> None:
        """The policy chose ``item`` to go; what goes with it follows."""
        ...
