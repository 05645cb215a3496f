"""A shared prefix pays on its second sighting wherever a placement rule can make it so; where it
can not, the test says why.

Requests run through a lease, as in the engine and the simulator. Lengths are in tokens, the grid is
64.
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
    """A cache that serves one request after another."""

    def __init__(self, placement, grid=GRID, num_slots=500):
        config = CacheConfig(num_kv_tokens=30_000, num_slots=num_slots, grid=grid, eviction="lru")
        self.cache = build_prefix_cache(config)
        self.placement = parse_placement(placement)

    def serve(self, prompt, answer=(), boundaries=(), piece=None):
        """Prefill (in pieces) and decode one request; returns the tokens it did not have to
        compute."""
        request = LeaseRequest(prompt, boundaries=tuple(boundaries))
        lease = Lease.begin(self.cache, self.placement, request)
        assert lease is not None
        everything = np.concatenate([prompt, np.array(answer, np.int32)])
        assert lease.extend(len(everything))
        for start in range(lease.cached_len, len(prompt), piece or len(prompt)):
            end = min(start + (piece or len(prompt)), len(prompt))
            lease.take_checkpoint_slots(start, end)
            self.cache.take_step().done()
            lease.publish(everything, end)
        for position in range(len(prompt), len(everything)):
            lease.take_checkpoint_slots(position, position + 1)
        self.cache.take_step().done()
        lease.finish(everything, len(everything))
        self.cache.check(held_tokens=0, held_slots=0)
        return lease.cached_len


@pytest.mark.parametrize("length", [65, 128, 129, 1000, 6400])
def test_a_prompt_sent_again_pays_by_backoff(length):
    server, prompt = Server("backoff"), text(length)
    assert server.serve(prompt) == 0
    assert server.serve(prompt) == (length - 1) // GRID * GRID


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_prompt_cut_short_by_a_few_tokens_pays_by_backoff_while_it_reaches_the_same_grid_point(
    cut,
):
    server, prompt = Server("backoff"), text(1000)
    server.serve(prompt)
    assert server.serve(prompt[:-cut]) == 960


@pytest.mark.parametrize(
    ("length", "resent", "grid", "one", "two"),
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
def test_a_prompt_cut_back_over_a_grid_point_pays_by_one_more_state(length, resent, grid, one, two):
    """Up to a whole grid step may be cut; the state before position 64 of a grid of 64 would stand
    at 0, where none is."""
    prompt = text(length)
    single, double = Server("backoff", grid), Server("backoff:2", grid)
    for server in (single, double):
        server.serve(prompt)
    assert single.serve(prompt[:resent]) == one
    assert double.serve(prompt[:resent]) == two


@pytest.mark.full
def test_the_price_of_one_more_position_back_is_one_more_state_a_prompt():
    for count in (1, 2, 3):
        server = Server(f"backoff:{count}")
        for _ in range(10):
            server.serve(text(1000))
        assert server.cache.num_checkpoints == 10 * count


def test_where_slots_are_short_the_further_state_goes_first():
    server, prompts = Server("backoff:2", num_slots=12), [text(1000) for _ in range(10)]
    for prompt in prompts:
        server.serve(prompt)
    assert [server.serve(prompt) for prompt in prompts] == [960] * 10


def test_a_prompt_cut_back_over_a_grid_point_pays_by_periodic_checkpoints():
    prompt = text(1000)
    backoff, periodic = Server("backoff"), Server("backoff,every:256")
    for server in (backoff, periodic):
        server.serve(prompt)
    assert backoff.serve(prompt[:950]) == 0, "its only state stands past the cut"
    assert periodic.serve(prompt[:950]) == 768


def test_a_prompt_with_more_positions_than_there_are_slots_pays_by_its_last_ones():
    server, prompt = Server("every:64", num_slots=48), text(100 * GRID + 1)
    assert server.serve(prompt) == 0
    assert server.cache.num_checkpoints == 47, "one slot is the running request's own"
    assert server.serve(prompt) == 100 * GRID
    cuts = (99, 54, 53, 1)
    matches = [server.cache.match(prompt[: position * GRID + 1]) for position in cuts]
    assert [match.cached_len // GRID for match in matches] == [99, 54, 0, 0]


def test_a_system_prompt_with_another_user_turn_pays_by_its_boundary():
    server, system = Server("boundary"), text(640)
    server.serve(np.concatenate([system, text(200)]), boundaries=(640,))
    assert server.serve(np.concatenate([system, text(300)]), boundaries=(640,)) == 640


def test_a_system_prompt_off_the_grid_pays_up_to_the_grid_point_before_it():
    server, system = Server("boundary"), text(700)
    server.serve(np.concatenate([system, text(200)]), boundaries=(700,))
    assert server.serve(np.concatenate([system, text(300)]), boundaries=(700,)) == 640


def test_the_next_turn_of_a_chat_pays_by_the_end_of_decode():
    server, prompt, answer = Server("end"), text(500), text(140)
    server.serve(prompt, answer)
    followup = np.concatenate([prompt, answer, text(100)])
    assert server.serve(followup) == 640


def test_the_next_turn_that_drops_the_thinking_pays_by_the_stable_boundary():
    server, prompt = Server("end,boundary"), text(500)
    server.serve(prompt, text(300), boundaries=(498,))
    followup = np.concatenate([prompt[:498], text(100)])
    assert server.serve(followup) == 448, (
        "the state at the end of decode is dead, that before the header lives"
    )


def test_a_fork_at_an_unknown_place_pays_from_the_third_sighting_by_branch():
    server, shared = Server("branch"), text(1000)
    assert server.serve(np.concatenate([shared, text(300)])) == 0
    assert server.serve(np.concatenate([shared, text(300)])) == 0, "seen now, saved now"
    assert server.serve(np.concatenate([shared, text(300)])) == 960


def test_a_fork_at_an_unknown_place_pays_on_the_second_by_periodic_checkpoints():
    server, shared = Server("branch,every:256"), text(1000)
    server.serve(np.concatenate([shared, text(300)]))
    assert server.serve(np.concatenate([shared, text(300)])) == 768
    assert server.serve(np.concatenate([shared, text(300)])) == 960


@pytest.mark.parametrize(("piece", "pays"), [(512, 0), (4096, 1024)])
def test_where_slots_are_short_a_fork_pays_by_what_was_saved_last_above_it(piece, pays):
    server, shared = Server("every:256,backoff", num_slots=24), text(1024)
    server.serve(np.concatenate([shared, text(3072)]), piece=piece)
    server.serve(text(4096), piece=piece)
    assert server.serve(np.concatenate([shared, text(300)])) == pays


def test_a_fork_is_noticed_by_ghosts_after_its_kv_went():
    server, shared = Server("branch"), text(1000)
    server.serve(np.concatenate([shared, text(300)]))
    server.cache.evict(num_tokens=100_000)
    server.serve(np.concatenate([shared, text(300)]))
    assert server.serve(np.concatenate([shared, text(300)])) == 960


@pytest.mark.parametrize("length", [63, 64])
def test_a_prompt_of_at_most_one_grid_step_never_pays(length):
    server, prompt = Server("end,branch,boundary,backoff:2,prompt,every:64"), text(length)
    server.serve(prompt, boundaries=(length,))
    assert server.serve(prompt, boundaries=(length,)) == 0, (
        "its last token is computed, and before that no state can stand"
    )


def test_a_fork_inside_an_answer_pays_only_up_to_the_prompts_last_state():
    server, prompt, answer = Server("end,prompt"), text(512), text(300)
    server.serve(prompt, answer)
    edited = np.concatenate([prompt, answer[:200], text(100)])
    assert server.serve(edited) == 512, "decode keeps one state, its last; the fork is before it"


def test_nothing_saved_nothing_paid():
    server, prompt = Server("none"), text(1000)
    server.serve(prompt)
    assert server.serve(prompt) == 0
