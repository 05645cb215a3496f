"""The store against its reference: whatever was whole is found, and nothing else is ever read."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.store import segment
from engine.store.segment import SUFFIX, record_bytes
from engine.store.store import LOCK_NAME, SegmentStore, StoreError, StoreFull
from tests.engine.store.reference import ReferenceStore

OURS, THEIRS = b"o" * 32, b"t" * 32
MAX_BYTES = 1 << 16


def payload_of(number: int, size: int) -> bytes:
    return bytes((number * 31 + 7 * i) % 251 for i in range(size))


def append(store: SegmentStore, kind: int, meta: bytes, payload: list[bytes]) -> int:
    number = store.next_id
    store.append(number, kind, meta, payload)
    return number


def read(store: SegmentStore, number: int, size: int) -> bytes | None:
    out = bytearray(size)
    return bytes(out) if store.read(number, memoryview(out)) else None


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SUFFIX}"))


class StoreMachine(RuleBasedStateMachine):
    """Appends, drops, restarts; and files cut or changed at any byte between two lives."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.model = ReferenceStore()
        self.damaged: set[int] = set()
        self.store = SegmentStore.open(self.folder, OURS, MAX_BYTES)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(size=st.integers(0, 2000), meta=st.binary(max_size=90), kind=st.integers(0, 3))
    def append(self, size: int, meta: bytes, kind: int) -> None:
        payload = payload_of(size + kind, size)
        need = record_bytes(len(meta), size)
        fits = self.store.live_bytes + need <= self.store.usable_bytes
        try:
            number = append(self.store, kind, meta, [payload[: size // 2], payload[size // 2 :]])
        except StoreFull:
            assert not fits, "refused, though there was room"
            return
        self.model.append(number, kind, meta, payload)
        self.damaged.discard(number)

    @rule(count=st.integers(1, 12))
    def append_many(self, count: int) -> None:
        for size in range(count):
            self.append(1900 - size, b"m", 1)

    @precondition(lambda self: self.model.living)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.model.living)))
        self.store.drop(number)
        self.model.drop(number)

    @precondition(lambda self: self.model.living)
    @rule(data=st.data())
    def read_one(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.model.living)))
        payload = self.model.written[number][2]
        found = read(self.store, number, len(payload))
        assert found == payload, "wrong bits" if found is not None else "a whole payload refused"

    @rule()
    def restart(self) -> None:
        self._restart()

    @rule(data=st.data())
    def cut_the_newest_at_any_byte_and_restart(self, data: st.DataObject) -> None:
        newest = segments(self.folder)[-1:]
        if newest:
            size = newest[0].stat().st_size
            at = data.draw(st.integers(max(0, size - 3000), size))
            self.damaged |= self._touched(newest[0], at, size)
            with open(newest[0], "r+b") as file:
                file.truncate(at)
        self._restart()

    @rule(data=st.data(), change=st.integers(1, 255))
    def change_any_byte_and_restart(self, data: st.DataObject, change: int) -> None:
        files = [path for path in segments(self.folder) if path.stat().st_size]
        if not files:
            return
        path = data.draw(st.sampled_from(files))
        raw = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] ^= change
        path.write_bytes(raw)
        self.damaged |= self._touched(path, at, len(raw))
        self._restart()

    def _touched(self, path: Path, first: int, end: int) -> set[int]:
        """Records of ``path`` with a byte in that range, or behind its first byte: nothing is
        looked for behind a head that is wrong."""
        return {
            number
            for number, (segment, place) in self.store._places.items()
            if segment.path == path and ((place.end > first and place.first < end) or first < 64)
        }

    def _restart(self) -> None:
        whole = self.model.living - self.damaged  # where dropped ones lie, nobody knows
        self.store.close()
        self.store = SegmentStore.open(self.folder, OURS, MAX_BYTES)
        found = {record.id: record for record in self.store.records()}
        self.model.restart(set(found), whole)
        for number, record in found.items():
            kind, meta, payload = self.model.written[number]
            assert (record.kind, record.meta) == (kind, meta)
            again = read(self.store, number, len(payload))
            assert again in (payload, None), "wrong bits"
            if again is None:
                assert number not in whole, "a whole payload was refused"
                self.model.drop(number)

    @invariant()
    def is_bounded(self) -> None:
        on_disk = sum(path.stat().st_size for path in segments(self.folder))
        assert on_disk == self.store.num_bytes <= MAX_BYTES
        assert {record.id for record in self.store.records()} == self.model.living


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestStore = StoreMachine.TestCase


def filled(folder: Path) -> tuple[SegmentStore, list[int]]:
    store = SegmentStore.open(folder, OURS, MAX_BYTES)
    return store, [append(store, 1, b"meta", [payload_of(i, 1000)]) for i in range(6)]


def test_every_byte_where_the_newest_segment_may_end(tmp_path):
    """All of them, not some: what is found is what was whole."""
    store = SegmentStore.open(tmp_path / "whole", OURS, MAX_BYTES)
    ends = {}
    for i in range(3):
        number = append(store, i, b"m" * i, [payload_of(i, 70 * i)])
        ends[number] = store.num_bytes
    store.close()
    (path,) = segments(tmp_path / "whole")
    raw = path.read_bytes()
    for size in range(len(raw) + 1):
        folder = tmp_path / "cut"
        folder.mkdir()
        (folder / path.name).write_bytes(raw[:size])
        cut = SegmentStore.open(folder, OURS, MAX_BYTES)
        assert [one.id for one in cut.records()] == [n for n, end in ends.items() if end <= size]
        for number in ends:
            if number in cut:
                assert read(cut, number, 70 * (number - 1)) == payload_of(
                    number - 1, 70 * (number - 1)
                )
        cut.close()
        shutil.rmtree(folder)


def test_another_owners_folder_is_refused_and_left_untouched(tmp_path):
    store, _ = filled(tmp_path)
    store.close()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (torn := tmp_path / f"{99:016x}{SUFFIX}").write_bytes(b"HCST")
    with pytest.raises(StoreError, match="written by another model or setting"):
        SegmentStore.open(tmp_path, THEIRS, MAX_BYTES)
    assert torn.exists() and before == {path: path.read_bytes() for path in before}


def test_a_second_process_reads_and_does_not_write(tmp_path):
    store, numbers = filled(tmp_path)
    other = SegmentStore.open(tmp_path, OURS, MAX_BYTES)
    assert other.is_read_only and not store.is_read_only
    for number in numbers:
        store.drop(number)
    append(store, 1, b"", [bytes(8000)])
    assert read(other, numbers[0], 1000) == payload_of(0, 1000), "deleted files stay readable"
    with pytest.raises(AssertionError, match="another process"):
        other.append(other.next_id, 1, b"", [])
    other.close()
    store.close()
    assert not SegmentStore.open(tmp_path, OURS, MAX_BYTES).is_read_only


@pytest.mark.parametrize("why", [errno.EACCES, errno.EROFS])
def test_a_folder_that_takes_nothing_is_read(tmp_path, monkeypatch, why):
    store = SegmentStore.open(tmp_path, OURS, MAX_BYTES)
    number = append(store, 1, b"", [b"kept"])
    store.close()
    (tmp_path / LOCK_NAME).unlink()
    opened = os.open

    def refuse(path, flags, *args, **options):
        if flags & (os.O_CREAT | os.O_RDWR):
            raise OSError(why, os.strerror(why))
        return opened(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", refuse)
    store = SegmentStore.open(tmp_path, OURS, MAX_BYTES)
    assert store.is_read_only and read(store, number, 4) == b"kept"
    store.close()


def test_what_can_not_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="can not be used as a store"):
        SegmentStore.open(tmp_path / "file", OURS, MAX_BYTES)


def test_a_payload_that_changed_is_dropped_when_it_is_read(tmp_path):
    store, numbers = filled(tmp_path)
    segment, place = store._places[numbers[2]]
    with open(segment.path, "r+b") as file:
        file.seek(place.payload_first + 500)
        file.write(b"?")
    assert read(store, numbers[2], 1000) is None and numbers[2] not in store
    assert read(store, numbers[3], 1000) == payload_of(3, 1000)


def test_a_record_larger_than_a_segment_has_one_of_its_own(tmp_path):
    store = SegmentStore.open(tmp_path, OURS, MAX_BYTES)
    small, large = append(store, 0, b"", [b"x"]), append(store, 0, b"", [payload_of(1, 9000)])
    assert len(segments(tmp_path)) == 2 and read(store, large, 9000) == payload_of(1, 9000)
    store.drop(small)
    with pytest.raises(StoreFull, match="no room for"):
        append(store, 0, b"", [bytes(MAX_BYTES)])
    with pytest.raises(ValueError, match="has 9000 bytes, not 1"):
        read(store, large, 1)


def test_a_disk_that_takes_no_more_loses_nothing(tmp_path, monkeypatch):
    store, numbers = filled(tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("engine.store.segment.os.pwritev", full)
        with pytest.raises(StoreFull, match="takes no more: No space left"):
            append(store, 1, b"", [bytes(10)])
    assert store.live_bytes == 6 * record_bytes(4, 1000)
    assert append(store, 1, b"", [b"y"]) == numbers[-1] + 1
    assert read(store, numbers[-1], 1000) == payload_of(5, 1000)


@pytest.mark.parametrize("most", [1, 63, 64, 1000])
def test_a_system_that_takes_a_part_of_a_record_at_a_time_is_asked_again(
    tmp_path, monkeypatch, most
):
    real = os.pwritev

    def short(file: int, parts: list[memoryview], first: int) -> int:
        return real(file, [b"".join(parts)[:most]], first)

    monkeypatch.setattr("engine.store.segment.os.pwritev", short)
    store, numbers = filled(tmp_path)
    assert [read(store, n, 1000) for n in numbers] == [payload_of(i, 1000) for i in range(6)]
    with_nothing = append(store, 1, b"", [b"", b""])
    assert read(store, with_nothing, 0) == b""


@pytest.mark.parametrize("max_record", [700, 3000, 20_000])
def test_never_more_bytes_than_given_and_never_full_whatever_the_records_are(
    tmp_path, monkeypatch, max_record
):
    """Also while a segment is copied, and with segments of one small record, all of it alive."""
    largest, choose, write = record_bytes(4, max_record), random.Random(max_record), segment._write
    store = SegmentStore.open(tmp_path, OURS, MAX_BYTES * 4, largest)
    living, most = [], 0

    def counted(file: int, parts: object, first: int) -> None:
        nonlocal most
        write(file, parts, first)
        most = max(most, sum(os.fstat(one.file).st_size for one in store._segments.values()))

    monkeypatch.setattr(segment, "_write", counted)
    for _ in range(600):
        size = choose.randrange(1, max_record + 1)
        while store.live_bytes + record_bytes(4, size) > store.usable_bytes:
            store.drop(living.pop(choose.randrange(len(living)) if choose.random() < 0.5 else 0))
        living.append(append(store, 1, b"meta", [bytes(size)]))
    assert MAX_BYTES * 2 < most <= MAX_BYTES * 4
    store.close()


def test_a_record_whose_end_was_never_written_is_none(tmp_path):
    """A machine that lost its power may leave the length of a file and not what it held."""
    store, numbers = filled(tmp_path)
    last, place = store._places[numbers[-1]]
    store.close()
    with open(last.path, "r+b") as file:
        file.seek(place.tail_first)
        file.write(bytes(64))
    again = SegmentStore.open(tmp_path, OURS, MAX_BYTES)
    assert [record.id for record in again.records()] == numbers[:-1]
    assert again.next_id == numbers[-1], "its place is written again"
    again.close()
