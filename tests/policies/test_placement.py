"""Placements that look at lengths, and the plan over overlaps against brute force."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcache.policies.placement.planned import Planned, plan
from hybridcache.policies.placement.rules import Backoff
from hybridcache.policies.protocol import Placed, PlacementPolicy, PolicyError, Prefill
from hybridcache.policies.registry import PLACEMENT_NAMES, parse_placement, placement_names
from tests.policies.items import FakeItem


def where(words: str, **facts: object) -> list[int]:
    """Positions that ``words`` ask for, for a cold prompt of 1,000 on a grid of 64 unless said
    otherwise."""
    prefill = Prefill(1000, 0, 0, 0, (), 64)._replace(**facts)  # type: ignore[arg-type]
    return sorted(prefill.on_grid(parse_placement(words).plan(prefill)))


@pytest.mark.parametrize(
    ("words", "positions"),
    [
        ("none", []),
        ("prompt", [960]),
        ("backoff", [960]),
        ("backoff:1", [960]),
        ("backoff:3", [832, 896, 960]),
        ("backoff:3,cap:2", [896, 960]),
        ("backoff:99", list(range(64, 961, 64))),
        ("aligned:512", [512]),
        ("every:256", [256, 512, 768]),
        ("chunks:300", [256, 576, 896, 960]),
        ("balanced:4", [192, 384, 576, 768]),
        ("sqrt", [64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960]),
        ("dyadic", [64, 128, 256, 512]),
        ("thinned:3", [192, 448, 960]),
        ("planned:2", [960]),
        ("dyadic,backoff,cap:2", [256, 512]),
        ("backoff,prompt,every:512,cap:2", [512, 960]),
    ],
)
def test_known_positions(words: str, positions: list[int]) -> None:
    assert where(words) == positions


def test_sqrt_on_a_fine_grid() -> None:
    assert where("sqrt", prompt_len=100, grid=1) == list(range(10, 101, 10))


def test_backoff_goes_back_no_further_than_the_prompt_resumes() -> None:
    assert where("backoff:3", cached_len=896) == [960]
    assert where("backoff:3", prompt_len=960) == [768, 832, 896]
    assert where("backoff:3", prompt_len=64) == []
    with pytest.raises(ValueError, match="K >= 1"):
        Backoff(0)
    with pytest.raises(ValueError, match="takes no number"):
        parse_placement("branch:2")


def test_thinned_and_chunks_start_where_the_prompt_resumes() -> None:
    assert where("thinned:2", cached_len=512) == [704, 960]
    assert where("chunks:300", cached_len=512) == [768, 960]


class Nowhere(PlacementPolicy):
    """A placement without its one abstract method."""


def test_a_class_of_the_users_own_derives_from_the_base_class() -> None:
    with pytest.raises(ValueError, match="derive JSONDecoder from hybridcache"):
        parse_placement("branch,json:JSONDecoder")
    with pytest.raises(ValueError, match="it does not implement PlacementPolicy: it lacks plan"):
        parse_placement(Nowhere)  # type: ignore[type-abstract]
    with pytest.raises(ValueError, match="give a name, or a class derived from hybridcache"):
        parse_placement(["branch"])  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", [[24], (24, "a"), None, [Placed(24, "a"), (1, 2, 3)]], ids=str)
def test_a_plan_that_is_no_list_of_positions_with_labels_is_refused(plan: Any) -> None:
    prefill = Prefill(200, 64, 64, 64, (), 8)
    with pytest.raises(PolicyError, match=r"must return a list of Placed\(position, label\) \(got"):
        prefill.on_grid(plan)


@pytest.mark.parametrize(
    "word", [name.partition(":")[0] for name in placement_names() if ":" in name]
)
def test_numbers_must_be_positive(word: str) -> None:
    with pytest.raises(ValueError, match=word):
        parse_placement(f"{word}:0")


@given(st.integers(1, 5000), st.data())
def test_every_word_stays_inside_the_prompt_and_on_the_grid(
    length: int, data: st.DataObject
) -> None:
    cached = data.draw(st.integers(0, length - 1)) // 64 * 64
    branch = data.draw(st.integers(cached, length))
    prefill = Prefill(length, cached, branch, branch, (length // 2,), 64)
    numbers = {"tokens": "70", "checkpoints": "3"}
    words = [name for name, word in PLACEMENT_NAMES.items() if not word.example]
    words += [
        f"{name}:{numbers[word.counts]}" for name, word in PLACEMENT_NAMES.items() if word.counts
    ]
    for word in [*words, "backoff,cap:3"]:
        for position, label in prefill.on_grid(parse_placement(word).plan(prefill)).items():
            assert cached < position <= length and position % 64 == 0 and label


def words_with_numbers() -> list[str]:
    """Every registered placement, with a number where one is needed."""
    return [
        f"{name}:{word.example}" if word.example else name for name, word in PLACEMENT_NAMES.items()
    ]


@pytest.mark.parametrize("words", [*words_with_numbers(), "adaptive,planned:2,cap:3"])
def test_planning_changes_nothing(words: str) -> None:
    """A placement that is also asked by a router, for requests that never come, plans as one that
    is not, whatever both learn."""
    rng = random.Random(7)
    asked, alone = parse_placement(words), parse_placement(words)
    label = next(iter(alone.plan(Prefill(1000, 0, 500, 500, (300,), 64))), Placed(0, "end")).label
    for number in range(300):
        length = rng.randint(100, 4000)
        cached = rng.choice([0, 64, 512]) if length > 600 else 0
        seen = rng.randint(cached, length)
        facts = Prefill(length, cached, seen, seen, (length // 2,), 64)
        for _ in range(3):
            list(asked.plan(facts._replace(prompt_len=rng.randint(600, 4000))))
            asked.decode_interval()
        item = FakeItem("x", label=label, position=max(cached, 64), span=64)
        for placement in (asked, alone):
            if number % 3 == 0:
                placement.on_hit(item)
            elif number % 5 == 0:
                placement.on_ghost_hit(item, 200)
            placement.on_prefill(facts)
        planned = facts.on_grid(alone.plan(facts))
        assert facts.on_grid(asked.plan(facts)) == planned
        assert asked.decode_interval() == alone.decode_interval()
        for placement in (asked, alone):
            for position, wanted in planned.items():
                placement.on_saved(position, wanted)


def expected_loss(depths: list[int], weights: list[float], positions: tuple[int, ...]) -> float:
    return sum(
        weight * (depth - max((p for p in positions if p <= depth), default=0))
        for depth, weight in zip(depths, weights, strict=True)
    )


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=7),
    st.integers(1, 4),
)
def test_the_plan_is_the_best_there_is(overlaps: list[tuple[int, int]], count: int) -> None:
    histogram = dict(overlaps)
    depths = sorted(histogram)
    weights = [float(histogram[depth]) for depth in depths]
    best = min(
        expected_loss(depths, weights, chosen)
        for size in range(min(count, len(depths)) + 1)
        for chosen in combinations(depths, size)
    )
    planned = plan(depths, weights, count)
    assert len(planned) <= count
    assert expected_loss(depths, weights, planned) == pytest.approx(best)


@given(st.integers(1, 6), st.integers(1, 12))
def test_balanced_is_the_plan_for_overlaps_of_every_depth(count: int, step: int) -> None:
    length = (count + 1) * step
    depths = list(range(1, length + 1))
    balanced = tuple(where(f"balanced:{count}", prompt_len=length, grid=1))
    planned = plan(depths, [1.0] * length, count)
    ones = [1.0] * length
    # A depth at which a checkpoint stands costs nothing, so the plan may shift all of them by one.
    assert expected_loss(depths, ones, balanced) <= expected_loss(depths, ones, planned) + step


@given(st.integers(64, 5000), st.data())
def test_dyadic_gives_back_half_of_what_is_shared(length: int, data: st.DataObject) -> None:
    shared = data.draw(st.integers(64, length))
    resumed = max(p for p in where("dyadic", prompt_len=length) if p <= shared)
    assert 2 * resumed > shared - 64


def test_planned_follows_the_overlaps_and_forgets() -> None:
    rule = Planned(1)
    prompt = Prefill(1000, 0, 0, 0, (), 1)

    def overlap(seen_len: int, times: int) -> list[int]:
        for _ in range(times):
            rule.on_prefill(prompt._replace(seen_len=seen_len))
        return [position for position, _ in rule.plan(prompt)]

    assert overlap(300, 30) == [300]
    overlap(300, 170)
    # 300 was seen 200 times, 700 then 60 times: 300 would save more if nothing faded
    assert overlap(700, 60) == [700]


def test_a_cap_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="saves nothing: cap limits other rules"):
        parse_placement("cap:2")
