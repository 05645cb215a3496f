"""Tests of the disk tier: records are found by their tokens, also after a restart, and file system
errors lose only their own records."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import wait
from pathlib import Path

import numpy as np
import pytest

from engine.plugins.tiers import disk as disk_module
from engine.plugins.tiers.disk import Disk, FutureRows, Rows
from engine.plugins.tiers.prefixes import Prefixes, RecordPart, covering
from engine.plugins.tiers.records import HEAD_BYTES, RecordStore, record_bytes
from hybridcache.allocators.moves import Indices
from hybridcache.radix.tokens import Tokens, common_prefix_len

ROW_BYTES, STATE_ROWS, NUM_ROWS = 16, 5, 400
FIELDS = {"weights": "ours"}

Path_ = tuple[Hashable, Tokens]


def open_disk(folder: Path, max_bytes: int = 1 << 22) -> Disk:
    store = RecordStore(folder).open(FIELDS)
    sizes = {"row_bytes": ROW_BYTES, "state_rows": STATE_ROWS, "num_rows": NUM_ROWS}
    return Disk(store, max_bytes=max_bytes, **sizes)


def rows_of(path: Path_, kind: str = "kv") -> Rows:
    """Return the bytes that stand for ``path``: one row per token, or the state at its end."""
    namespace, tokens = path
    marks, mark = [], hash(("n", namespace)) & 0xFFFFFF
    for token in tokens.tolist():
        mark = (mark * 1000003 + token + 1) & 0xFFFFFFFFFFFF
        marks.append([mark, 1])
    if kind == "checkpoint":
        marks = [[marks[-1][0], 2 + piece] for piece in range(STATE_ROWS)]
    return np.array(marks, np.int64).view(np.uint8).reshape(-1, ROW_BYTES)


def reader(path: Path_, num_rows: int, kind: str = "kv") -> Callable[[int, int], FutureRows]:
    data = rows_of(path, kind)[-num_rows:]
    return lambda first, end: lambda: data[first:end].copy()


def loaded(disk: Disk, rows: Indices) -> Rows | None:
    """Return the bytes of ``rows``, joined."""
    pieces = disk.load(rows)
    if pieces is None:
        return None
    assert [first for first, _ in pieces] == sorted({first for first, _ in pieces})
    return np.concatenate([data for _, data in pieces])


def prompt(first: int, length: int = 30) -> Path_:
    """Return a prompt that shares nothing with those of another ``first``."""
    return None, np.arange(first * 1000, first * 1000 + length, dtype=np.int32)


def write(disk: Disk, *paths: Path_) -> None:
    for path in paths:
        disk.write_through("kv", path, len(path[1]), reader(path, len(path[1])))


def settled(disk: Disk) -> Disk:
    """Finish all queued work, compare all counts, and return ``disk``."""
    disk.flush()
    disk.check()
    sizes = [file.stat().st_size for file in disk._store.folder.glob("*.record")]
    assert disk.num_bytes == sum(record_bytes(0, size - HEAD_BYTES) for size in sizes)
    return disk


def readable(disk: Disk, *paths: Path_) -> list[bool]:
    """Return whether each whole path is on disk, with the right bytes."""
    found = []
    for path in paths:
        pieces = disk.prefixes.find(*path)
        rows = np.arange(sum(piece.num_rows for piece in pieces), dtype=np.int32)
        disk.prefixes.bind(rows, pieces)
        data = loaded(disk, rows) if len(rows) else None
        assert data is None or np.array_equal(data, rows_of(path)[: len(rows)])
        found.append(data is not None and len(rows) == len(path[1]))
    return found


@pytest.mark.full("0")
@pytest.mark.parametrize("seed", range(3))
def test_loaded_rows_equal_the_offloaded_ones(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Write, offload, load and drop random paths, over several restarts and in small records."""
    monkeypatch.setattr(disk_module, "MAX_RECORD_BYTES", 7 * ROW_BYTES)
    choose = np.random.default_rng(seed)
    disk, free = open_disk(tmp_path), list(range(NUM_ROWS))
    stored: list[tuple[Indices, Rows]] = []
    for step in range(250):
        tokens = choose.integers(0, 2, choose.integers(1, 40)).astype(np.int32)
        path = (None, "tenant", ("salt", 1))[choose.integers(3)], tokens
        stored_paths = map(disk.prefixes.path, disk.prefixes.items)
        known_lens = [
            common_prefix_len(one, tokens) for space, one in stored_paths if space == path[0]
        ]
        for end in (len(tokens) // 2, len(tokens)):  # As chunks of one prompt.
            num_known = sum(piece.num_rows for piece in disk.prefixes.find(path[0], tokens[:end]))
            assert num_known == min(end, max(known_lens, default=0))
        missing = len(path[1]) - num_known
        action = choose.integers(6)
        if action == 0 or not stored:
            num_rows = missing + int(choose.integers(0, num_known + 1))
            disk.write_through("kv", path, num_rows, reader(path, num_rows))
            read = reader(path, STATE_ROWS, "checkpoint")
            disk.write_through("checkpoint", path, STATE_ROWS, read)
        if action in (1, 2) and len(free) > 60:
            kind = "kv" if action == 1 or missing else "checkpoint"
            num_rows = max(missing, 1) if kind == "kv" else STATE_ROWS
            rows = np.array([free.pop() for _ in range(num_rows)], np.int32)
            disk.offload(kind, path, rows, reader(path, num_rows, kind))  # type: ignore[arg-type]
            stored.append((rows, rows_of(path, kind)[-num_rows:]))
        if action in (3, 4) and stored:
            rows, data = stored.pop(int(choose.integers(len(stored))))
            if action == 3:
                reads = disk.stage(rows)
                wait(reads, 120)
                assert np.array_equal(loaded(disk, rows), data)
            else:
                disk.prefixes.unbind(rows)
            free += rows.tolist()
        if step % 50 == 49:
            before = dict(settled(disk).prefixes.items)
            disk.close()
            disk = open_disk(tmp_path)
            assert set(before) <= set(disk.prefixes.items), "a written record was not found"
            for number in list(disk.prefixes.items):
                path = disk.prefixes.path(number)
                kind = "checkpoint" if disk.prefixes.items[number].is_state else "kv"
                pieces = disk.write_through(
                    kind, path, 1, lambda *_: pytest.fail("it was on disk already")
                )
                rows = np.arange(sum(piece.num_rows for piece in pieces), dtype=np.int32)
                disk.prefixes.bind(rows, pieces)
                assert np.array_equal(loaded(disk, rows), rows_of(path, kind)[-len(rows) :])
            stored, free = [], list(range(NUM_ROWS))
    disk.close()


def test_states_are_adopted_if_they_fit_with_their_tokens(tmp_path: Path) -> None:
    disk, need = open_disk(tmp_path), 30 + STATE_ROWS
    for path in (prompt(1), prompt(2)):
        write(disk, path)
        read = reader(path, STATE_ROWS, "checkpoint")
        disk.write_through("checkpoint", path, STATE_ROWS, read)
    states, room = settled(disk).prefixes, (need - 1, need, 2 * need - 1, 2 * need)
    assert [len(states.newest_states(rows, STATE_ROWS)) for rows in room] == [0, 1, 1, 2]
    disk.close()


def test_a_damaged_record_is_removed_with_its_descendants(tmp_path: Path) -> None:
    disk = open_disk(tmp_path)
    path = (None, np.arange(30, dtype=np.int32))
    first, other = (None, path[1][:20]), prompt(7)
    write(disk, first, other)
    rows = np.arange(10, dtype=np.int32)
    disk.offload("kv", path, rows, reader(path, 10))
    disk.flush()
    for file in tmp_path.glob("*.record"):
        raw = bytearray(file.read_bytes())
        place = raw.find(rows_of(first)[7].tobytes())
        if place >= 0:
            raw[place] ^= 1
            file.write_bytes(raw)
    upper = np.arange(50, 70, dtype=np.int32)
    disk.prefixes.bind(upper, covering(disk.prefixes.find(*first), 0, 20))
    assert loaded(disk, upper) is None
    disk.settle()
    assert loaded(disk, rows) is None
    assert readable(settled(disk), first, path, other) == [False, False, True]
    assert len(list(tmp_path.glob("*.record"))) == disk.num_errors == 1
    disk.close()
    [file] = tmp_path.glob("*.record")
    file.write_bytes(file.read_bytes()[:-1])
    disk = open_disk(tmp_path)
    assert not disk.prefixes.items and disk.num_errors == 1, "damage found at the start counts too"
    disk.close()


class FailingSystem:
    """Faults of one system call in the disk's thread while ``number`` is set; 0: no memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        self.number: int | None = None
        self.count = 0
        real = getattr(os, call)

        def attempt(*args: object, **options: object) -> object:
            if self.number is None or threading.current_thread().name != "disk":
                return real(*args, **options)
            self.count += 1
            raise (OSError if self.number else MemoryError)(self.number, os.strerror(self.number))

        monkeypatch.setattr(os, call, attempt)


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ("rename", errno.ENOSPC),
        ("rename", errno.EIO),
        ("open", errno.EMFILE),
        ("open", 0),
        ("unlink", errno.EROFS),
    ],
)
def test_after_an_error_of_the_file_system_the_disk_is_off_until_the_next_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: str,
    number: int,
) -> None:
    disk = open_disk(tmp_path, max_bytes=20_000)  # four records
    before, failed, skipped = prompt(0), prompt(1, 30), prompt(2)
    write(disk, prompt(3), prompt(4), prompt(5), before)
    disk.flush()
    system = FailingSystem(monkeypatch, call)
    system.number = number
    rows = np.arange(30, dtype=np.int32)
    disk.offload("kv", failed, rows, reader(failed, 30))
    disk.flush()
    disk.check()
    assert disk.has_lost_rows and disk.is_lost(rows) and loaded(disk, rows) is None
    assert disk.is_off and disk.num_errors == 1 and os.strerror(number) in disk.problem
    system.number = None
    write(disk, skipped)
    disk.write_file("memory", lambda: pytest.fail("the disk is off"))
    disk.flush()
    assert disk.num_skipped == 1 and system.count <= 2, "the disk is not used any more"
    assert [line.count(os.strerror(number)) for line in caplog.messages] == [1]
    disk.close()
    disk = open_disk(tmp_path)
    assert readable(disk, before, skipped) == [True, False] and not list(tmp_path.glob("*.part"))
    disk.close()


@pytest.mark.parametrize(("has_states", "num_kept"), [(False, 2), (True, 3)])
def test_a_smaller_folder_removes_the_oldest_records_and_keeps_states_with_their_kv(
    has_states: bool, num_kept: int, tmp_path: Path
) -> None:
    disk = open_disk(tmp_path)
    paths = [prompt(number) for number in range(8)]
    write(disk, *paths)
    for path in paths if has_states else ():
        read = reader(path, STATE_ROWS, "checkpoint")
        disk.write_through("checkpoint", path, STATE_ROWS, read)
    write(disk, *(prompt(number, 60) for number in range(8) if has_states))
    limit = settled(disk).num_bytes // 4 + 1
    disk.close()
    disk = open_disk(tmp_path, max_bytes=limit)
    assert readable(settled(disk), *paths) == [False] * (8 - num_kept) + [True] * num_kept
    num_states = sum(item.is_state for item in disk.prefixes.items.values())
    assert num_states == num_kept * has_states
    disk.close()


def test_records_that_rows_point_to_stay_until_these_are_dropped(tmp_path: Path) -> None:
    disk, number = open_disk(tmp_path, max_bytes=20_000), 0
    while not disk.num_skipped:
        rows = np.arange(30, dtype=np.int32) + 30 * number
        disk.offload("kv", prompt(number), rows, reader(prompt(number), 30))
        number += 1
    write(disk, prompt(50), prompt(51))
    assert disk.num_skipped == 3
    disk.prefixes.unbind(np.arange(30, dtype=np.int32))
    write(disk, prompt(52))
    found = readable(settled(disk), prompt(0), prompt(50), prompt(52), prompt(number - 2))
    assert found == [False, False, True, True]
    disk.close()


def test_a_record_whose_continuation_had_no_room_is_removed_for_another_prompt(
    tmp_path: Path,
) -> None:
    disk = open_disk(tmp_path, max_bytes=20_000)  # four records
    for number in range(3):
        rows = np.arange(30, dtype=np.int32) + 30 * number
        disk.offload("kv", prompt(number), rows, reader(prompt(number), 30))
    write(disk, prompt(3), prompt(3, 60))
    assert disk.num_skipped == 1
    write(disk, prompt(4))
    found = readable(settled(disk), prompt(0), prompt(3), prompt(4))
    assert found == [True, False, True] and disk.num_skipped == 1
    disk.close()


def test_an_eviction_does_not_wait_for_a_slow_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write_record = threading.Event(), RecordStore.write

    def write_slowly(*arguments: object) -> None:
        assert may_write.wait(60)
        write_record(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(RecordStore, "write", write_slowly)
    monkeypatch.setattr(disk_module, "MAX_PENDING_BYTES", 600)
    disk, rows = open_disk(tmp_path), np.arange(30, dtype=np.int32)
    write(disk, prompt(0))
    disk.offload("kv", prompt(1), rows, reader(prompt(1), 30))
    assert disk.num_skipped == 1 and disk.is_lost(rows) and disk.problem is None
    may_write.set()
    settled(disk)
    disk.offload("kv", prompt(1), rows, reader(prompt(1), 30))
    assert readable(settled(disk), prompt(0), prompt(1)) == [True, True]
    disk.close()


class HungReads:
    """File system that does not answer reads until ``responds`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.responds = threading.Event()
        read = RecordStore.read

        def hang(store: RecordStore, record_id: int, out: memoryview) -> bool:
            assert self.responds.wait(120)
            return read(store, record_id, out)

        monkeypatch.setattr(RecordStore, "read", hang)
        monkeypatch.setattr(disk_module, "DEADLINE_S", 0.02)
        self._monkeypatch = monkeypatch

    def heal(self) -> None:
        self._monkeypatch.setattr(disk_module, "DEADLINE_S", 60)
        self.responds.set()


def test_reads_and_writes_do_not_wait_for_a_hung_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = open_disk(tmp_path)
    write(disk, prompt(0), prompt(1))
    settled(disk)
    system = HungReads(monkeypatch)
    monkeypatch.setattr(disk_module, "MAX_PENDING_BYTES", 600)
    rows = np.arange(30, dtype=np.int32)
    disk.prefixes.bind(rows, disk.prefixes.find(*prompt(0)))
    assert loaded(disk, rows) is None, "an unresponsive read is given up"
    assert disk.is_off and "has not responded" in disk.problem
    assert caplog.text.count("has not responded") == 1
    disk.prefixes.bind(rows, disk.prefixes.find(*prompt(1)))
    assert disk.is_lost(rows) and loaded(disk, rows) is None
    more = np.arange(30, 60, dtype=np.int32)
    disk.offload("kv", prompt(2), more, reader(prompt(2), 30))
    assert disk.num_skipped == 1 and not disk.flush(), "flush does not wait"
    system.heal()
    assert disk.flush() and disk.is_off and caplog.text.count("has not responded") == 1
    disk.close()
    disk = open_disk(tmp_path)
    assert readable(disk, prompt(0), prompt(1)) == [True, True]
    disk.close()


@pytest.mark.parametrize("call", ["bind", "parts", "unbind"])
def test_without_memory_rows_of_records_are_not_found_or_bound(call: str) -> None:
    """NumPy 2.4 ends the process if an int32 index has no memory for its buffer."""
    api = pytest.importorskip("_testcapi")
    rows, prefixes = np.arange(100, dtype=np.int32), Prefixes(200)
    arguments = (rows, [RecordPart(0, 0, 100)])[: 2 if call == "bind" else 1]
    for at in range(12):
        try:
            api.set_nomemory(at, at + 1)
            getattr(prefixes, call)(*arguments)
        except MemoryError:
            pass
        finally:
            api.remove_mem_hooks()
