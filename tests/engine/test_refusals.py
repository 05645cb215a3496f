"""Tests of refused requests, settings and sampling parameters: each error is one sentence."""

from __future__ import annotations

import pytest

from engine import (
    ConfigError,
    EngineConfig,
    QueueFull,
    SamplingParams,
)
from tests.engine.test_engine import GREEDY, ids, make_engine


def test_submit_refuses_beyond_the_queue_and_generate_waits() -> None:
    engine = make_engine(max_queue=3)
    for i in range(3):
        engine.submit(ids(5, first=i))
    with pytest.raises(QueueFull, match="3 requests are waiting"):
        engine.submit(ids(9))
    while engine.has_work():
        engine.step()
    assert len(engine.generate([ids(5, first=i) for i in range(40)], GREEDY)) == 40


@pytest.mark.parametrize(
    "prompt, sampling, options, sentence",
    [
        ([], GREEDY, {}, "the prompt is empty"),
        ([1, 320], GREEDY, {}, "token ids must be from 0 to 319"),
        ([-1], GREEDY, {}, "token ids must be from 0"),
        ([1, 2**70], GREEDY, {}, "token ids must be from 0 to 319"),
        ([-1, 2**63], GREEDY, {}, "token ids must be from 0 to 319"),
        ([[1], [2, 3]], GREEDY, {}, "flat list of token ids"),
        ([1.5], GREEDY, {}, "flat list of token ids"),
        ("text", GREEDY, {}, "the engine has no tokenizer"),
        ([1], SamplingParams(stop="x"), {}, "stop strings require a tokenizer"),
        ([1] * 5000, GREEDY, {}, "maximum context length is 4096 tokens"),
        ([1] * 4096, SamplingParams(max_tokens=None), {}, "maximum context length is 4096 tokens"),
        ([1] * 4090, SamplingParams(max_tokens=7), {}, "4090 tokens and its answer needs 7 more"),
        ([1], SamplingParams(max_tokens=0), {}, "max_tokens must be at least 1"),
        ([1], GREEDY, {"prompt_logprobs": -1}, "prompt_logprobs must be"),
        ([1], GREEDY, {"namespace": True}, "namespace True is a bool; use None"),
        ([1], GREEDY, {"namespace": [1]}, "is a list; use None, a str, bytes, an int"),
    ],
)
def test_impossible_requests_are_refused_in_one_sentence(
    prompt: object, sampling: SamplingParams, options: dict[str, object], sentence: str
) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=sentence) as caught:
        engine.submit(prompt, sampling, **options)
    assert "\n" not in str(caught.value)
    assert not engine.has_work()


def test_a_request_of_the_maximum_length_is_served() -> None:
    engine = make_engine(kv_tokens=256)
    outputs = engine.generate([ids(192)] * 3, SamplingParams(max_tokens=64))
    assert {len(output.token_ids) for output in outputs} == {64}


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"token_budget": 63}, "token_budget must be at least 64"),
        ({"grid": 100}, "grid must be 16 or 32 or a multiple of 64, not 100"),
        ({"grid": 48}, "grid must be 16 or 32 or a multiple of 64, not 48"),
        ({"grid": 8}, "grid must be 16 or 32 or a multiple of 64, not 8"),
        ({"max_running": 0}, "max_running must be an integer of 1 or more"),
        ({"page_size": 1.5}, "page_size must be an integer"),
        ({"kv_gib": -1}, "kv_gib must be a positive number"),
        ({"cache_gib": 1, "kv_gib": 1}, "cache_gib only"),
        ({"prefix_cache": "magic"}, "must be one of hybrid, radix, none"),
        ({"overlap": "maybe"}, "overlap must be one of auto, on, off"),
        ({"quantization": "int4"}, "quantization must be one of none, int8, fp8"),
        ({"kv_gib": "1"}, "kv_gib must be a positive number"),
        ({"model": ""}, "model must name a directory"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"checkpoints": ("brunch",)}, "unknown checkpoint placement 'brunch'"),
        ({"eviction": "mru"}, "mru"),
        ({"prefix_cache": "radix"}, "linear-attention layers that need their state"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(
    settings: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        make_engine(**settings)
    assert "\n" not in str(caught.value)


def test_placements_may_be_given_as_one_string() -> None:
    config = EngineConfig(checkpoints="end,every:1024")  # type: ignore[arg-type]
    assert config.checkpoints == ("end", "every:1024")


def test_config_errors_are_value_errors() -> None:
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    "field, value, sentence",
    [
        ("temperature", -0.1, "temperature must be a finite number from 0 to 100"),
        ("temperature", float("nan"), "temperature must be a finite number"),
        ("temperature", "hot", "temperature must be a finite number"),
        ("top_p", 0.0, "top_p must be a finite number above 0"),
        ("top_p", 1.1, "at most 1"),
        ("top_k", 0, "top_k must be an integer from 1"),
        ("top_k", True, "top_k must be an integer"),
        ("min_p", 2, "min_p must be"),
        ("max_tokens", -1, "max_tokens must be an integer from 0"),
        ("stop", ("",), "stop must contain only non-empty strings"),
        ("stop_token_ids", (-1,), "stop_token_ids must contain"),
        ("seed", 2**63, "seed must be an integer from"),
        ("logprobs", 51, "logprobs must be an integer from 0 to 50"),
        ("repetition_penalty", 0, "repetition_penalty must be a finite number above 0"),
        ("presence_penalty", 3, "presence_penalty must be"),
        ("frequency_penalty", -3, "frequency_penalty must be"),
    ],
)
def test_sampling_parameters_are_checked(field: str, value: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        SamplingParams(**{field: value})
