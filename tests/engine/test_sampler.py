"""The sampler: distributions, filters, penalties, and draws that depend on nothing but the request."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.requests.sampling_params import SamplingInput, SamplingParams
from engine.run import sampler
from engine.run.sampler import Sampler, uniform

VOCAB = 67
NONE = np.empty(0, dtype=np.int32)


def request(seed=0, prompt=NONE, output=NONE, **params):
    return SamplingInput(SamplingParams(**params), seed, prompt, output, draw=len(output))


def drawn(logits, *requests):
    return [token.token_id for token in Sampler(VOCAB).sample(logits, requests)]


def random_logits(rows, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def draws(logits, count, **params):
    """Tokens of ``count`` requests that differ in their seed."""
    rows = logits.expand(count, VOCAB)
    return drawn(rows, *(request(seed, **params) for seed in range(count)))


def test_greedy_is_argmax_in_any_dtype():
    logits = random_logits(5)
    for dtype in (torch.float32, torch.bfloat16):
        rows = logits.to(dtype)
        assert drawn(rows, *[request(temperature=0)] * 5) == rows.argmax(-1).tolist()


def test_draws_follow_the_distribution():
    logits = random_logits(1)
    counts = np.bincount(draws(logits, 20_000, temperature=0.7), minlength=VOCAB)
    expected = (logits[0] / 0.7).softmax(-1).numpy()
    assert np.abs(counts / 20_000 - expected).max() < 0.012


@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}])
def test_filters_keep_exactly_the_likely_ones(params):
    logits = random_logits(1)
    probabilities, order = logits[0].softmax(-1).sort(descending=True)
    if "top_k" in params:
        kept = 3
    elif "top_p" in params:
        kept = int((probabilities.cumsum(0) < 0.6).sum()) + 1
    else:
        kept = int((probabilities >= 0.3 * probabilities[0]).sum())
    assert 1 < kept < VOCAB
    assert set(draws(logits, 3000, **params)) == set(order[:kept].tolist())


def test_top_k_one_is_greedy():
    logits = random_logits(1)
    assert set(draws(logits, 50, top_k=1)) == {int(logits.argmax())}


MIXES = st.lists(
    st.fixed_dictionaries(
        {
            "seed": st.integers(-(2**63), 2**63 - 1),
            "temperature": st.sampled_from([0.0, 0.5, 1.0]),
            "top_k": st.sampled_from([None, 5]),
            "top_p": st.sampled_from([1.0, 0.8]),
            "min_p": st.sampled_from([0.0, 0.05]),
            "repetition_penalty": st.sampled_from([1.0, 1.3]),
            "presence_penalty": st.sampled_from([0.0, 0.5]),
            "logprobs": st.sampled_from([None, 0, 3]),
        }
    ),
    min_size=1,
    max_size=9,
)


@given(MIXES)
@settings(max_examples=60, deadline=None)
def test_a_token_does_not_depend_on_the_batch(mix):
    logits = random_logits(len(mix), seed=len(mix))
    output = np.array([3, 3, 5], dtype=np.int32)
    requests = [
        request(prompt=np.array([1, 2], np.int32), output=output, **kwargs) for kwargs in mix
    ]
    together = Sampler(VOCAB).sample(logits, requests)
    for row, one in enumerate(requests):
        assert Sampler(VOCAB).sample(logits[row : row + 1], [one]) == [together[row]]


def test_the_number_of_the_draw_counts():
    logits = random_logits(1).expand(200, VOCAB)
    at_each = drawn(logits, *(request(5, output=np.zeros(n, np.int32)) for n in range(200)))
    assert len(set(at_each)) > 10


def test_penalties():
    logits = torch.zeros(1, VOCAB)
    logits[0, :3] = torch.tensor([4.0, 3.9, 3.8])
    seen = np.array([0, 0, 1], dtype=np.int32)
    assert drawn(logits, request(temperature=0, repetition_penalty=2.0, prompt=seen)) == [2]
    assert drawn(logits, request(temperature=0, presence_penalty=1.0, output=seen)) == [2]
    assert drawn(logits, request(temperature=0, frequency_penalty=0.06, output=seen[:2])) == [1]
    assert drawn(logits, request(temperature=0, presence_penalty=1.0, prompt=seen)) == [0]
    other = np.array([9], dtype=np.int32)
    answered = request(temperature=0, presence_penalty=1.0, prompt=seen, output=other)
    assert drawn(logits, answered) == [0]
    assert logits[0, 0] == 4.0  # the caller's logits stay as they were


def test_a_repetition_makes_a_token_less_likely_wherever_it_stood():
    logits = torch.zeros(1, VOCAB)
    logits[0, :2] = torch.tensor([4.0, 3.9])
    output = np.array([0], dtype=np.int32)
    assert drawn(logits, request(temperature=0, repetition_penalty=2.0, output=output)) == [1]
    negative = torch.full((1, VOCAB), -9.0)
    negative[0, :2] = torch.tensor([-4.0, -4.1])
    assert drawn(negative, request(temperature=0, repetition_penalty=2.0, output=output)) == [1]


@pytest.mark.parametrize("filters", [{"min_p": 0.5}, {"top_k": 2}])
def test_a_draw_of_zero_picks_no_token_that_was_left_out(monkeypatch, filters):
    monkeypatch.setattr(sampler, "uniform", lambda seed, draw: 0.0)
    logits = torch.full((1, VOCAB), -9.0)
    logits[0, 5:7] = torch.tensor([3.9, 4.0])
    assert drawn(logits, request(**filters))[0] in (5, 6)


def test_log_probabilities_go_to_the_rows_that_asked_for_them():
    logits = random_logits(4)
    wanted = (None, 0, None, 3)
    sampled = Sampler(VOCAB).sample(logits, [request(temperature=0, logprobs=n) for n in wanted])
    expected = logits.log_softmax(-1)
    for row, num_top in enumerate(wanted):
        one = sampled[row]
        assert (one.logprob is None) == (num_top is None)
        assert len(one.top_logprobs) == (num_top or 0)
        if num_top is not None:
            assert one.logprob == pytest.approx(float(expected[row, one.token_id]), abs=1e-6)


def test_logprobs_are_the_models_own():
    logits = random_logits(2)
    expected = logits.log_softmax(-1)
    plain, scored = Sampler(VOCAB).sample(
        logits, [request(temperature=0), request(temperature=0.3, logprobs=4)]
    )
    assert plain.logprob is None and plain.top_logprobs == ()
    assert scored.logprob == pytest.approx(float(expected[1, scored.token_id]), abs=1e-6)
    assert [i for i, _ in scored.top_logprobs] == expected[1].topk(4).indices.tolist()
    given = Sampler(VOCAB).score(logits, [7, 9], 0).wait()
    assert [s.token_id for s in given] == [7, 9]
    assert given[1].logprob == pytest.approx(float(expected[1, 9]), abs=1e-6)


def test_many_rows_are_scored_in_parts(monkeypatch):
    logits = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(7)
    whole = sampler._score(logits, tokens, 3)
    monkeypatch.setattr(sampler, "SCORED_ROWS", 3)
    for part, expected in zip(sampler._score(logits, tokens, 3), whole, strict=True):
        assert torch.equal(part, expected)


def test_uniform_is_uniform():
    numbers = np.array([uniform(seed, draw) for seed in range(100) for draw in range(100)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert np.abs(np.histogram(numbers, 20, (0, 1))[0] - 500).max() < 100
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    assert uniform(1, 0) != uniform(0, 1)
