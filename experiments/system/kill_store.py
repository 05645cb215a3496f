"""Kill the writer of a disk store at random moments, and check the store after each kill.

A child writes records as fast as it can, drops some, and reports each action. The child is killed
(SIGKILL) at a random moment, two hundred times on the same folder. The folder is so small that
records are removed all the time.

After each kill the store is opened. The result counts refused starts, records with a wrong byte,
and records that the child had reported as written and that are missing.

    python -m experiments.system.kill_store --kills 200
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from engine.plugins.tiers.fingerprint import StoreError
from engine.plugins.tiers.records import RecordStore, record_bytes
from experiments.provenance import RESULTS, write_json_lines

FIELDS = {"writer": "experiments.system.kill_store"}
MAX_BYTES, MAX_PAYLOAD_BYTES = 1 << 24, 1 << 18


def payload_of(number: int) -> bytes:
    """Return the payload of a record: random bytes of a random length up to 256 KiB."""
    random_bytes = np.random.default_rng(number)
    return random_bytes.bytes(int(random_bytes.integers(0, MAX_PAYLOAD_BYTES)))


def write_until_killed(folder: Path, seed: int) -> None:
    """Write and drop records, and print a line for each record written (``+``) or dropped
    (``-``)."""
    store = RecordStore.open(folder, FIELDS, MAX_BYTES)
    choose = random.Random(seed)
    living = [record.id for record in store.scan()]
    print("open", flush=True)
    room = record_bytes(20, MAX_PAYLOAD_BYTES)
    while True:
        while store.num_bytes + room > MAX_BYTES or (living and choose.random() < 0.3):
            gone = living.pop(choose.randrange(len(living)))
            print("-", gone, flush=True)
            store.remove(gone)
        number = store.next_id
        store.write(number, 1, str(number).encode(), payload_of(number))
        living.append(number)
        print("+", number, flush=True)


def kill_once(folder: Path, seed: int, delay_s: float) -> tuple[set[int], set[int]]:
    """Start a child and kill it. Returns (records reported as written and not dropped, records
    reported as dropped)."""
    command = [sys.executable, "-m", "experiments.system.kill_store", "--child", str(folder)]
    child = subprocess.Popen([*command, "--seed", str(seed)], stdout=subprocess.PIPE, text=True)
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
    store = RecordStore.open(folder, FIELDS, MAX_BYTES)
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


def measure(kills: int, seed: int, most_s: float) -> dict[str, float]:
    """Kill a writer ``kills`` times, each after at most ``most_s`` seconds. Returns the totals."""
    choose = random.Random(seed)
    totals = {"kills": kills, "refused": 0, "wrong": 0, "lost": 0, "records": 0}
    with tempfile.TemporaryDirectory() as name:
        folder, expected = Path(name), set[int]()
        for number in range(kills):
            written, dropped = kill_once(folder, seed + number, choose.random() * most_s)
            expected = (expected | written) - dropped
            try:
                wrong, lost, found = count_wrong(folder, expected)
            except StoreError:
                totals["refused"] += 1
                continue
            totals["wrong"] += wrong
            totals["lost"] += lost
            totals["records"] += len(found)
            expected = found
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most-s", type=float, default=0.2, help="maximum life of a writer")
    parser.add_argument("--out", type=Path, default=RESULTS / "kill_store.jsonl")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        write_until_killed(arguments.child, arguments.seed)
    totals = measure(arguments.kills, arguments.seed, arguments.most_s)
    settings = {name: getattr(arguments, name) for name in ("kills", "seed", "most_s")}
    write_json_lines(arguments.out, [totals], settings)
    print(json.dumps(totals))


if __name__ == "__main__":
    main()
