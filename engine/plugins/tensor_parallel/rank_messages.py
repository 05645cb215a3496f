"""Messages between rank 0 and another rank on the same machine, over a pair of sockets."""

from __future__ import annotations

import pickle
import select
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.config import EngineConfig
from engine.schedule.batch import Batch


@dataclass(frozen=True, slots=True)
class Start:
    """First command to a rank."""

    number: int
    count: int
    config: EngineConfig
    meeting: str
    """Path of the file through which the ranks connect."""
    memory: int | None
    """Descriptor of the shared memory for exchanges, or None to use ``torch.distributed``."""
    num_threads: int
    """Number of threads on a CPU."""


@dataclass(frozen=True, slots=True)
class Forward:
    """Compute a batch; see ``Runner.forward``."""

    batch: Batch
    num_drawn: int | None
    """Number of tokens drawn by the previous step, which rank 0 distributes, or None if none are
    needed."""


@dataclass(frozen=True, slots=True)
class Commit:
    """See ``Runner.commit``."""

    batch: Batch
    taken: Sequence[int]


RankEvent = Literal["here", "ready", "refused", "lost", "failed"]
"""``here``: the process runs and can connect to the others; ``ready``: its part of the model is
loaded. With the others it ends: ``refused``: the model is not supported in this configuration;
``lost``: another rank did not answer; ``failed``: there was another error."""


@dataclass(frozen=True, slots=True)
class RankReport:
    """Message of a rank to rank 0."""

    event: RankEvent
    sentence: str = ""
    """Reason why the process ends."""

    @property
    def is_last(self) -> bool:
        """True if the process ends."""
        return self.event not in ("here", "ready")


class Line:
    """One end of the connection. Both processes belong to one engine, so messages are trusted."""

    def __init__(self, end: socket.socket, timeout_s: float | None = None) -> None:
        """``timeout_s``: limit for sending or receiving a message, or None for no limit."""
        self._socket = end
        end.settimeout(timeout_s)

    def send(self, message: object) -> None:
        """Send ``message``. Raises OSError if the other end has gone, or TimeoutError if it does
        not receive."""
        data = pickle.dumps(message)
        self._socket.sendall(len(data).to_bytes(8, "little") + data)

    def receive(self, spin_s: float = 0.0) -> Any:
        """Return the next message. Raises EOFError if the other end has gone, and TimeoutError if
        no message arrived.

        The socket is polled for ``spin_s`` before the thread sleeps, because waking up costs more
        than a small step.
        """
        if spin_s:
            end, poll = time.perf_counter() + spin_s, select.poll()
            poll.register(self._socket, select.POLLIN)
            while not poll.poll(0) and time.perf_counter() < end:
                pass
        size = int.from_bytes(self._read(8), "little")
        return pickle.loads(self._read(size))

    def set_timeout(self, timeout_s: float | None) -> None:
        """Set the limit for further messages."""
        self._socket.settimeout(timeout_s)

    def _read(self, count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            try:
                part = self._socket.recv(count - len(parts))
            except ConnectionError:
                part = b""
            if not part:
                raise EOFError("the other end has gone")
            parts += part
        return bytes(parts)

    def fileno(self) -> int:
        """Return the descriptor of the socket, which closes when the other end does."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()
