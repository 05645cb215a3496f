"""Faults of snapshot files: a full disk, and damaged files."""

from __future__ import annotations

import random
import resource
from pathlib import Path

from experiments.system.attack.snapshots import make_cache
from hybridcache.api import PrefixCache
from hybridcache.export.snapshot import load_snapshot, save_snapshot

LIMIT_BYTES = 512
"""Bytes that the full disk still accepts."""


def _adds_up(cache: PrefixCache) -> None:
    """Check ``free + cached + held == total``, with nothing held."""
    cache.check(held_tokens=0, held_slots=0)


def full_disk(folder: Path) -> None:
    """Save a snapshot on a full disk. The earlier file, its folder and the cache must be
    unchanged."""
    path, cache = folder / "snapshot", make_cache(1, filled=True)
    save_snapshot(cache, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, hard))
    try:
        save_snapshot(cache, path)
        raise AssertionError("The snapshot was saved although the disk is full.")
    except OSError:
        pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(before) > LIMIT_BYTES and path.read_bytes() == before
    assert [file.name for file in folder.iterdir()] == ["snapshot"]
    _adds_up(cache)
    load_snapshot(make_cache(1, filled=False), path)


def damaged(folder: Path, num_files: int = 200) -> int:
    """Load files that are cut, or have one changed byte. Returns the number of refused files.

    A refused file must leave the cache unchanged. A loaded one must leave it sound.
    """
    path, draw, num_refused = folder / "damaged", random.Random(0), 0
    save_snapshot(make_cache(1, filled=True), path)
    whole = path.read_bytes()
    for number in range(num_files):
        data = bytearray(whole)
        if number % 2:
            del data[draw.randrange(len(data)) :]
        else:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        cache = make_cache(1, filled=False)
        try:
            load_snapshot(cache, path)
        except ValueError:
            num_refused += 1
            assert cache.cached_tokens == cache.num_checkpoints == 0
        _adds_up(cache)
    return num_refused
