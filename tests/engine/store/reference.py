"""Reference of a record store: a dictionary of all writes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ReferenceStore:
    """Records by id, in memory."""

    written: dict[int, tuple[int, bytes, bytes]] = field(default_factory=dict)
    """Kind, meta and payload of every record that was ever written."""
    living: set[int] = field(default_factory=set)

    def write(self, record_id: int, kind: int, meta: bytes, payload: bytes) -> None:
        assert record_id not in self.written, "an id was used twice"
        self.written[record_id] = kind, meta, payload
        self.living.add(record_id)

    def remove(self, record_id: int) -> None:
        self.living.discard(record_id)

    def restart(self, found: set[int], damaged: set[int]) -> None:
        """Compare with the ids ``found`` by a start, after damage to some files."""
        assert found <= self.living, "a removed or unknown record was found"
        assert self.living - damaged <= found, "a complete record was lost"
        self.living = set(found)
