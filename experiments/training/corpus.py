"""Sources that every Python ships, as training text: the standard library and its documentation
strings, under the PSF License (``LICENSE.txt`` of Python). One file in thirty is held out."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

EXCLUDED = ("site-packages", "dist-packages", "__pycache__", "/test/", "/tests/", "/idle_test/")
MOST_BYTES = 120_000
"""Maximum size of one file: a few generated tables have megabytes."""
HELD_OUT = 30


def sources(held_out: bool) -> Iterator[str]:
    """Texts of the standard library's modules, in an order that is the same on every machine with
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
        if len(text) <= MOST_BYTES:
            yield f"# {name}\n{text}<|endoftext|>"


def is_held_out(name: str) -> bool:
    """Whether a module is kept from training: by its name alone."""
    return int(_digest(name)[:8], 16) % HELD_OUT == 0


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
