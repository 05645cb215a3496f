"""Memory that malloc keeps although nobody uses it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

TRIM_S = 30
"""Between two times."""


def _trimmer() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None  # not glibc


_malloc_trim = _trimmer()


async def trim() -> None:
    """Give the system back every page that is free inside malloc's arenas: what lives long, between
    what was freed, keeps them else. Up to a millisecond for 100 MiB; nothing where there is no
    glibc."""
    if _malloc_trim is not None:
        _malloc_trim(0)
