"""Ways to break what the cache is built on: tree, allocators, eviction orders."""

from __future__ import annotations

from experiments.mutations import Mutation

PAGES = "hybridcache/allocators/pages.py"
SLOTS = "hybridcache/allocators/slots.py"
LRU = "hybridcache/policies/eviction/lru.py"
TIERS = "hybridcache/policies/eviction/tiers.py"
COMPACT = "hybridcache/radix/compact.py"
FORKS = "hybridcache/radix/forks.py"
GHOSTS = "hybridcache/radix/ghosts.py"
KEY = "hybridcache/radix/key.py"
FAMILY = "hybridcache/radix/node.py"
TREE = "hybridcache/radix/tree.py"
TOKENS = "hybridcache/tokens.py"

BREAKS_OF_PARTS = (
    Mutation(
        "tokens of what was forgotten stay where a queue lists it",
        GHOSTS,
        '            ghost.edge = b""',
        "            ghost.edge",
    ),
    Mutation(
        "a split leaves the lower half under its old key",
        TREE,
        "        lower.key = child_key(lower.edge, self.page_size)\n",
        "",
    ),
    Mutation(
        "a split does not shorten the lower edge", TREE, "        lower.edge = edge[cut:]\n", ""
    ),
    Mutation(
        "a walk takes a child without comparing its edge",
        TREE,
        "if not starts_with(child.edge, at * TOKEN_BYTES):",
        "if False:",
    ),
    Mutation(
        "a partial edge is not floored to pages",
        TOKENS,
        "    return shared - shared % page_size\n",
        "    return shared\n",
    ),
    Mutation(
        "an emptied namespace keeps its root",
        GHOSTS,
        "                self.tree.prune_root(parent.key)\n",
        "                pass\n",
    ),
    Mutation(
        "the youngest ghost is forgotten first", GHOSTS, "popitem(last=False)", "popitem(last=True)"
    ),
    Mutation(
        "LRU forgets live items when it sweeps",
        LRU,
        "deque(entry for entry in self.queue if entry[2].memo is entry)",
        "deque()",
    ),
    Mutation(
        "LRU does not notice later uses in its queue",
        LRU,
        "if item.last_used == entry[0]:",
        "if True:",
    ),
    Mutation(
        "LRU does not notice later uses in its heap",
        LRU,
        "            elif item.last_used > entry[0]:",
        "            elif False:",
    ),
    Mutation(
        "LRU returns items that were discarded",
        LRU,
        "            if item.memo is not entry:\n                heappop(late)\n            elif",
        "            if",
    ),
    Mutation(
        "LRU queues what comes late behind the youngest",
        LRU,
        "if queue and entry < queue[-1]:",
        "if False:",
    ),
    Mutation(
        "LRU prefers checkpoints when both kinds may go",
        LRU,
        "return kv if kv_age < checkpoint_age else checkpoint",
        "return checkpoint",
    ),
    Mutation(
        "LRU does not let dead KV go first",
        LRU,
        "self._dead = _Line() if dead_first else self._kv",
        "self._dead = self._kv",
    ),
    Mutation(
        "LRU does not let superseded checkpoints go first",
        LRU,
        "self._superseded = _Line() if demote_superseded else self._checkpoints",
        "self._superseded = self._checkpoints",
    ),
    Mutation(
        "the last child of two stays in a dict",
        FAMILY,
        "    if len(family) > 1:\n        return family\n",
        "    if family:\n        return family\n",
    ),
    Mutation(
        "an only child is taken for any key",
        TREE,
        "if end >= stop or child.key != first_page(tokens, at, page_size):",
        "if end >= stop:",
    ),
    Mutation(
        "dead KV does not go first",
        TIERS,
        '            first = self._dead.victim("kv")\n',
        "            first = None\n",
    ),
    Mutation(
        "superseded checkpoints do not go first",
        TIERS,
        '            first = self._superseded.victim("checkpoint")\n',
        "            first = None\n",
    ),
    Mutation(
        "one page too many is handed out",
        PAGES,
        "        if num_pages > self._height:\n",
        "        if num_pages > self._height + 1:\n",
    ),
    Mutation(
        "freed pages are written one place too low",
        PAGES,
        "        self._height = top = bottom + len(pages)\n",
        "        top = bottom + len(pages)\n        self._height = max(bottom, top - 1)\n",
    ),
    Mutation(
        "a freed slot's bytes are not given back",
        SLOTS,
        "            self.budget.give_back(self.unit_bytes)\n",
        "            pass\n",
    ),
    Mutation(
        "the shared budget is not asked for slots",
        SLOTS,
        "            if self.budget.free_bytes < self.unit_bytes:\n                return None\n",
        "",
    ),
    Mutation(
        "compaction moves the wrong rows",
        COMPACT,
        "above.kv.indices = living[num_living - length : num_living]",
        "above.kv.indices = living[:length]",
    ),
    Mutation(
        "half-dead buffers are never let go",
        COMPACT,
        "    if 2 * num_living >= len(base):\n",
        "    if True:\n",
    ),
    Mutation(
        "a fork is no end of a demoting path",
        FORKS,
        "while above.parent is not None and not isinstance(above.children, dict):",
        "while above.parent is not None:",
    ),
    Mutation("a split reads a negative id as unsigned", KEY, "signed=True", "signed=False"),
    Mutation("a namespace may be NaN", TREE, "if namespace != namespace:", "if False:"),
    Mutation(
        "a negative number of rows is handed out",
        PAGES,
        "        if num_pages < 0:\n",
        "        if False:\n",
    ),
    Mutation(
        "more pages are taken back than are out",
        PAGES,
        "if len(rows) > self.num_taken:",
        "if False:",
    ),
    Mutation(
        "a slot is taken back when none is out",
        SLOTS,
        "if len(self._stack) == self.capacity:",
        "if False:",
    ),
)
