"""Placements that look at lengths, and the plan over overlaps against brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcache.policies.placement.planned import Planned, plan
from hybridcache.policies.placement.rules import Backoff
from hybridcache.policies.protocol import Prefill
from hybridcache.policies.words import PLACEMENT_WORDS, parse_placement, placement_words


def where(words: str, **facts: object) -> list[int]:
    """Positions that ``words`` ask for, for a cold prompt of 1,000 on a grid of 64 unless said
    otherwise."""
    prefill = Prefill(1000, 0, 0, 0, (), 64)._replace(**facts)  # type: ignore[arg-type]
    return [position for position, _ in parse_placement(words).plan(prefill)]


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
    with pytest.raises(ValueError, match="K of at least 1"):
        Backoff(0)
    with pytest.raises(ValueError, match="takes no number"):
        parse_placement("branch:2")


def test_thinned_and_chunks_start_where_the_prompt_resumes() -> None:
    assert where("thinned:2", cached_len=512) == [704, 960]
    assert where("chunks:300", cached_len=512) == [768, 960]


def test_a_class_of_the_users_own_needs_both_methods() -> None:
    with pytest.raises(
        ValueError, match="no PlacementPolicy, it has no positions, decode_interval"
    ):
        parse_placement("branch,json:JSONDecoder")


@pytest.mark.parametrize(
    "word", [name.partition(":")[0] for name in placement_words() if ":" in name]
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
    words = [name for name, word in PLACEMENT_WORDS.items() if not word.example]
    words += [
        f"{name}:{numbers[word.counts]}" for name, word in PLACEMENT_WORDS.items() if word.counts
    ]
    for word in [*words, "backoff,cap:3"]:
        for position, label in parse_placement(word).plan(prefill):
            assert cached < position <= length and position % 64 == 0 and label


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
    for _ in range(30):
        list(rule.positions(prompt._replace(branch_len=300)))
    assert [p for p, _ in rule.positions(prompt)] == [300]
    for _ in range(170):
        list(rule.positions(prompt._replace(branch_len=300)))
    # 300 was seen 200 times, 700 then 60 times: 300 would save more if nothing faded
    for _ in range(60):
        list(rule.positions(prompt._replace(branch_len=700)))
    assert [p for p, _ in rule.positions(prompt)] == [700]


def test_a_cap_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="saves nothing: cap limits other words"):
        parse_placement("cap:2")
