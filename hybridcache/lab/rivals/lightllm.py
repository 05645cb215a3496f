"""LightLLM's paged hybrid cache: a tree of 512-token hash pages, with states in host memory.

Published behaviour that decides its hit rates:

- Prompts are hashed in pages of 512 tokens, the last token excluded. A node is one page (or one
  *big page* of several), so nothing is split and a hit is a whole number of pages.
- One state per prompt, at ``floor((prompt - 1) / page) * page``, in a pool of host buffers (512 by
  default) that the device budget does not pay for. With big pages, every big-page end also has a
  state, always kept with its page.
- A match is trimmed back to the deepest page with a state. All KV past the state position,
  including the answer's, is freed when the request ends.
- KV is evicted leaf by leaf, stateless leaves first, then least recently used. Host buffers are
  evicted least recently used first; the node is kept without its state.
- A hit copies its state to the device before anything is computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, field

from sortedcontainers import SortedDict

from hybridcache.lab.rivals.protocol import BaselineConfig, PeerSession
from hybridcache.radix.tokens import Tokens

HOST_STATES = 512


@dataclass(slots=True, eq=False)
class _Page:
    """One hash page (or big page) of the tree. The end of a big page always has a state."""

    key: bytes
    parent: _Page | None
    num_tokens: int
    big: bool
    has_state: bool
    children: dict[bytes, _Page] = field(default_factory=dict)
    references: int = 0
    time: int = 0


class LightllmCache:
    """LightLLM on its main branch; ``page`` and ``big_page`` in tokens (None: off)."""

    def __init__(
        self, config: BaselineConfig, page: int = 512, big_page: int | None = None
    ) -> None:
        self.page = max(1, page // config.unit)
        self.big_page = None if big_page is None else big_page // config.unit
        self.num_tokens = config.budget_bytes // (config.kv_bytes_per_token * config.unit)
        self.free_states = HOST_STATES
        self.free_tokens = self.num_tokens
        self.held_tokens = 0
        self.clock = 0
        self.roots: dict[Hashable, _Page] = {}
        self.leaves: SortedDict[tuple[bool, int], _Page] = SortedDict()
        self.small_states: SortedDict[int, _Page] = SortedDict()

    def begin(self, tokens: Tokens, namespace: Hashable = None) -> LightllmSession | None:
        root = self.roots.setdefault(namespace, _Page(b"root", None, 0, False, False))
        session = LightllmSession(self, root, tokens, self._match(root, tokens))
        self.refer(session.path, 1)
        if self.allocate(session.held):
            return session
        self.refer(session.path, -1)
        return None

    def allocate(self, num_tokens: int) -> bool:
        """Take rows, evicting unreferenced leaves. Returns False, and takes nothing, if refused."""
        while self.free_tokens < num_tokens and self.leaves:
            self._evict_leaf()
        if self.free_tokens < num_tokens:
            return False
        self.free_tokens -= num_tokens
        self.held_tokens += num_tokens
        return True

    def free(self, num_tokens: int) -> None:
        self.free_tokens += num_tokens
        self.held_tokens -= num_tokens

    def publish(self, root: _Page, tokens: Tokens) -> int:
        """Insert a prompt's whole pages with its states. Returns the number of new tokens."""
        node, taken, start = root, 0, 0
        end = (len(tokens) - 1) // self.page * self.page
        while start < end:
            size = self._page_at(start, end)
            node, new = self._child(node, tokens[start : start + size], size)
            if new:
                taken += size
            start += size
        if node is not root and not node.has_state:
            self._save_state(node)
        return taken

    def check(self) -> None:
        cached = states = 0
        stack = list(self.roots.values())
        while stack:
            node = stack.pop()
            cached += node.num_tokens
            states += node.has_state and not node.big
            stack.extend(node.children.values())
            if node.parent is not None:
                evictable = not node.children and not node.references
                assert evictable == (self._leaf_key(node) in self.leaves), "leaf set is stale"
        total = self.free_tokens + cached + self.held_tokens
        assert total == self.num_tokens, "rows: free + cached + held != total"
        assert self.free_states + states == HOST_STATES, "host states: free + cached != total"

    def _page_at(self, start: int, end: int) -> int:
        size = self.big_page
        if size is not None and start % size == 0 and start + size <= end:
            return size
        return self.page

    def _match(self, root: _Page, tokens: Tokens) -> list[_Page]:
        """Return the pages to reuse, big ones first, down to the deepest page with a state."""
        self.clock += 1
        path: list[_Page] = []
        node, start, end = root, 0, (len(tokens) - 1) // self.page * self.page
        while start < end:
            sizes = (self._page_at(start, end), self.page)
            keys = (_key(node, tokens[start : start + size]) for size in sizes)
            child = next((node.children[key] for key in keys if key in node.children), None)
            if child is None:
                break
            self._stamp(child)
            path.append(child)
            node, start = child, start + child.num_tokens
        while path and not path[-1].has_state:
            path.pop()
        return path

    def _child(self, node: _Page, tokens: Tokens, size: int) -> tuple[_Page, bool]:
        key = _key(node, tokens)
        child = node.children.get(key)
        if child is not None:
            self._stamp(child)
            return child, False
        self.leaves.pop(self._leaf_key(node), None)
        is_big = size == self.big_page
        child = _Page(key, node, size, is_big, has_state=is_big)
        node.children[key] = child
        self.clock += 1
        child.time = self.clock
        self._list(child)
        return child, True

    def _save_state(self, node: _Page) -> None:
        if not self.free_states:
            _, oldest = self.small_states.popitem(0)
            self.leaves.pop(self._leaf_key(oldest), None)
            oldest.has_state = False
            self._list(oldest)
            self.free_states += 1
        self.free_states -= 1
        self.leaves.pop(self._leaf_key(node), None)
        node.has_state = True
        self.small_states[node.time] = node
        self._list(node)

    def _stamp(self, node: _Page) -> None:
        self.leaves.pop(self._leaf_key(node), None)
        if node.has_state and not node.big:
            del self.small_states[node.time]
        self.clock += 1
        node.time = self.clock
        if node.has_state and not node.big:
            self.small_states[node.time] = node
        self._list(node)

    def refer(self, path: list[_Page], change: int) -> None:
        """Add ``change`` references to the pages of ``path``."""
        for node in path:
            self.leaves.pop(self._leaf_key(node), None)
            node.references += change
            self._list(node)

    def _list(self, node: _Page) -> None:
        if node.parent is not None and not node.children and not node.references:
            self.leaves[self._leaf_key(node)] = node

    def _leaf_key(self, node: _Page) -> tuple[bool, int]:
        return node.has_state, node.time

    def _evict_leaf(self) -> None:
        _, node = self.leaves.popitem(0)
        if node.has_state and not node.big:
            del self.small_states[node.time]
            self.free_states += 1
        assert node.parent is not None
        del node.parent.children[node.key]
        self._list(node.parent)
        self.free_tokens += node.num_tokens


class LightllmSession(PeerSession):
    """One request, with the pages that it references and the rows that it holds in addition."""

    def __init__(
        self, cache: LightllmCache, root: _Page, tokens: Tokens, path: list[_Page]
    ) -> None:
        self.cache = cache
        self.root = root
        self.tokens = tokens
        self.path = path
        self.cached_len = sum(node.num_tokens for node in path)
        self.held = len(tokens) - self.cached_len
        state_at = (len(tokens) - 1) // cache.page * cache.page
        stops = {len(tokens), state_at}
        if cache.big_page is not None:
            stops.update(range(cache.big_page, len(tokens), cache.big_page))
        self.num_chunks = sum(1 for stop in stops if stop > self.cached_len)

    def finish(self, output: Tokens) -> None:
        """Take and release the rows of the answer, and insert the whole pages of the prompt."""
        if self.cache.allocate(len(output)):
            self.cache.free(len(output))
        taken = self.cache.publish(self.root, self.tokens)
        self.cache.held_tokens -= taken
        self.cache.free(self.held - taken)
        self.cache.refer(self.path, -1)


def _key(parent: _Page, tokens: Tokens) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), key=parent.key, digest_size=16).digest()
