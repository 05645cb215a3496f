"""Kills of the writer of a disk store at random moments, with a check of the store after each.

A child writes records as fast as it can, drops some, and reports each action. It is killed
(SIGKILL) at a random moment, again and again on the same folder. The folder is so small that
records are removed all the time. After each kill the store must open, every record must be whole,
and no record that the child had reported as written may be missing.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from engine.plugins.tiers.records import RecordStore, record_bytes, record_name
from tests.selection import ROOT

FIELDS = {"writer": "tests.endurance.stores"}
MAX_BYTES, MAX_PAYLOAD_BYTES = 1 << 24, 1 << 18


def payload_of(number: int) -> bytes:
    """Return the payload of a record: random bytes of a random length up to 256 KiB."""
    random_bytes = np.random.default_rng(number)
    return random_bytes.bytes(int(random_bytes.integers(0, MAX_PAYLOAD_BYTES)))


def write_until_killed(folder: Path, seed: int) -> None:
    """Write and drop records, and print a line for each record written (``+``) or dropped
    (``-``)."""
    store = RecordStore(folder).open(FIELDS)
    choose = random.Random(seed)
    sizes = {
        record.id: record_bytes(len(record.meta), record.payload_bytes) for record in store.scan()
    }
    print("open", flush=True)
    room = record_bytes(20, MAX_PAYLOAD_BYTES)
    for number in itertools.count(store.next_id):
        while sum(sizes.values()) + room > MAX_BYTES or (sizes and choose.random() < 0.3):
            gone = choose.choice(list(sizes))
            print("-", gone, flush=True)
            store.remove_file(record_name(gone))
            del sizes[gone]
        meta, payload = str(number).encode(), payload_of(number)
        store.write(number, meta, payload)
        sizes[number] = record_bytes(len(meta), len(payload))
        print("+", number, flush=True)


def kill_once(folder: Path, seed: int, delay_s: float) -> tuple[set[int], set[int]]:
    """Start a child and kill it. Returns (records reported as written and not dropped, records
    reported as dropped)."""
    command = [sys.executable, "-m", "tests.endurance.stores", str(folder), str(seed)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert child.stdout is not None
    assert child.stdout.readline() == "open\n", "the store refused to open in the child"
    time.sleep(delay_s)
    os.kill(child.pid, signal.SIGKILL)
    written: set[int] = set()
    dropped: set[int] = set()
    for line in child.stdout:
        if line.endswith("\n"):
            sign, number = line.split()
            (written if sign == "+" else dropped).add(int(number))
    child.stdout.close()
    child.wait()
    return written - dropped, dropped


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


if __name__ == "__main__":
    write_until_killed(Path(sys.argv[1]), int(sys.argv[2]))
