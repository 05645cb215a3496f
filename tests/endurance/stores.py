"""Kills of the writer of a disk store at random moments, with a check of the store after each.

A child writes records as fast as it can, drops some, and reports each action. It is killed
(SIGKILL) at a random moment, again and again on the same folder. The folder is so small that
records are removed all the time. After each kill the store must open, every record must be whole,
and no record that the child had reported as written may be missing.
"""

from __future__ import annotations

import itertools
import multiprocessing
import random
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from engine.plugins.tiers.records import RecordStore, record_bytes, record_name

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload([__name__])
"""Children are forked from a process that has imported this module once."""
FIELDS = {"writer": "tests.endurance.stores"}
MAX_BYTES, MAX_PAYLOAD_BYTES = 1 << 24, 1 << 18


def payload_of(number: int) -> bytes:
    """Return the payload of a record: random bytes of a random length up to 256 KiB."""
    random_bytes = np.random.default_rng(number)
    return random_bytes.bytes(int(random_bytes.integers(0, MAX_PAYLOAD_BYTES)))


def write_until_killed(folder: Path, seed: int, reports: Connection) -> None:
    """Write and drop records, and report each record written (positive) or dropped (negative)."""
    store = RecordStore(folder).open(FIELDS)
    choose = random.Random(seed)
    sizes = {
        record.id: record_bytes(len(record.meta), record.payload_bytes) for record in store.scan()
    }
    reports.send(0)
    room = record_bytes(20, MAX_PAYLOAD_BYTES)
    for number in itertools.count(store.next_id):
        while sum(sizes.values()) + room > MAX_BYTES or (sizes and choose.random() < 0.3):
            gone = choose.choice(list(sizes))
            reports.send(-gone)
            store.remove_file(record_name(gone))
            del sizes[gone]
        meta, payload = str(number).encode(), payload_of(number)
        store.write(number, meta, payload)
        sizes[number] = record_bytes(len(meta), len(payload))
        reports.send(number)


def kill_once(folder: Path, seed: int, delay_s: float) -> tuple[set[int], set[int]]:
    """Start a child and kill it. Returns (records reported as written and not dropped, records
    reported as dropped)."""
    reports, theirs = FORKSERVER.Pipe(duplex=False)
    child = FORKSERVER.Process(target=write_until_killed, args=(folder, seed, theirs))
    child.start()
    theirs.close()
    assert reports.recv() == 0, "the store refused to open in the child"
    time.sleep(delay_s)
    child.kill()
    found: set[int] = set()
    with suppress(EOFError, OSError):  # OSError: the last report was not written whole.
        while True:
            found.add(reports.recv())
    child.join()
    dropped = {-number for number in found if number < 0}
    return {number for number in found if number > 0} - dropped, dropped


def count_wrong(folder: Path, expected: set[int]) -> tuple[int, int, set[int]]:
    """Return (number of wrong records, number of lost records, found records) after a kill."""
    store = RecordStore(folder).open(FIELDS)
    records = list(store.scan())
    wrong, found = 0, {record.id for record in records}
    for record in records:
        out = bytearray(record.payload_bytes)
        is_correct = store.read(record.id, memoryview(out)) and out == payload_of(record.id)
        wrong += not (is_correct and record.meta == str(record.id).encode())
    on_disk = sum(path.stat().st_blocks * 512 for path in folder.glob("*.record"))
    assert on_disk <= MAX_BYTES, "the store exceeds its maximum size"
    assert not list(folder.glob("*.part")), "an unfinished file was left"
    store.close()
    return wrong, len(expected - found), found


def run(seed: int, num_kills: int) -> dict[str, int]:
    """Kill a writer ``num_kills`` times, each after at most 0.2 s. Returns the found records."""
    choose, num_records, expected = random.Random(seed), 0, set[int]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(seed, seed + num_kills):
            written, dropped = kill_once(folder, number, choose.random() * 0.2)
            expected = (expected | written) - dropped
            num_wrong, num_lost, expected = count_wrong(folder, expected)
            assert (num_wrong, num_lost) == (0, 0), f"kill {number}: {num_wrong=} {num_lost=}"
            num_records += len(expected)
    return {"kills": num_kills, "records": num_records}
