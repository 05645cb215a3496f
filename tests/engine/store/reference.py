"""What a store must be, as plainly as it can be said: a list of what was written."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ReferenceStore:
    """Records by id, in memory."""

    written: dict[int, tuple[int, bytes, bytes]] = field(default_factory=dict)
    """All that were ever accepted: kind, meta, payload. An id may be given again only if nothing of
    its former record can be found."""
    living: set[int] = field(default_factory=set)

    def append(self, number: int, kind: int, meta: bytes, payload: bytes) -> None:
        self.written[number] = kind, meta, payload
        self.living.add(number)

    def drop(self, number: int) -> None:
        self.living.discard(number)

    def restart(self, found: set[int], whole: set[int]) -> None:
        """``found`` after a start; ``whole``: those that no damage touched."""
        assert found <= set(self.written), "a record that nobody wrote"
        assert self.living & whole <= found, "a whole record was lost"
        self.living = set(found)
