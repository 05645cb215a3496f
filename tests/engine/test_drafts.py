"""Several tokens a step on a small real model: no token and no bit of a log-probability differs
from those of one token a step, whatever was guessed; and the cache has the same in it.

Faults that other engines had or have where guesses meet a prefix cache of states, and what would
notice each here (n: numerics/test_verify.py, m: test_scheduler_machine.py, l: test_lease.py of the
cache, the others below):

| fault | test |
|---|---|
| a lookup gives up a unit for the drafter: no hit | hits_are_those_without_drafts |
| the last matched block is computed again on each hit | hits_are_those_without_drafts |
| a stale conv window after a rejection | n, any_guess_changes_nothing |
| a hit during a verification reads a state ahead | a_next_turn_resumes_inside_an_accepted_run |
| a checkpoint of guessed tokens (poison) | a_wrong_guess_is_never_published, m |
| states saved only where a step ends on the grid | a_next_turn_resumes_inside_an_accepted_run |
| a rejected checkpoint has overwritten the one before | l |
| a prompt's last token taken for a decode | a_prompt_that_ends_in_one_token_is_prefilled |
| preempted, and goes on from the state of its guesses | preempted_requests_go_on_as_they_were, m |
| a stop, or the last token, inside an accepted run | what_ends_a_run, m |
| penalties that do not see the guesses before | any_guess_changes_nothing |
| drafting begins again from nothing after a hit | a_hit_is_drafted_for_at_once |
| a client leaves while its guesses are on the way | an_abort_leaves_nothing_behind, m |
| guesses show one tenant what another asked | tenants_do_not_see_each_other |

The prediction head's own faults (its KV not rolled back, hidden vectors from behind the wrong norm)
come with the head.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import SamplingParams, engine_config
from engine.config import ConfigError
from engine.requests.spec import SamplingInput
from engine.runner.sampler import Sampler
from engine.schedule.batch import Draft, Task
from tests.engine.drafted import Guesses, MakeEngine, assert_same, guessing_engine, prompts
from tests.engine.numerics import families


@pytest.fixture
def make_engine(tmp_path: Path) -> MakeEngine:
    return partial(guessing_engine, tmp_path)


GREEDY = SamplingParams(max_tokens=40, temperature=0, logprobs=3)
ASKED = {
    "greedy": GREEDY,
    "penalties": SamplingParams(
        max_tokens=30, temperature=0, logprobs=2, frequency_penalty=0.7, repetition_penalty=1.3
    ),
    "sampled": SamplingParams(max_tokens=30, temperature=0.3, logprobs=2, top_p=0.9, seed=5),
    "sampled_top_k": SamplingParams(
        max_tokens=30, temperature=0.5, logprobs=0, top_k=20, presence_penalty=0.5, seed=9
    ),
}


@pytest.mark.full("False-sampled_top_k", "True-penalties")
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("exact", [False, True])
def test_any_guess_changes_nothing(asked: str, exact: bool, make_engine: MakeEngine) -> None:
    params = ASKED[asked]
    plain = make_engine(exact=exact).generate(prompts(), params)
    guesses = Guesses()
    guesses.learn(plain)
    drafted = make_engine(guesses, exact=exact)
    outputs = drafted.generate(prompts(), params)
    assert_same(outputs, plain)
    accepted = sum(output.drafts.accepted.total() for output in outputs)
    assert accepted > 30
    assert sum(output.drafts.drafted.total() for output in outputs) > accepted
    alone = make_engine(guesses, exact=exact, max_running=1)
    assert_same(alone.generate(prompts()[3:4], params), plain[3:4])


@pytest.mark.parametrize("family", [n for n, f in families.find().items() if not f.is_variant])
def test_guesses_change_nothing_in_any_family(family: str, make_engine: MakeEngine) -> None:
    """Also on hits: the prompts come twice."""
    transformers = pytest.importorskip("transformers")
    config_class, _ = families.find()[family].classes
    config = families.find()[family].config | {"vocab_size": 320}
    make = partial(make_engine, geometry=getattr(transformers, config_class)(**config).to_dict())
    plain, guesses = make(), Guesses()
    expected = plain.generate(prompts(), GREEDY)
    guesses.learn(expected)
    drafted = make(guesses)
    outputs = drafted.generate(prompts(), GREEDY)
    assert_same(outputs, expected)
    assert sum(output.drafts.accepted.total() for output in outputs) > 30
    assert_same(drafted.generate(prompts(), GREEDY), plain.generate(prompts(), GREEDY))


@pytest.mark.full("bfloat16-arena")
@pytest.mark.parametrize(
    "numbers",
    [
        {"dtype": "bfloat16", "state_dtype": "bfloat16"},
        {"dtype": "float32", "cache_gib": None, "kv_gib": 0.01, "state_gib": 0.005},
    ],
    ids=["bfloat16-arena", "float32-pools"],
)
def test_the_words_change_nothing(numbers: dict[str, Any], make_engine: MakeEngine) -> None:
    """In other formats, with drafts of the tree: each prompt comes twice, so that its first answer
    is what the tree guesses."""
    plain, drafted = make_engine(**numbers), make_engine(draft="tree:5", **numbers)
    for _ in range(2):
        outputs = drafted.generate(prompts(), GREEDY)
        assert_same(outputs, plain.generate(prompts(), GREEDY))
    assert sum(output.drafts.accepted["tree", 1] for output in outputs) > 20
    assert sum(output.drafts.num_verified for output in outputs) < 6 * 40 / 2


def test_hits_are_those_without_drafts(make_engine: MakeEngine) -> None:
    reports = []
    for word in ("none", "tree:5"):
        engine = make_engine(draft=word)
        for _ in range(2):
            outputs = engine.generate(prompts(), GREEDY)
        reports.append(([output.cached_len for output in outputs], engine.report().usage))
        assert engine.report().kv.held == engine.report().slots.held == 0
    assert reports[0] == reports[1]
    assert reports[0][0][0] == 128


@pytest.mark.full("16")
@pytest.mark.parametrize("grid", [64, 16])
def test_a_next_turn_resumes_inside_an_accepted_run(make_engine: MakeEngine, grid: int) -> None:
    """The answer crosses the grid in the middle of a run; the next turn finds a state there, with
    the bits of single steps."""
    (prompt,) = [prompts()[5]]
    settings = {"checkpoints": ("end",), "grid": grid}
    guesses = Guesses(lambda done, most: most)
    plain = make_engine(**settings)
    first = plain.generate([prompt], GREEDY)
    guesses.learn(first)
    drafted = make_engine(guesses, **settings)
    assert_same(drafted.generate([prompt], GREEDY), first)
    turn = prompt + first[0].token_ids + [3, 1, 4]
    further = plain.generate([turn], GREEDY)
    guesses.learn(further)
    outputs = drafted.generate([turn], GREEDY)
    answered = len(prompt) + len(first[0].token_ids) - 1
    assert outputs[0].cached_len == answered // grid * grid > len(prompt)
    assert_same(outputs, further)


def test_a_wrong_guess_is_never_published(make_engine: MakeEngine) -> None:
    """Guesses that cross the grid and are wrong leave no token, and no state, in the tree."""
    (prompt,) = [prompts()[5]]
    params = SamplingParams(max_tokens=14, temperature=0)  # one past the grid
    settings = {"checkpoints": ("end",)}
    guesses = Guesses(lambda done, most: 0)
    plain = make_engine(**settings)
    first = plain.generate([prompt], params)
    guesses.learn(first)
    drafted = make_engine(guesses, **settings)
    assert_same(drafted.generate([prompt], params), first)
    tokens = np.array([*prompt, *first[0].token_ids, 9], np.int32)
    ours, theirs = (engine._cache.match(tokens) for engine in (drafted, plain))
    assert (
        (ours.cached_len, ours.kv_match_len) == (theirs.cached_len, theirs.kv_match_len) == (0, 63)
    )
    assert drafted.report().kv.cached == 63


def test_a_prompt_that_ends_in_one_token_is_prefilled(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(draft="tree:5", checkpoints=("every:64",))
    segments = []
    forward = engine.runner.forward

    def spy(batch: Any, *drawn: Any) -> Any:
        segments.extend(batch.segments)
        return forward(batch, *drawn)

    monkeypatch.setattr(engine.runner, "forward", spy)
    stem = prompts()[0]
    engine.generate([stem[:64]], SamplingParams(max_tokens=1))
    engine.generate([stem[:65]], SamplingParams(max_tokens=1))
    assert [(s.start, s.end, s.is_decode, s.num_drafts) for s in segments] == [
        (0, 64, False, 0),
        (64, 65, False, 0),
    ]


def test_preempted_requests_go_on_as_they_were(make_engine: MakeEngine) -> None:
    settings = {"cache_gib": None, "kv_gib": 0.0001, "state_gib": 0.001, "exact": True}
    params = SamplingParams(max_tokens=60, temperature=0, logprobs=1)
    plain = make_engine(prefix_cache="none").generate(prompts(), params)
    guesses = Guesses()
    guesses.learn(plain)
    outputs = make_engine(guesses, **settings).generate(prompts(), params)
    assert sum(output.num_preemptions for output in outputs) > 0
    for output, expected in zip(outputs, plain, strict=True):
        assert output.token_ids == expected.token_ids
        assert output.logprobs == expected.logprobs


def test_what_ends_a_run(make_engine: MakeEngine) -> None:
    """A stop token, a stop string and the last token, at every place of a run; what was guessed
    behind is neither reported nor published."""
    prompt = prompts()[5]
    plain = make_engine()
    (whole,) = plain.generate([prompt], GREEDY)
    guesses = Guesses(lambda done, most: most)
    guesses.learn([whole])
    drafted = make_engine(guesses)
    for place in (1, 4, 6):
        token = whole.token_ids[place]
        letters = whole.text[place : place + 2] or "none"
        for params in (
            SamplingParams(max_tokens=place, temperature=0, logprobs=1),
            SamplingParams(max_tokens=40, temperature=0, logprobs=1, stop_token_ids=(token,)),
            SamplingParams(max_tokens=40, temperature=0, logprobs=1, stop=(letters,)),
        ):
            drafted.reset_prefix_cache(), plain.reset_prefix_cache()
            (output,) = drafted.generate([prompt], params)
            assert_same([output], plain.generate([prompt], params))
            assert len(output.logprobs) == len(output.token_ids)
            assert drafted.report().kv == plain.report().kv
            assert drafted.report().slots == plain.report().slots


def test_a_hit_is_drafted_for_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(draft="tree:5")
    engine.generate(prompts()[:1], GREEDY)
    (output,) = engine.generate(prompts()[:1], GREEDY)
    assert output.cached_len == 128
    verified = output.drafts.num_verified
    assert verified <= 9  # 39 tokens after the first: 4 and one, then 5 and one at a time
    assert output.drafts.accepted.total() >= 39 - verified


def test_an_abort_leaves_nothing_behind(make_engine: MakeEngine) -> None:
    engine = make_engine(draft="tree:5")
    engine.generate(prompts()[:1], GREEDY)
    request_id = engine.submit(prompts()[0], GREEDY)
    for _ in range(4):
        engine.step()
    output = engine.abort(request_id)
    assert output.finish_reason == "abort" and output.drafts.num_verified > 0
    engine.check()
    assert engine.report().kv.held == engine.report().slots.held == 0


def test_tenants_do_not_see_each_other(make_engine: MakeEngine) -> None:
    engine = make_engine(draft="tree:5")
    prompt = prompts()[0]
    engine.generate([prompt], GREEDY, namespace="a")
    (output,) = engine.generate([prompt], GREEDY, namespace="b")
    assert not [source for source, _ in output.drafts.drafted if source == "tree"]
    (output,) = engine.generate([prompt], GREEDY, namespace="a")
    assert output.drafts.accepted["tree", 1] > 0


def test_guesses_leave_the_distribution_as_it_is() -> None:
    """A guess is taken where the draw falls on it: as often as it is likely, and what comes in its
    place is spread as the rest (4,000 runs of two tokens; chi-squared of the 16 pairs, 15 degrees
    of freedom, seeded)."""
    torch = pytest.importorskip("torch")
    first, second = torch.tensor([1.0, 0.0, -1.0, 0.5]), torch.tensor([0.0, 2.0, 0.3, -0.5])
    params, sampler, guess = SamplingParams(temperature=0.8), Sampler(4), 0
    likely = torch.outer((first / 0.8).softmax(0), (second / 0.8).softmax(0)).numpy()
    count = 4000
    inputs = [SamplingInput(params, seed, draw) for seed in range(count) for draw in (0, 1)]
    drawn = sampler.sample(torch.stack([first, second]).repeat(count, 1), inputs)
    pairs = np.zeros((4, 4))
    for one, other in zip(drawn[::2], drawn[1::2], strict=True):
        task = Task(None, None, 0, 2, True, True, False, Draft(np.array([guess], np.int32), "x"))
        run = task.run_of(iter([one, other]))
        assert len(run) == 1 + (one.token_id == guess)
        # Where the guess was wrong the next step draws the second token, with the same number.
        pairs[one.token_id, run[1].token_id if len(run) == 2 else other.token_id] += 1
    assert abs(pairs[guess].sum() - count * likely[guess].sum()) < 3 * (count / 4) ** 0.5
    assert ((pairs - count * likely) ** 2 / (count * likely)).sum() < 37.7  # p = 0.001


@pytest.mark.parametrize(
    "word",
    ["tre", "tree:0", "tree:33", "tree:x", "tree:", "tree,", "", "mtp:5", "tree,tree", "none,mtp"],
)
def test_a_wrong_word_says_what_would_work(word: str) -> None:
    with pytest.raises(ConfigError, match=r"tree .1 to 32 .*mtp .1 to 4 tokens, as in mtp:3.; not"):
        engine_config(draft=word)
