"""Accounts of the adaptive placement: worked examples, and rules that refuse open again."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybridcache.policies.placement import (
    ANSWER_END,
    COMPARED_AFTER,
    FOUND_ONE_IN,
    MEMORY,
    PROMPT_END,
    TRIAL_AFTER,
    TRIAL_OF_END,
    Adaptive,
    _Account,
)
from hybridcache.radix.protocol import Placed, Prefill
from tests.policies.items import FakeItem


def test_thirty_prefills_of_one_label_by_hand() -> None:
    """A checkpoint must earn 20 tokens. The first three live on hope, and the trial is due at
    prefill 32 of the label, of which 20 were counted before. It halves the four placed (with the
    first, assumed one) and adds its own. The 200 tokens of a hit then pay until ten are placed."""
    account, steps = _Account(100.0, 20, 3), ""
    for step in range(1, 31):
        account.offer((20.0, float("inf"), 0.0))
        pays = account.pays((20.0, float("inf"), 0.0))
        steps += "P" if pays else "t" if account.is_tried else "."
        if pays or account.is_tried:
            account.save()
        if step == 20:
            account.earned += 200
    assert steps == "PPP" + 8 * "." + "t" + 8 * "." + "PPPPPPP" + 3 * "."


def test_a_label_that_pays_again_is_tried_as_often_as_at_the_beginning() -> None:
    """Each trial without a hit makes the next one later."""
    account, bars = _Account(0.0, 0, 0.0), (20.0, float("inf"), 0.0)
    for _ in range(10 * TRIAL_AFTER):
        account.offer(bars)
    assert account.wait > 2 * TRIAL_AFTER
    account.earned = 100.0 * account.placed
    account.offer(bars)
    assert account.wait == TRIAL_AFTER and not account.is_tried


@pytest.mark.parametrize("earnings", ["earned", "used"])
def test_halving_old_counts_leaves_the_earnings_per_checkpoint(earnings: str) -> None:
    """Checkpoint ``MEMORY`` halves the counts. The label earned 5 tokens for each, and 6 pay."""
    account, bars = _Account(0.0, 0, 0.0), (6.0, 6.0, 6.0)
    setattr(account, earnings, 5.0 * MEMORY)
    pays = []
    for _ in range(MEMORY):
        account.save()
        pays.append(account.pays(bars))
    assert pays[:10] == [True] * 10 and pays[-2:] == [False] * 2
    assert account.placed == (MEMORY + 1) / 2


def test_every_count_of_an_account_is_halved() -> None:
    account = _Account(8.0, 20, 0.0)
    before = {"placed": 16.0, "earned": 96.0, "used": 32.0, "uses": 4.0}
    for name, count in before.items():
        setattr(account, name, count)
    kept = {name: value for name, value in vars(account).items() if name not in before}
    account._fade()
    assert vars(account) == kept | {name: count / 2 for name, count in before.items()}


def test_saves_and_missed_tokens_fade_together() -> None:
    placement = Adaptive()
    placement._num_placed, placement._missed_tokens = MEMORY, 6.0
    placement.on_saved(Placed(64, "branch"))
    assert (placement._num_placed, placement._missed_tokens) == ((MEMORY + 1) / 2, 3.0)


@pytest.mark.parametrize(
    ("rejoins", "boundary_hit", "missed", "is_saved"),
    [(12, 6400, 40, True), (12, 6400, 60, False), (12, 0, 60, True), (6, 6400, 100, True),
     (7, 6400, 100, False)],
)  # fmt: skip
def test_poor_forks_alone_are_no_reason_to_save_more(
    rejoins: int, boundary_hit: int, missed: int, is_saved: bool
) -> None:
    """Eight forks have no hit. Rejoins have two of 320 tokens: 49 for each of twelve and the
    assumed one, which is above a loss of 40, and above a mean of 28, if the loss is 60. Six have no
    evidence."""
    placement, rejoin = Adaptive(), FakeItem("it", label="rejoin", position=320)
    head = FakeItem("head", label="boundary", position=boundary_hit)
    for label, count in (("branch", COMPARED_AFTER), ("rejoin", rejoins)):
        for _ in range(count):
            placement.on_saved(Placed(640, label))
    placement.on_hit(rejoin)
    placement.on_hit(rejoin)
    placement.on_hit(head)
    placement.on_ghost_hit(head, missed * (COMPARED_AFTER + rejoins + 1))
    prefill = Prefill(2000, 0, 640, 640, (), 64, forks=False)
    assert (Placed(640, "rejoin") in placement.plan(prefill)) == is_saved


@pytest.mark.parametrize(
    ("distance", "stop_reason", "earned"), [(1, "", 640), (1, "tool_use", 1216), (4, "", 1216)]
)
def test_an_end_earns_down_to_the_nearest_checkpoint_that_it_does_not_replace(
    distance: int, stop_reason: str, earned: int
) -> None:
    """Between a fork at 64 and an end at 1280 is a back-off at 640."""
    placement, fork = Adaptive(), FakeItem("fork", label="branch", position=64)
    back = FakeItem("back", label="back", position=640, above=fork)
    back.distance, back.stop_reason = distance, stop_reason
    end = FakeItem("end", label="back", distance=1, position=1280, above=back)
    placement.on_hit(end)
    assert placement._accounts[PROMPT_END].earned == earned


Events = list[tuple[str, int]]
HISTORY = st.lists(
    st.tuples(st.sampled_from(("hit", "ghost hit", "again", "new", "end")), st.integers(1, 300)),
    max_size=12,
)


NEWCOMER = Prefill(1000, 0, 0, 0, (), 64)


def saves_end(placement: Adaptive) -> bool:
    """Return whether a conversation that is not in the cache saves its end."""
    placement.on_prefill(NEWCOMER)
    planned = [placed[1:] for placed in placement.plan(NEWCOMER)]
    return PROMPT_END in planned or placement.decode_interval() is not None


def live_through(placement: Adaptive, history: Events) -> None:
    """Apply each event of ``history`` as many times as it says."""
    for event, times in history:
        for _ in range(times):
            label, distance = ANSWER_END if event == "hit" else PROMPT_END
            item = FakeItem("old", label=label, distance=distance, position=960)
            if event == "hit":
                item.uses = 1
                placement.on_hit(item)
            elif event in ("ghost hit", "again"):
                item.earlier_uses = 1 if event == "ghost hit" else 2
                placement.on_ghost_hit(item, 960)
            elif event == "new":
                saves_end(placement)
            else:
                placement._accounts[ANSWER_END].save()


@given(HISTORY)
def test_turnover_opens_after_any_history_once_ends_are_used(history: Events) -> None:
    placement = Adaptive()
    live_through(placement, [*history, ("ghost hit", 1)])
    for number in itertools.count():
        if FOUND_ONE_IN * placement._ends_used > placement._ends_used + placement._ends_lost:
            break
        assert number < FOUND_ONE_IN * (MEMORY + TRIAL_OF_END), "it is still closed"
        if saves_end(placement):
            item = FakeItem("new", label="back", distance=1, position=960, uses=1)
            placement.on_hit(item)


@given(HISTORY)
def test_an_end_is_tried_in_a_fixed_share_of_the_cases_while_conversations_go_on(
    history: Events,
) -> None:
    placement = Adaptive()
    live_through(placement, [*history, ("ghost hit", 100)])
    assert sum(saves_end(placement) for _ in range(4 * TRIAL_OF_END)) >= 4


def test_turnover_needs_one_hit_in_eight_first_requests_for_an_end() -> None:
    """A conversation that is refused misses the same evicted end ``again`` at each turn."""
    placement, saves = Adaptive(), []
    for event, times in (("new", 1), ("hit", 1), ("ghost hit", 6), ("again", 99), ("ghost hit", 1)):
        live_through(placement, [(event, times)])
        for rule in (PROMPT_END, ANSWER_END) * (40 if event == "ghost hit" else 0):
            placement._accounts[rule].save()
        saves.append(placement._end(NEWCOMER) is not None)
    assert saves == [False, False, True, True, False], "a hit alone leaves the earnings assumed"


@given(HISTORY)
def test_a_label_pays_again_after_a_few_trials_with_hits(history: Events) -> None:
    """Its checkpoints earn four times what is needed from now on."""
    account, bars = _Account(0.0, 0, 0.0), (25.0, float("inf"), 0.0)
    for event, times in history:
        for _ in range(times):
            account.offer(bars)
            if event != "new":
                account.save()
            if event == "hit":
                account.earned += 10
    trials = 0
    while not account.pays(bars):
        account.offer(bars)
        if account.is_tried:
            trials += 1
            account.save()
            account.earned += 100
        assert trials <= 12, "a label waits at most MEMORY prefills for each"
        assert account.due - account.offered <= MEMORY
