"""The outlines of the latest requests, in a bounded number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from engine.history.explain import Found
from engine.history.outline import Outline
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

    @property
    def num_bytes(self) -> int:
        """About what it takes."""
        return self.outline.num_bytes + (self.chat.size if self.chat is not None else 0)


class RequestMemory:
    """Requests by the id of their answer, the latest in ``limit_bytes``. Safe from any thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._known: OrderedDict[str, Remembered] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def get(self, answer_id: str, namespace: Hashable) -> Remembered | None:
        """What is known of an answer, to requests of its own namespace alone."""
        with self._lock:
            known = self._known.get(answer_id)
        return known if known is not None and known.outline.namespace == namespace else None

    def find(self, answer_id: str) -> Remembered | None:
        """What is known of an answer, for the operator."""
        with self._lock:
            return self._known.get(answer_id)

    def put(self, answer_id: str, remembered: Remembered) -> None:
        """Remember a request, and forget the oldest. O(1) amortised."""
        size = remembered.num_bytes
        if size > self._limit_bytes:
            return
        with self._lock:
            assert answer_id not in self._known, "an id is given once"
            self._known[answer_id] = remembered
            self.num_bytes += size
            while self.num_bytes > self._limit_bytes:
                _, oldest = self._known.popitem(last=False)
                self.num_bytes -= oldest.num_bytes

    def nearest(self, answer_id: str) -> str | None:
        """Of the requests before ``answer_id`` in its namespace the one that shares most with it,
        the latest of equals; None: there is none that shares a token."""
        with self._lock:
            listed = list(self._known.items())
        at = next((i for i, (name, _) in enumerate(listed) if name == answer_id), 0)
        outline = listed[at][1].outline if listed else None
        best, best_len = None, 0
        for name, other in listed[max(at - NEAREST, 0) : at]:
            assert outline is not None
            if other.outline.namespace != outline.namespace:
                continue
            mine = outline.tokens[: outline.prompt_len]
            shared = common_prefix_len(cast(Tokens, other.outline.tokens), cast(Tokens, mine))
            if shared and shared >= best_len:
                best, best_len = name, shared
        return best

    def check(self) -> None:
        """AssertionError: the books are wrong. O(requests)."""
        sizes = [remembered.num_bytes for remembered in self._known.values()]
        assert sum(sizes) == self.num_bytes <= self._limit_bytes
