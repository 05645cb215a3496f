"""Ways to break the arena, and what follows its moves."""

from __future__ import annotations

from experiments.mutations import Mutation, Mutations
from experiments.mutations.cache.core import RESIDENCY
from experiments.mutations.cache.parts import COMPACT

ALLOCATOR, MOVES = "hybridcache/allocators/arena.py", "hybridcache/allocators/moves.py"
OWNERS, LEASE = "hybridcache/core/owners.py", "hybridcache/lease.py"
LEASE_ROWS = "hybridcache/lease_rows.py"
SAVING = "hybridcache/saving.py"
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
        "an emptied slab's own holes are filled",
        ALLOCATOR,
        "is_outside = ~is_inside",
        "is_outside = np.ones(len(pages), np.bool_)",
    ),
    Mutation(
        "an arena without states has a slab",
        ALLOCATOR,
        "        is_whole[-1] = False\n",
        "",
    ),
    Mutation(
        "the tail is emptied too",
        ALLOCATOR,
        "counts[:-1].argmax()",
        "counts.argmax()",
    ),
    Mutation(
        "a fuller slab than need be is emptied",
        ALLOCATOR,
        "counts[:-1].argmax()",
        "np.flatnonzero(counts[:-1])[-1]",
    ),
    Mutation(
        "holes that a move does not need are lost",
        ALLOCATOR,
        "self.pages.restack(holes[: len(living) - 1 : -1])",
        "self.pages.restack(holes[:0])",
    ),
    Mutation(
        "a slab without living rows is free, and its rows are too",
        ALLOCATOR,
        "        self.pages.restack(self.pages.stacked()[~is_whole[slabs]])\n",
        "",
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
        "keys.argsort(",
        "(~keys).argsort(",
    ),
    Mutation(
        "an opened slab's rows come before other holes",
        ALLOCATOR,
        "        self._stack[num_pages:top] = self._stack[:height]\n"
        "        return self._stack[:num_pages]",
        "        return self._stack[height:top]",
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
        "a moved row's buffer is forgotten",
        OWNERS,
        "        self._numbers[move.dst.astype(np.intp)] = numbers\n",
        "",
    ),
    Mutation(
        "what was stored lately is not known",
        OWNERS,
        "        self._number_new()\n        numbers",
        "        numbers",
    ),
    Mutation(
        "a number is given to two buffers",
        OWNERS,
        "self._free_numbers.pop()",
        "self._free_numbers[-1]",
    ),
    Mutation(
        "rows that a request holds are taken for the tree's",
        OWNERS,
        "num_owned += len(move.rename(rows))",
        "num_owned += int((numbers == number).sum())",
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
        "            cache.arena.holders[self._rows] = None\n",
        "            pass\n",
    ),
    Mutation(
        "a lease that ended is still notified",
        LEASE,
        "            del self._cache.arena.holders[self._rows]\n",
        "            pass\n",
    ),
    Mutation(
        "rows that a lease read are not renamed",
        LEASE_ROWS,
        "        if self._unread_start:\n            moved = np",
        "        if False:\n            moved = np",
    ),
    Mutation(
        "a lease claims what it has published",
        LEASE_ROWS,
        "num_held = len(moved) - int(np.searchsorted(moved, self.published_len))",
        "num_held = len(moved)",
    ),
    Mutation(
        "a second move hides the first from a lease's caller",
        LEASE_ROWS,
        "start, end = min(start, self._moved[0]), max(end, self._moved[1])",
        "start, end = start, end",
    ),
    Mutation(
        "a lease's positions that moved end one early",
        LEASE_ROWS,
        "start, end = int(moved[0]), int(moved[-1]) + 1",
        "start, end = int(moved[0]), int(moved[-1])",
    ),
    Mutation(
        "a checkpoint that has its slot is planned again",
        SAVING,
        "        if not self.is_pending(position):\n            self._plan",
        "        if True:\n            self._plan",
    ),
    Mutation(
        "what a lease has read is lost when it grows",
        LEASE_ROWS,
        "                slice(0, self._unread_start),\n",
        "",
    ),
    Mutation(
        "duplicates are read from the wrong place on",
        LEASE_ROWS,
        "                self._unread_start = first\n",
        "                self._unread_start = first + num_duplicates\n",
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
        "tests/cache/test_arena_machine.py",
    ),
    machines=("tests/allocators/test_arena.py", "tests/cache/test_arena_machine.py"),
    copied=("hybridcache", "tests", "pyproject.toml"),
)
