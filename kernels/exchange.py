"""Sums and concatenations across processes of one machine, through shared memory.

Each process has one ``Exchange`` on the same bytes, and all processes call the same functions in
the same order. Exchanges are native calls, so a recorded step contains them. A failed exchange
leaves its output unchanged, and all later ones return at once. Check ``failure`` after the step.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from kernels.native import DTYPES, address, function, has

POST_BYTES = 128
CAPACITY_BYTES = 256 << 10
"""Size of one buffer. Larger data takes several rounds, which stay in a core's cache."""
LINE = np.dtype([("descriptor", "i4"), ("events", "i2"), ("revents", "i2")])
STATE = np.dtype(
    [
        *[("memory", "i8"), ("lines", "i8"), ("num_lines", "i8"), ("number", "i8")],
        *[("count", "i8"), ("capacity", "i8"), ("spin_ns", "i8"), ("timeout_ns", "i8")],
        *[("failure", "i8"), ("whose", "i8"), ("rounds", "i8"), ("bytes", "i8")],
        *[("total_ns", "i8"), ("round", "i8")],
    ]
)
"""Layouts of both structures in ``exchange.cpp``."""
FAILURES = {1: "did not answer in time", 2: "did not answer, and a process has gone"}


def is_available() -> bool:
    """Return True if the compiled library has these functions."""
    return has("exchange_join")


def shared_bytes(count: int) -> int:
    """Return the bytes of shared memory for ``count`` processes. The memory must be zeroed
    first."""
    return count * (POST_BYTES + 2 * CAPACITY_BYTES)


class Totals(NamedTuple):
    """Counters of one process."""

    rounds: int
    bytes: int
    """Bytes sent."""
    seconds: float
    """Time in all exchanges, including waits."""


class Exchange:
    """Process ``number`` of ``count``, on ``memory`` of ``shared_bytes(count)``."""

    def __init__(
        self,
        memory: mmap.mmap,
        number: int,
        count: int,
        *,
        lines: Sequence[int] = (),
        timeout_s: float,
        spin_s: float = 0.0,
    ) -> None:
        """Join the exchange.

        Args:
            memory: Shared memory of ``shared_bytes(count)``.
            number: Index of this process.
            count: Number of processes.
            lines: Descriptors of sockets that close when another process ends. They are polled
                during waits.
            timeout_s: Time limit of one exchange.
            spin_s: Time of busy waiting before sleeping.
        """
        self._bytes = np.frombuffer(memory, dtype=np.uint8)
        self._lines = np.zeros(len(lines), dtype=LINE)
        self._lines["descriptor"] = lines
        self._state = np.zeros(1, dtype=STATE)
        state = self._state[0]
        state["memory"], state["lines"] = self._bytes.ctypes.data, self._lines.ctypes.data
        state["num_lines"], state["number"], state["count"] = len(lines), number, count
        state["capacity"], state["spin_ns"] = CAPACITY_BYTES, round(spin_s * 1e9)
        self._count, self._at = count, self._state.ctypes.data
        self.set_timeout(timeout_s)

    def set_timeout(self, seconds: float) -> None:
        """Change the time limit of one exchange."""
        self._state[0]["timeout_ns"] = round(seconds * 1e9)

    def can_sum(self, x: torch.Tensor) -> bool:
        return x.dtype in DTYPES and x.is_contiguous()

    def sum(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Sum ``x`` over all processes into ``out``, in float32 and in process order, rounded once.

        Both are contiguous and have the same shape.
        """
        function(f"exchange_sum_{DTYPES[x.dtype]}", "pppit")(
            self._at, x.data_ptr(), out.data_ptr(), x.numel(), torch.get_num_threads()
        )

    def join(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Concatenate ``x [T, columns]`` of all processes into ``out [T, C]``, both contiguous.

        Process r has the columns from ``r * C // count`` to ``(r + 1) * C // count``.
        """
        function("exchange_join", "pppiii")(
            self._at, address(x), address(out), out.shape[0], out.shape[1], out.itemsize
        )

    @property
    def failure(self) -> str | None:
        """Description of the failure, or None. After a failure no exchange is possible."""
        state = self._state[0]
        said = FAILURES.get(int(state["failure"]))
        return None if said is None else f"rank {state['whose']} {said}"

    @property
    def totals(self) -> Totals:
        state = self._state[0]
        return Totals(int(state["rounds"]), int(state["bytes"]), int(state["total_ns"]) / 1e9)
