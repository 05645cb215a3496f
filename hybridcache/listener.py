"""Who is told when something enters or leaves a cache: event streams, studies, tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from hybridcache.policies.protocol import Item
from hybridcache.radix.node import RadixNode


class Listener(Protocol):
    """Called right after (stored, split) or right before (chosen, removed) the change. Must not change the cache, nor
    raise: the change it is told of is half done.

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


class Listeners(Listener):
    """Several listeners, told one after the other."""

    def __init__(self, members: tuple[Listener, ...]) -> None:
        self.members = members

    def kv_stored(self, node: RadixNode) -> None:
        for member in self.members:
            member.kv_stored(node)

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        for member in self.members:
            member.kv_split(upper, lower)

    def kv_removed(self, node: RadixNode) -> None:
        for member in self.members:
            member.kv_removed(node)

    def checkpoint_stored(self, node: RadixNode) -> None:
        for member in self.members:
            member.checkpoint_stored(node)

    def checkpoint_removed(self, node: RadixNode) -> None:
        for member in self.members:
            member.checkpoint_removed(node)

    def chosen(self, item: Item) -> None:
        for member in self.members:
            member.chosen(item)


def members_of(told: Listener | None) -> tuple[Listener, ...]:
    """Those who are told when ``told`` is."""
    if isinstance(told, Listeners):
        return told.members
    return () if told is None else (told,)


def joined(members: tuple[Listener, ...]) -> Listener | None:
    """One listener for all ``members``: itself where it is the only one, None where there is none."""
    if len(members) > 1:
        return Listeners(members)
    return members[0] if members else None


def introduce(listener: Listener, nodes: Iterable[RadixNode]) -> None:
    """Tell ``listener`` of all that is cached in ``nodes``, parents before children. O(nodes)."""
    for node in nodes:
        if node.kv is not None:
            listener.kv_stored(node)
        if node.checkpoint is not None:
            listener.checkpoint_stored(node)
