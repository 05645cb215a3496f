"""A file that is there whole, or as it was before, whenever the process ends."""

from __future__ import annotations

import os
from pathlib import Path

PART = ".part"


def write_whole(path: Path, data: bytes) -> None:
    """``data`` becomes the file at ``path``. OSError: it can not be written; what was there stays,
    and nothing else is left."""
    part = path.with_suffix(PART)
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
