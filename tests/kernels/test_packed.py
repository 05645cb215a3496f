"""The packed layout, the plan of exports, and uploads of tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.packed import Exports, Packed
from kernels.strides import rows_contiguous
from kernels.upload import upload
from tests.refused import refused


def test_tiles_start_at_each_sequence() -> None:
    packed = Packed.from_lengths([65, 0, 64, 1])
    assert packed.lengths == (65, 0, 64, 1)
    assert packed.cu_seqlens.tolist() == [0, 65, 65, 129, 130]
    assert packed.tile_sequences.tolist() == [0, 0, 2, 3]
    assert packed.cu_tiles.tolist() == [0, 2, 2, 3, 4]
    assert [table.tolist() for table in Packed.from_lengths([]).tables] == [[0], [], [0]]


def test_exports_are_ordered_by_sequence_and_position() -> None:
    packed = Packed.from_lengths([200, 0, 70])
    exports = Exports.plan(packed, [(2, 64, 5), (0, 200, 3), (0, 64, 4)])
    assert exports.sequences == (0, 0, 2)
    assert exports.ends == (64, 200, 64)
    assert exports.slots == (4, 3, 5)
    assert [table.tolist() for table in exports.tables] == [[64, 200, 64], [4, 3, 5], [0, 2, 2, 3]]
    assert Exports.plan(packed, []) is None
    refused("twice", Exports.plan, packed, [(0, 64, 1), (0, 64, 2)])


ENDS = [*((64, end) for end in (0, 63, 65, 192, -64)), (32, 16), (32, 48), (16, 8), (16, 24)]


@pytest.mark.parametrize(("tile_size", "end"), ENDS)
def test_export_off_the_grid_is_refused(tile_size: int, end: int) -> None:
    packed = Packed.from_lengths([130], tile_size=tile_size)
    assert Exports.plan(packed, [(0, 2 * tile_size, 1)]).ends == (2 * tile_size,)
    refused("a state cannot be exported", Exports.plan, packed, [(0, end, 1)])


def test_rows_are_copied_only_if_not_contiguous() -> None:
    tokens = Packed.from_lengths([3]).cu_seqlens.new_zeros(4, 6, 2)
    assert rows_contiguous(tokens[:, :3]).data_ptr() == tokens.data_ptr()
    assert rows_contiguous(tokens[:, ::2]).is_contiguous()


def test_an_upload_starts_from_a_pinned_copy(monkeypatch) -> None:
    sources, to, empty = [], torch.Tensor.to, torch.empty

    def without_pinning(*args, pin_memory, **settings) -> torch.Tensor:
        assert pin_memory
        return empty(*args, **settings)

    monkeypatch.setattr(torch, "empty", without_pinning)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, *a, **k: (sources.append(self), to(self, *a, **k))[1]
    )
    values = np.arange(4)
    assert upload(values[1:], torch.int64, "meta").shape == (3,)
    values[:] = 0
    assert sources[-1].tolist() == [1, 2, 3]
