"""Tests of the sampler: distributions, filters, penalties, and independence from the batch."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig

from engine import EngineConfig
from engine.requests.logit_rules import FREE, Penalties, Repeats
from engine.requests.request import Intake, Request, RequestSpec, SamplingInput, SamplingParams
from engine.runner import sampler
from engine.runner.sampler import Sampler, uniform
from engine.text.answers import NO_TOKEN

VOCAB = 67
NONE = np.empty(0, dtype=np.int32)


def request(seed=0, prompt=NONE, output=NONE, **params):
    sampling, rulings = SamplingParams(**params), [FREE]
    costs = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
    if costs != (1, 0, 0):
        rulings = Penalties(prompt, *costs).apply(output, NONE, rulings)
    return SamplingInput(sampling, seed, len(output), *rulings)


def sample(logits, requests):
    """Return a token for each row."""
    return Sampler().launch(logits, requests, range(len(requests))).wait()


def drawn(logits, *requests):
    return [token.token_id for token in sample(logits, requests)]


def random_logits(rows, seed=0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def test_greedy_is_argmax_in_any_dtype():
    logits = random_logits(5)
    for dtype in (torch.float32, torch.bfloat16):
        rows = logits.to(dtype)
        assert drawn(rows, *[request(temperature=0)] * 5) == rows.argmax(-1).tolist()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_infinite_logits_give_no_token(bad):
    """Check that other rows draw as before, and that every id on the device is in the
    vocabulary."""
    requests = [
        request(temperature=0),
        request(temperature=0, logprobs=2),
        request(1),
        request(2, top_k=5, min_p=0.1),
        request(3, top_p=0.8, logprobs=1),
        request(4, repetition_penalty=1.2, output=np.array([3, 5], np.int32)),
    ]
    logits = random_logits(2 * len(requests))
    sound = sample(logits[::2], requests)
    if bad == -np.inf:
        logits[1::2] = bad
    else:
        logits[1::2, 7] = bad
    both = [one for one in requests for _ in range(2)]
    drawn = Sampler().launch(logits, both, range(len(both)))
    assert [token.token_id for token in drawn.wait()[1::2]] == [NO_TOKEN] * len(requests)
    assert drawn.wait()[::2] == sound
    assert ((drawn.tokens >= 0) & (drawn.tokens < VOCAB)).all()
    scored = Sampler().score(logits[:2], [3, 4], 2).wait()
    assert [token.token_id for token in scored] == [3, NO_TOKEN]


MIXES = st.lists(
    st.fixed_dictionaries(
        {
            "seed": st.integers(-(2**63), 2**63 - 1),
            "temperature": st.sampled_from([0.0, 0.5, 1.0]),
            "top_k": st.sampled_from([None, 5, 66]),
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
def test_tokens_do_not_depend_on_the_batch(mix):
    logits = random_logits(len(mix), seed=len(mix))
    output = np.array([3, 3, 5], dtype=np.int32)
    requests = [
        request(prompt=np.array([1, 2], np.int32), output=output, **kwargs) for kwargs in mix
    ]
    together = sample(logits, requests)
    for row, one in enumerate(requests):
        assert sample(logits[row : row + 1], [one]) == [together[row]]


def test_a_seed_may_be_an_integer_of_numpy():
    intake = Intake(EngineConfig(), None, vocab_size=VOCAB, max_model_len=64)
    spec = intake.validate(RequestSpec([1, 2], SamplingParams(seed=np.int64(-5))))
    made = Request(spec, intake)
    assert uniform(made.seed, 3) == uniform(-5, 3)


@given(st.lists(st.floats(-30, 8, width=32), min_size=2, max_size=40), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_a_draw_is_found_by_exact_sums(logits, seed):
    """Probabilities are whole numbers, so a device may add them in any order."""
    probabilities = torch.tensor(logits).softmax(-1)
    exact = [int(p * 2**52) for p in probabilities.double().tolist()]
    [token] = sampler._look_up(probabilities[None], [request(seed)]).tolist()
    point = uniform(seed, 0) * sum(exact)
    assert sum(exact[:token]) <= point < sum(exact[: token + 1])


def test_penalties_apply_to_prompt_or_answer_tokens():
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
    both = request(temperature=0, repetition_penalty=1.001, presence_penalty=1.0, prompt=seen)
    assert drawn(logits, both) == [0]  # prompt tokens count for repetition, not for presence
    assert logits[0, 0] == 4.0  # the caller's logits are not changed


def test_logprobs_are_those_before_filters_and_temperature():
    logits = random_logits(2)
    expected = logits.log_softmax(-1)
    plain, scored = sample(logits, [request(temperature=0), request(temperature=0.3, logprobs=4)])
    assert plain.logprob is None and plain.top_logprobs == ()
    assert scored.logprob == pytest.approx(float(expected[1, scored.token_id]), abs=1e-6)
    assert [i for i, _ in scored.top_logprobs] == expected[1].topk(4).indices.tolist()
    given = Sampler().score(logits, [7, 9], 0).wait()
    assert [s.token_id for s in given] == [7, 9]
    assert given[1].logprob == pytest.approx(float(expected[1, 9]), abs=1e-6)


def warped(logits, params):
    """Return probabilities after transformers' own warpers, in its order."""
    config = GenerationConfig(do_sample=True, **{"top_k": 0} | params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warpers = _Model()._get_logits_processor(config)
    return warpers(None, logits.clone()).softmax(-1)


class _Model(GenerationMixin):
    config = PretrainedConfig(vocab_size=VOCAB)


@pytest.mark.full("1.7-1.0")
@pytest.mark.parametrize("width", [1.0, 4.0])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_filters_equal_those_of_transformers(temperature, width):
    """Check that every mix of top_k, top_p and min_p keeps the same tokens with the same
    probabilities."""
    rows = 40
    logits = random_logits(rows, seed=int(width)) * width
    for top_k in (None, 1, 5, 20, 66, 500):
        for top_p in (1.0, 0.95, 0.8, 0.1):
            for min_p in (0.0, 0.05, 0.5):
                params = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
                params |= {"top_k": top_k} if top_k is not None else {}
                requests = [request(seed, **params) for seed in range(rows)]
                expected = warped(logits, params)
                size = sampler._width(requests[0].params, VOCAB)
                if size is not None:
                    ours = torch.zeros(rows, VOCAB)
                    ours.scatter_(1, *sampler._filter(logits, requests, size))
                    assert torch.equal(ours > 0, expected > 0), params
                    ours /= ours.sum(-1, keepdim=True)
                    assert torch.allclose(ours, expected, atol=1e-6)
                assert_drawn_from(logits, requests, expected, by_id=size is None)


def test_no_token_is_kept_behind_a_sum_of_exactly_top_p():
    """Two tokens have a probability of one half each. The others have none."""
    logits = torch.full((1, VOCAB), -200.0)
    logits[0, [5, 9]] = 0.0
    for top_p, kept in ((0.5, {5}), (0.501, {5, 9})):
        assert {drawn(logits, request(seed, top_p=top_p))[0] for seed in range(20)} == kept


def assert_drawn_from(logits, requests, chances, by_id):
    """Check that each token is where its number falls in the running sum of ``chances``."""
    order = torch.arange(VOCAB).expand_as(logits)
    if not by_id:
        order = logits.sort(dim=-1, descending=True, stable=True).indices
    sums = chances.double().gather(1, order).cumsum(-1)
    for row, token in enumerate(drawn(logits, *requests)):
        place = order[row].tolist().index(token)
        number = uniform(requests[row].seed, 0)
        assert chances[row, token] > 0
        assert (sums[row, place - 1] if place else 0) - 1e-6 <= number <= sums[row, place] + 1e-6


@given(
    st.lists(st.sampled_from([-torch.inf, -2.5, -1e-40, -0.0, 0.0, 1e-40, 3.0, 1e38]), min_size=2),
    st.data(),
)
def test_the_most_likely_tokens_equal_those_of_a_stable_sort(values, data):
    """Cover equal values, which topk orders differently."""
    scores = torch.tensor([values, values[::-1]])
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    width = data.draw(st.integers(1, len(values)))
    assert torch.equal(sampler._most_likely(scores, width), order[:, :width])


class LiveBytes(TorchDispatchMode):
    """Most bytes that the results of torch's functions have at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self._alive = 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                storage = tensor.untyped_storage()
                self._alive[StorageWeakRef(storage)] = storage.nbytes()
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        self.most = max(self.most, sum(self._alive.values()))
        return out


def test_memory_for_sampling_is_bounded(monkeypatch):
    """256 requests of all kinds over 151,936 tokens, and prompts with log-probabilities. Copies of
    the logits in float32, which penalties need, take 0.16 GB; 1,024 scored rows took 3.1 GB."""
    monkeypatch.setattr(sampler, "upload", lambda values, dtype, device: (
        torch.empty(np.shape(values), dtype=dtype, device="meta")
    ))  # fmt: skip
    monkeypatch.setattr(sampler, "HostCopy", lambda *tensors: None)
    logits = torch.empty(1024, 151936, dtype=torch.bfloat16, device="meta")
    repeats = Repeats(np.arange(3), np.ones((2, 3)))
    ruled = FREE._replace(mask=np.full(18992, 255, np.uint8), repeats=repeats)
    mixes = {"top_p": 0.9}, {}, {"top_k": 1000}, {"temperature": 0.0, "logprobs": 2}
    for mix, (ruling, most) in itertools.product(mixes, ((FREE, 256e6), (ruled, 400e6))):
        requests = [SamplingInput(SamplingParams(**mix), 1, 0, ruling)] * 256
        with LiveBytes() as live:
            Sampler().launch(logits[:256], requests, range(256))
        assert 0 < live.most < most
    with LiveBytes() as live:
        Sampler().score(logits, [1] * 1024, 5)
    assert 0 < live.most < 256e6
