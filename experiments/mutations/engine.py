"""Ways to break the engine: scheduler, cache manager, sharing, requests, sampler, and its
thread."""

from __future__ import annotations

from experiments.mutations import Mutation, Mutations

SCHEDULER, MANAGER = "engine/schedule/scheduler.py", "engine/schedule/cache_manager.py"
SHARING, REQUEST = "engine/schedule/sharing.py", "engine/requests/request.py"
SAMPLER, SAMPLE_STEP = "engine/run/sampler.py", "engine/run/sample_step.py"
BUDGET, TOKEN_COUNTS = "engine/schedule/budget.py", "engine/requests/token_counts.py"
ENGINE_LOOP, ASYNC = "engine/engine.py", "engine/async_engine.py"
RUNNER = "engine/run/model_runner.py"

ENGINE_TESTS = "tests/engine/test_engine.py"
SCHEDULE_TESTS = "tests/engine/test_schedule.py"
SHORT_MEMORY = "tests/engine/test_short_memory.py"
MANAGER_TESTS = "tests/engine/test_cache_manager.py"
SAMPLER_TESTS = "tests/engine/test_sampler.py"
COUNTS_TESTS = "tests/engine/test_token_counts.py"
BUDGET_TESTS = "tests/engine/test_budget.py"
FAIRNESS_TESTS = "tests/engine/test_fairness.py"
ARENA_TESTS = "tests/engine/test_arena.py"
BITS_TESTS = "tests/engine/test_hits_change_nothing.py"
ASYNC_TESTS = "tests/engine/test_async_engine.py"
MACHINES = ("tests/engine/test_scheduler_machine.py",)

STEPS = (SCHEDULE_TESTS, ENGINE_TESTS, SHORT_MEMORY, *MACHINES)
MEMORY = (MANAGER_TESTS, *STEPS)
FAIR = (BUDGET_TESTS, SCHEDULE_TESTS, FAIRNESS_TESTS)
ARENA = (ARENA_TESTS, *MACHINES)
MOVES = (MANAGER_TESTS, *ARENA)
BITS = (BITS_TESTS,)
DRAWS = (SAMPLER_TESTS,)
COUNTS = (COUNTS_TESTS,)
THREAD = (ASYNC_TESTS,)

BREAKAGES = (
    # -- the scheduler
    Mutation(
        "an empty step takes the row writes with it",
        SCHEDULER,
        "            return EMPTY\n        self._num_in_flight",
        "            self._manager.take_copies()\n            return EMPTY\n        "
        "self._num_in_flight",
        (SHORT_MEMORY,),
    ),
    Mutation(
        "an empty step brings copies",
        SCHEDULER,
        "        if not ready and not self._manager.has_moves:\n",
        "        if False:\n",
        (SHORT_MEMORY,),
    ),
    Mutation(
        "segments stand in the order of admission",
        SCHEDULER,
        "        tasks.sort(key=lambda task: not task.is_decode)\n",
        "",
        STEPS,
    ),
    Mutation(
        "a drawn token's row counts those who draw none",
        SCHEDULER,
        "for row, request in enumerate(task.request for task, _ in ready if task.samples):",
        "for row, request in enumerate(task.request for task, _ in ready):",
        STEPS,
    ),
    Mutation(
        "a token that the host knows is taken for a late one",
        SCHEDULER,
        "            if task.end > task.request.num_tokens\n        )",
        "            if task.end >= task.request.num_tokens\n        )",
        STEPS,
    ),
    Mutation(
        "a chunk ends where the budget does",
        SCHEDULER,
        "else max(start, end // TILE * TILE)",
        "else end",
        STEPS,
    ),
    Mutation(
        "a long prompt is computed a tile a step",
        SCHEDULER,
        "else max(start, end // TILE * TILE)",
        "else min(start + TILE, end // TILE * TILE)",
        STEPS,
    ),
    Mutation(
        "decodes may take the whole budget",
        SCHEDULER,
        "tokens = max(self._token_budget - num_decodes, TILE)",
        "tokens = self._token_budget - num_decodes",
        STEPS,
    ),
    Mutation(
        "decodes cost no budget",
        SCHEDULER,
        "tokens = max(self._token_budget - num_decodes, TILE)",
        "tokens = self._token_budget",
        STEPS,
    ),
    Mutation(
        "a running prefill's chunk costs no budget",
        SCHEDULER,
        "                self._plan(ends, request, end, budget)\n        passed",
        "                ends[request] = end\n        passed",
        STEPS,
    ),
    Mutation(
        "an admitted prompt's chunk costs no budget",
        SCHEDULER,
        "                self._plan(ends, request, end, budget)\n        return passed",
        "                ends[request] = end\n        return passed",
        STEPS,
    ),
    Mutation(
        "a request is let in for less than a tile",
        SCHEDULER,
        "if budget.room(request.wants_scores) >= TILE:",
        "if budget.room(request.wants_scores) >= 1:",
        FAIR,
    ),
    Mutation(
        "a chunk from what short prompts left costs no budget",
        SCHEDULER,
        "                if end > start and self._manager.extend(request, end):\n"
        "                    self._plan(ends, request, end, budget)\n",
        "                if end > start and self._manager.extend(request, end):\n"
        "                    ends[request] = end\n",
        FAIR,
    ),
    Mutation(
        "what short prompts leave is given to nobody",
        SCHEDULER,
        "        if budget.num_for_short and budget.tokens:\n",
        "        if False:\n",
        FAIR,
    ),
    Mutation(
        "what short prompts leave is not given to who runs",
        SCHEDULER,
        "            self._grow(ends, budget)\n",
        "",
        FAIR,
    ),
    Mutation(
        "who was passed over is not asked again",
        SCHEDULER,
        "            self._admit(passed, ends, budget)\n",
        "",
        FAIR,
    ),
    Mutation(
        "a short prompt takes the place of a long one that it passes",
        SCHEDULER,
        "num_taken = len(self._running) + len(passed)",
        "num_taken = len(self._running)",
        FAIR,
    ),
    Mutation(
        "followers hide who stands behind them",
        SCHEDULER,
        "num_unled += self._sharing is None or not self._sharing.follows(request)",
        "num_unled += 1",
        FAIR,
    ),
    Mutation(
        "all that waits is one prompt, though others prefill",
        SCHEDULER,
        "len(self._running) - num_decodes + len(self._waiting) <= 1",
        "len(self._waiting) <= 1",
        FAIR,
    ),
    Mutation(
        "a request begins though its slot takes a second slab",
        SCHEDULER,
        "            if self._manager.must_wait_for_slab:\n                continue\n",
        "",
        ARENA,
    ),
    Mutation(
        "moves wait for a step that computes",
        SCHEDULER,
        "        if not ready and not self._manager.has_moves:\n",
        "        if not ready:\n",
        ARENA,
    ),
    Mutation(
        "a request decodes one token past its end",
        SCHEDULER,
        "return min(request.scheduled_len + 1, request.max_len - 1)",
        "return request.scheduled_len + 1",
        STEPS,
    ),
    Mutation(
        "somebody is preempted while a step is in flight",
        SCHEDULER,
        "            if self._num_in_flight:\n                self._must_wait = True\n"
        "                return False\n",
        "",
        STEPS,
    ),
    Mutation(
        "a refusal in flight is forgotten",
        SCHEDULER,
        "                self._must_wait = True\n",
        "",
        STEPS,
    ),
    Mutation(
        "after one refusal no step is made ahead again",
        SCHEDULER,
        "        self._must_wait = False\n        budget",
        "        budget",
        STEPS,
    ),
    Mutation(
        "rules that look back are drawn without the newest token",
        REQUEST,
        "return self.num_drawn > 0 and self.params.needs_history",
        "return False",
        STEPS,
    ),
    Mutation(
        "the oldest is preempted instead of the youngest",
        SCHEDULER,
        "            youngest = self._running[-1]\n",
        "            youngest = self._running[0]\n",
        STEPS,
    ),
    Mutation(
        "a preempted request waits behind younger ones",
        SCHEDULER,
        "        self._running.remove(request)\n        insort(self._waiting, request, key=_age)\n"
        "        self._is_full = True\n",
        "        self._running.remove(request)\n        self._waiting.append(request)\n"
        "        self._is_full = True\n",
        STEPS,
    ),
    Mutation(
        "what preemption freed is given to who waits",
        SCHEDULER,
        "        insort(self._waiting, request, key=_age)\n        self._is_full = True\n",
        "        insort(self._waiting, request, key=_age)\n",
        STEPS,
    ),
    Mutation(
        "those let in later count as younger",
        SCHEDULER,
        "        insort(self._running, request, key=_age)\n",
        "        self._running.append(request)\n",
        STEPS,
    ),
    Mutation(
        "a request that left makes no room",
        SCHEDULER,
        "                self._running.remove(request)\n                self._is_full = False\n",
        "                self._running.remove(request)\n",
        STEPS,
    ),
    Mutation(
        "a request that was aborted makes no room",
        SCHEDULER,
        "            self._running.remove(request)\n            self._is_full = False\n        "
        "else:",
        "            self._running.remove(request)\n        else:",
        STEPS,
    ),
    Mutation(
        "a follower does not wait for its leader",
        SCHEDULER,
        "            if goal and self._manager.cached_len(request) < goal:\n"
        "                continue\n",
        "",
        STEPS,
    ),
    Mutation(
        "a request without memory for its first chunk keeps its lease",
        SCHEDULER,
        "            self._manager.abort(request)\n            self._is_full = fits\n",
        "            self._is_full = fits\n",
        STEPS,
    ),
    Mutation(
        "who was aborted takes a token from the step",
        SCHEDULER,
        "            if request.lease is not task.lease:\n                continue\n",
        "",
        STEPS,
    ),
    Mutation(
        "tokens of those who left are given to the next",
        SCHEDULER,
        "            token = next(tokens) if task.samples else None\n            request = "
        "task.request\n"
        "            if task.scores:\n                request.scores.extend(next(scores))\n"
        "            if request.lease is not task.lease:\n                continue\n",
        "            request = task.request\n"
        "            if task.scores:\n                request.scores.extend(next(scores))\n"
        "            if request.lease is not task.lease:\n                continue\n"
        "            token = next(tokens) if task.samples else None\n",
        STEPS,
    ),
    Mutation(
        "a commit counts what is still in flight as computed",
        SCHEDULER,
        "            request.computed_len = task.end\n",
        "            request.computed_len = request.scheduled_len\n",
        STEPS,
    ),
    Mutation(
        "what broke off stays in flight",
        SCHEDULER,
        "        self._num_in_flight = 0\n        self._must_wait = self._is_full",
        "        self._must_wait = self._is_full",
        STEPS,
    ),
    Mutation(
        "who ran when a step broke off is lost",
        SCHEDULER,
        "                insort(self._waiting, request, key=_age)\n                interrupted",
        "                interrupted",
        STEPS,
    ),
    Mutation(
        "a late token is not drawn from",
        SCHEDULER,
        "samples=end == request.known_len < request.max_len",
        "samples=end == request.num_tokens < request.max_len",
        STEPS,
    ),
    Mutation(
        "a token in flight is not counted as drawn",
        SCHEDULER,
        "        request.num_drawn += task.samples\n",
        "",
        STEPS,
    ),
    Mutation(
        "checkpoints are looked for before the step",
        SCHEDULER,
        "self._manager.take_checkpoint_slots(task.request, task.end)",
        "self._manager.take_checkpoint_slots(task.request, task.start)",
        STEPS,
    ),
    Mutation(
        "segments do not say whose they are",
        SCHEDULER,
        "            namespace=request.namespace,\n",
        "            namespace=None,\n",
        STEPS,
    ),
    # -- what a step's prefills may take of it
    Mutation(
        "no part of a step is for short prompts",
        BUDGET,
        "min(tokens // SHORT_SHARE, tokens - TILE) if is_shared else 0",
        "0",
        FAIR,
    ),
    Mutation(
        "short prompts leave less than a tile to the others",
        BUDGET,
        "min(tokens // SHORT_SHARE, tokens - TILE)",
        "tokens // SHORT_SHARE",
        FAIR,
    ),
    Mutation(
        "short prompts take more than their part",
        BUDGET,
        "SHORT_SHARE = 4",
        "SHORT_SHARE = 2",
        FAIR,
    ),
    Mutation(
        "a long prompt takes the short ones' part",
        BUDGET,
        "tokens = max(0, self.tokens - self.num_for_short)",
        "tokens = self.tokens",
        FAIR,
    ),
    Mutation(
        "a long prompt's positions are scored without a limit",
        BUDGET,
        "return min(tokens, self.scored) if scores else tokens",
        "return tokens",
        FAIR,
    ),
    Mutation(
        "a short prompt's positions are scored without a limit",
        BUDGET,
        "(min(short, self.scored) if scores else short)",
        "short",
        FAIR,
    ),
    Mutation(
        "a short prompt takes what is taken already",
        BUDGET,
        "short = min(self.num_for_short, self.tokens)",
        "short = self.num_for_short",
        FAIR,
    ),
    Mutation(
        "a prefill takes more than its rest",
        BUDGET,
        "else min(rest, self.room(scores))",
        "else self.room(scores)",
        FAIR,
    ),
    Mutation(
        "scored positions are not counted",
        BUDGET,
        "        self.scored -= num_tokens * scores\n",
        "",
        FAIR,
    ),
    Mutation(
        "every position counts as scored",
        BUDGET,
        "self.scored -= num_tokens * scores",
        "self.scored -= num_tokens",
        FAIR,
    ),
    # -- the cache manager
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
        "MAX_MOVES - len(self._moves), num_wanted)",
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
        "        self._move_rows(batch.moves)\n",
        "",
        BITS,
    ),
    Mutation(
        "rows move after the state copies",
        RUNNER,
        "        self._move_rows(batch.moves)\n        self.table.write(batch.row_writes)\n"
        "        self._copy_states(batch.restores)\n",
        "        self.table.write(batch.row_writes)\n        self._copy_states(batch.restores)\n"
        "        self._move_rows(batch.moves)\n",
        BITS,
    ),
    Mutation(
        "rows move again after the step",
        RUNNER,
        "        logits = self._logits(batch, drawn)\n",
        "        logits = self._logits(batch, drawn)\n        self._move_rows(batch.moves)\n",
        BITS,
    ),
    Mutation(
        "rows move the wrong way round",
        RUNNER,
        "pairs = np.stack([move.src, move.dst])",
        "pairs = np.stack([move.dst, move.src])",
        BITS,
    ),
    Mutation(
        "moves without anything to compute are not made",
        ENGINE_LOOP,
        "        elif plan.tasks or plan.batch.moves:\n",
        "        elif plan.tasks:\n",
        ARENA,
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
    # -- requests and what is drawn for them
    Mutation(
        "an answer is one token too long",
        REQUEST,
        "        elif self.num_tokens >= self.max_len:\n",
        "        elif self.num_tokens > self.max_len:\n",
        STEPS,
    ),
    Mutation(
        "a draw's number forgets tokens in flight",
        REQUEST,
        "draw = self.known_len - 1 - self.prompt_len",
        "draw = self.num_tokens - self.prompt_len",
        STEPS,
    ),
    Mutation(
        "a report repeats what was reported",
        REQUEST,
        "        self._reported = self.num_tokens\n        new_text",
        "        new_text",
        STEPS,
    ),
    Mutation(
        "a scored prompt's token is drawn from its first row",
        SAMPLE_STEP,
        "            rows.append(num_rows - 1)\n",
        "            rows.append(first)\n",
        STEPS,
    ),
    Mutation(
        "a prompt's tokens are scored one place too early",
        SAMPLE_STEP,
        "request.tokens[task.start + 1 : min(task.end + 1, request.prompt_len)]",
        "request.tokens[task.start : min(task.end, request.prompt_len)]",
        STEPS,
    ),
    # -- the engine's step
    Mutation(
        "an empty step counts as in flight",
        ENGINE_LOOP,
        "in_flight if in_flight.plan.tasks else None",
        "in_flight",
        STEPS,
    ),
    Mutation(
        "a step that broke off is committed",
        ENGINE_LOOP,
        "            self._in_flight = None\n            self.interrupted",
        "            self.interrupted",
        STEPS,
    ),
    Mutation(
        "a step that is not overlapped is committed one late",
        ENGINE_LOOP,
        "        if not self._overlaps:\n            return in_flight\n",
        "",
        STEPS,
    ),
    # -- the sampler
    Mutation("a draw forgets its seed", SAMPLER, "z = (seed * 0x", "z = (0 * 0x", DRAWS),
    Mutation("a draw forgets its number", SAMPLER, "+ (draw + 1) * 0x9E", "+ 1 * 0x9E", DRAWS),
    Mutation(
        "the likeliest token is chosen before penalties",
        SAMPLER,
        "return scores.argmax(dim=-1)",
        "return logits.argmax(dim=-1)",
        DRAWS,
    ),
    Mutation(
        "penalties are written into the model's logits",
        SAMPLER,
        "scores = logits.to(torch.float32, copy=True)",
        "scores = logits.to(torch.float32)",
        DRAWS,
    ),
    Mutation(
        "a repetition in the answer costs nothing",
        SAMPLER,
        "np.full(len(numbers), params.repetition_penalty)",
        "np.where(numbers > 0, 1.0, params.repetition_penalty)",
        DRAWS,
    ),
    Mutation(
        "a repetition makes an unlikely token likelier",
        SAMPLER,
        "torch.where(found > 0, found / factor, found * factor) - less",
        "found / factor - less",
        DRAWS,
    ),
    Mutation(
        "a frequent token is penalised once",
        SAMPLER,
        "params.frequency_penalty * numbers",
        "params.frequency_penalty * (numbers > 0)",
        DRAWS,
    ),
    Mutation(
        "a token counts as present when it is in the prompt",
        SAMPLER,
        "params.presence_penalty * (numbers > 0)",
        "params.presence_penalty * (numbers >= 0)",
        DRAWS,
    ),
    Mutation(
        "penalties of one row fall on another",
        SAMPLER,
        "index.append(request.counts.ids + row * logits.shape[-1])",
        "index.append(request.counts.ids)",
        DRAWS,
    ),
    Mutation(
        "who is drawn beside others is drawn before penalties",
        SAMPLER,
        "_pick(scores, rows).float()",
        "_pick(logits, rows).float()",
        DRAWS,
    ),
    # -- how often a token stands in an answer
    Mutation(
        "the prompt's tokens repeat nothing",
        REQUEST,
        "self._buffer[: self.prompt_len if repeats else 0]",
        "self._buffer[:0]",
        COUNTS,
    ),
    Mutation(
        "an answer is counted once, and not as it grows",
        REQUEST,
        "        self._counts.count(self.output)\n        return self._counts\n",
        "            self._counts.count(self.output)\n        return self._counts\n",
        COUNTS,
    ),
    Mutation(
        "what was counted is counted again",
        TOKEN_COUNTS,
        "        self.num_counted = len(output)\n",
        "",
        COUNTS,
    ),
    Mutation(
        "a token is counted once",
        TOKEN_COUNTS,
        "self._numbers[at] += 1",
        "self._numbers[at] = 1",
        COUNTS,
    ),
    Mutation(
        "a prompt's token counts as answered",
        TOKEN_COUNTS,
        "np.zeros(len(self._ids), np.int32)",
        "np.ones(len(self._ids), np.int32)",
        COUNTS,
    ),
    Mutation(
        "a new token takes the place of the one before it",
        TOKEN_COUNTS,
        "self._at.setdefault(token, len(self._at))",
        "self._at.setdefault(token, max(len(self._at) - 1, 0))",
        COUNTS,
    ),
    Mutation(
        "what was counted is lost where the arrays grow",
        TOKEN_COUNTS,
        "np.concatenate([self._numbers, np.zeros(at + 64, np.int32)])",
        "np.zeros(2 * at + 64, np.int32)",
        COUNTS,
    ),
    Mutation(
        "draws are looked up with a batch mate's number",
        SAMPLER,
        "_column([uniform(q.seed, q.draw) for q in requests], sums)",
        "_column([uniform(q.seed, q.draw) for q in requests[::-1]], sums)",
        DRAWS,
    ),
    Mutation(
        "a draw of zero picks a token that was left out",
        SAMPLER,
        "torch.searchsorted(sums, points, right=True)",
        "torch.searchsorted(sums, points, right=False)",
        DRAWS,
    ),
    Mutation(
        "log-probabilities of one row are given to another",
        SAMPLER,
        "            if num_top is None:\n                sampled",
        "            if num_top is None and next(scored):\n                sampled",
        DRAWS,
    ),
    Mutation(
        "as few alternatives are found as anybody wants",
        SAMPLER,
        "most = max(num_top or 0 for num_top in wanted)",
        "most = min(num_top or 0 for num_top in wanted)",
        DRAWS,
    ),
    # -- the engine's thread
    Mutation(
        "an order wakes nobody",
        ASYNC,
        "        self._orders.append(order)\n        self._wake.notify()\n",
        "        self._orders.append(order)\n",
        THREAD,
    ),
    Mutation(
        "draining wakes nobody",
        ASYNC,
        "            self._is_open = False\n            self._wake.notify()\n",
        "            self._is_open = False\n",
        THREAD,
    ),
    Mutation(
        "stopping wakes nobody",
        ASYNC,
        "            self._is_open, self._must_stop = False, True\n            "
        "self._wake.notify()\n",
        "            self._is_open, self._must_stop = False, True\n",
        THREAD,
    ),
    Mutation(
        "who arrived is counted as arriving for ever",
        ASYNC,
        "                self._num_arriving -= 1\n",
        "                pass\n",
        THREAD,
    ),
    Mutation(
        "one more may wait than the queue holds",
        ASYNC,
        "self._num_arriving >= self.config.max_queue",
        "self._num_arriving > self.config.max_queue",
        THREAD,
    ),
    Mutation(
        "those on their way are not counted as waiting",
        ASYNC,
        "self._engine.num_waiting + self._num_arriving >=",
        "self._engine.num_waiting >=",
        THREAD,
    ),
    Mutation(
        "who is aborted is not told",
        ASYNC,
        "                self._hand_out([output])\n",
        "                pass\n",
        THREAD,
    ),
    Mutation(
        "a finished stream is kept",
        ASYNC,
        "            if output.is_finished:\n                self._streams.pop",
        "            if False:\n                self._streams.pop",
        THREAD,
    ),
    Mutation(
        "who ran in a step that failed goes on unread",
        ASYNC,
        "            self._engine.abort(request_id)\n            stream =",
        "            stream =",
        THREAD,
    ),
    Mutation(
        "the second failed step ever ends the engine",
        ASYNC,
        "            self._last_step_failed = False\n            self._hand_out",
        "            self._hand_out",
        THREAD,
    ),
    Mutation(
        "no number of failed steps ends the engine",
        ASYNC,
        "            self._last_step_failed = True\n",
        "",
        THREAD,
    ),
    Mutation(
        "who still waits at the end is not told",
        ASYNC,
        "            _post(stream.loop, [(stream, ended)])\n",
        "            pass\n",
        THREAD,
    ),
    Mutation(
        "a stopped engine keeps what its requests held",
        ASYNC,
        "            for request_id in tuple(self._streams):\n"
        "                self._engine.abort(request_id)\n",
        "",
        THREAD,
    ),
    Mutation(
        "a drained engine drops what runs",
        ASYNC,
        "            if engine.has_work():\n                return True\n",
        "            if engine.has_work():\n                return is_open\n",
        THREAD,
    ),
)

ENGINE = Mutations(
    breakages=BREAKAGES,
    tests=(
        *MEMORY,
        BUDGET_TESTS,
        FAIRNESS_TESTS,
        ARENA_TESTS,
        BITS_TESTS,
        *DRAWS,
        *COUNTS,
        *THREAD,
    ),
    machines=MACHINES,
    copied=("hybridcache", "kernels", "engine", "tests", "pyproject.toml"),
)
