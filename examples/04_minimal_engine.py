"""A minimal engine around a prefix cache: numpy only, and a model of one multiplication.

    python 04_minimal_engine.py

The cache decides with integers: which KV row holds which token, which slot holds which state. The
engine owns the memory. Each step it (1) takes rows and checkpoint slots from the lease of every
running request, preempting the youngest request if memory is short, (2) takes one StepPlan and
carries it out, (3) computes, (4) publishes prompts. The toy model makes every byte checkable: a
token's KV, and the state after it, is a number that depends on all tokens so far. So ``compute``
detects every wrong row and every wrong state.
"""

from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from hybridcache import CacheConfig, Lease, LeaseRequest, build_prefix_cache, parse_placement
from hybridcache.allocators.moves import StepMemory
from hybridcache.radix.protocol import PromptBoundaries

GRID = 8  # checkpoints are at multiples of it
PIECE = 8  # tokens of one prefill step
STATE_ROWS = 8  # a state takes as many bytes as the KV of eight tokens; pages may not be longer


def advance(state: int, token: int) -> int:
    """Return the model's state after one more token; the token's KV is the same number."""
    return (state * 6364136223846793005 + int(token) + 1) % 2**64


@dataclass(eq=False)
class Request:
    """One request: its tokens so far, how far they are computed, and its latest lease."""

    tokens: list[int]
    max_len: int
    boundary: int
    lease: Lease | None = None
    computed_len: int = 0
    cached_len: int = 0

    @property
    def ids(self) -> np.ndarray:
        return np.array(self.tokens, np.int32)


class AlwaysLoad:
    """A rule for the host tier: loading is always faster than computing."""

    def seconds_saved(self, cached_len, position, prompt_len, num_bytes):
        """Return the benefit of resuming at ``position`` instead of ``cached_len``."""
        return position - cached_len


class MinimalEngine(StepMemory):
    """Chunked prefill, greedy decode, preemption, checkpoints, and a cache; one thread."""

    def __init__(self, config: CacheConfig, reserves: bool = False) -> None:
        """With ``reserves``, a request starts only if all that run can then end in memory."""
        self.reserves = reserves
        self.cache = cache = build_prefix_cache(config)
        self.placement = parse_placement("branch,boundary,end")  # one object for all requests
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # the oldest first
        self.counts: Counter[str] = Counter()
        if cache.arena is None:  # two pools
            self.kv = np.zeros(config.num_kv_tokens, np.uint64)
            self.states = np.zeros((config.num_slots, STATE_ROWS), np.uint64)
        else:  # rows and slots are views of the same bytes
            self.kv = np.zeros(cache.arena.capacity, np.uint64)
            self.states = self.kv[: cache.arena.num_slabs * STATE_ROWS].reshape(-1, STATE_ROWS)
        self.host = np.zeros(config.host_bytes // config.kv_bytes_per_token, np.uint64)

    def submit(self, prompt: list[int], num_new: int, boundary: int = 0) -> Request:
        """Queue a request. Later prompts will share its first ``boundary`` tokens."""
        one = Request(list(prompt), len(prompt) + num_new, boundary)
        self.waiting.append(one)
        return one

    def step(self) -> None:
        """Compute one piece of every running request."""
        self.admit()
        if self.waiting and not self.running:
            raise MemoryError("there is no slot for the state of a request")
        pieces = []
        for one in tuple(self.running):
            start, end = one.computed_len, min(one.computed_len + PIECE, len(one.tokens))
            if self.extend(one, end):
                pieces.append((one, start, end, one.lease.take_checkpoint_slots(start, end)))
        self.cache.take_step().carry_out(self)  # calls move, copy and restore below, in order
        for one, start, end, checkpoints in pieces:
            self.compute(one, start, end, dict(checkpoints))
            one.computed_len = end
            if end <= one.lease.prompt_len:  # ``finish`` publishes the answer, as one node
                one.lease.publish(one.ids, end)
            if end == one.max_len:
                one.lease.finish(one.ids, end)
                self.running.remove(one)
            elif end == len(one.tokens):
                one.tokens.append(int(self.states[one.lease.state_slot, 0]) % 50)

    def admit(self) -> None:
        """Start waiting requests, as long as there is memory for them."""
        while self.waiting and not self.follows(one := self.waiting[0]):
            if self.reserves and self.running and not self.fits(one):
                return
            resumes = one.lease is not None and one.lease.is_counted  # it was preempted
            boundaries = PromptBoundaries((one.boundary,))
            request = LeaseRequest(one.ids, boundaries=boundaries, resumes=resumes)
            lease = Lease.begin(self.cache, self.placement, request, AlwaysLoad())
            if lease is None:
                return
            self.running.append(self.waiting.popleft())
            one.lease, one.computed_len = lease, lease.cached_len
            one.cached_len = one.cached_len if resumes else lease.cached_len

    def fits(self, one: Request) -> bool:
        """Return whether ``one`` and every running request can end without a preemption.

        Otherwise they take memory from each other, and most of the work is done again (thrash).
        """
        cache, arena, runs = self.cache, self.cache.arena, self.running
        match = cache.match(one.ids)
        with cache.lock(match.node):  # as ``begin`` will: an idle prefix takes memory from then on
            locked = cache.protected()  # prefixes in use, shared ones counted once
        rows = locked.num_tokens + self.whole_pages(one.max_len) - match.cached_len
        rows += sum(self.whole_pages(run.max_len) - run.lease.published_len for run in runs)
        if arena is not None:  # three states: its own, the one resumed from, the rolling one
            return rows + 3 * (len(runs) + 1) * arena.slab_rows <= arena.capacity
        # Without a slot of its own, ``begin`` would evict the state that it should resume from.
        slots = locked.num_checkpoints + sum(run.lease.held_slots for run in runs) + 1
        return rows <= len(self.kv) and slots <= len(self.states)

    def whole_pages(self, num_tokens: int) -> int:
        """Return the number of rows that ``num_tokens`` take."""
        return -(-num_tokens // self.cache.page_size) * self.cache.page_size

    def follows(self, one: Request) -> bool:
        """Return whether ``one`` should wait for a running prefill of the same prefix."""
        cached_len = self.cache.match(one.ids).cached_len
        for leader in self.running:
            end = min(len(one.tokens) - 1, leader.lease.prompt_len)
            differs = (i for i in range(end) if one.tokens[i] != leader.tokens[i])
            goal = next(differs, end) // GRID * GRID
            if goal > max(cached_len, leader.computed_len):
                leader.lease.plan_checkpoint(goal, "branch")  # there ``one`` can resume
                return True
        return False

    def extend(self, one: Request, to_len: int) -> bool:
        """Take rows, preempting the youngest as often as needed. False if ``one`` is preempted."""
        while one in self.running and not one.lease.extend(to_len):
            if self.running == [one]:
                raise MemoryError(f"a request of {to_len} tokens does not fit, even alone")
            youngest = self.running.pop()  # not in ``pieces`` yet: it is ``one`` or a later one
            youngest.lease.preempt(youngest.ids, youngest.computed_len)
            self.counts["preemptions"] += 1
            self.waiting.appendleft(youngest)
        return one in self.running

    def abort(self, one: Request) -> None:
        """End a request early. Its published prefix stays in the cache."""
        (self.running if one in self.running else self.waiting).remove(one)
        if one.lease is not None:
            one.lease.abort()  # does nothing if it was preempted

    def move(self, move) -> None:
        """Move rows ``move.src`` to ``move.dst`` within the arena."""
        self.kv[move.dst] = self.kv[move.src]
        self.counts["moves"] += 1

    def copy(self, copy) -> None:
        """Copy rows or a state between the device and the host."""
        memory = {"device": self.kv if copy.kind == "kv" else self.states, "host": self.host}
        memory[copy.dst_tier][copy.dst] = memory[copy.src_tier][copy.src]
        self.counts["loads" if copy.dst_tier == "device" else "offloads"] += 1

    def restore(self, checkpoint: int, own: int) -> None:
        """Copy the state of a checkpoint to the slot of a request that resumes from it."""
        self.states[own] = self.states[checkpoint]

    def compute(self, one: Request, start: int, end: int, checkpoints: dict[int, int]) -> None:
        """Run the model over positions [start, end); save its state where a slot was given."""
        rows, own, expected = one.lease.kv_indices, one.lease.state_slot, 0
        for position in range(start):  # attention reads the KV of every earlier token
            expected = advance(expected, one.tokens[position])
            assert int(self.kv[rows[position]]) == expected, f"wrong KV at position {position}"
        state = int(self.states[own, 0]) if start else 0
        assert state == expected, f"wrong state at position {start}"
        for position in range(start, end):
            state = advance(state, one.tokens[position])
            self.kv[rows[position]] = state
            if position + 1 in checkpoints:
                self.states[checkpoints[position + 1]] = state
        self.states[own] = state


SYSTEM = list(range(100, 116))  # a system prompt of 16 tokens that all requests share
SIZES = {"grid": GRID, "kv_bytes_per_token": 8, "state_bytes": 8 * STATE_ROWS}


def serve(engine: MinimalEngine, *prompts: list[int]) -> list[Request]:
    """Serve ``prompts`` at the same time, and compare the answers with those without a cache."""
    requests = [engine.submit(prompt, 5, len(SYSTEM)) for prompt in prompts]
    while engine.waiting or engine.running:
        engine.step()
        held = [one.lease for one in engine.running]
        engine.cache.check(sum(x.held_tokens for x in held), sum(x.held_slots for x in held))
    for prompt, one in zip(prompts, requests, strict=True):
        state = 0
        for position, token in enumerate(one.tokens):
            assert position < len(prompt) or token == state % 50, "the cache changed an answer"
            state = advance(state, token)
    return requests


def demonstrate(title: str, config: CacheConfig) -> None:
    """Serve requests with a shared prefix, verify every byte, and print the reused tokens."""
    engine, first = MinimalEngine(config), [*SYSTEM, 1, 2, 3, 4]
    print(title)
    for prompt in (first, [*SYSTEM, 5, 6, 7, 8]):
        [one] = serve(engine, prompt)
        print(f"  {one.cached_len} of 20 tokens reused, answer {one.tokens[20:]}")
    gone = engine.submit([*SYSTEM, 9, 9, 9], num_new=5)
    engine.step()
    engine.abort(gone)
    twins = serve(engine, *([7, 7, *SYSTEM, number] for number in range(6)))
    print(f"  six prompts at the same time reused {[one.cached_len for one in twins]} tokens")
    serve(engine, *(SYSTEM[: 8 * (n % 3)] + [11 * n] * (1 + n % 15) for n in range(40)))
    [one] = serve(engine, first)
    print(f"  the first prompt again: {one.cached_len} of 20 tokens reused")
    print(f"  every KV row and state was the right one; {dict(sorted(engine.counts.items()))}")


def compare_admission() -> None:
    """Serve 120 requests that do not fit together, with and without ``fits``."""
    preemptions = []
    for reserves in (False, True):
        config = CacheConfig(num_kv_tokens=400, num_slots=60, **SIZES)
        engine = MinimalEngine(config, reserves=reserves)
        serve(engine, *([*SYSTEM, *range(n, n + 24)] for n in range(120)))
        preemptions.append(engine.counts["preemptions"])
    print("preemptions of 120 requests: {}, with `fits` {}".format(*preemptions))


if __name__ == "__main__":
    demonstrate("two pools", CacheConfig(num_kv_tokens=96, num_slots=12, **SIZES))
    arena = {"memory": "arena", "total_bytes": 8 * 192}
    demonstrate("one arena", CacheConfig(**arena, **SIZES))
    demonstrate("an arena with a host tier", CacheConfig(**arena, host_bytes=8 * 400, **SIZES))
    compare_admission()
