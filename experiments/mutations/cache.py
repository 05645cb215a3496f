"""Ways to break the cache."""

from __future__ import annotations

from experiments.mutations import Mutation, Mutations

RESIDENCY, HYBRID = "hybridcache/core/residency.py", "hybridcache/hybrid.py"
INSERTION = "hybridcache/core/insertion.py"
ROOM, GATHERED = "hybridcache/core/make_room.py", "hybridcache/core/gathers.py"
LOCKED = "hybridcache/core/locks.py"
LISTENER, STATS = "hybridcache/listener.py", "hybridcache/stats.py"
TREE, FORKS, GHOSTS = (f"hybridcache/radix/{name}.py" for name in ("tree", "forks", "ghosts"))
FAMILY = "hybridcache/radix/node.py"
TOKENS = "hybridcache/tokens.py"
KEY, COMPACT = "hybridcache/radix/key.py", "hybridcache/radix/compact.py"
PAGES, SLOTS = "hybridcache/allocators/pages.py", "hybridcache/allocators/slots.py"
LRU, TIERS = "hybridcache/policies/eviction/lru.py", "hybridcache/policies/eviction/tiers.py"

BREAKAGES = (
    Mutation(
        "a lock is not looked at before evicting",
        RESIDENCY,
        "if not node.locks:\n                break",
        "if True:\n                break",
    ),
    Mutation("a second lock is not counted", RESIDENCY, "node.locks += 1", "node.locks = 1"),
    Mutation(
        "an unlocked victim is not given back to the policy",
        RESIDENCY,
        "                    self.policy.add(item)\n\n    def _withdraw",
        "                    pass\n\n    def _withdraw",
    ),
    Mutation("a receipt unlocks twice", HYBRID, "            receipt.node = None\n", ""),
    Mutation(
        "the cascade runs over a locked parent",
        RESIDENCY,
        "parent.checkpoint is not None or parent.locks or not stateful",
        "parent.checkpoint is not None or not stateful",
    ),
    Mutation(
        "the cascade stops after one node",
        RESIDENCY,
        "            leaf = parent\n",
        "            self.policy.add(parent.kv)\n            return\n",
    ),
    Mutation(
        "the cascade takes a parent that has a checkpoint",
        RESIDENCY,
        "parent.checkpoint is not None or parent.locks or not stateful",
        "parent.locks or not stateful",
    ),
    Mutation(
        "a dropped leaf leaks its slot",
        RESIDENCY,
        "            if leaf.checkpoint is not None:\n                "
        "self._drop_checkpoint(leaf)\n            parent",
        "            leaf.checkpoint = None\n            parent",
    ),
    Mutation(
        "an evicted checkpoint's slot is not freed",
        RESIDENCY,
        "        self.slots.free(checkpoint.slot)\n",
        "",
    ),
    Mutation(
        "an evicted leaf's rows are not freed",
        RESIDENCY,
        "        self.pages.release(rows)\n",
        "",
    ),
    Mutation(
        "an evicted leaf is not remembered as a ghost",
        RESIDENCY,
        "        self.ghosts.add(leaf)\n",
        "",
    ),
    Mutation(
        "ghosts are never trimmed",
        RESIDENCY,
        "            self.ghosts.trim()\n",
        "            pass\n",
    ),
    Mutation(
        "recency is not handed up",
        RESIDENCY,
        "                above.last_used = kv.last_used\n",
        "                pass\n",
    ),
    Mutation(
        "an evicted checkpoint leaves no tombstone",
        RESIDENCY,
        "        node.lost_checkpoint = checkpoint\n",
        "",
    ),
    Mutation(
        "a refilled tombstone stays a tombstone",
        RESIDENCY,
        "        node.lost_checkpoint = None\n",
        "",
    ),
    Mutation(
        "a hit does not refresh its checkpoint",
        RESIDENCY,
        "            checkpoint.last_used = now\n",
        "",
    ),
    Mutation("a hit does not refresh its KV", RESIDENCY, "            kv.last_used = now\n", ""),
    Mutation(
        "a new checkpoint does not demote the one above",
        RESIDENCY,
        "        if type(before) is Checkpoint and below is None:\n            "
        "self._set_superseded(before, True)\n",
        "",
    ),
    Mutation(
        "a fork does not lift the demotion",
        RESIDENCY,
        "                    self._set_superseded(before, False)\n",
        "                    pass\n",
    ),
    Mutation(
        "the end of a fork does not restore the demotion",
        RESIDENCY,
        "        link(before, below)\n        if isinstance(before, Checkpoint):\n            "
        "self._set_superseded(before, True)\n",
        "        link(before, below)\n",
    ),
    Mutation(
        "an evicted checkpoint leaves the one above demoted",
        RESIDENCY,
        "        elif type(before) is Checkpoint:\n            self._set_superseded(before, "
        "False)\n",
        "",
    ),
    Mutation(
        "an evicted checkpoint stays in the list of its run",
        RESIDENCY,
        "        before.deeper = below\n        if below is not None:\n",
        "        if below is not None:\n",
    ),
    Mutation(
        "a split leaves the list of its run with the lower half",
        RESIDENCY,
        "            link(upper, lower.deeper)\n            lower.deeper = None\n",
        "            pass\n",
    ),
    Mutation(
        "the upper half of a split under a lock is not pinned",
        RESIDENCY,
        "            upper.pins = 1\n",
        "            pass\n",
    ),
    Mutation(
        "an evicted leaf stays pinned",
        RESIDENCY,
        "            self.locked_paths.forget(leaf)\n",
        "            pass\n",
    ),
    Mutation(
        "a state saved under a lock counts as one that may go",
        RESIDENCY,
        "            self.locked_paths.checkpoint_stored(node)\n",
        "            pass\n",
    ),
    Mutation("a lock that is gone still counts", LOCKED, "                self._unpin(node)\n", ""),
    Mutation(
        "a shared head counts once for each lock",
        LOCKED,
        "            if node.pins > 1:\n                return\n",
        "",
    ),
    Mutation(
        "rows of what was evicted stay where a queue lists it",
        RESIDENCY,
        "        kv.indices = NO_ROWS",
        "        NO_ROWS",
    ),
    Mutation(
        "tokens of what was forgotten stay where a queue lists it",
        GHOSTS,
        '            ghost.edge = b""',
        "            ghost.edge",
    ),
    Mutation(
        "a gather outlives its rows",
        RESIDENCY,
        "            gathered.discard(kv)\n",
        "            pass\n",
    ),
    Mutation(
        "gathers are kept when what is cached shrinks",
        RESIDENCY,
        "            gathered.trim(cached_tokens)\n",
        "            pass\n",
    ),
    Mutation(
        "a refilled checkpoint is never demoted at once",
        RESIDENCY,
        "            checkpoint.superseded = True\n",
        "",
    ),
    Mutation(
        "a parent stays a candidate when it gets a child",
        RESIDENCY,
        "        elif parent.kv is not None:\n            self._withdraw(parent.kv)\n",
        "",
    ),
    Mutation(
        "a new leaf is not offered to the policy",
        HYBRID,
        "            residency.offer_leaf(leaf)\n",
        "            pass\n",
    ),
    Mutation(
        "KV that a checkpoint revived stays in the dead tier",
        RESIDENCY,
        "        if revives is not None:\n            self._withdraw(revives)\n",
        "        revives = None\n",
    ),
    Mutation(
        "a split forgets the rows of the lower half",
        RESIDENCY,
        "        kv.indices = kv.indices[cut:]\n",
        "",
    ),
    Mutation(
        "a split is not told to listeners",
        RESIDENCY,
        "            self.listener.kv_split(upper, lower)\n",
        "            pass\n",
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
        "a revived ghost stays in the ghost list",
        RESIDENCY,
        "        self.ghosts.discard(ghost)\n",
        "",
    ),
    Mutation(
        "a checkpoint at the prompt's very end is used",
        HYBRID,
        "            if node.end < num_tokens:\n                if node",
        "            if node.end <= num_tokens:\n                if node",
    ),
    Mutation(
        "checkpoints off the grid are taken",
        INSERTION,
        "if position % step or not 0 < position <= end:",
        "if not 0 < position <= end:",
    ),
    Mutation(
        "checkpoints past the inserted end are taken",
        INSERTION,
        "or not 0 < position <= end:",
        "or position <= 0:",
    ),
    Mutation(
        "a second checkpoint replaces the first",
        INSERTION,
        "        if node.checkpoint is not None:\n            rejected.append(slot)\n"
        "            continue\n",
        "",
    ),
    Mutation(
        "a rejected slot is not handed back",
        INSERTION,
        "        if node.checkpoint is not None:\n            rejected.append(slot)\n",
        "        if node.checkpoint is not None:\n",
    ),
    Mutation(
        "duplicates are not handed back",
        HYBRID,
        "kv_indices[owned_from:kv_len] if kv_len > owned_from else NO_INDICES",
        "NO_INDICES",
    ),
    Mutation(
        "rows already the tree's are handed back as duplicates",
        HYBRID,
        "kv_indices[owned_from:kv_len] if kv_len > owned_from else NO_INDICES",
        "kv_indices[:kv_len]",
    ),
    Mutation(
        "the caller's array is kept instead of a copy",
        INSERTION,
        "store_rows(node, rows.copy())",
        "store_rows(node, rows)",
    ),
    Mutation(
        "a gather trusts its memo for any node",
        GATHERED,
        "return self.rows.get(segment)",
        "return next(reversed(self.rows.values()), None)",
    ),
    Mutation("a gather is in the wrong order", HYBRID, "        parts.reverse()\n", ""),
    Mutation(
        "a refused allocation evicts all the same",
        ROOM,
        "num_tokens - pages.num_free):\n        return False\n",
        "num_tokens - pages.num_free):\n        pass\n",
    ),
    Mutation(
        "locks do not count in what could be freed",
        ROOM,
        "return short_tokens <= residency.cached_tokens - protected.num_tokens",
        "return short_tokens <= residency.cached_tokens",
    ),
    Mutation(
        "kv losses are counted as never seen",
        HYBRID,
        "            num_tokens - branch_len,\n            branch_len - kv_len,\n",
        "            num_tokens - kv_len,\n            0,\n",
    ),
    Mutation(
        "ghosts are not read",
        HYBRID,
        "        if inside is None and node.ghosts:\n            branch_len, missed",
        "        if False:\n            branch_len, missed",
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
    Mutation(
        "locked checkpoints count in what could be freed",
        ROOM,
        "    num_slots = residency.num_checkpoints - protected.num_checkpoints\n",
        "    num_slots = residency.num_checkpoints\n",
    ),
    Mutation(
        "of two missed checkpoints the shallower one is told",
        HYBRID,
        "missed = missed or node.lost_checkpoint",
        "missed = node.lost_checkpoint",
    ),
    Mutation(
        "a policy is never told what was missed",
        HYBRID,
        "            residency.policy.missed(match.missed)\n",
        "            pass\n",
    ),
    Mutation(
        "a withheld checkpoint is told to the policy when it is superseded",
        RESIDENCY,
        "        if checkpoint in self.withheld:\n            checkpoint.superseded = superseded\n "
        "           return\n",
        "",
    ),
    Mutation("uses are not handed up", RESIDENCY, "            above.uses += kv.uses\n", ""),
    Mutation(
        "dropped gathers are still weighed",
        GATHERED,
        "            self.num_rows -= len(rows) + ENTRY_ROWS\n",
        "            pass\n",
    ),
    Mutation(
        "gathers have no limit",
        GATHERED,
        "            self.trim(limit_rows)\n",
        "            pass\n",
    ),
    Mutation(
        "a gather that was extended does not go first",
        GATHERED,
        "            self.rows.move_to_end(extends, last=False)\n",
        "            pass\n",
    ),
    Mutation(
        "ids of another type are matched",
        HYBRID,
        '            require_int32(tokens, "tokens")\n        num_tokens = len(tokens)\n        '
        "root",
        "            pass\n        num_tokens = len(tokens)\n        root",
    ),
    Mutation(
        "rows of another type are taken",
        INSERTION,
        '        require_int32(kv_indices, "KV indices")\n',
        "        pass\n",
    ),
    Mutation(
        "too few labels are found out midway",
        INSERTION,
        "if labels and len(labels) != len(checkpoints):",
        "if False:",
    ),
    Mutation(
        "a position that is no number is found out midway",
        INSERTION,
        "if not (type(slot) is type(position) is int and 0 <= slot < num_slots):",
        "if False:",
    ),
    Mutation(
        "an owned part past the prompt is believed",
        INSERTION,
        "if not 0 <= owned_from <= num_tokens:",
        "if False:",
    ),
    Mutation(
        "a walk begins at a node that nobody locked",
        INSERTION,
        "if after is not None and not after.locks:",
        "if False:",
    ),
    Mutation(
        "a node that was evicted can be locked",
        HYBRID,
        "            if node.kv is None:\n                raise ValueError(EVICTED)\n",
        "",
    ),
    Mutation(
        "another cache's receipt is taken",
        HYBRID,
        "if node not in self._residency.locked:",
        "if False:",
    ),
    Mutation("a split reads a negative id as unsigned", KEY, "signed=True", "signed=False"),
    Mutation("a namespace may be NaN", TREE, "if namespace != namespace:", "if False:"),
    Mutation(
        "a listener's error stops a change midway",
        LISTENER,
        "            except Exception:\n",
        "            except ZeroDivisionError:\n",
    ),
    Mutation(
        "a listener that raised is told on",
        LISTENER,
        "                self.members = tuple(one for one in self.members if one is not member)\n",
        "",
    ),
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
    Mutation(
        "a namespace in use is folded with the rest",
        STATS,
        "if usage.requests > self._known_requests.pop(oldest, 1):",
        "if False:",
    ),
)

TESTS = (
    "tests/cache/test_eviction.py",
    "tests/cache/test_operations.py",
    "tests/cache/test_scenarios.py",
    "tests/cache/test_refusals.py",
    "tests/cache/test_check.py",
    "tests/cache/test_gathers.py",
    "tests/cache/test_losses.py",
    "tests/allocators",
    "tests/radix",
    "tests/export/test_events.py",
    "tests/export/test_snapshot.py",
    "tests/cache/test_churn.py",
    "tests/cache/test_machine.py",
)
MACHINES = ("tests/cache/test_machine.py", "tests/cache/test_radix_machine.py")

CACHE = Mutations(
    breakages=BREAKAGES,
    tests=TESTS,
    machines=MACHINES,
    copied=("hybridcache", "tests", "pyproject.toml"),
)
