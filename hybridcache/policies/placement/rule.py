"""What most placement rules share."""

from __future__ import annotations

from hybridcache.policies.protocol import PlacementPolicy


class PrefillRule(PlacementPolicy):
    """A rule that saves nothing in decode."""

    def decode_interval(self) -> int | None:
        """None, whatever the prompt."""
        return None
