"""Ways to break who computes what: the scheduler."""

from __future__ import annotations

from experiments.mutations import Mutation
from experiments.mutations.engine.tests import (
    ARENA,
    DRAFTS,
    FAIR,
    LEASE_TESTS,
    SHORT_MEMORY,
    STEPS,
    VERIFIED,
)

SCHEDULER = "engine/schedule/scheduler.py"
REQUEST = "engine/requests/request.py"
PLACES = "engine/run/running_states.py"

BREAKS_OF_SCHEDULE = (
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
        "        tasks.sort(key=lambda task: (not task.is_decode, task.draft is not None))\n",
        "",
        STEPS,
    ),
    Mutation(
        "a drawn token's row counts those who draw none",
        SCHEDULER,
        "                num_drawn += 1\n",
        "            num_drawn += 1\n",
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
        "num_unled += not self._is_led(request)",
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
        "or not may_begin or self._manager.must_wait_for_slab:",
        "or not may_begin:",
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
        "return self.num_drawn > 0 and looks_back",
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
        "            if request.lease is not task.lease:\n"
        "                taken += [0] * (task.draft is not None)\n                continue\n",
        "",
        STEPS,
    ),
    Mutation(
        "tokens of those who left are given to the next",
        SCHEDULER,
        "            run = task.run_of(tokens)\n            request = task.request\n"
        "            if task.scores:\n                request.scores.extend(next(scores))\n"
        "            if request.lease is not task.lease:\n"
        "                taken += [0] * (task.draft is not None)\n                continue\n",
        "            request = task.request\n"
        "            if task.scores:\n                request.scores.extend(next(scores))\n"
        "            if request.lease is not task.lease:\n"
        "                taken += [0] * (task.draft is not None)\n                continue\n"
        "            run = task.run_of(tokens)\n",
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
        "a token in flight is not counted as drawn",
        SCHEDULER,
        "                request.num_drawn += 1\n",
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
    # -- tokens guessed ahead
    Mutation(
        "a step is made ahead of what becomes of drafts",
        SCHEDULER,
        "self.must_commit or (",
        "(",
        DRAFTS,
    ),
    Mutation(
        "guesses behind a stop count",
        SCHEDULER,
        "request.computed_len = request.scheduled_len = request.num_tokens - 1\n",
        "request.computed_len = request.scheduled_len = task.start + num_accepted + 1\n",
        DRAFTS,
    ),
    Mutation(
        "rejected guesses count as computed",
        SCHEDULER,
        "request.computed_len = request.scheduled_len = request.num_tokens - 1\n",
        "request.scheduled_len = request.num_tokens - 1\n",
        DRAFTS,
    ),
    Mutation(
        "a guess costs another request its memory",
        SCHEDULER,
        "            if self._manager.extend(request, ends[request] + len(draft.tokens))\n",
        "            if self._claim(request, ends[request] + len(draft.tokens))\n",
        DRAFTS,
    ),
    Mutation(
        "who left is still drafted for",
        SCHEDULER,
        "                self._forget_drafts(request)\n"
        "                self._running.remove(request)\n",
        "                self._running.remove(request)\n",
        DRAFTS,
    ),
    Mutation(
        "a state moves on by all that was guessed",
        PLACES,
        "slots.pop(count - 1)",
        "slots.pop()",
        VERIFIED,
    ),
    Mutation(
        "the state after the token that was rejected is taken",
        PLACES,
        "slots.pop(count - 1)",
        "slots.pop(min(count, len(slots) - 1))",
        VERIFIED,
    ),
    Mutation(
        "a checkpoint in a run is that of the next token",
        "engine/run/model_runner.py",
        "(slots[position - segment.start - 1], slot)",
        "(slots[position - segment.start], slot)",
        VERIFIED,
    ),
    Mutation(
        "a verification writes over the state that it reads",
        PLACES,
        "last = [own] if own in self._away else []",
        "last = [self.at(own)] if own in self._away else []",
        VERIFIED,
    ),
    Mutation(
        "step slots of a step that broke off are lost",
        PLACES,
        "            self._free += [slot for slot in slots if slot != own]\n            if own",
        "            if own",
        VERIFIED,
    ),
    Mutation(
        "what a broken commit published is believed",
        "engine/engine.py",
        "self._manager.lost_moves() or half_done.has_drafts",
        "self._manager.lost_moves()",
        DRAFTS,
    ),
    Mutation(
        "others touch memory while a verification is in flight",
        "engine/engine.py",
        "if not self._scheduler.must_commit:",
        "if True:",
        DRAFTS,
    ),
    Mutation(
        "a state that is copied elsewhere is not brought home before",
        "engine/run/model_runner.py",
        "moves = batch.moves or batch.restores",
        "moves = batch.moves",
        VERIFIED,
    ),
    Mutation(
        "a state is exported from where it is no more",
        "engine/run/unit.py",
        "        self._settle()\n        views",
        "        views",
        VERIFIED,
    ),
    Mutation(
        "a rejected checkpoint counts",
        "hybridcache/saving.py",
        "        self._rolling = self._overwritten\n",
        "",
        (LEASE_TESTS,),
    ),
    # -- what a step's prefills may take of it
)
