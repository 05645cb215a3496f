"""Placement policies: their positions."""

from __future__ import annotations

import random
from unittest.mock import Mock

import pytest

from hybridcache.policies.placement import Placement
from hybridcache.policies.registry import PLACEMENT_NAMES, parse_placement
from hybridcache.radix.protocol import Placed, Prefill
from tests.policies.items import FakeItem


@pytest.mark.parametrize(
    ("spec", "positions"),
    [
        ("none", []),
        ("backoff", [960]),
        ("backoff:1", [960]),
        ("backoff:3", [832, 896, 960]),
        ("backoff:99", list(range(64, 961, 64))),
        ("every:256", [256, 512, 768]),
        ("backoff,every:512", [512, 960]),
    ],
)
def test_each_rule_plans_the_expected_positions(spec: str, positions: list[int]) -> None:
    prefill = Prefill(1000, 0, 0, 0, (), 64)
    planned = prefill.on_grid(parse_placement(spec).plan(prefill))
    assert sorted(placed.position for placed in planned) == positions


@pytest.mark.parametrize(
    ("intervals", "shortest"), [((3, 1, None), 1), ((None, 2), 2), ((None,), None), ((), None)]
)
def test_several_rules_save_answers_at_the_shortest_interval_of_any(
    intervals: tuple[int | None, ...], shortest: int | None
) -> None:
    rules = (Mock(**{"decode_interval.return_value": interval}) for interval in intervals)
    assert Placement(tuple(rules)).decode_interval() == shortest


def test_no_back_off_is_at_the_end_of_the_prompt() -> None:
    """A repetition computes at least its last token, so it cannot resume there."""
    prefill = Prefill(640, 0, 0, 0, (), 64)
    planned = prefill.on_grid(parse_placement("backoff:2").plan(prefill))
    assert [placed.position for placed in planned] == [576, 512]
    assert prefill.on_grid([Placed(199, "end", 2)]) == [Placed(192, "end", 2)]


@pytest.mark.parametrize(("fits", "room"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (7, 3), (8, 4)])
def test_the_room_rule_leaves_a_prompt_half_of_the_checkpoints_that_fit(
    fits: int, room: int
) -> None:
    prefill = Prefill(
        5000, 0, 0, 0, (500, 1500, 2500, 3500), 64, num_checkpoints=1, free_slots=fits - 1
    )
    placement = parse_placement("adaptive")
    placement.on_prefill(prefill)
    planned = prefill.on_grid(placement.plan(prefill))
    assert len(planned) + (placement.decode_interval() is not None) == room


@pytest.mark.parametrize(
    ("grid", "header", "label"),
    [(1, 1, "back"), (1, 2, "boundary"), (4, 3, "back"), (4, 4, "boundary"), (64, 17, "boundary")],
)
def test_a_boundary_less_than_a_grid_step_from_the_end_is_that_of_the_prompt(
    grid: int, header: int, label: str
) -> None:
    prefill = Prefill(500, 0, 0, 0, (500 - header,), grid)
    placement = parse_placement("adaptive")
    placement.on_prefill(prefill)
    [found] = [placed for placed in placement.plan(prefill) if placed.position == 500 - header]
    assert found.label == label
    assert placement.state_dict()["_mean_prompt"] == 500


@pytest.mark.parametrize(("hit", "num_accounts"), [(448, 3), (512, 2)])
def test_a_hit_at_the_last_boundary_offers_none(hit: int, num_accounts: int) -> None:
    placement = parse_placement("adaptive")
    placement.on_prefill(Prefill(640, hit, hit, hit, (512,), 64))
    assert len(placement.state_dict()["accounts"]) == num_accounts


@pytest.mark.parametrize(("earlier", "is_head"), [(7, True), (6, False)])
def test_requests_for_an_evicted_head_do_not_rank_the_forks_that_displace_it(
    earlier: int, is_head: bool
) -> None:
    """Eight requests make a head. Those for another evicted fork rank later forks."""
    item = FakeItem("it", label="branch", position=2496, uses=1, earlier_uses=earlier)
    head = item if is_head else FakeItem("head", label="branch", position=2496, uses=8)
    prefill = Prefill(4000, 0, 2560, 2560, (), 64, evicted=(head,), free_slots=2)
    placement = parse_placement("adaptive")
    for _ in range(4):
        placement.on_saved(Placed(2560, "branch"))
    for _ in range(16):
        placement.on_ghost_hit(item, 2496)
    placement.on_prefill(prefill)
    assert placement.plan(prefill) == [Placed(2496, "head") if is_head else Placed(2560, "branch")]


def test_an_evicted_head_is_ranked_by_its_own_requests() -> None:
    """Its hits, while it was cached as a fork, count for the label of the fork behind it."""
    head = FakeItem("head", label="branch", position=2496, uses=45)
    prefill = Prefill(4000, 0, 2560, 2560, (), 64, evicted=(head,), free_slots=2)
    placement = parse_placement("adaptive")
    for _ in range(4):
        placement.on_saved(Placed(2560, "branch"))
    for _ in range(45):
        placement.on_hit(head)
    placement.on_prefill(prefill)
    assert placement.plan(prefill) == [Placed(2496, "head")]


@pytest.mark.parametrize("num_siblings", [0, 1])
def test_the_end_of_a_prompt_serves_the_requests_for_that_of_its_answer(num_siblings: int) -> None:
    """One of both fits. Requests that repeat the prompt cannot resume from the answer."""
    prefill = Prefill(1000, 0, 0, 0, (), 64, free_slots=3)
    placement = parse_placement("adaptive")
    for label, distance, num_uses in ("back", 1, num_siblings), ("decode", 0, 8):
        item = FakeItem("end", label=label, distance=distance, position=960)
        for _ in range(8):
            placement.on_saved(Placed(960, label, distance))
        for _ in range(num_uses):
            placement.on_hit(item)
    placement.on_prefill(prefill)
    assert placement.plan(prefill) == [Placed(999, "back", 1)][:num_siblings]
    assert placement.decode_interval() == (None if num_siblings else 1)


@pytest.mark.parametrize(("prompt_len", "position"), [(1000, 960), (640, 576)])
def test_a_branch_at_the_end_of_a_known_prompt_can_be_used_by_that_prompt(
    prompt_len: int, position: int
) -> None:
    prefill = Prefill(prompt_len, 0, prompt_len, prompt_len, (), 64)
    planned = prefill.on_grid(parse_placement("branch").plan(prefill))
    assert planned == [Placed(position, "branch")]


EVERY_RULE = [f"{name}:{rule.example}".rstrip(":") for name, rule in PLACEMENT_NAMES.items()]


@pytest.mark.parametrize("spec", [*EVERY_RULE, "adaptive,every:512"])
def test_planning_does_not_change_a_placement(spec: str) -> None:
    """Routers call ``plan`` for requests that may never arrive. Later plans must not change."""
    rng = random.Random(7)
    forecasting, plain = parse_placement(spec), parse_placement(spec)
    label = next(iter(plain.plan(Prefill(1000, 0, 500, 500, (300,), 64))), Placed(0, "end")).label
    for number in range(300):
        length = rng.randint(100, 4000)
        cached = rng.choice([0, 64, 512]) if length > 600 else 0
        seen = rng.randint(cached, length)
        prefill = Prefill(length, cached, seen, seen, (length // 2,), 64)
        for _ in range(3):
            list(forecasting.plan(prefill._replace(prompt_len=rng.randint(600, 4000))))
            forecasting.decode_interval()
        item = FakeItem("x", label=label, position=max(cached, 64), span=64)
        for placement in (forecasting, plain):
            if number % 3 == 0:
                placement.on_hit(item)
            elif number % 5 == 0:
                placement.on_ghost_hit(item, 200)
            placement.on_prefill(prefill)
        planned = prefill.on_grid(plain.plan(prefill))
        assert prefill.on_grid(forecasting.plan(prefill)) == planned
        assert forecasting.decode_interval() == plain.decode_interval()
        for placement in (forecasting, plain):
            for placed in planned:
                placement.on_saved(placed)
