"""Tests of pools that hold one request and part of the next: steps are empty, and no copy is
lost."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from engine import Engine, EngineConfig, SamplingParams
from engine.schedule.batch import Batch, Segment
from tests.oracle import OracleRunner, OracleSampler
from tests.selection import is_quick


def make_engine(kv_tokens: int, overlap: str) -> Engine:
    config = EngineConfig(
        max_running=3, token_budget=128, overlap=overlap, checkpoints=("none",), check=True
    )
    return Engine(config, runner=OracleRunner(kv_tokens, 8), sampler=OracleSampler())


def combinations() -> Iterator[tuple[int, int, int, int]]:
    """Yield up to 1,600 of (KV rows, second prompt's length, tokens of the first answer, steps
    between them)."""
    sizes = ((256, range(64, 256, 12)), (320, range(64, 320, 17)))
    products = (itertools.product([n], lengths, range(1, 11), range(5)) for n, lengths in sizes)
    yield from itertools.islice(itertools.chain(*products), 0, None, 7 if is_quick() else 1)


@pytest.mark.full("off")
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_prompts_that_share_one_token_read_their_own_rows(overlap: str) -> None:
    """Check a publish of tokens that the first request has: the second's row changes, and it has no
    memory to go on."""
    for kv_tokens, length, answer, between in combinations():
        engine = make_engine(kv_tokens, overlap)
        engine.submit([7] + [1] * 63, SamplingParams(max_tokens=answer))
        for _ in range(between):
            engine.step()
        engine.submit([7] + [2] * (length - 1), SamplingParams(max_tokens=1))
        while engine.has_work():
            engine.step()


def test_a_batch_without_segments_refuses_copies() -> None:
    indices = np.arange(3, dtype=np.int32)
    with pytest.raises(AssertionError, match="is not executed"):
        Batch((), row_writes=((0, 0, indices),))
    with pytest.raises(AssertionError, match="is not executed"):
        Batch((), restores=((0, 1),))
    segment = Segment(0, None, indices, 0, is_decode=False)
    assert Batch((segment,), row_writes=((0, 0, indices),)).num_tokens == 3
