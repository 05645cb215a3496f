"""A digest of large files, computed once: as long as none of them was touched since, it is what it
was.

The file ``weights.json`` of a folder: ``{"digest": text, "files": [[path, bytes, mtime, ctime,
inode], ...]}``, times in nanoseconds.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from engine.store.whole_file import write_whole

NAME, PATTERN = "weights.json", "*.safetensors"
STARTED_NS = time.time_ns()
CLOCK_NS = 2_000_000_000
"""File systems' clocks may be behind by so much."""

Files = list[list[str | int]]


def recall(folder: Path, files_dir: Path) -> str | None:
    """The digest that ``remember`` was given of the files in ``files_dir``; None: it was given
    none, or one of them may be another now. O(files)."""
    try:
        known = json.loads((folder / NAME).read_text(encoding="utf-8"))
        digest = known["digest"] if known["files"] == _files(files_dir) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return digest if isinstance(digest, str) else None


def remember(folder: Path, files_dir: Path, digest: str) -> None:
    """``digest``, made by this process, is of the files in ``files_dir``. Nothing is written where
    it is known, where one of them changed while this process ran, or ``folder`` takes nothing."""
    try:
        files = _files(files_dir)
        is_old = all(int(when) < STARTED_NS - CLOCK_NS for file in files for when in file[2:4])
        if is_old and recall(folder, files_dir) != digest:
            known = {"digest": digest, "files": files}
            write_whole(folder / NAME, json.dumps(known).encode())
    except OSError:
        pass


def _files(files_dir: Path) -> Files:
    found: Files = []
    for path in sorted(files_dir.resolve().glob(PATTERN)):
        stat = path.stat()
        times = stat.st_mtime_ns, stat.st_ctime_ns
        found.append([str(path), stat.st_size, *times, stat.st_ino])
    return found
