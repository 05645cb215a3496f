"""Tests of the runner that proves reads: every fault it must refuse."""

from __future__ import annotations

import numpy as np
import pytest

from engine.schedule.batch import Batch, Segment
from tests.oracle import OracleRunner

Write = tuple[int, int, np.ndarray]


def write(row: int, start: int, *indices: int) -> Write:
    return row, start, np.array(indices, np.int32)


def segment(
    row: int,
    slot: int | None,
    start: int,
    tokens: list[int],
    namespace: str | None = None,
    exports: tuple[tuple[int, int], ...] = (),
) -> Segment:
    return Segment(
        row,
        slot,
        np.array(tokens, np.int32),
        start,
        is_decode=False,
        exports=exports,
        namespace=namespace,
    )


def runner_with(namespace: str | None = None) -> OracleRunner:
    """Return a runner with tokens 5, 6, 7 in KV rows 0 to 2 and slot 0, and the state after two in
    slot 3."""
    runner = OracleRunner(8, 4)
    first = segment(0, 0, 0, [5, 6, 7], namespace, exports=((2, 3),))
    runner.forward(Batch((first,), row_writes=(write(0, 0, 0, 1, 2),)))
    return runner


def test_a_segment_that_continues_its_prefix_is_computed() -> None:
    runner = runner_with("a")
    resumed = segment(1, 1, 2, [9], "a")
    runner.forward(Batch((resumed,), ((3, 1),), (write(1, 0, 0, 1, 4),)))
    assert runner.table_row(1, 3).tolist() == [0, 1, 4]
    assert runner.table_row(1, 2).tolist() == [0, 1]
    assert runner.table_row(2, 2).tolist() == []


@pytest.mark.parametrize(
    "broken, sentence",
    [
        (Batch((segment(1, 1, 2, [9]),), ((3, 1),), (write(1, 2, 4),)), "without a KV row"),
        (Batch((segment(1, 1, 2, [9]),), ((3, 1),), (write(1, 0, 0, 5, 4),)), "no namespace"),
        (Batch((segment(1, 1, 2, [9]),), ((3, 1),), (write(1, 0, 1, 0, 4),)), "another prefix"),
        (Batch((segment(1, 1, 2, [9]),), (), (write(1, 0, 0, 1, 4),)), "never written"),
        (Batch((segment(1, 0, 2, [9]),), (), (write(1, 0, 0, 1, 4),)), "holds the state of 3"),
        (Batch((segment(0, 0, 3, [9]),)), "without a KV row"),
        (Batch((segment(0, 0, 3, [9, 9]),), (), (write(0, 3, 4, 4),)), "two positions in one"),
        (Batch((segment(0, 0, 3, []),)), "without tokens"),
        (
            Batch(
                (segment(0, 0, 3, [9]), segment(1, 1, 0, [9])),
                (),
                (write(0, 3, 4), write(1, 0, 4)),
            ),
            "two requests write one KV row",
        ),
        (
            Batch(
                (segment(0, 0, 3, [9]), segment(1, 1, 0, [9])),
                (),
                (write(0, 3, 4), write(1, 0, 2)),
            ),
            "writes a KV row that another reads",
        ),
        (
            Batch(
                (segment(0, 0, 3, [9]), segment(1, 0, 0, [9])),
                (),
                (write(0, 3, 4), write(1, 0, 5)),
            ),
            "two states in one slot",
        ),
        (
            Batch((segment(0, 0, 3, [9], exports=((3, 2),)),), (), (write(0, 3, 4),)),
            "outside of its segment",
        ),
        (
            Batch((segment(0, 0, 3, [9], exports=((4, 1), (4, 2))),), (), (write(0, 3, 4),)),
            "two checkpoints of one state",
        ),
    ],
)
def test_a_wrong_read_or_write_is_refused(broken: Batch, sentence: str) -> None:
    with pytest.raises(AssertionError, match=sentence):
        runner_with().forward(broken)


def test_a_read_across_namespaces_is_refused() -> None:
    resumed = segment(1, 1, 2, [9], "b")
    batch = Batch((resumed,), ((3, 1),), (write(1, 0, 0, 1, 4),))
    with pytest.raises(AssertionError, match="'b' reads at position 0 a KV row of namespace 'a'"):
        runner_with("a").forward(batch)
    new_rows = Batch((segment(1, 1, 0, [5, 6], "b"),), row_writes=(write(1, 0, 4, 5),))
    runner = runner_with("a")
    runner.forward(new_rows)
    with pytest.raises(AssertionError, match="'b' reads in slot 1 a state of namespace 'a'"):
        runner.forward(Batch((resumed,), ((3, 1),), (write(1, 2, 6),)))
