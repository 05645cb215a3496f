"""Tests of ``pieces``, which splits a step: tokens, checkpoints and rows of logits stay in
order."""

from __future__ import annotations

import pickle

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from engine.schedule.scheduler import Batch, Segment, logit_rows, pieces


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    segments = [
        Segment(row, row, np.array([row], np.int32), 70, True, exports=((71, 90 + row),))
        for row in range(draw(st.integers(0, 2)))
    ]
    for row in range(2, 2 + draw(st.integers(0, 3))):
        start, length = 64 * draw(st.integers(0, 2)), draw(st.integers(1, 400))
        grid = [at for at in range(start + 64, start + length + 1, 64) if draw(st.booleans())]
        exports = draw(st.permutations([(at, 100 * row + at // 64) for at in grid]))
        num_logits = draw(st.sampled_from([0, 1, length]))
        tokens = np.arange(start, start + length, dtype=np.int32) + 1000 * row
        segments.append(Segment(row, row, tokens, start, False, tuple(exports), num_logits, "salt"))
    writes = ((0, 0, np.arange(3, dtype=np.int32)),) if segments else ()
    return Batch(tuple(segments), row_writes=writes)


FOUR = tuple((64 * number, number) for number in range(1, 5))


@given(batch=batches(), max_exports=st.integers(1, 4))
@example(Batch((Segment(2, 2, np.arange(300, dtype=np.int32), 0, False, FOUR),)), 1)
def test_pieces_of_a_batch_add_up_to_the_batch(batch: Batch, max_exports: int) -> None:
    parts = pieces(batch, max_exports)
    segments = [segment for part in parts for segment in part.segments]
    sent: Batch = pickle.loads(pickle.dumps(batch))
    assert list(map(repr, sent.segments)) == list(map(repr, batch.segments))
    for part in parts:
        assert sum(len(s.exports) for s in part.segments if not s.is_decode) <= max_exports
        assert len({segment.row for segment in part.segments}) == len(part.segments)
    assert all(part.segments for part in parts[1:])
    assert parts[0].row_writes == batch.row_writes and not any(p.row_writes for p in parts[1:])
    scored: list[int] = []
    for whole in batch.segments:
        own = [segment for segment in segments if segment.row == whole.row]
        assert [own[0].start, *(s.end for s in own)] == [
            whole.start,
            *(s.start for s in own[1:]),
            whole.end,
        ]
        assert all(segment.start % 64 == 0 for segment in own[1:])
        assert np.array_equal(np.concatenate([s.token_ids for s in own]), whole.token_ids)
        assert sorted(e for s in own for e in s.exports) == sorted(whole.exports)
        assert all(s.start < at <= s.end for s in own for at, _ in s.exports)
        assert {(s.slot, s.namespace, s.is_decode) for s in own} == {
            (whole.slot, whole.namespace, whole.is_decode)
        }
    for part in parts:
        ids = np.concatenate([s.token_ids for s in part.segments]) if part.segments else []
        scored += [int(ids[row]) for row in logit_rows(part.segments)]
    ids = np.concatenate([s.token_ids for s in batch.segments]) if batch.segments else []
    assert scored == [int(ids[row]) for row in logit_rows(batch.segments)]
