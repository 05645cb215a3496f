"""Sums and wholes of what processes of one machine compute, through memory that they share.

Each process has one ``Exchange`` on the same bytes, and all of them call the same functions in the
same order. Native calls like others, so a recorded step has its exchanges in it. One that fails
leaves its output as it is, and all after it return at once: ``failure`` says so when the step is
done.
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
"""Of one buffer: what is larger is exchanged in several rounds, and stays in a core's own cache."""
LINE = np.dtype([("descriptor", "i4"), ("events", "i2"), ("revents", "i2")])
STATE = np.dtype(
    [
        *[("memory", "i8"), ("lines", "i8"), ("num_lines", "i8"), ("number", "i8")],
        *[("count", "i8"), ("capacity", "i8"), ("spin_ns", "i8"), ("timeout_ns", "i8")],
        *[("failure", "i8"), ("whose", "i8"), ("rounds", "i8"), ("bytes", "i8")],
        *[("total_ns", "i8"), ("round", "i8")],
    ]
)
"""As ``exchange.cpp`` has both."""
FAILURES = {1: "did not answer in time", 2: "did not answer, and a process has gone"}


def is_available() -> bool:
    """Whether there is a compiled library with these functions."""
    return has("exchange_join")


def shared_bytes(count: int) -> int:
    """Of the memory that ``count`` processes need, zeros at first."""
    return count * (POST_BYTES + 2 * CAPACITY_BYTES)


class Totals(NamedTuple):
    """Of a process so far."""

    rounds: int
    bytes: int
    """That it gave."""
    seconds: float
    """In all exchanges, waiting for others included."""


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
        """``lines``: descriptors of sockets whose other ends close when a process ends: whoever
        waits looks at them. ``spin_s``: how long it asks again and again before it sleeps."""
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
        """Of one exchange, from now on."""
        self._state[0]["timeout_ns"] = round(seconds * 1e9)

    def can_sum(self, x: torch.Tensor) -> bool:
        return x.dtype in DTYPES and x.is_contiguous()

    def sum(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """``x`` of all, added in their order in float32 and rounded once, into ``out`` of the same
        shape, both contiguous."""
        function(f"exchange_sum_{DTYPES[x.dtype]}", "pppit")(
            self._at, x.data_ptr(), out.data_ptr(), x.numel(), torch.get_num_threads()
        )

    def join(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """``x [T, columns]`` of each into ``out [T, C]``, both contiguous: process r has the
        columns from ``r * C // count`` up to where the next one's begin."""
        function("exchange_join", "pppiii")(
            self._at, address(x), address(out), out.shape[0], out.shape[1], out.itemsize
        )

    @property
    def failure(self) -> str | None:
        """What went wrong: then nothing can be exchanged any more."""
        state = self._state[0]
        said = FAILURES.get(int(state["failure"]))
        return None if said is None else f"rank {state['whose']} {said}"

    @property
    def totals(self) -> Totals:
        state = self._state[0]
        return Totals(int(state["rounds"]), int(state["bytes"]), int(state["total_ns"]) / 1e9)
