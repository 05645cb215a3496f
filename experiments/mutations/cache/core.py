"""Ways to break what is resident: eviction, insertion, room, gathers, locks."""

from __future__ import annotations

from experiments.mutations import Mutation

GATHERED = "hybridcache/core/gathers.py"
INSERTION = "hybridcache/core/insertion.py"
LOCKED = "hybridcache/core/locks.py"
ROOM = "hybridcache/core/make_room.py"
RESIDENCY = "hybridcache/core/residency.py"

BREAKS_OF_CORE = (
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
    Mutation(
        "ghosts do not tell a fork from an end",
        "hybridcache/radix/ghosts.py",
        "forks = inside is not None or bool(ghost.children) or bool(ghost.ghosts)",
        "forks = True",
        ("tests/policies/test_regret.py",),
    ),
    Mutation(
        "a node with children is no fork",
        "hybridcache/hybrid.py",
        "forks = inside is not None or bool(node.children)",
        "forks = inside is not None",
        ("tests/policies/test_regret.py",),
    ),
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
        "a revived ghost stays in the ghost list",
        RESIDENCY,
        "        self.ghosts.discard(ghost)\n",
        "",
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
        "locked checkpoints count in what could be freed",
        ROOM,
        "    num_slots = residency.num_checkpoints - protected.num_checkpoints\n",
        "    num_slots = residency.num_checkpoints\n",
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
)
