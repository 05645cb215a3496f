"""Store of responses that later requests may continue: in memory, bounded, separate for each
tenant."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

MAX_RESPONSES = 4096
ENTRY_BYTES = 512
"""Size of an entry without its contents."""


def held_bytes(value: Any) -> int:
    """Return the memory of a JSON ``value`` that shares nothing with other values. O(values in it).

    An object that occurs several times in it, such as a key of a parsed text, counts once.

    >>> held_bytes([{"text": "a" * 1000}]) > 1000
    True
    """
    num_bytes, left, seen = 0, [value], set[int]()
    while left:
        one = left.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        num_bytes += sys.getsizeof(one)
        if isinstance(one, dict):
            left.extend(one)
            left.extend(one.values())
        elif isinstance(one, list | tuple):
            left.extend(one)
    return num_bytes


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One response with the conversation that it ends."""

    items: list[dict[str, Any]]
    """All items from the beginning; entries may be shared with the previous response."""
    response: dict[str, Any]
    items_bytes: int
    """Memory of the ``items``, counting shared entries fully."""

    num_bytes: int
    """Memory of the whole entry, counted in the same way."""

    @classmethod
    def of(
        cls, items: list[dict[str, Any]], response: dict[str, Any], items_bytes: int
    ) -> StoredResponse:
        """Make an entry with its memory counted. O(values in the response)."""
        return cls(items, response, items_bytes, ENTRY_BYTES + items_bytes + held_bytes(response))


class ResponseStore:
    """The responses used last, in ``limit_bytes``."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._stored: OrderedDict[tuple[Hashable, str], StoredResponse] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def put(self, tenant: Hashable, response_id: str, stored: StoredResponse) -> None:
        """Store ``stored`` and evict the least recently used responses. A response larger than the
        limit is not stored. O(1) per response."""
        if stored.num_bytes > self._limit_bytes:
            return
        self.delete(tenant, response_id)
        self._stored[tenant, response_id] = stored
        self.num_bytes += stored.num_bytes
        while self.num_bytes > self._limit_bytes or len(self._stored) > MAX_RESPONSES:
            _, oldest = self._stored.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def get(self, tenant: Hashable, response_id: str) -> StoredResponse | None:
        """Return a response of the tenant, or None. O(1)."""
        stored = self._stored.get((tenant, response_id))
        if stored is not None:
            self._stored.move_to_end((tenant, response_id))
        return stored

    def delete(self, tenant: Hashable, response_id: str) -> bool:
        """Remove a response; its continuations stay complete. Returns False if there is none.
        O(1)."""
        stored = self._stored.pop((tenant, response_id), None)
        self.num_bytes -= 0 if stored is None else stored.num_bytes
        return stored is not None
