"""Tests of speculation on a small real model, compared with one token per step.

Tokens, bits of log-probabilities and cache contents are the same for any drafts.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import SamplingParams
from engine.requests.request import SamplingInput
from engine.runner.sampler import Sampler
from engine.schedule.scheduler import Draft, Segment
from tests.engine.drafted import (
    GREEDY,
    SAMPLING,
    MakeEngine,
    ScriptedDrafter,
    assert_same,
    drafting_engine,
    prompts,
)


@pytest.fixture
def make_engine(tmp_path: Path) -> MakeEngine:
    return partial(drafting_engine, tmp_path)


@pytest.mark.full("False-sampled_top_k", "True-penalties")
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("exact", [False, True])
def test_drafts_do_not_change_answers(sampling: str, exact: bool, make_engine: MakeEngine) -> None:
    params = SAMPLING[sampling]
    plain = make_engine(exact=exact).generate(prompts(), params)
    drafter = ScriptedDrafter()
    drafter.learn(plain)
    drafted = make_engine(drafter, exact=exact)
    outputs = drafted.generate(prompts(), params)
    assert_same(outputs, plain)
    accepted = sum(sum(output.drafts.accepted.values()) for output in outputs)
    assert accepted > 30
    assert sum(sum(output.drafts.drafted.values()) for output in outputs) > accepted
    alone = make_engine(drafter, exact=exact, max_running=1)
    assert_same(alone.generate(prompts()[3:4], params), plain[3:4])


def test_answers_end_inside_an_accepted_run(make_engine: MakeEngine) -> None:
    """Check stop tokens, stop strings and the last token at every place of a run.

    The drafted rest is neither reported nor published.
    """
    prompt = prompts()[5]
    plain = make_engine()
    (whole,) = plain.generate([prompt], GREEDY)
    drafter = ScriptedDrafter(lambda done, most: most)
    drafter.learn([whole])
    drafted = make_engine(drafter)
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
            if output.drafts is not None:
                assert sum(output.drafts.accepted.values()) < len(output.token_ids)
            assert drafted.report().kv == plain.report().kv
            assert drafted.report().slots == plain.report().slots


def test_a_hit_gets_drafts_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(draft="tree:5")
    engine.generate(prompts()[:1], GREEDY)
    (output,) = engine.generate(prompts()[:1], GREEDY)
    assert output.cached_len == 128
    verified = output.drafts.num_verified
    assert verified <= 9  # 39 tokens after the first: 4 and one, then 5 and one at a time
    assert sum(output.drafts.accepted.values()) >= 39 - verified


def test_drafts_do_not_change_the_sampled_distribution() -> None:
    """Check that a draft is accepted as often as it is likely, and replaced as the others are.

    Chi-squared of the 16 pairs of tokens, in 4,000 seeded runs of two tokens: 15 degrees of
    freedom.
    """
    torch = pytest.importorskip("torch")
    first, second = torch.tensor([1.0, 0.0, -1.0, 0.5]), torch.tensor([0.0, 2.0, 0.3, -0.5])
    params, sampler, drafted_token = SamplingParams(temperature=0.8), Sampler(), 0
    likely = torch.outer((first / 0.8).softmax(0), (second / 0.8).softmax(0)).numpy()
    count = 4000
    inputs = [SamplingInput(params, seed, draw) for seed in range(count) for draw in (0, 1)]
    logits = torch.stack([first, second]).repeat(count, 1)
    drawn = sampler.launch(logits, inputs, range(2 * count)).wait()
    pairs = np.zeros((4, 4))
    for one, other in zip(drawn[::2], drawn[1::2], strict=True):
        tokens = np.array([0, drafted_token], np.int32)
        draft = Draft(tokens[1:], "test")
        segment = Segment(0, None, tokens, 0, True, num_drafts=1, samples=True, draft=draft)
        run = segment.run_of(iter([one, other]))
        assert len(run) == 1 + (one.token_id == drafted_token)
        # After a rejected draft, the next step draws the second token, with the same number.
        pairs[one.token_id, run[1].token_id if len(run) == 2 else other.token_id] += 1
    assert (
        abs(pairs[drafted_token].sum() - count * likely[drafted_token].sum())
        < 3 * (count / 4) ** 0.5
    )
    assert ((pairs - count * likely) ** 2 / (count * likely)).sum() < 37.7  # p = 0.001


def test_namespaces_do_not_share_drafts(make_engine: MakeEngine) -> None:
    engine = make_engine(draft="tree:5")
    prompt = prompts()[0]
    engine.generate([prompt], GREEDY, namespace="a")
    (output,) = engine.generate([prompt], GREEDY, namespace="b")
    assert not [source for source, _ in output.drafts.drafted if source == "tree"]
    (output,) = engine.generate([prompt], GREEDY, namespace="a")
    assert output.drafts.accepted["tree", 1] > 0


def test_entries_published_by_a_failed_commit_are_forgotten(make_engine: MakeEngine) -> None:
    """Check that published entries are forgotten after a failed commit.

    The runner's commit writes their states, so a hit would resume from memory that was never
    written.
    """
    params = SamplingParams(max_tokens=12, temperature=0)
    plain = make_engine().generate(prompts(), params)
    drafter = ScriptedDrafter(lambda done, most: most)
    drafter.learn(plain)
    engine = make_engine(drafter)
    commit, num_cached = engine.runner.commit, []

    def fail_once(batch: Any, taken: Any) -> None:
        if not num_cached:
            num_cached.append(engine.report().kv.cached)
            raise MemoryError
        commit(batch, taken)

    engine.runner.commit = fail_once  # type: ignore[method-assign]
    for prompt in prompts():
        engine.submit(prompt, params)
    with pytest.raises(MemoryError):
        while engine.has_work():
            engine.step()
    assert num_cached[0] > 0 == engine.report().kv.cached
    engine.check()
    outputs = engine.generate(prompts(), params)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert engine.report().kv.held == 0
