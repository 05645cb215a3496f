"""Tests of ``SamplingParams``: bad values are refused in one sentence."""

from __future__ import annotations

import numpy as np
import pytest

from engine.requests.spec import MAX_STOPS, SamplingParams


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"stop": ["x"] * (MAX_STOPS + 1)}, "at most 64"),
        ({"stop_token_ids": range(MAX_STOPS + 1)}, "at most 64"),
        ({"stop": 5}, "must be a list"),
        ({"stop": None}, "must be a list"),
        ({"stop": [""]}, "non-empty"),
        ({"stop_token_ids": [-1]}, "0 or more"),
        ({"temperature": float("nan")}, "finite"),
        ({"top_p": 0}, "above 0"),
        ({"seed": 1.5}, "integer"),
        ({"max_tokens": True}, "integer"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(bad: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as raised:
        SamplingParams(**bad)  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_numpy_numbers_are_accepted() -> None:
    params = SamplingParams(
        seed=np.int64(4), temperature=np.float32(0.5), stop_token_ids=(np.int32(7),)
    )
    assert (params.seed, params.temperature, params.stop_token_ids) == (4, 0.5, (7,))
