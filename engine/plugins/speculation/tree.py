"""Drafts without weights: what the prefix cache, or the request itself, saw follow here before."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

from engine.plugins.speculation.suffix import IndexMemory, SuffixIndex
from engine.requests.request import Request
from hybridcache.tokens import Tokens

MAX_TEXTS, MAX_KEPT = 16, 1 << 16
"""Finished texts that are kept, and their tokens together."""
MAX_READ = 1024
"""Tokens indexed in one step, of all requests: 0.2 ms."""


class TreeDrafter:
    """What followed this very path in the radix tree of the request's namespace: answers to the
    same prompt, earlier turns, retries. A read of the tree changes nothing."""

    name = "tree"

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens | None]:
        return [
            request.claims[0].continuation(request.tokens, max_tokens)
            for request, max_tokens in wanted
        ]

    def forget(self, request: Request) -> None:
        pass

    def reset(self) -> None:
        pass


class SuffixDrafter:
    """Proposes what followed the request's last tokens earlier in the request itself (prompt
    lookup), or in one of the texts of its namespace that ended last, while the cache is kept.

    A long prompt is indexed in pieces, so that no step waits for it.
    """

    name = "suffix"

    def __init__(self, *, shares: bool, memory: IndexMemory) -> None:
        """``shares``: keep texts that ended. ``memory`` is for all indices together; what does not
        fit is not looked up."""
        self._shares = shares
        self._memory = memory
        self._indices: dict[Request, SuffixIndex] = {}
        self._ended: deque[tuple[Hashable, SuffixIndex]] = deque()
        """The newest first."""
        self._num_kept = 0

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens | None]:
        """See ``Drafter.propose``. O(new tokens), at most ``MAX_READ`` of all requests."""
        left = MAX_READ
        found: list[Tokens | None] = []
        for request, max_tokens in wanted:
            index = self._indices.get(request)
            if index is None:
                index = self._indices[request] = SuffixIndex(self._memory)
            left -= self._read(index, request.tokens, left)
            if not index.has_read(request.tokens):
                found.append(None)
                continue
            others = [other for namespace, other in self._ended if namespace == request.namespace]
            found.append(index.continuation(request.tokens, max_tokens, others))
        return found

    def _read(self, index: SuffixIndex, tokens: Tokens, most: int) -> int:
        """Index up to ``most`` tokens, if need be in place of texts that ended."""
        num_read = index.read(tokens, most)
        while index.is_full and self._ended:
            self._drop_oldest()
            num_read += index.read(tokens, most - num_read)
        return num_read

    def forget(self, request: Request) -> None:
        index = self._indices.pop(request, None)
        if index is None:
            return
        self._read(index, request.tokens, MAX_READ)
        is_whole = index.has_read(request.tokens) and not index.is_full
        if not self._shares or not is_whole or len(request.tokens) > MAX_KEPT:
            index.free()
            return
        index.text = request.tokens.copy()
        self._num_kept += len(index.text)
        while self._num_kept > MAX_KEPT or len(self._ended) == MAX_TEXTS:
            self._drop_oldest()
        self._ended.appendleft((request.namespace, index))

    def reset(self) -> None:
        while self._ended:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, index = self._ended.pop()
        assert index.text is not None, "a text that still grows"
        self._num_kept -= len(index.text)
        index.free()
