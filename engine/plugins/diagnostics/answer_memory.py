"""The outlines of the latest requests, in a bounded number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from engine.plugins.diagnostics.explain import Found
from engine.plugins.diagnostics.outline import Outline
from hybridcache.tokens import Tokens, common_prefix_len

NEAREST = 64
"""Requests that are looked through for the one that shares most."""


@dataclass(frozen=True, slots=True)
class ChatParts:
    """A chat as a template renders it, of ``size`` bytes."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    variables: Mapping[str, Any] | None
    size: int


@dataclass(frozen=True, slots=True)
class Remembered:
    """One request: what it asked for, and what the cache had of it."""

    outline: Outline
    found: Found
    chat: ChatParts | None = None
    """To name the part that a position lies in; None: a namespace's is not kept."""
    request_id: str | None = None
    """The engine's id of the request; None if nobody asks by it."""

    @property
    def num_bytes(self) -> int:
        """About what it takes."""
        return self.outline.num_bytes + (self.chat.size if self.chat is not None else 0)


class RequestMemory:
    """Requests by their tenant and the id of their answer, the latest in ``limit_bytes``. Safe from
    any thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._known: OrderedDict[tuple[Hashable, str], Remembered] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def get(self, tenant: Hashable, answer_id: str) -> Remembered | None:
        """Return what is known of an answer of ``tenant``. O(1)."""
        with self._lock:
            return self._known.get((tenant, answer_id))

    def find(self, name: str) -> tuple[str, Remembered] | None:
        """Return the id of the latest answer with this id, or this ``request_id``, of any tenant,
        and what is known of it: for the operator. O(requests)."""
        with self._lock:
            listed = list(self._known.items())
        return next(
            (
                (answer_id, known)
                for (_, answer_id), known in reversed(listed)
                if name in (answer_id, known.request_id)
            ),
            None,
        )

    def put(self, tenant: Hashable, answer_id: str, remembered: Remembered) -> None:
        """Remember a request, in place of an earlier one with this id, and forget the oldest. O(1)
        amortised."""
        size = remembered.num_bytes
        if size > self._limit_bytes:
            return
        with self._lock:
            earlier = self._known.pop((tenant, answer_id), None)
            self._known[tenant, answer_id] = remembered
            self.num_bytes += size - (0 if earlier is None else earlier.num_bytes)
            while self.num_bytes > self._limit_bytes:
                _, oldest = self._known.popitem(last=False)
                self.num_bytes -= oldest.num_bytes

    def nearest(self, later: Remembered) -> tuple[str, Remembered] | None:
        """Return the id of the request before ``later`` in its namespace that shares most with it,
        the latest of equals, and what is known of it; None if none shares a token."""
        with self._lock:
            listed = list(self._known.items())
        at = next((i for i, (_, known) in enumerate(listed) if known is later), 0)
        outline = later.outline
        best, best_len = None, 0
        for (_, answer_id), other in listed[max(at - NEAREST, 0) : at]:
            if other.outline.namespace != outline.namespace:
                continue
            mine = outline.tokens[: outline.prompt_len]
            shared = common_prefix_len(cast(Tokens, other.outline.tokens), cast(Tokens, mine))
            if shared and shared >= best_len:
                best, best_len = (answer_id, other), shared
        return best

    def check(self) -> None:
        """AssertionError: the books are wrong. O(requests)."""
        sizes = [remembered.num_bytes for remembered in self._known.values()]
        assert sum(sizes) == self.num_bytes <= self._limit_bytes
