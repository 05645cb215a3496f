"""Formatting of bytes, counts, names and durations for people."""

from __future__ import annotations

from collections.abc import Sequence

GIB = 2**30


def format_bytes(num_bytes: float) -> str:
    """Format a size with a binary unit.

    >>> format_bytes(77266944), format_bytes(24576), format_bytes(40 * GIB), format_bytes(512)
    ('73.7 MiB', '24.0 KiB', '40.0 GiB', '512 B')
    """
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:.0f} B"


def format_count(count: float) -> str:
    """Format a count with ``B`` for 10^9 and ``M`` for 10^6.

    >>> format_count(79_674_391_296), format_count(6_900_000), format_count(81_472)
    ('79.7 B', '6.9 M', '81,472')
    """
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,.0f}"


def counted(number: int, noun: str) -> str:
    """Format a number with its noun, in the plural if needed.

    >>> counted(1, "thread"), counted(4096, "token")
    ('1 thread', '4,096 tokens')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def enumerated(names: Sequence[str], most: int = 8) -> str:
    """Format the first ``most`` names as a list.

    >>> enumerated(["a", "b", "c", "d"], most=2)
    'a, b and 2 more'
    """
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def format_seconds(duration_s: float) -> str:
    """Format a duration in seconds or milliseconds.

    >>> format_seconds(0.0123), format_seconds(4.56), format_seconds(0.00031)
    ('12.3 ms', '4.56 s', '0.31 ms')
    """
    if duration_s >= 1:
        return f"{duration_s:.2f} s"
    return f"{duration_s * 1e3:.{1 if duration_s >= 0.001 else 2}f} ms"
