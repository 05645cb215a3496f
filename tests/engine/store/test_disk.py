"""What is kept on disk is found by its tokens, in this life and the next, never another's."""

from __future__ import annotations

import numpy as np
import pytest

from engine.store.disk import Disk
from engine.store.prefixes import Prefixes, Run, State, covering
from engine.store.segment import SUFFIX
from engine.store.store import SegmentStore, StoreFull

ROW_BYTES, STATE_ROWS, NUM_ROWS = 16, 5, 400
WHOSE = b"d" * 32


def open_disk(folder, max_bytes=1 << 20):
    store = SegmentStore.open(folder, WHOSE, max_bytes)
    return Disk(store, row_bytes=ROW_BYTES, state_rows=STATE_ROWS, num_rows=NUM_ROWS)


def rows_of(path, kind="kv"):
    """The bytes that stand for ``path``: of each token, or of the state at its end."""
    namespace, tokens = path
    marks, mark = [], hash(("n", namespace)) & 0xFFFFFF
    for token in tokens.tolist():
        mark = (mark * 1000003 + token + 1) & 0xFFFFFFFFFFFF
        marks.append([mark, 1])
    if kind == "checkpoint":
        marks = [[marks[-1][0], 2 + piece] for piece in range(STATE_ROWS)]
    return np.array(marks, np.int64).view(np.uint8).reshape(-1, ROW_BYTES)


def reader(path, num_rows, kind="kv"):
    data = rows_of(path, kind)[-num_rows:]
    return lambda first, end: lambda: data[first:end].copy()


def taken(disk, rows):
    """The bytes of ``rows``, put together."""
    pieces = disk.take(rows)
    if pieces is None:
        return None
    assert [first for first, _ in pieces] == sorted({first for first, _ in pieces})
    return np.concatenate([data for _, data in pieces])


def random_path(choose):
    tokens = choose.integers(0, 2, choose.integers(1, 40)).astype(np.int32)
    return (None, "tenant", ("salt", 1))[choose.integers(3)], tokens


@pytest.mark.parametrize("seed", range(3))
def test_rows_are_what_was_put_whatever_was_kept_before(tmp_path, seed, monkeypatch):
    """Random paths, kept and put, taken and forgotten, over several lives and small records."""
    monkeypatch.setattr("engine.store.disk.MAX_RECORD_BYTES", 7 * ROW_BYTES)
    choose = np.random.default_rng(seed)
    disk, free, stored = open_disk(tmp_path), list(range(NUM_ROWS)), []
    for step in range(250):
        path = random_path(choose)
        known = sum(piece.num_tokens for piece in disk.prefixes.find(*path))
        missing = len(path[1]) - known
        action = choose.integers(6)
        if action == 0 or not stored:
            num_rows = missing + int(choose.integers(0, known + 1))
            disk.keep("kv", path, num_rows, reader(path, num_rows))
            disk.keep("checkpoint", path, STATE_ROWS, reader(path, STATE_ROWS, "checkpoint"))
        if action in (1, 2) and len(free) > 60:
            kind = "kv" if action == 1 or missing else "checkpoint"
            num_rows = max(missing, 1) if kind == "kv" else STATE_ROWS
            rows = np.array([free.pop() for _ in range(num_rows)], np.int32)
            disk.put(kind, path, rows, reader(path, num_rows, kind))
            stored.append((rows, rows_of(path, kind)[-num_rows:]))
        if action in (3, 4) and stored:
            rows, data = stored.pop(int(choose.integers(len(stored))))
            if action == 3:
                names = disk.stage(rows)
                disk.wait(names, 10)
                assert disk.is_staged(names) or len(names) > 1
                assert np.array_equal(taken(disk, rows), data)
            else:
                disk.forget(rows)
            free += rows.tolist()
        if step % 50 == 49:
            before = dict(disk.prefixes.used)
            disk.close()
            disk = open_disk(tmp_path)
            assert set(before) <= set(disk.prefixes.used), "what was kept is found"
            for number in list(disk.prefixes.used):
                path = disk.prefixes.path(number)
                kind = "checkpoint" if isinstance(disk.prefixes.used[number], State) else "kv"
                pieces = disk.keep(kind, path, 1, lambda *_: pytest.fail("it was kept already"))
                rows = np.arange(sum(piece.num_tokens for piece in pieces), dtype=np.int32)
                disk.bind(rows, pieces)
                assert np.array_equal(taken(disk, rows), rows_of(path, kind)[-len(rows) :])
            stored, free = [], list(range(NUM_ROWS))
    disk.close()


def test_what_no_row_points_into_makes_room_the_oldest_first(tmp_path):
    disk = open_disk(tmp_path, max_bytes=1 << 16)
    paths = [(None, np.full(200, number, np.int32)) for number in range(16)]
    pinned = np.arange(200, dtype=np.int32)
    disk.put("kv", paths[0], pinned, reader(paths[0], 200))
    for path in paths[1:]:
        disk.keep("kv", path, 200, reader(path, 200))
        disk.touch(*paths[1])
    found = [bool(disk.prefixes.find(*path)) for path in paths]
    assert found[0] and found[1] and found[15], "pinned, used, newest"
    assert not all(found) and disk.num_skipped == 0
    assert np.array_equal(taken(disk, pinned), rows_of(paths[0]))
    disk.close()


def test_a_disk_that_takes_no_more_is_no_disk(tmp_path, monkeypatch):
    disk = open_disk(tmp_path)
    path = (None, np.arange(30, dtype=np.int32))

    def full(*_):
        raise StoreFull("no space")

    monkeypatch.setattr(disk._store, "append", full)
    rows = np.arange(30, dtype=np.int32)
    disk.put("kv", path, rows, reader(path, 30))
    disk.flush()
    assert taken(disk, rows) is None and not len(disk.prefixes) and disk.num_bytes == 0
    assert disk.keep("kv", path, 30, reader(path, 30)) == []
    disk.close()


def test_a_damaged_record_is_not_read_and_takes_what_hangs_on_it_along(tmp_path):
    disk = open_disk(tmp_path)
    path = (None, np.arange(30, dtype=np.int32))
    first = (None, path[1][:20])
    disk.keep("kv", first, 20, reader(first, 20))
    rows = np.arange(10, dtype=np.int32)
    disk.put("kv", path, rows, reader(path, 10))
    disk.flush()
    for file in tmp_path.glob(f"*{SUFFIX}"):
        raw = bytearray(file.read_bytes())
        place = raw.index(rows_of(first)[7].tobytes())
        raw[place] ^= 1
        file.write_bytes(raw)
    upper = np.arange(50, 70, dtype=np.int32)
    disk.bind(upper, covering(disk.prefixes.find(*first), 0, 20))
    assert taken(disk, upper) is None and taken(disk, rows) is None and not len(disk.prefixes)
    disk.close()


def test_a_run_hangs_where_its_parent_leaves_it():
    prefixes = Prefixes()
    upper = Run(0, 0, np.array([1, 2, 3, 4], np.int32), "n")
    assert prefixes.add(1, upper) and not prefixes.add(2, upper)
    assert not prefixes.add(2, Run(1, 2, np.array([3], np.int32), "n")), "the run itself goes on so"
    assert not prefixes.add(2, Run(1, 5, np.array([3], np.int32), "n")), "past its end"
    assert not prefixes.add(2, Run(1, 2, np.array([9], np.int32), "m")), "another namespace"
    assert prefixes.add(2, Run(1, 2, np.array([9, 8], np.int32), "n"))
    assert prefixes.add(3, State(2, 4)) and not prefixes.add(4, State(2, 2))
    path = "n", np.array([1, 2, 9, 8, 7], np.int32)
    pieces = prefixes.find(*path)
    assert pieces == [(1, 0, 2), (2, 0, 2)] and prefixes.state(pieces, 4) == 3
    assert covering(pieces, 1, 3) == [(1, 1, 1), (2, 0, 1)]
    assert prefixes.path(3)[1].tolist() == [1, 2, 9, 8] and prefixes.below(1) == [1, 2, 3]
    assert list(prefixes.used) == [3, 2, 1] and prefixes.is_leaf(3) and not prefixes.is_leaf(2)


def test_a_folder_that_may_take_less_than_before_is_cut_down_at_the_start(tmp_path):
    disk = open_disk(tmp_path, max_bytes=1 << 18)
    for number in range(40):
        path = (None, np.full(200, number, np.int32))
        disk.keep("kv", path, 200, reader(path, 200))
    disk.close()
    disk = open_disk(tmp_path, max_bytes=1 << 16)
    disk.flush()
    assert sum(file.stat().st_size for file in tmp_path.glob(f"*{SUFFIX}")) <= 1 << 16
    newest = (None, np.full(200, 39, np.int32))
    assert disk.prefixes.find(*newest) and not disk.prefixes.find(None, np.zeros(200, np.int32))
    rows = np.arange(200, dtype=np.int32)
    disk.put("kv", newest, rows, lambda *_: pytest.fail("it was kept"))
    assert np.array_equal(taken(disk, rows), rows_of(newest))
    disk.close()
