"""Drafts without weights: what the prefix cache, or the request itself, saw follow here before."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

from engine.drafts.suffix import SuffixIndex
from engine.requests.request import Request
from hybridcache.tokens import Tokens

MAX_TEXTS, MAX_KEPT = 16, 1 << 16
"""Texts that ended, and tokens of them all (some 200 bytes each)."""


class TreeDrafter:
    """What followed this very path in the radix tree of the request's namespace: answers to the
    same prompt, earlier turns, retries. A read of the tree changes nothing."""

    name = "tree"

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens]:
        return [
            request.claims[0].continuation(request.tokens, max_tokens)
            for request, max_tokens in wanted
        ]

    def forget(self, request: Request) -> None:
        pass

    def reset(self) -> None:
        pass


class SuffixDrafter:
    """What followed the request's last tokens earlier in the request itself (prompt lookup), or in
    one of the texts of its namespace that ended last, while the cache is kept."""

    name = "suffix"

    def __init__(self, *, shares: bool) -> None:
        """``shares``: texts that ended are kept."""
        self._shares = shares
        self._indices: dict[Request, SuffixIndex] = {}
        self._ended: deque[tuple[Hashable, SuffixIndex]] = deque(maxlen=MAX_TEXTS)
        """The newest first."""
        self._num_kept = 0

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens]:
        found = []
        for request, max_tokens in wanted:
            index = self._indices.get(request)
            if index is None:
                index = self._indices[request] = SuffixIndex()
            others = [other for namespace, other in self._ended if namespace == request.namespace]
            found.append(index.continuation(request.tokens, max_tokens, others))
        return found

    def forget(self, request: Request) -> None:
        index = self._indices.pop(request, None)
        if index is None or not self._shares or len(request.tokens) > MAX_KEPT:
            return
        index.text = request.tokens.copy()
        self._num_kept += len(index.text)
        while self._num_kept > MAX_KEPT or len(self._ended) == MAX_TEXTS:
            self._num_kept -= len(_text(self._ended.pop()))
        self._ended.appendleft((request.namespace, index))

    def reset(self) -> None:
        self._ended.clear()
        self._num_kept = 0


def _text(ended: tuple[Hashable, SuffixIndex]) -> Tokens:
    text = ended[1].text
    assert text is not None
    return text
