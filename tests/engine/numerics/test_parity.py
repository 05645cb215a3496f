"""Our models against transformers' on the same random weights, float32: the same greedy tokens,
logits within 1e-4."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.schedule.batch import Batch

LENGTHS = (1, 63, 64, 65, 777)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_logits(family, length, drivers, oracles, random_tokens):
    tokens = random_tokens(length, seed=length)
    ours = drivers(family).cold(tokens, logits="all")
    assert_close(ours, oracles(family).logits(tokens))


@pytest.mark.parametrize("grid", [16, 32])
def test_prefill_logits_with_shorter_tiles(family, grid, drivers, oracles, random_tokens):
    tokens = random_tokens(200, seed=grid)
    ours = drivers(family, grid=grid).cold(tokens, logits="all")
    assert_close(ours, oracles(family).logits(tokens))


def test_batch_of_prompts_then_greedy_decode(family, drivers, oracles, random_tokens):
    driver = drivers(family)
    prompts = [random_tokens(length, seed=100 + length) for length in (*LENGTHS, 128)]
    sequences, writes = zip(*(driver.begin(prompt) for prompt in prompts), strict=True)
    segments = tuple(driver.prefill_segment(s, len(s.tokens)) for s in sequences)
    logits = driver.runner.forward(Batch(segments, (), writes))
    for _ in range(6):
        chosen = logits.argmax(-1).tolist()
        for sequence, row in zip(sequences, logits, strict=True):
            expected = oracles(family).logits(sequence.tokens)[-1]
            assert_close(row, expected)
            assert row.argmax() == expected.argmax()
        segments = tuple(
            driver.decode_segment(s, token) for s, token in zip(sequences, chosen, strict=True)
        )
        logits = driver.runner.forward(Batch(segments))


def test_on_a_hit(family, drivers, oracles, random_tokens):
    driver = drivers(family)
    for length in (65, 777):
        tokens = random_tokens(length, seed=length)
        at = (length - 1) // 64 * 64
        first, write = driver.begin(tokens)
        slot = driver.slot()
        exports = ((at, slot),) if slot is not None else ()
        driver.runner.forward(
            Batch((driver.prefill_segment(first, length, exports=exports),), (), (write,))
        )
        again, rewrite = driver.begin(tokens, prefix=write[2][:at])
        restores = ((slot, again.slot),) if slot is not None else ()
        segment = driver.prefill_segment(again, length, logits="all")
        logits = driver.runner.forward(Batch((segment,), restores, (rewrite,)))
        assert len(logits) == length - at
        assert_close(logits, oracles(family).logits(tokens)[at:])


def test_scattered_kv_rows(drivers, oracles, random_tokens):
    driver = drivers("qwen3_next")
    driver.scatter_seed = 3
    driver.reset()
    tokens = random_tokens(300, seed=5)
    assert np.any(np.diff(driver.order[:300]) != 1)
    assert_close(driver.cold(tokens, logits="all"), oracles("qwen3_next").logits(tokens))
