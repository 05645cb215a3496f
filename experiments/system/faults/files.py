"""Snapshots on a full disk, and snapshots that were damaged."""

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
    """``free + cached + held == total``, and nothing is held."""
    cache.check(held_tokens=0, held_slots=0)


def full_disk(folder: Path) -> None:
    """The file that was there before stays, nothing lies beside it, and the cache is as it was."""
    path, cache = folder / "snapshot", make_cache(1, filled=True)
    save_snapshot(cache, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, hard))
    try:
        save_snapshot(cache, path)
        raise AssertionError("the disk was not full")
    except OSError:
        pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(before) > LIMIT_BYTES and path.read_bytes() == before
    assert [file.name for file in folder.iterdir()] == ["snapshot"]
    _adds_up(cache)
    load_snapshot(make_cache(1, filled=False), path)


def damaged(folder: Path, num_files: int = 200) -> int:
    """Cut, or with a byte changed: each is refused and the cache as it was, or it is loaded and
    sound. How many were refused."""
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
