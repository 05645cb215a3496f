"""Drafts without weights: what the prefix cache, or the request itself, saw follow here before."""

from __future__ import annotations

from collections.abc import Sequence

from engine.drafts.suffix import SuffixIndex
from engine.requests.request import Request
from hybridcache.tokens import Tokens


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


class SuffixDrafter:
    """What followed the request's last tokens earlier in the request itself (prompt lookup)."""

    name = "suffix"

    def __init__(self) -> None:
        self._indices: dict[Request, SuffixIndex] = {}

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> Sequence[Tokens]:
        found = []
        for request, max_tokens in wanted:
            index = self._indices.get(request)
            if index is None:
                index = self._indices[request] = SuffixIndex()
            found.append(index.continuation(request.tokens, max_tokens))
        return found

    def forget(self, request: Request) -> None:
        self._indices.pop(request, None)
