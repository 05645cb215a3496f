"""Ways to break whose memory it is: the cache manager, and who waits for whom."""

from __future__ import annotations

from experiments.mutations import Mutation
from experiments.mutations.engine.tests import (
    ARENA,
    BITS,
    MEMORY,
    MOVES,
    REMEMBERED,
    STEPS,
    STORE,
    TIERS,
)

MANAGER = "engine/schedule/cache_manager.py"
SHARING = "engine/schedule/sharing.py"
ENGINE_LOOP = "engine/engine.py"
RUNNER, COPIES = "engine/run/model_runner.py", "engine/run/copies.py"
DISK = "engine/store/disk.py"
SEGMENT = "engine/store/segment.py"
LOWER = "engine/run/lower.py"
STORED_IN, BELOW = "engine/store/store.py", "engine/below.py"
FETCH = "hybridcache/core/fetch.py"

BREAKS_OF_MEMORY = (
    Mutation(
        "after a preemption in exact mode the answer is prefilled",
        MANAGER,
        "prefill_len = request.prompt_len if self._exact else request.num_tokens",
        "prefill_len = request.num_tokens",
        MEMORY,
    ),
    Mutation(
        "tokens in flight are remembered through a preemption",
        MANAGER,
        "request.prefill_len, request.num_drawn = prefill_len, 0",
        "request.prefill_len = prefill_len",
        MEMORY,
    ),
    Mutation(
        "prompt scores are counted twice after a preemption",
        MANAGER,
        "            request.scores.clear()\n",
        "            pass\n",
        MEMORY,
    ),
    Mutation(
        "a checkpoint is resumed from without a copy",
        MANAGER,
        "            self._restores[row] = lease.restore\n",
        "            pass\n",
        MEMORY,
    ),
    Mutation(
        "a copy overwrites the checkpoint",
        MANAGER,
        "            self._restores[row] = lease.restore\n",
        "            self._restores[row] = lease.restore[::-1]\n",
        MEMORY,
    ),
    Mutation(
        "the rows of what is cached are not listed",
        MANAGER,
        "            self._row_writes.append((row, 0, lease.kv_indices))\n",
        "            pass\n",
        MEMORY,
    ),
    Mutation(
        "an extension's rows are listed one place too far",
        MANAGER,
        "self._row_writes.append((row, before, lease.kv_indices[before : request.max_len]))",
        "self._row_writes.append((row, before + 1, lease.kv_indices[before + 1 : "
        "request.max_len]))",
        MEMORY,
    ),
    Mutation(
        "rows past the longest answer are listed",
        MANAGER,
        "lease.kv_indices[before : request.max_len]",
        "lease.kv_indices[before:]",
        MEMORY,
    ),
    Mutation(
        "a publish does not change the request's row",
        MANAGER,
        "            self._row_writes.append((row, start, lease.kv_indices[start:end].copy()))\n",
        "            pass\n",
        MEMORY,
    ),
    Mutation(
        "a publish lists all but the last row that changed",
        MANAGER,
        "lease.kv_indices[start:end].copy()",
        "lease.kv_indices[start : end - 1].copy()",
        MEMORY,
    ),
    Mutation(
        "a state that still moves is donated",
        MANAGER,
        "lease.finish(request.tokens, request.computed_len, donate=is_state_final)",
        "lease.finish(request.tokens, request.computed_len, donate=True)",
        MEMORY,
    ),
    Mutation(
        "row writes of who left are made",
        MANAGER,
        "        self._row_writes = [write for write in self._row_writes if write[0] != row]\n",
        "",
        MEMORY,
    ),
    Mutation(
        "state copies of who left are made",
        MANAGER,
        "        self._restores.pop(row, None)\n",
        "",
        MEMORY,
    ),
    Mutation(
        "a request's row is not given back",
        MANAGER,
        "        self._free_rows.append(row)\n",
        "",
        MEMORY,
    ),
    Mutation(
        "state copies are made in every step from then on",
        MANAGER,
        "restores, self._restores = tuple(self._restores.values()), {}",
        "restores = tuple(self._restores.values())",
        MEMORY,
    ),
    Mutation(
        "row writes are made in the wrong order",
        MANAGER,
        "row_writes, self._row_writes = tuple(self._row_writes), []",
        "row_writes, self._row_writes = tuple(self._row_writes[::-1]), []",
        MEMORY,
    ),
    Mutation(
        "rows that moved are not listed anew",
        MANAGER,
        "                    self._row_writes.append((row, start, lease.kv_indices[start:end]))\n",
        "                    pass\n",
        ARENA,
    ),
    Mutation(
        "rows that moved are written before what is out of date",
        MANAGER,
        "self._row_writes.append((row, start, lease.kv_indices[start:end]))\n",
        "self._row_writes.insert(0, (row, start, lease.kv_indices[start:end]))\n",
        MOVES,
    ),
    Mutation(
        "rows that moved are listed past the longest answer",
        MANAGER,
        "start, end = moved[0], min(moved[1], request.max_len)",
        "start, end = moved",
        MOVES,
    ),
    Mutation(
        "moves are dropped",
        MANAGER,
        "return Copies(moves, row_writes, restores)",
        "return Copies((), row_writes, restores)",
        MOVES,
    ),
    Mutation(
        "moves are given in every step from then on",
        MANAGER,
        "moves = self._moves.take()",
        "moves = tuple(self._moves._moves)",
        MOVES,
    ),
    Mutation(
        "two slabs are emptied in a step",
        MANAGER,
        "MAX_MOVES - self._moves.num_moves, num_wanted)",
        "MAX_MOVES, num_wanted)",
        MOVES,
    ),
    Mutation(
        "moves are not known to be lost with their step",
        MANAGER,
        "self._has_given_moves = bool(moves)",
        "self._has_given_moves = False",
        MOVES,
    ),
    Mutation(
        "rows that nobody knows to have moved are read",
        ENGINE_LOOP,
        "            if self._manager.lost_moves():\n",
        "            if False:\n",
        MOVES,
    ),
    Mutation(
        "the memory's rows do not move",
        RUNNER,
        "        self._copies.move(batch.moves)\n",
        "",
        BITS,
    ),
    Mutation(
        "rows move after the state copies",
        RUNNER,
        "        self._copies.move(batch.moves)\n        self.table.write(batch.row_writes)\n"
        "        self._copies.restore(batch.restores)\n",
        "        self.table.write(batch.row_writes)\n        self._copies.restore(batch.restores)\n"
        "        self._copies.move(batch.moves)\n",
        BITS,
    ),
    Mutation(
        "rows move again after the step",
        RUNNER,
        "        logits = self._logits(batch, drawn)\n",
        "        logits = self._logits(batch, drawn)\n        self._copies.move(batch.moves)\n",
        BITS,
    ),
    Mutation(
        "rows move the wrong way round",
        COPIES,
        "pairs = np.stack([order.src, order.dst])",
        "pairs = np.stack([order.dst, order.src])",
        BITS,
    ),
    Mutation(
        "moves without anything to compute are not made",
        ENGINE_LOOP,
        "        elif plan.tasks or plan.batch.moves:\n",
        "        elif plan.tasks:\n",
        ARENA,
    ),
    # -- below the device
    Mutation(
        "what is fetched from host memory is not copied",
        LOWER,
        "            _copy(self._rows, dst, self.host, src)\n",
        "            pass\n",
        TIERS,
    ),
    Mutation(
        "a record is whole without its end",
        SEGMENT,
        " or self._tail(place, number) is None:",
        ":",
        STORE,
    ),
    Mutation(
        "a payload is read whatever its checksum",
        SEGMENT,
        "return self._tail(place, number) == zlib.crc32(out)",
        "return True",
        STORE,
    ),
    Mutation(
        "rows point at the beginning of their record",
        DISK,
        "np.arange(piece.offset, piece.offset + len(some), dtype=np.int32)",
        "np.arange(len(some), dtype=np.int32)",
        STORE,
    ),
    Mutation(
        "rows are copied in runs of their place alone",
        LOWER,
        "(np.diff(src) != 1) | (np.diff(dst) != 1)",
        "np.diff(dst) != 1",
        TIERS,
    ),
    Mutation(
        "rows of a record are taken from its beginning",
        DISK,
        "payload[offset : offset + end - first]",
        "payload[: end - first]",
        STORE,
    ),
    Mutation(
        "a segment of which all lives keeps the others from being cleaned",
        STORED_IN,
        "if one is not self._current and one.live_bytes + ALIGNMENT < one.end",
        "if one is not self._current",
        STORE,
    ),
    Mutation(
        "what was learnt is not recalled",
        BELOW,
        "            self.remembering.recall_policies(placement.rules)\n",
        "            pass\n",
        REMEMBERED,
    ),
    Mutation(
        "an adopted state is a new one",
        FETCH,
        "    if was is not None:\n        was.stored",
        "    if was is None:\n        was.stored",
        REMEMBERED,
    ),
    # -- sharing
    Mutation(
        "a request follows another namespace's",
        SHARING,
        "        and leader.namespace == request.namespace\n",
        "",
        STEPS,
    ),
    Mutation(
        "a follower waits for its own last token",
        SHARING,
        "min(shared, request.num_tokens - 1) // grid",
        "min(shared, request.num_tokens) // grid",
        STEPS,
    ),
    Mutation(
        "a leader is not asked to save its state",
        SHARING,
        "                    self._manager.plan_checkpoint(leader.request, ahead[-1])\n",
        "                    pass\n",
        STEPS,
    ),
    Mutation(
        "a follower takes the shallowest of its resume points",
        SHARING,
        "                goal = max([goal, *ahead])\n",
        "                goal = min([goal or 1 << 30, *ahead])\n",
        STEPS,
    ),
    Mutation(
        "a request that reads no cache follows somebody",
        SHARING,
        "        if request.wants_scores:\n            return 0\n",
        "",
        STEPS,
    ),
    Mutation(
        "who waits no more is remembered as a follower",
        SHARING,
        "self._followers.pop(request, None)",
        "pass",
        STEPS,
    ),
    Mutation(
        "the newest leader is overlooked",
        SHARING,
        "if leader.rank < follower.num_leaders_seen:",
        "if leader.rank <= follower.num_leaders_seen:",
        STEPS,
    ),
    Mutation(
        "a leader that was preempted is followed on",
        SHARING,
        "return self.request.lease is self.lease and self.request.is_prefilling",
        "return self.request.is_prefilling",
        STEPS,
    ),
)
