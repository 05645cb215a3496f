"""The children of a node: None, the one child itself, or a dict of two and more by their keys.

Most nodes have one child or none, since a conversation is a chain. A dict for each would take 64 to 224 bytes and two cold
cache lines at every step of a walk.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from hybridcache.radix.node import RadixNode

Family: TypeAlias = "RadixNode | dict[Hashable, RadixNode] | None"


def with_child(family: Family, child: RadixNode) -> Family:
    """``family`` and ``child``, which has a key of its own. O(1)."""
    if family is None:
        return child
    if isinstance(family, dict):
        family[child.key] = child
        return family
    return {family.key: family, child.key: child}


def without_child(family: Family, child: RadixNode) -> Family:
    """``family`` less ``child``, which is in it. O(1)."""
    if not isinstance(family, dict):
        return None
    del family[child.key]
    if len(family) > 1:
        return family
    (only,) = family.values()
    return only


def only_child(family: Family) -> RadixNode | None:
    """The one child; None if there is none, or more than one. O(1)."""
    return None if isinstance(family, dict) else family


def members(family: Family) -> Collection[RadixNode]:
    """All of them, in the order in which they came. O(1)."""
    if isinstance(family, dict):
        return family.values()
    return () if family is None else (family,)
