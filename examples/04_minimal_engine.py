"""A minimal engine around a prefix cache: numpy only, and a model of one multiplication.

    python examples/04_minimal_engine.py

The cache decides with integers: which KV row holds which token, which slot holds which state. The
engine owns the memory. Each step it (1) asks every running request's lease for rows and checkpoint
slots, (2) takes one StepPlan and carries it out, (3) computes, (4) publishes. The toy model makes
every byte checkable: a token's KV, and the state after it, is a number that depends on all tokens
so far. ``compute`` therefore notices any row or state that is not the one the request needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybridcache import CacheConfig, Lease, LeaseRequest, build_prefix_cache, parse_placement
from hybridcache.allocators.moves import Move

STATE_ROWS = 8  # a state takes as many bytes as the KV of eight tokens
PIECE = 8  # tokens of one prefill step


def advance(state: int, token: int) -> int:
    """Return the model's state after one more token; the token's KV is the same number."""
    return (state * 6364136223846793005 + int(token) + 1) % 2**64


@dataclass(eq=False)
class Running:
    """One request: its tokens so far, its lease, and how far it is computed."""

    tokens: list[int]
    max_len: int
    lease: Lease
    computed_len: int


class AlwaysLoad:
    """A rule for the host tier: loading is always faster than computing."""

    def seconds_saved(self, cached_len, position, prompt_len, num_bytes):
        """Return the benefit of resuming at ``position`` instead of ``cached_len``."""
        return position - cached_len


class MinimalEngine:
    """Chunked prefill, greedy decode, checkpoints, and a cache; one thread."""

    def __init__(self, config: CacheConfig) -> None:
        self.cache = cache = build_prefix_cache(config)
        self.placement = parse_placement("boundary,end")
        self.running: list[Running] = []
        self.counts = {"moves": 0, "offloads": 0, "loads": 0}
        if cache.arena is not None:  # rows and slots are views of the same bytes
            self.kv = np.zeros(cache.arena.capacity, np.uint64)
            slabs = self.kv[: cache.arena.num_slabs * STATE_ROWS]
            self.states = slabs.reshape(-1, STATE_ROWS)
        else:  # two pools
            self.kv = np.zeros(cache.free_tokens, np.uint64)
            self.states = np.zeros((cache.free_slots, STATE_ROWS), np.uint64)
        self.host = np.zeros(config.host_bytes // config.kv_bytes_per_token, np.uint64)

    def begin(self, prompt: list[int], num_new: int, boundary: int) -> Running | None:
        """Start a request, or return None if there is no memory for its state."""
        request = LeaseRequest(np.array(prompt, np.int32), boundaries=(boundary,))
        lease = Lease.begin(self.cache, self.placement, request, AlwaysLoad())
        if lease is None:
            return None
        running = Running(list(prompt), len(prompt) + num_new, lease, lease.cached_len)
        self.running.append(running)
        return running

    def step(self) -> None:
        """Compute one piece of every running request."""
        pieces = []
        for one in self.running:
            start = one.computed_len
            end = min(start + PIECE, len(one.tokens))
            if not one.lease.extend(end):
                raise MemoryError("a real engine would preempt a request here")
            pieces.append((one, start, end, one.lease.take_checkpoint_slots(start, end)))
        self.carry_out()
        for one, start, end, checkpoints in pieces:
            self.compute(one, start, end, dict(checkpoints))
            one.computed_len = end
            one.lease.publish(np.array(one.tokens, np.int32), end)
            if len(one.tokens) == one.max_len:
                self.running.remove(one)
                one.lease.finish(np.array(one.tokens, np.int32), end)
            elif end == len(one.tokens):
                one.tokens.append(int(self.states[one.lease.state_slot, 0] % 50))

    def abort(self, one: Running) -> None:
        """End a request early. Its published prefix stays in the cache."""
        self.running.remove(one)
        one.lease.abort()

    def carry_out(self) -> None:
        """Do everything that the cache decided since the last step, in the plan's order."""
        plan = self.cache.take_step()
        for transfer in plan.transfers:
            if isinstance(transfer, Move):  # rows move within the arena
                self.kv[transfer.dst] = self.kv[transfer.src]
                self.counts["moves"] += 1
            else:
                self.write(transfer.dst_tier, transfer, self.read(transfer.src_tier, transfer))
                self.counts["loads" if transfer.dst_tier == "device" else "offloads"] += 1
        for checkpoint, own in plan.restores:
            self.states[own] = self.states[checkpoint]

    def read(self, tier: str, copy) -> np.ndarray:
        """Return the bytes that ``copy`` takes from ``tier``."""
        if tier == "host":
            return self.host[copy.src]
        return self.kv[copy.src] if copy.kind == "kv" else self.states[copy.src[0]].copy()

    def write(self, tier: str, copy, content: np.ndarray) -> None:
        """Write ``content`` to the place that ``copy`` names in ``tier``."""
        if tier == "host":
            self.host[copy.dst] = content
        elif copy.kind == "kv":
            self.kv[copy.dst] = content
        else:
            self.states[copy.dst[0]] = content

    def compute(self, one: Running, start: int, end: int, checkpoints: dict[int, int]) -> None:
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
GRID = {"grid": 8, "kv_bytes_per_token": 8, "state_bytes": 8 * STATE_ROWS}


def demonstrate(title: str, config: CacheConfig) -> None:
    """Serve requests with a shared prefix, verify every byte, and print what was reused."""
    engine, answers = MinimalEngine(config), []
    print(title)
    for number in (1, 2):
        user = [number * 7 + i for i in range(8)]
        one = engine.begin(SYSTEM + user, num_new=5, boundary=len(SYSTEM))
        assert one is not None
        lost = {cause: n for cause, n in one.lease.losses._asdict().items() if n}
        print(f"  request {number}: {one.lease.cached_len} of 24 tokens reused, computed: {lost}")
        while one in engine.running:
            engine.step()
        answers.append(one.tokens[24:])
        print(f"  request {number}: generated {answers[-1]}")
    gone = engine.begin([*SYSTEM, 1, 2, 3], num_new=5, boundary=len(SYSTEM))
    assert gone is not None
    engine.step()
    engine.abort(gone)
    for number in range(3, 40):  # other conversations, until memory is short
        user = [number * 11 + i for i in range(1 + number % 15)]
        other = engine.begin(SYSTEM[: 8 * (number % 3)] + user, num_new=3, boundary=8)
        while other in engine.running:
            engine.step()
    again = engine.begin(SYSTEM + [7 + i for i in range(8)], num_new=5, boundary=len(SYSTEM))
    assert again is not None
    print(f"  request 1 again: {again.lease.cached_len} of 24 tokens reused")
    while again in engine.running:
        engine.step()
    assert again.tokens[24:] == answers[0], "a hit changes no answer"
    engine.cache.check(held_tokens=0, held_slots=0)
    print(f"  every KV row and state was the right one; {engine.counts}")


if __name__ == "__main__":
    demonstrate("two pools", CacheConfig(num_kv_tokens=96, num_slots=6, **GRID))
    arena = {"memory": "arena", "total_bytes": 8 * 144}
    demonstrate("one arena", CacheConfig(**arena, **GRID))
    demonstrate("an arena with a host tier", CacheConfig(**arena, host_bytes=8 * 400, **GRID))
