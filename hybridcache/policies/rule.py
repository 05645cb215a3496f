"""What most placement rules share."""

from __future__ import annotations


class PrefillRule:
    """A rule that saves nothing in decode."""

    def decode_interval(self) -> int | None:
        return None
