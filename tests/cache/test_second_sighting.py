"""Reuse of a shared prefix by its second request, for each rule of placement.

The cases are the table of docs/concepts/placement.md. Requests run through a lease, as in the
engine and the simulator. Lengths are in tokens, and the grid is 64.
"""

from __future__ import annotations

import numpy as np
import pytest

from hybridcache import CacheConfig, build_prefix_cache
from hybridcache.lease import Lease, LeaseRequest
from hybridcache.policies.registry import parse_placement

GRID = 64
RNG = np.random.default_rng(0)


def text(num_tokens):
    return RNG.integers(0, 150_000, num_tokens, dtype=np.int32)


class Server:
    """Cache that serves one request after another."""

    def __init__(self, placement, grid=GRID, num_slots=500):
        config = CacheConfig(num_kv_tokens=30_000, num_slots=num_slots, grid=grid, eviction="lru")
        self.cache = build_prefix_cache(config)
        self.placement = parse_placement(placement)

    def serve(self, prompt, answer=(), boundaries=(), chunk=None):
        """Prefill one request in chunks of ``chunk`` tokens and decode it. Returns its cached
        length."""
        request = LeaseRequest(prompt, boundaries=tuple(boundaries))
        lease = Lease.begin(self.cache, self.placement, request)
        assert lease is not None
        history = np.concatenate([prompt, np.array(answer, np.int32)])
        assert lease.extend(len(history))
        for start in range(lease.cached_len, len(prompt), chunk or len(prompt)):
            end = min(start + (chunk or len(prompt)), len(prompt))
            lease.take_checkpoint_slots(start, end)
            self.cache.take_step().done()
            lease.publish(history, end)
        for position in range(len(prompt), len(history)):
            lease.take_checkpoint_slots(position, position + 1)
        self.cache.take_step().done()
        lease.finish(history, len(history))
        self.cache.check(held_tokens=0, held_slots=0)
        return lease.cached_len


@pytest.mark.parametrize("length", [65, 128, 129, 1000, 6400])
def test_backoff_reuses_a_repeated_prompt(length):
    server, prompt = Server("backoff"), text(length)
    assert server.serve(prompt) == 0
    assert server.serve(prompt) == (length - 1) // GRID * GRID


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_backoff_reuses_a_prompt_cut_after_its_last_grid_position(
    cut,
):
    server, prompt = Server("backoff"), text(1000)
    server.serve(prompt)
    assert server.serve(prompt[:-cut]) == 960


@pytest.mark.parametrize(
    ("length", "resent_len", "grid", "with_one", "with_two"),
    [
        (16, 15, 1, 0, 14),
        (17, 16, 1, 0, 15),
        (1000, 960, 64, 0, 896),
        (1000, 897, 64, 0, 896),
        (129, 128, 64, 0, 64),
        (1000, 999, 64, 960, 960),
        (1000, 896, 64, 0, 0),
        (65, 64, 64, 0, 0),
    ],
)
def test_backoff_2_reuses_a_prompt_cut_before_its_last_grid_position(
    length, resent_len, grid, with_one, with_two
):
    """The cut may remove up to one grid step. No state exists before position 64 of a grid of
    64."""
    prompt = text(length)
    single, double = Server("backoff", grid), Server("backoff:2", grid)
    for server in (single, double):
        server.serve(prompt)
    assert single.serve(prompt[:resent_len]) == with_one
    assert double.serve(prompt[:resent_len]) == with_two


@pytest.mark.full
def test_backoff_k_saves_k_states_per_prompt():
    for count in (1, 2, 3):
        server = Server(f"backoff:{count}")
        for _ in range(10):
            server.serve(text(1000))
        assert server.cache.num_checkpoints == 10 * count


def test_with_few_slots_the_earlier_state_of_backoff_is_evicted_first():
    server, prompts = Server("backoff:2", num_slots=12), [text(1000) for _ in range(10)]
    for prompt in prompts:
        server.serve(prompt)
    assert [server.serve(prompt) for prompt in prompts] == [960] * 10


def test_periodic_checkpoints_reuse_a_shortened_prompt():
    prompt = text(1000)
    backoff, periodic = Server("backoff"), Server("backoff,every:256")
    for server in (backoff, periodic):
        server.serve(prompt)
    assert backoff.serve(prompt[:950]) == 0, "its only state is past the cut"
    assert periodic.serve(prompt[:950]) == 768


def test_with_few_slots_the_last_periodic_checkpoints_are_kept():
    server, prompt = Server("every:64", num_slots=48), text(100 * GRID + 1)
    assert server.serve(prompt) == 0
    assert server.cache.num_checkpoints == 47, "one slot belongs to the running request"
    assert server.serve(prompt) == 100 * GRID
    cuts = (99, 54, 53, 1)
    matches = [server.cache.match(prompt[: position * GRID + 1]) for position in cuts]
    assert [match.cached_len // GRID for match in matches] == [99, 54, 0, 0]


def test_boundary_reuses_a_system_prompt():
    server, system = Server("boundary"), text(640)
    server.serve(np.concatenate([system, text(200)]), boundaries=(640,))
    assert server.serve(np.concatenate([system, text(300)]), boundaries=(640,)) == 640


def test_boundary_off_the_grid_reuses_up_to_the_previous_grid_position():
    server, system = Server("boundary"), text(700)
    server.serve(np.concatenate([system, text(200)]), boundaries=(700,))
    assert server.serve(np.concatenate([system, text(300)]), boundaries=(700,)) == 640


def test_end_reuses_prompt_and_answer_in_the_next_turn():
    server, prompt, answer = Server("end"), text(500), text(140)
    server.serve(prompt, answer)
    followup = np.concatenate([prompt, answer, text(100)])
    assert server.serve(followup) == 640


def test_boundary_reuses_the_prompt_if_reasoning_is_dropped():
    server, prompt = Server("end,boundary"), text(500)
    server.serve(prompt, text(300), boundaries=(498,))
    followup = np.concatenate([prompt[:498], text(100)])
    assert server.serve(followup) == 448, (
        "the state at the end of decode is useless, the one at the boundary is not"
    )


def test_branch_reuses_a_fork_from_the_third_request_on():
    server, shared = Server("branch"), text(1000)
    assert server.serve(np.concatenate([shared, text(300)])) == 0
    assert server.serve(np.concatenate([shared, text(300)])) == 0, (
        "the second request only saves the checkpoint"
    )
    assert server.serve(np.concatenate([shared, text(300)])) == 960


def test_periodic_checkpoints_reuse_a_fork_in_the_second_request():
    server, shared = Server("branch,every:256"), text(1000)
    server.serve(np.concatenate([shared, text(300)]))
    assert server.serve(np.concatenate([shared, text(300)])) == 768
    assert server.serve(np.concatenate([shared, text(300)])) == 960


@pytest.mark.parametrize(("chunk", "cached_len"), [(512, 0), (4096, 1024)])
def test_with_few_slots_reuse_of_a_fork_depends_on_the_chunk_size(chunk, cached_len):
    server, shared = Server("every:256,backoff", num_slots=24), text(1024)
    server.serve(np.concatenate([shared, text(3072)]), chunk=chunk)
    server.serve(text(4096), chunk=chunk)
    assert server.serve(np.concatenate([shared, text(300)])) == cached_len


def test_branch_finds_a_fork_from_ghosts_after_its_kv_was_evicted():
    server, shared = Server("branch"), text(1000)
    server.serve(np.concatenate([shared, text(300)]))
    server.cache.evict(num_tokens=100_000)
    server.serve(np.concatenate([shared, text(300)]))
    assert server.serve(np.concatenate([shared, text(300)])) == 960


@pytest.mark.parametrize("length", [63, 64])
def test_a_prompt_of_at_most_one_grid_step_is_never_reused(length):
    server, prompt = Server("end,branch,boundary,backoff:2,every:64"), text(length)
    server.serve(prompt, boundaries=(length,))
    assert server.serve(prompt, boundaries=(length,)) == 0, (
        "its last token must be computed, and no grid position is before it"
    )


def test_a_fork_inside_an_answer_reuses_only_the_prompt():
    server, prompt, answer = Server("end,backoff"), text(520), text(300)
    server.serve(prompt, answer)
    edited = np.concatenate([prompt, answer[:200], text(100)])
    assert server.serve(edited) == 512, (
        "decode keeps only its last state, and the fork is before it"
    )


def test_none_saves_nothing_and_reuses_nothing():
    server, prompt = Server("none"), text(1000)
    server.serve(prompt)
    assert server.serve(prompt) == 0
