"""Training texts from the Python standard library.

They are under the PSF License (``LICENSE.txt`` of Python). One module in thirty is held out.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

EXCLUDED = ("site-packages", "dist-packages", "__pycache__", "/test/", "/tests/", "/idle_test/")
MAX_BYTES = 120_000
"""Maximum size of one file. A few generated tables have megabytes."""
HELD_OUT = 30
"""One module in this many is held out."""


def sources(held_out: bool) -> Iterator[str]:
    """Yield the texts of the standard library's modules, in the same order on every machine with
    the same Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not any(part in f"/{path.relative_to(root).as_posix()}" for part in EXCLUDED)
    )
    for name in sorted(paths, key=_digest):
        if is_held_out(name) != held_out:
            continue
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        if len(text) <= MAX_BYTES:
            yield f"# {name}\n{text}<|endoftext|>"


def is_held_out(name: str) -> bool:
    """Return True if a module is excluded from training. Depends only on its name."""
    return int(_digest(name)[:8], 16) % HELD_OUT == 0


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
