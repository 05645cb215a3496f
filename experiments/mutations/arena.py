"""Ways to break the arena, and what follows its moves."""

from __future__ import annotations

from experiments.mutations import Mutation, Mutations
from experiments.mutations.cache import COMPACT, RESIDENCY

ALLOCATOR, MOVES = "hybridcache/allocators/arena.py", "hybridcache/allocators/moves.py"
OWNERS, LEASE = "hybridcache/core/owners.py", "hybridcache/lease.py"
SNAPSHOT, BUILD = "hybridcache/export/snapshot.py", "hybridcache/build.py"

BREAKAGES = (
    Mutation(
        "a slab's state is a row too short",
        ALLOCATOR,
        "rows = -(-state_bytes // row_bytes)",
        "rows = state_bytes // row_bytes",
    ),
    Mutation(
        "a slab is no whole pages",
        ALLOCATOR,
        "return -(-rows // page_size) * page_size",
        "return rows",
    ),
    Mutation(
        "holes that were taken are still counted",
        ALLOCATOR,
        "        self._num_holes[slab] = 0\n        return self._holes.pop",
        "        return self._holes.pop",
    ),
    Mutation(
        "holes that were taken are still listed",
        ALLOCATOR,
        "return self._holes.pop(slab, [])",
        "return self._holes.get(slab, [])",
    ),
    Mutation(
        "the tail is emptied too",
        ALLOCATOR,
        "self._empty(int(self._num_holes[:-1].argmax()))",
        "self._empty(int(self._num_holes.argmax()))",
    ),
    Mutation(
        "a fuller slab than need be is emptied",
        ALLOCATOR,
        "self._empty(int(self._num_holes[:-1].argmax()))",
        "self._empty(int(np.flatnonzero(self._num_holes[:-1])[-1]))",
    ),
    Mutation(
        "holes that a move does not need are lost",
        ALLOCATOR,
        "        self.pages.push(pages[len(living) :])\n",
        "",
    ),
    Mutation(
        "a slab without living rows is free, and its rows are too",
        ALLOCATOR,
        "            self._take_holes(slab)\n            self._free_slabs.append(slab)",
        "            self._free_slabs.append(slab)",
    ),
    Mutation(
        "a move tells no new rows",
        ALLOCATOR,
        "        new_rows.reshape(-1, self.page_size)[living] = dst.reshape(-1, self.page_size)\n",
        "",
    ),
    Mutation(
        "rows that nobody claims move in silence",
        ALLOCATOR,
        "if claimed != len(src):",
        "if False:",
    ),
    Mutation(
        "the emptiest slabs' holes are filled first",
        ALLOCATOR,
        "self._num_holes[slabs].argsort(",
        "(-self._num_holes[slabs]).argsort(",
    ),
    Mutation(
        "a slab is opened before holes are filled",
        ALLOCATOR,
        "if self._num_holes.any():",
        "if not self._free_slabs:",
    ),
    Mutation(
        "a slot is given though too few rows are free",
        ALLOCATOR,
        "if self.budget.free_bytes < self.unit_bytes or not self.capacity:",
        "if not self.capacity:",
    ),
    Mutation(
        "a freed slot's bytes are not given back",
        ALLOCATOR,
        "        self.budget.give_back(self.unit_bytes)\n        self._arena",
        "        self._arena",
    ),
    Mutation(
        "a freed slot stays a state",
        ALLOCATOR,
        "        self.states.remove(slot)\n",
        "",
    ),
    Mutation(
        "rows under states count as KV",
        ALLOCATOR,
        "return self.num_free + len(self.arena.slots.states) * self.arena.slab_rows",
        "return self.num_free",
    ),
    Mutation(
        "a slab that was opened for KV stays free for a state",
        ALLOCATOR,
        "[slab for slab in self._free_slabs if slab not in opened]",
        "list(self._free_slabs)",
    ),
    Mutation(
        "a slot is reserved and stays free",
        ALLOCATOR,
        "free[:] = [slab for slab in free if slab not in taken]",
        "free[:] = list(free)",
    ),
    Mutation(
        "moves are given out in reverse",
        MOVES,
        "moves, self._moves = tuple(self._moves), []",
        "moves, self._moves = tuple(self._moves[::-1]), []",
    ),
    Mutation(
        "moves are given out twice",
        MOVES,
        "moves, self._moves = tuple(self._moves), []",
        "moves = tuple(self._moves)",
    ),
    Mutation(
        "the row behind a slab is renamed too",
        MOVES,
        "offsets.view(np.uint32) < size",
        "(offsets >= 0) & (offsets <= size)",
    ),
    Mutation("rows that moved are still gathered", OWNERS, "        self._gathered.clear()\n", ""),
    Mutation(
        "a moved row's place is forgotten",
        OWNERS,
        "        self._places[move.dst] = places\n",
        "",
    ),
    Mutation(
        "what was stored lately is not known",
        OWNERS,
        "        self._number_new()\n        places",
        "        places",
    ),
    Mutation(
        "a number is given to two buffers",
        OWNERS,
        "number = self._free_numbers.pop()",
        "number = self._free_numbers[-1]",
    ),
    Mutation(
        "rows that a request holds are taken for the tree's",
        OWNERS,
        'owned = rows.take(offsets, mode="clip") == src',
        "owned = np.ones(len(src), np.bool_)",
    ),
    Mutation(
        "a buffer that shrank is known whole",
        OWNERS,
        "        self._numbered[number] = living\n        if living is None:",
        "        if living is None:\n            self._numbered[number] = None",
    ),
    Mutation(
        "a new buffer that shrank is forgotten",
        OWNERS,
        "            if living is not None:\n"
        "                self._new[id(_buffer(living))] = living\n",
        "",
    ),
    Mutation(
        "the tree's owner is not notified of what is stored",
        RESIDENCY,
        "        if self.owners is not None:\n            self.owners.add(rows)\n",
        "",
    ),
    Mutation(
        "the tree's owner is not notified of what goes",
        RESIDENCY,
        "        if self.owners is not None:\n            self.owners.shrink(rows, living)\n",
        "",
    ),
    Mutation(
        "what was loaded can not move",
        SNAPSHOT,
        "                residency.owners.add(node.kv.indices)\n",
        "                pass\n",
    ),
    Mutation(
        "a compacted buffer is not known by its new array",
        COMPACT,
        "        above = above.parent\n    return living\n",
        "        above = above.parent\n    return base[: len(living)]\n",
    ),
    Mutation(
        "a lease is not notified of moves",
        LEASE,
        "            cache.arena.holders[self] = None\n",
        "            pass\n",
    ),
    Mutation(
        "a lease that ended is still notified",
        LEASE,
        "            del self._cache.arena.holders[self]\n",
        "            pass\n",
    ),
    Mutation(
        "rows that a lease read are not renamed",
        LEASE,
        "        if self._unread_start:\n            moved = np",
        "        if False:\n            moved = np",
    ),
    Mutation(
        "a lease claims what it has published",
        LEASE,
        "num_held = len(moved) - int(np.searchsorted(moved, self.published_len))",
        "num_held = len(moved)",
    ),
    Mutation(
        "a second move hides the first from a lease's caller",
        LEASE,
        "start, end = min(start, self._moved[0]), max(end, self._moved[1])",
        "start, end = start, end",
    ),
    Mutation(
        "a lease's positions that moved end one early",
        LEASE,
        "start, end = int(moved[0]), int(moved[-1]) + 1",
        "start, end = int(moved[0]), int(moved[-1])",
    ),
    Mutation(
        "a checkpoint that has its slot is planned again",
        LEASE,
        " and not self.is_saving_at(position):",
        ":",
    ),
    Mutation(
        "what a lease has read is lost when it grows",
        LEASE,
        "                slice(0, self._unread_start),\n",
        "",
    ),
    Mutation(
        "duplicates are read from the wrong place on",
        LEASE,
        "            self._unread_start = first\n        self._unread_end",
        "            self._unread_start = first + num_duplicates\n        self._unread_end",
    ),
    Mutation(
        "an attention-only arena keeps slabs",
        BUILD,
        'state_bytes = 0 if config.prefix_cache == "radix" else config.state_bytes',
        "state_bytes = config.state_bytes",
    ),
)

ARENA = Mutations(
    BREAKAGES,
    tests=(
        "tests/cache/test_lease.py",
        "tests/export/test_snapshot.py",
        "tests/allocators/test_arena.py",
        "tests/cache/test_arena.py",
    ),
    machines=("tests/allocators/test_arena.py", "tests/cache/test_arena.py"),
    copied=("hybridcache", "tests", "pyproject.toml"),
)
