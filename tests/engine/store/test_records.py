"""Tests of the record store: complete records are found, and damaged ones are not read."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.plugins.tiers import records
from engine.plugins.tiers.fingerprint import NAME, StoreError
from engine.plugins.tiers.records import LOCK_NAME, RecordStore, StoreFull, record_bytes
from tests.engine.store.reference import ReferenceStore

OURS, THEIRS = {"weights": "ours"}, {"weights": "theirs"}
MAX_BYTES = 1 << 16


def payload_of(number: int, size: int) -> bytes:
    return bytes((number * 31 + 7 * i) % 251 for i in range(size))


def write(store: RecordStore, payload: bytes, meta: bytes = b"meta") -> int:
    record_id = store.next_id
    store.write(record_id, 1, meta, payload)
    return record_id


def read(store: RecordStore, record_id: int, size: int) -> bytes | None:
    out = bytearray(size)
    return bytes(out) if store.read(record_id, memoryview(out)) else None


def reopen(folder: Path, fields: dict[str, str] = OURS) -> tuple[RecordStore, list[int]]:
    store = RecordStore.open(folder, fields, MAX_BYTES)
    return store, [record.id for record in store.scan()]


def filled(folder: Path, count: int = 6) -> tuple[RecordStore, list[int]]:
    store, found = reopen(folder)
    assert not found
    return store, [write(store, payload_of(i, 1000)) for i in range(count)]


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.record"))


class StoreMachine(RuleBasedStateMachine):
    """State machine of writes, removals and restarts, with files cut or changed between two
    runs."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.model = ReferenceStore()
        self.damaged: set[int] = set()
        self.store, _ = reopen(self.folder)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(size=st.integers(0, 9000), meta=st.binary(max_size=90), kind=st.integers(0, 3))
    def write(self, size: int, meta: bytes, kind: int) -> None:
        payload, record_id = payload_of(size + kind, size), self.store.next_id
        fits = self.store.num_bytes + record_bytes(len(meta), size) <= MAX_BYTES
        try:
            self.store.write(record_id, kind, meta, payload)
        except StoreFull:
            assert not fits, "refused, though there was room"
            return
        assert fits
        self.model.write(record_id, kind, meta, payload)

    @precondition(lambda self: self.model.living)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        record_id = data.draw(st.sampled_from(sorted(self.model.living)))
        self.store.remove(record_id)
        self.model.remove(record_id)

    @precondition(lambda self: self.model.living)
    @rule(data=st.data())
    def read_one(self, data: st.DataObject) -> None:
        record_id = data.draw(st.sampled_from(sorted(self.model.living)))
        payload = self.model.written[record_id][2]
        found = read(self.store, record_id, len(payload))
        assert found == payload, (
            "wrong bits" if found is not None else "an intact payload was refused"
        )

    @rule(data=st.data())
    def add_an_unfinished_file(self, data: st.DataObject) -> None:
        name = f"{self.store.next_id:016x}.part"
        (self.folder / name).write_bytes(data.draw(st.binary(max_size=99)))
        self.restart()
        assert not list(self.folder.glob("*.part"))

    @precondition(lambda self: self.model.living)
    @rule(data=st.data())
    def cut_a_file(self, data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(files(self.folder)))
        raw = path.read_bytes()
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
        self.damaged.add(int(path.stem, 16))
        self.restart()

    @precondition(lambda self: self.model.living)
    @rule(data=st.data(), change=st.integers(1, 255))
    def change_a_byte(self, data: st.DataObject, change: int) -> None:
        path = data.draw(st.sampled_from(files(self.folder)))
        raw = bytearray(path.read_bytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= change
        path.write_bytes(raw)
        self.damaged.add(int(path.stem, 16))
        self.restart()

    @precondition(lambda self: len(self.model.living) > 1)
    @rule(data=st.data())
    def replace_a_file_by_another(self, data: st.DataObject) -> None:
        pair = st.lists(st.sampled_from(files(self.folder)), min_size=2, max_size=2, unique=True)
        source, target = data.draw(pair)
        shutil.copy(source, target)
        self.damaged.add(int(target.stem, 16))
        self.restart()

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = RecordStore.open(self.folder, OURS, MAX_BYTES)
        found = {record.id: record for record in self.store.scan()}
        self.model.restart(set(found), self.damaged)
        for record_id, record in found.items():
            kind, meta, payload = self.model.written[record_id]
            assert (record.kind, record.meta) == (kind, meta)
            assert record.payload_bytes == len(payload)
            again = read(self.store, record_id, len(payload))
            assert again in (payload, None), "wrong bits"
            if again is None:
                assert record_id in self.damaged, "an intact payload was refused"
                self.store.remove(record_id)
                self.model.remove(record_id)
        self.damaged.clear()

    @invariant()
    def counts_match_the_disk(self) -> None:
        found = files(self.folder)
        assert {int(path.stem, 16) for path in found} == self.model.living
        assert sum(path.stat().st_size for path in found) <= self.store.num_bytes <= MAX_BYTES
        assert len(self.store) == len(found)


StoreMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
TestStore = StoreMachine.TestCase


def test_truncated_files_are_not_records(tmp_path: Path) -> None:
    store, (record_id,) = filled(tmp_path, 1)
    store.close()
    (path,) = files(tmp_path)
    raw = path.read_bytes()
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        store, found = reopen(tmp_path)
        assert found == [] and store.num_bytes == 0 and not files(tmp_path)
        store.close()
    path.write_bytes(raw)
    store, found = reopen(tmp_path)
    assert found == [record_id] and read(store, record_id, 1000) == payload_of(0, 1000)
    store.close()


def test_ids_are_never_reused(tmp_path: Path) -> None:
    """Guard against a file restored by an unfinished unlink, which must not become another record's
    parent."""
    store, ids = filled(tmp_path)
    restored = files(tmp_path)[-1].read_bytes()
    for record_id in ids:
        store.remove(record_id)
    store.close()
    store, found = reopen(tmp_path)
    assert not found
    later = write(store, b"later")
    store.close()
    (tmp_path / f"{ids[-1]:016x}.record").write_bytes(restored)
    store, found = reopen(tmp_path)
    assert found == [ids[-1], later] and store.next_id > later
    assert read(store, ids[-1], 1000) == payload_of(5, 1000)
    store.close()


def test_a_folder_with_another_fingerprint_is_refused_and_unchanged(tmp_path: Path) -> None:
    store, _ = filled(tmp_path)
    store.close()
    (tmp_path / f"{9:016x}.part").write_bytes(b"unfinished")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(StoreError, match="differs in weights"):
        reopen(tmp_path, THEIRS)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["whose.json", "0000000000000001.segment"])
def test_a_store_of_an_earlier_version_is_refused_and_unchanged(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"earlier")
    with pytest.raises(StoreError, match=r"of an earlier version, .* delete it, or use another"):
        reopen(tmp_path)
    assert (tmp_path / name).read_bytes() == b"earlier" and not files(tmp_path)


@pytest.mark.parametrize("damage", ["every byte", "cut", "removed"])
def test_a_damaged_fingerprint_is_rebuilt_from_own_records(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, ids = filled(tmp_path)
    store.close()
    path = tmp_path / NAME
    raw = path.read_bytes()
    if damage == "every byte":
        variants = [raw[:i] + bytes([raw[i] ^ 1]) + raw[i + 1 :] for i in range(0, len(raw), 7)]
    else:
        variants = [raw[:9], b""] if damage == "cut" else [None]
    for variant in variants:
        path.unlink()
        if variant is not None:
            path.write_bytes(variant)
        with pytest.raises(StoreError, match="missing or damaged, and records of another model"):
            reopen(tmp_path, THEIRS)
        store, found = reopen(tmp_path)
        assert found == ids and read(store, ids[0], 1000) == payload_of(0, 1000)
        store.close()
        assert path.read_bytes() == raw
    assert any("is rebuilt" in record.message for record in caplog.records)


def test_without_records_a_damaged_fingerprint_is_written_again(tmp_path: Path) -> None:
    reopen(tmp_path)[0].close()
    (tmp_path / NAME).write_bytes(b"{")
    reopen(tmp_path, THEIRS)[0].close()
    with pytest.raises(StoreError, match="differs in weights"):
        reopen(tmp_path)


def test_a_second_store_reads_while_the_first_writes(tmp_path: Path) -> None:
    store, ids = filled(tmp_path)
    reader, found = reopen(tmp_path)
    assert reader.is_read_only and not store.is_read_only and found == ids
    store.remove(ids[0])
    later = write(store, b"later")
    with pytest.raises(FileNotFoundError):
        read(reader, ids[0], 1000)
    assert read(reader, ids[1], 1000) == payload_of(1, 1000) and later not in reader
    with pytest.raises(AssertionError, match="may not write"):
        reader.write(reader.next_id, 1, b"", b"")
    removed = sum(path.stat().st_size for path in files(tmp_path))
    assert removed <= store.num_bytes, "removed records are still on the disk"
    reader.close()
    store.close()
    store, found = reopen(tmp_path)
    assert not store.is_read_only and found == [*ids[1:], later]
    store.close()


def test_a_reader_finds_only_intact_records_during_writes(tmp_path: Path) -> None:
    """Check a reader while files of another process appear and vanish."""
    child = (
        "from pathlib import Path; import sys, random;"
        "from engine.plugins.tiers.records import RecordStore;"
        f"s = RecordStore.open(Path({str(tmp_path)!r}), {OURS!r}, 1 << 22); ids = list(s.scan());"
        "print('open', flush=True)\n"
        "while True:\n"
        "    n = s.next_id; ids.append(n)\n"
        "    s.write(n, 1, str(n).encode(), bytes([n % 251]) * 3000)\n"
        "    if len(ids) > 40: s.remove(ids.pop(random.randrange(len(ids))))\n"
    )
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen(
        [sys.executable, "-c", child], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        num_read = num_there = 0
        while num_read < 300 or num_there < 40:  # Reading may be faster than writing.
            reader = RecordStore.open(tmp_path, OURS, 1 << 22)
            assert reader.is_read_only
            num_there = len(list(tmp_path.glob("*.record")))
            for record in reader.scan():
                assert record.meta == str(record.id).encode()
                try:
                    found = read(reader, record.id, record.payload_bytes)
                except FileNotFoundError:
                    continue
                assert found == bytes([record.id % 251]) * 3000
                num_read += 1
            reader.close()
        process.kill()
    store = RecordStore.open(tmp_path, OURS, 1 << 22)
    assert len(list(store.scan())) in (40, 41) and not list(tmp_path.glob("*.part"))
    store.close()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_read_only_folder_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store, ids = filled(tmp_path)
    store.close()
    opened = os.open

    def refuse(path: object, flags: int, *args: object, **options: object) -> int:
        if flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY):
            raise OSError(number, os.strerror(number))
        return opened(path, flags, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    store, found = reopen(tmp_path)
    assert store.is_read_only and found == ids
    assert read(store, ids[0], 1000) == payload_of(0, 1000)
    store.close()


def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="is a file: use a folder"):
        reopen(tmp_path / "file")
    with pytest.raises(StoreError, match=r"cannot be made or opened \(Not a directory\)"):
        reopen(tmp_path / "file" / "folder")


def test_a_changed_payload_is_detected_by_read(tmp_path: Path) -> None:
    store, ids = filled(tmp_path)
    path = files(tmp_path)[2]
    raw = bytearray(path.read_bytes())
    raw[-500] ^= 1
    path.write_bytes(raw)
    assert read(store, ids[2], 1000) is None
    assert read(store, ids[3], 1000) == payload_of(3, 1000)
    assert read(store, ids[3], 999) is None, "the buffer has another length"
    store.close()


def fail_calls(monkeypatch: pytest.MonkeyPatch, name: str, number: int, times: int = 10**9) -> None:
    """Make ``os.<name>`` fail the next ``times`` times."""
    real, remaining = getattr(os, name), [times]

    def refuse(*args: object, **options: object) -> object:
        if remaining[0]:
            remaining[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(*args, **options)

    monkeypatch.setattr(os, name, refuse)


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("open", errno.EMFILE),
        ("open", errno.ENOSPC),
        ("open", errno.EACCES),
        ("writev", errno.ENOSPC),
        ("writev", errno.EIO),
        ("rename", errno.EIO),
        ("rename", errno.ENOSPC),
    ],
)
def test_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    store, ids = filled(tmp_path)
    before = store.num_bytes
    with monkeypatch.context() as patch:
        fail_calls(patch, call, number)
        with pytest.raises(OSError, match=os.strerror(number)):
            write(store, bytes(10))
    assert store.num_bytes == before and not list(tmp_path.glob("*.part"))
    ids.append(write(store, payload_of(6, 1000)))
    assert [read(store, one, 1000) for one in ids] == [payload_of(i, 1000) for i in range(7)]
    store.close()
    assert reopen(tmp_path)[1] == ids


def test_a_file_that_cannot_be_removed_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ids = filled(tmp_path)
    before = store.num_bytes
    with monkeypatch.context() as patch:
        fail_calls(patch, "unlink", errno.EIO)
        with pytest.raises(OSError, match="Input/output"):
            store.remove(ids[0])
    assert ids[0] in store and store.num_bytes == before
    store.remove(ids[0])
    assert store.num_bytes < before and len(files(tmp_path)) == 5
    store.close()


def test_leftovers_that_stay_are_counted_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, ids = filled(tmp_path)
    store.close()
    files(tmp_path)[0].write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        fail_calls(patch, "unlink", errno.EIO)
        store, found = reopen(tmp_path)
    assert found == ids[1:] and store.other_bytes > 0
    assert "cannot be removed: Input/output error" in caplog.text
    store.close()
    store = RecordStore.open(tmp_path, OURS, MAX_BYTES)
    with monkeypatch.context() as patch:
        fail_calls(patch, "pread", errno.EIO, times=1)
        assert [record.id for record in store.scan()] == ids[1:]
    assert "cannot be read: Input/output error" in caplog.text
    assert store.other_bytes > 0 and len(files(tmp_path)) == 6, (
        "files that may be readable later are kept"
    )
    store.close()


def test_records_hold_no_descriptors(tmp_path: Path) -> None:
    """Open, read and write a store of many records with few free descriptors."""
    store, ids = filled(tmp_path, 6)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, held + 8), hard))
    try:
        for number in range(200):
            write(store, payload_of(number, 10))
            store.remove(store.next_id - 1)
        assert all(read(store, one, 1000) for one in ids * 30)
        store.close()
        for _ in range(20):
            store, found = reopen(tmp_path)
            store.close()
        assert found == ids
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_deleted_folder_is_not_written_again(tmp_path: Path) -> None:
    """Guard against a new folder of another engine under the same name."""
    folder = tmp_path / "state"
    store, ids = filled(folder)
    shutil.rmtree(folder)
    successor, found = reopen(folder, THEIRS)
    assert not found and not successor.is_read_only
    with pytest.raises(FileNotFoundError):
        write(store, b"late")
    with pytest.raises(FileNotFoundError):
        read(store, ids[0], 1000)
    store.remove(ids[0])
    assert not files(folder)
    store.close()
    successor.close()


def test_two_starts_at_once_agree_on_one_fingerprint(tmp_path: Path) -> None:
    """Check that the fingerprint is compared under the lock, so the second start cannot replace the
    first's."""
    first, _ = reopen(tmp_path)
    (tmp_path / NAME).unlink()  # As before the first engine has written it.
    second = RecordStore.open(tmp_path, THEIRS, MAX_BYTES)
    assert second.is_read_only and not (tmp_path / NAME).exists()
    second.close()
    first.close()


@pytest.mark.parametrize("most", [1, 63, 64, 1000])
def test_records_may_be_written_in_several_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    real = os.writev

    def short(file: int, parts: list[memoryview]) -> int:
        return real(file, [b"".join(parts)[:most]])

    monkeypatch.setattr(os, "writev", short)
    store, ids = filled(tmp_path, 3)
    assert [read(store, one, 1000) for one in ids] == [payload_of(i, 1000) for i in range(3)]
    assert read(store, write(store, b"", b""), 0) == b""
    store.close()


def test_a_long_meta_is_read_whole(tmp_path: Path) -> None:
    store, _ = reopen(tmp_path)
    meta = payload_of(1, 3 * records.FIRST_READ_BYTES)
    store.write(store.next_id, 2, meta, b"x")
    store.close()
    store = RecordStore.open(tmp_path, OURS, MAX_BYTES)
    [record] = store.scan()
    assert record.meta == meta and (record.kind, record.payload_bytes) == (2, 1)
    store.close()


def test_a_file_system_without_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(records.fcntl, "flock", no_locks)
    with pytest.raises(StoreError, match=r"cannot be made or opened \(No locks available\)"):
        reopen(tmp_path)
    assert (tmp_path / LOCK_NAME).exists()


def test_sync_raises_errors_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = filled(tmp_path)
    store.sync()
    with pytest.raises(OSError, match="Bad file descriptor"):
        records.sync_file_system(10**6)
    store.close()
