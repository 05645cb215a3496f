"""Ways to break the cache's own face: receipts, counts, listeners."""

from __future__ import annotations

from experiments.mutations import Mutation

GATHERS = "hybridcache/core/gathers.py"
HYBRID = "hybridcache/hybrid.py"
LISTENER = "hybridcache/listener.py"
STATS = "hybridcache/stats.py"

BREAKS_OF_FRONT = (
    Mutation("a receipt unlocks twice", HYBRID, "            receipt.node = None\n", ""),
    Mutation(
        "a new leaf is not offered to the policy",
        HYBRID,
        "            residency.offer_leaf(leaf)\n",
        "            pass\n",
    ),
    Mutation(
        "a checkpoint at the prompt's very end is used",
        HYBRID,
        "            if node.end < num_tokens:\n                if node",
        "            if node.end <= num_tokens:\n                if node",
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
    Mutation("a gather is in the wrong order", GATHERS, "        parts.reverse()\n", ""),
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
        "a shared prefix's ghost is silent while a deeper one speaks",
        "hybridcache/radix/node.py",
        "        if above.lost_checkpoint is not None:\n            yield",
        "        if False:\n            yield",
        ("tests/policies/test_ghosts_above.py",),
    ),
    Mutation(
        "ghosts above a checkpoint that is there speak too",
        "hybridcache/radix/node.py",
        "    while above is not None and above.checkpoint is None:\n        if above.lost",
        "    while above is not None:\n        if above.lost",
        ("tests/policies/test_ghosts_above.py",),
    ),
    Mutation(
        "a superseded ghost is used while what stood below it is missed",
        "hybridcache/policies/eviction/regret.py",
        "used=not memo.superseded",
        "used=True",
        ("tests/policies/test_regret.py",),
    ),
    Mutation(
        "an evicted tip's demand stands in place of a greater one",
        "hybridcache/policies/eviction/regret.py",
        "if survival.index_at(tip_row, age) >= survival.index_at(row, age):",
        "if True:",
        ("tests/policies/test_regret.py",),
    ),
    Mutation(
        "ids of another type are matched",
        HYBRID,
        '            require_int32(tokens, "tokens")\n        num_tokens = len(tokens)\n        '
        "root",
        "            pass\n        num_tokens = len(tokens)\n        root",
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
        "a namespace in use is folded with the rest",
        STATS,
        "if usage.requests > self._known_requests.pop(oldest, 1):",
        "if False:",
    ),
)
