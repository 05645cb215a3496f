"""What went over the wire, counted."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass, field


@dataclass(slots=True)
class TransferCounts:
    """Of one engine, since its start. Any thread may add."""

    prefixes: int = 0
    """That went over whole."""
    failed: int = 0
    """That did not: their requests computed here, or their askers there."""
    tokens: int = 0
    """Whose KV went over."""
    needed_bytes: int = 0
    """KV and states of the prefixes that went over whole."""
    wire_bytes: int = 0
    """Everything sent and received: these, messages, and what was in vain."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **counts: int) -> None:
        """Add to the counts named."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def as_dict(self) -> dict[str, int]:
        """By name."""
        names = [one.name for one in dataclasses.fields(self) if one.name[0] != "_"]
        with self._lock:
            return {name: getattr(self, name) for name in names}
