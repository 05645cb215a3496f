"""Who is notified when something enters or leaves a cache: event streams, studies, tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from hybridcache.policies.protocol import Item
from hybridcache.radix.node import RadixNode


class Listener(Protocol):
    """Called right after (stored, split) or right before (chosen, removed) the change. Must not
    change the cache.

    Nor should it raise: the change is half done when it is notified, and is completed, so that the
    caller learns what it owns; the listener is unsubscribed and its error logged.

    A resident node is known by the serial of its KV, ``node.kv.serial``: unique for as long as the
    cache lives.
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
    """Several listeners, notified one after the other. One that raises is dropped, and the logger
    ``hybridcache`` says so."""

    def __init__(self, members: tuple[Listener, ...]) -> None:
        self.members = members

    def kv_stored(self, node: RadixNode) -> None:
        self._tell("kv_stored", node)

    def kv_split(self, upper: RadixNode, lower: RadixNode) -> None:
        self._tell("kv_split", upper, lower)

    def kv_removed(self, node: RadixNode) -> None:
        self._tell("kv_removed", node)

    def checkpoint_stored(self, node: RadixNode) -> None:
        self._tell("checkpoint_stored", node)

    def checkpoint_removed(self, node: RadixNode) -> None:
        self._tell("checkpoint_removed", node)

    def chosen(self, item: Item) -> None:
        self._tell("chosen", item)

    def _tell(self, change: str, *what: object) -> None:
        for member in self.members:
            try:
                getattr(member, change)(*what)
            except Exception:
                self.members = tuple(one for one in self.members if one is not member)
                import logging  # not at the top: it is needed here alone

                logging.getLogger("hybridcache").exception(
                    "%r raised when notified of %s: it is notified no more", member, change
                )


def members_of(listener: Listener | None) -> tuple[Listener, ...]:
    """The listeners behind ``listener``: those it forwards to, itself alone, or none."""
    if isinstance(listener, Listeners):
        return listener.members
    return () if listener is None else (listener,)


def joined(members: tuple[Listener, ...]) -> Listener | None:
    """One listener for all ``members``; None where there is none."""
    return Listeners(members) if members else None


def introduce(listener: Listener, nodes: Iterable[RadixNode]) -> None:
    """Tell ``listener`` of all that is cached in ``nodes``, parents before children. O(nodes)."""
    for node in nodes:
        if node.kv is not None:
            listener.kv_stored(node)
        if node.checkpoint is not None:
            listener.checkpoint_stored(node)
