"""Rendezvous hashing (Thaler and Ravishankar, 1998): each key maps to one replica.

When a replica leaves or joins, only its own keys move.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

from hybridcache.routing.protocol import ReplicaId


def rendezvous(key: bytes, replicas: Iterable[ReplicaId]) -> ReplicaId:
    """Return the highest-ranked replica for ``key``. O(replicas).

    Raises ValueError if there are no replicas.

    >>> rendezvous(b"a", (0, 1, 2)) == rendezvous(b"a", (2, 1, 0))
    True
    """
    return max(replicas, key=lambda replica: _rank(key, replica))


def _rank(key: bytes, replica: ReplicaId) -> bytes:
    return blake2b(key, digest_size=8, key=repr(replica).encode()[:64]).digest()
